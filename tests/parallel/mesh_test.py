"""Meshes and sharding tables."""

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from specjax.core import loop
from specjax.core.round import Engine
from specjax.drafters import ChainLM
from specjax.host import memory, tiny
from specjax.host.requests import Request
from specjax.host.rows import build_context, stages
from specjax.io.options import Sampling
from specjax.models import weights
from specjax.models.causal import CausalLM
from specjax.parallel import make_mesh, rules
from specjax.verify import Match

CONFIG = tiny.config(vocab_size=264, num_kv_heads=4, num_heads=8)


def test_axes_are_auto_and_take_the_devices_in_order():
  mesh = make_mesh((4, 2))
  assert mesh.axis_names == ('data', 'model')
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert mesh.devices.flatten().tolist() == jax.devices()
  assert dict(make_mesh().shape) == {'data': 8, 'model': 1}
  assert dict(make_mesh((-1, 4)).shape) == {'data': 2, 'model': 4}
  assert dict(make_mesh((2, -1)).shape) == {'data': 2, 'model': 4}
  assert make_mesh((1, 2)).size == 2  # a part of the devices


@pytest.mark.parametrize(
    'shape', [(3, 4), (16, 1), (0, 8), (-1, -1), (8, -2), (-1, 16), (8,),
              (2, 2, 2), (4.0, 2), ('a', 1)])
def test_shapes_that_cannot_be(shape):
  with pytest.raises(ValueError, match='mesh.*(8 devices|two integers)'):
    make_mesh(shape)


def test_parameters_follow_their_logical_axes():
  axes = weights.logical_axes(CONFIG)
  def specs(shape):
    placed = rules.param_shardings(
        make_mesh(shape), axes, weights.abstract(CONFIG))
    return jax.tree.map(lambda s: s.spec, placed)
  layer = specs((2, 4))['layer_0']
  assert specs((2, 4))['embedding'] == P('model', None)
  assert layer['attention']['qkv'] == P(None, 'model', None, None)
  assert layer['attention']['out'] == P('model', None, None, None)
  assert layer['mlp']['gate_up'] == P(None, None, 'model')
  assert layer['mlp']['down'] == P('model', None)
  assert layer['mlp_norm']['scale'] == P(None)
  # Four key-value heads do not divide among eight: replicated.
  assert specs((1, 8))['layer_0']['attention']['qkv'] == P(*[None] * 4)


def state_shapes(batch: int):
  """Returns the shapes of a state with two caches."""
  lm = CausalLM(CONFIG)
  engine = Engine(lm, ChainLM(num_speculative_tokens=3, model=lm), Match())
  request = Request(id='0', tokens=(1,), sampling=Sampling(
      temperature=1.0, logit_bias={1: 1.0}, log_probs=True))
  context = build_context(
      [request] * batch, size=32, vocab_size=264, eos=(),
      what=stages([request], 0))
  return jax.eval_shape(lambda c: loop.empty(engine, c), context)


def test_states_split_by_rows_and_heads():
  shapes = state_shapes(8)
  got = rules.state_shardings(make_mesh((4, 2)), shapes, 8)
  for cache in (got.target['cache'], got.drafter['model']['cache']):
    for leaf in jax.tree.leaves(cache):
      assert leaf.spec == P('data', 'model', None, None)
  assert got.context.tokens.spec == P('data', None)
  assert got.context.keys.spec == P('data')
  assert got.context.options.bias.spec == P('data', None)
  # Three rows do not divide among four: replicated, heads are not.
  few = rules.state_shardings(make_mesh((4, 2)), state_shapes(3), 3)
  assert few.target['cache'][0]['k'].spec == P(None, 'model', None, None)
  assert few.context.tokens.spec == P(None, None)


def test_bytes_of_a_device():
  shapes = state_shapes(8)
  placed = rules.state_shardings(make_mesh((4, 2)), shapes, 8)
  whole = memory.tree_bytes(shapes.target)
  assert whole == 2 * 2 * 8 * 4 * 36 * 8 * 4
  assert memory.tree_bytes(shapes.target, placed.target) == whole / 8
  # Rows are all on one axis: a mesh without `model` keeps parameters whole.
  mesh = make_mesh((8, 1))
  params = weights.abstract(CONFIG)
  where = rules.param_shardings(mesh, weights.logical_axes(CONFIG), params)
  assert memory.tree_bytes(params, where) == memory.tree_bytes(params)


def test_arrays_there_and_back():
  mesh = make_mesh((4, 2))
  tree = {'a': np.arange(16).reshape(8, 2), 'b': np.float32(3)}
  placed = rules.put(tree, rules.state_shardings(mesh, tree, 8))
  assert placed['a'].sharding.spec == P('data', None)
  np.testing.assert_array_equal(rules.fetch(placed)['a'], tree['a'])
