"""`generate` on meshes of eight virtual devices: the same texts, sharded."""

import dataclasses
import functools
import re

import compilations
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import toy_text

from specjax import Sampling, generate
from specjax.drafters import Lookup
from specjax.host import decoder as decoder_lib
from specjax.host import tiny
from specjax.models import weights
from specjax.parallel import make_mesh, rules

CONFIG = tiny.config(vocab_size=264, num_heads=8, num_kv_heads=8)
# 61 + 3 drafts + 1: no other array has an axis of this size.
SIZE, SLOTS = 61, 65
LOOKUP = Lookup(3)
PROMPTS = [f'say {"ab" * i}' for i in range(20)]
OPTIONS = [Sampling(max_new_tokens=3 + i % 9, temperature=0.8 * (i % 2),
                    seed=i, stop=('q',), log_probs=True)
           for i in range(20)]


@functools.cache
def model(shape: tuple[int, int] | None):
  """Returns the same weights on a mesh, or on one device."""
  if shape is None:
    return tiny.model(vocab_size=264, num_heads=8, num_kv_heads=8)
  mesh, plain = make_mesh(shape), model(None)
  placed = rules.param_shardings(
      mesh, weights.logical_axes(CONFIG), weights.abstract(CONFIG))
  return dataclasses.replace(
      plain, mesh=mesh, params=rules.put(plain.params, placed))


class Recorder(decoder_lib.Decoder):
  """Remembers the last decoder."""

  last: decoder_lib.Decoder

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    Recorder.last = self


@pytest.fixture(autouse=True)
def _recorded(monkeypatch):
  monkeypatch.setattr('specjax.host.generate.Decoder', Recorder)


def decode(shape, batch_size: int, drafter=LOOKUP):
  """Returns the results and the decoder; checks that nothing recompiles."""
  target = model(shape)
  before = compilations.counts()
  results = generate(
      target, drafter, PROMPTS, OPTIONS, batch_size=batch_size,
      capacity=SIZE, verify='match', rounds_per_chunk=2)
  grown = compilations.counts() - before
  assert grown['jit(run)'] == grown['jit(admit)'] == 1
  return results, Recorder.last


@pytest.fixture(scope='module', name='plain')
def _plain():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('specjax.host.generate.Decoder', Recorder)
    return decode(None, 2)[0]


def has(leaf: jax.Array, mesh, *spec) -> bool:
  return leaf.sharding.is_equivalent_to(
      NamedSharding(mesh, P(*spec)), leaf.ndim)


def test_equal_rows_a_device_give_equal_bits(plain):
  results, decoder = decode((8, 1), 16)
  for one, other in zip(plain, results):
    assert one.tokens == other.tokens and one.text == other.text
    assert one.finish_reason == other.finish_reason
    assert one.rounds == other.rounds
    for name, values in one.log_probs.items():
      np.testing.assert_array_equal(values, other.log_probs[name])
  mesh = make_mesh((8, 1))
  assert has(decoder.state.target['cache'][0]['k'], mesh, 'data')
  assert has(decoder.state.context.tokens, mesh, 'data')


def test_rows_and_heads_on_a_mesh_with_a_drafter_off_it(plain):
  # Matched texts do not depend on the drafter; this one has weights of its
  # own, made without a thought of the mesh.
  results, decoder = decode((4, 2), 8, toy_text.model(1))
  check_equal(plain, results)
  mesh = make_mesh((4, 2))
  layer, state = decoder.params.target['layer_1'], decoder.state
  assert has(layer['mlp']['down'], mesh, 'model')
  assert has(layer['attention']['qkv'], mesh, None, 'model')
  assert has(decoder.params.target['embedding'], mesh, 'model')
  for leaf in jax.tree.leaves(state.target['cache']):
    assert has(leaf, mesh, 'data', 'model')
    assert leaf.addressable_shards[0].data.shape == (2, 4, SLOTS + 2, 8)
  for leaf in (state.context.tokens, state.context.keys, state.context.done,
               state.metrics.histogram, state.drafter['model']['cache']):
    assert has(leaf, mesh, 'data'), leaf
  for leaf in jax.tree.leaves(decoder.params.drafter):
    assert has(leaf, mesh)  # once, not at every call
  check_collectives(decoder)


def test_heads_on_eight_devices(plain):
  results, decoder = decode((1, 8), 8)
  check_equal(plain, results)
  for leaf in jax.tree.leaves(decoder.state.target['cache']):
    assert has(leaf, make_mesh((1, 8)), None, 'model')
    assert leaf.addressable_shards[0].data.shape == (8, 1, SLOTS, 8)


def check_equal(plain, results) -> None:
  """Equal texts; scores up to the order of f32 sums of 64 terms."""
  for one, other in zip(plain, results):
    assert one.tokens == other.tokens and one.text == other.text
    np.testing.assert_allclose(
        one.log_probs['raw'], other.log_probs['raw'], atol=1e-4)


def check_collectives(decoder) -> None:
  """No collective of the compiled rounds moves keys or values."""
  text = decoder._run.lower(
      decoder.engine, decoder.params, decoder.state,
      np.int32(1)).compile().as_text()
  found = re.findall(
      r'= (.*) (?:all-gather|all-to-all|collective-permute|all-reduce)'
      r'(?:-start)?\(', text)
  assert found  # heads are summed over, at least
  sizes = {int(n) for shape in found for dims in re.findall(
      r'\[([\d,]+)\]', shape) for n in dims.split(',')}
  assert SLOTS + 2 not in sizes
