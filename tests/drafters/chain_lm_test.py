"""The small LM as drafter: what it says it drew is what it drew."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import reference as numpy_law
from specjax.certificates import toys
from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import IID, POINT, Models
from specjax.drafters import ChainLM, Null
from specjax.verify import Block, Greedy, Match, Speculative

VOCAB, NUM, ROWS = 6, 4, 64
LM = toys.ToyLM(VOCAB)
SMALL = ChainLM(num_speculative_tokens=NUM, model=LM)
TARGET, OTHER = toys.toy_params(0, VOCAB), toys.toy_params(1, VOCAB)
PROMPTS = [[1], [2, 0, 5], [3, 3], [4, 1, 0, 2, 5]] * (ROWS // 4)


RULES = (Speculative(), Block(), Match())


def make_context(new: int = 15, **kwargs):
  options = toys.sampled(ROWS, **kwargs) if kwargs else None
  return toys.context(
      PROMPTS, size=24, new=new, options=options,
      condition={'rule': jnp.arange(ROWS) % len(RULES)})


def _start(engine, params, context):
  state = loop.empty(engine, context)
  rows = jnp.ones(context.length.shape, bool)
  return loop.start(engine, params, state, rows, chunk=4)


@functools.partial(jax.jit, static_argnums=0)
def run(engine, params, context, num_rounds=100):
  state = _start(engine, params, context)
  return loop.run(engine, params, state, num_rounds)


@functools.partial(jax.jit, static_argnums=0)
def first_draft(drafter, params, context):
  engine = Engine(LM, drafter, Greedy())
  return drafter.propose(params, _start(engine, params, context))[0]


@functools.partial(jax.jit, static_argnums=0)
def next_draft(engine, params, state):
  return engine.drafter.propose(params, state)[0]


@pytest.mark.parametrize('greedy', [False, True])
def test_an_oracle_is_always_accepted(greedy):
  """The target as its own drafter: K + 1 tokens in every round.

  Except under sample-and-match, whose draws are its own.
  """
  params = Models(target=TARGET, drafter=TARGET)
  rule = Greedy() if greedy else toys.ByRow(RULES)
  context = make_context() if greedy else make_context(temperature=0.8)
  state = run(Engine(LM, SMALL, rule), params, context)
  full = greedy | (np.arange(ROWS) % len(RULES) < 2)
  rounds = np.asarray(state.context.rounds)
  np.testing.assert_array_equal(rounds[full], 15 // (NUM + 1))
  assert greedy or rounds[~full].min() > 15 // (NUM + 1)
  histogram = np.asarray(state.metrics.histogram)
  assert (histogram[full] == [0, 0, 0, 0, 3]).all()


def test_an_adversary_changes_nothing():
  """Drafts that the target never says: tau = 1, and the text is the same."""
  table = np.asarray(TARGET['table']).copy()
  table[..., 5] = -np.inf
  wrong = np.full_like(table, -np.inf)
  wrong[..., 5] = 0.0
  params = Models(target={'table': jnp.asarray(table)},
                  drafter={'table': jnp.asarray(wrong)})
  context = make_context(temperature=0.8)
  state = run(Engine(LM, SMALL, toys.ByRow(RULES)), params, context)
  np.testing.assert_array_equal(state.context.rounds, 15)
  assert state.metrics.accepted.sum() == 0
  new = np.asarray(state.context.tokens)
  start = np.asarray(state.context.prompt_length)
  for b in range(ROWS):
    assert 5 not in new[b, start[b]:start[b] + 15]
  plain = run(Engine(LM, Null(0), Match()), params, context)
  matched = np.arange(ROWS) % len(RULES) == 2
  np.testing.assert_array_equal(
      np.asarray(plain.context.tokens)[matched], new[matched])


def test_stated_law_is_teacher_forced_law():
  """q of every slot, recomputed in numpy from the text and the drafts."""
  columns = {'temperature': 0.9, 'top_k': 4, 'presence_penalty': 0.4}
  engine = Engine(LM, SMALL, Speculative())
  params = Models(target=TARGET, drafter=OTHER)
  state = run(engine, params, make_context(**columns), 3)
  draft = next_draft(engine, params, state)
  table, probs = np.asarray(OTHER['table']), np.asarray(draft.draft_law.probs)
  assert (np.asarray(draft.mode) == IID).all()
  for b in range(ROWS):
    start, end = (int(x[b]) for x in (
        state.context.prompt_length, state.context.length))
    text = [int(t) for t in state.context.tokens[b, :end]]
    if state.context.done[b]:
      continue
    for slot in range(NUM):
      before = text[-2] if len(text) > 1 else 0
      want = numpy_law.law(
          table[before, text[-1]], text[:start], text[start:], **columns)
      np.testing.assert_allclose(probs[b, slot], want, atol=1e-5)
      text.append(int(draft.tokens[b, slot]))
      assert want[text[-1]] > 0


def test_greedy_drafts_are_points():
  """Nothing of size V is kept when every row is greedy."""
  draft = first_draft(
      SMALL, Models(target=TARGET, drafter=OTHER), make_context())
  assert draft.draft_law is None
  assert (np.asarray(draft.mode) == POINT).all()


def test_one_draft():
  """K = 1: the loop over drafts is empty, the last draw is the only one."""
  one = dataclasses.replace(SMALL, num_speculative_tokens=1)
  params = Models(target=TARGET, drafter=TARGET)
  state = run(Engine(LM, one, Speculative()), params,
              make_context(10, temperature=1.0))
  np.testing.assert_array_equal(state.context.rounds, 5)


def test_the_stop_keeps_the_weak_token(threshold=0.2):
  """The draft ends after the first token below the threshold, not at it;
  and after an end token, which is drafted like any other."""
  drafter = dataclasses.replace(SMALL, confidence_threshold=threshold)
  context = make_context(temperature=1.0)
  context = context.replace(options=context.options.replace(
      eos=jnp.full((ROWS, 1), 2, jnp.int32)))
  draft = first_draft(drafter, Models(target=TARGET, drafter=OTHER), context)
  sure, tokens = np.asarray(draft.aux['confidence']), np.asarray(draft.tokens)
  want = np.ones((ROWS, NUM), bool)
  for slot in range(1, NUM):
    goes_on = (sure[:, slot - 1] >= threshold) & (tokens[:, slot - 1] != 2)
    want[:, slot] = want[:, slot - 1] & goes_on
  np.testing.assert_array_equal(draft.valid, want)
  lengths = want.sum(axis=1)
  assert (lengths.min(), lengths.max()) == (1, NUM)


def test_resync_feeds_only_what_was_missed():
  """Accepted drafts are held already: nothing is fed twice.

  `held` must be what the cache really has, after every round.
  """
  drafter = SMALL.resyncing()
  params = Models(target=TARGET, drafter=OTHER)
  context = make_context(15, temperature=1.0)
  for rounds in (1, 2, 3):
    state = run(Engine(LM, drafter, Speculative()), params, context, rounds)
    held = np.asarray(state.drafter['held'])
    length = np.asarray(state.context.length)
    cache = np.asarray(state.drafter['model']['cache'])
    tokens = np.asarray(state.context.tokens)
    for b in np.flatnonzero(~np.asarray(state.context.done)):
      assert length[b] - 2 <= held[b] <= length[b] - 1
      np.testing.assert_array_equal(
          cache[b, :held[b]], tokens[b, :held[b]])


@pytest.mark.parametrize('kwargs,match', [
    (dict(model=None), 'needs a model'), (dict(catch_up=1), 'catch_up=1'),
    (dict(confidence_threshold=1.5), r'=1\.5'),
    (dict(num_speculative_tokens=0), 'needs >= 1')])
def test_bad_values_raise(kwargs, match):
  with pytest.raises(ValueError, match=match):
    ChainLM(**{'model': LM, **kwargs})
