"""Real weights: drafting changes no bit of greedy text or of its scores.

SmolLM2-135M in float32 on a CPU. The drafters are a script (the text itself,
spoilt at random) and prompt lookup; the reference is the null drafter at the
same block shape.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters import Lookup, Null, Scripted
from specjax.host import requests
from specjax.host import rows as rows_lib
from specjax.verify import Greedy

NEW, SIZE = 64, 96
_RUN, _ADMIT = loop.compiled()


@pytest.fixture(scope='module', name='model')
def _model(smollm2_path):
  return specjax.load(str(smollm2_path), dtype='float32', quiet=True)


TEXTS = (
    'The lamp burned whale oil, then paraffin. Copy: The lamp burned',
    'def area(radius):\n  return', 'Once upon a time there was a cat who',
    'Bread rises in the oven because the yeast')


def prompts(model, batch: int) -> list[tuple[int, ...]]:
  """Returns ragged prompts, the first with something to copy."""
  return [tuple(model.tokenizer.encode(t)) for t in TEXTS[:batch]]


def admitted(model, batch: int, width: int):
  """Returns the prefilled state. None of the drafters keeps a state."""
  options = specjax.Sampling(
      max_new_tokens=NEW, ignore_eos=True, log_probs=True)
  rows = [requests.Request(id=str(i), tokens=p, sampling=options, seed=i)
          for i, p in enumerate(prompts(model, batch))]

  def context(slots):
    built = rows_lib.build_context(
        slots, size=SIZE, vocab_size=model.vocab_size, eos=(),
        what=rows_lib.stages(rows, 1))
    script = np.zeros((batch, SIZE), np.int32)
    return jax.tree.map(
        jnp.array, built.replace(condition={'script': script}))

  engine = Engine(model.lm, Null(width), Greedy())
  state = jax.jit(loop.empty, static_argnums=0)(
      engine, context([None] * batch))
  return _ADMIT(engine, Models(target=model.params), state,
                jnp.ones((batch,), bool), context(rows), chunk=32)


def decode(model, drafter, state, script=None) -> dict:
  """Decodes from a copy of `state`; returns texts, scores and counts."""
  state = jax.tree.map(jnp.copy, state)
  if script is not None:
    state = state.replace(context=state.context.replace(
        condition={'script': jnp.array(script)}))
  state = _RUN(Engine(model.lm, drafter, Greedy()),
               Models(target=model.params), state, np.int32(NEW))
  assert bool(state.context.done.all())
  return jax.device_get({
      'tokens': state.context.tokens, 'length': state.context.length,
      'raw': state.context.log_probs['raw'].view(jnp.int32),
      'metrics': state.metrics})


@pytest.mark.weights
@pytest.mark.parametrize('width, batch', [(7, 4), (3, 1)])
def test_no_bit_changes(model, width, batch):
  state = admitted(model, batch, width)
  want = decode(model, Null(width), state)
  assert np.unique(want['tokens']).size > 20 * batch  # not one over and over
  keep = 0.4 ** (1.5 / width)  # so that the last draft is reached often
  for drafter in (Scripted(width, keep), Lookup(width, 3, 1)):
    got = decode(model, drafter, state, script=want['tokens'])
    for name in ('tokens', 'length', 'raw'):
      np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    counts = got['metrics']
    drafted, accepted = counts.drafted.sum(0), counts.accepted.sum(0)
    assert accepted.sum() > 0
    if isinstance(drafter, Scripted):
      reached = np.append(drafted[0], accepted[:-1])
      assert (accepted > 0).all() and (reached > accepted).all()
