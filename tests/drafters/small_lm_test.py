"""The small LM as drafter: what it says it drew is what it drew."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_law
import pytest
import toys

from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import IID, POINT, Models
from specjax.drafters import Null, SmallLM
from specjax.verify import Block, Greedy, Match, Speculative

VOCAB, NUM, ROWS = 6, 4, 64
LM = toys.ToyLM(VOCAB)
SMALL = SmallLM(num_speculative_tokens=NUM, model=LM)
TARGET, OTHER = toys.toy_params(0, VOCAB), toys.toy_params(1, VOCAB)
PROMPTS = [[1], [2, 0, 5], [3, 3], [4, 1, 0, 2, 5]] * (ROWS // 4)


def make_context(new: int = 15, **kwargs):
  options = toys.sampled(ROWS, **kwargs) if kwargs else None
  return toys.context(PROMPTS, size=24, new=new, options=options)


@functools.partial(jax.jit, static_argnums=0)
def run(engine, params, context, num_rounds=100):
  state = loop.empty(engine, context)
  rows = jnp.ones(context.length.shape, bool)
  state = loop.start(engine, params, state, rows, chunk=4)
  return loop.run(engine, params, state, num_rounds)


@functools.partial(jax.jit, static_argnums=0)
def draft_after(engine, params, context, num_rounds):
  """Returns (draft, state) of the round after `num_rounds` rounds."""
  state = run.__wrapped__(engine, params, context, num_rounds)
  draft, _ = engine.drafter.propose(params, state)
  return draft, state


@pytest.mark.parametrize('rule', [Speculative(), Block(), Greedy()], ids=repr)
def test_an_oracle_is_always_accepted(rule):
  """The target as its own drafter: K + 1 tokens in every round."""
  sampled = {} if isinstance(rule, Greedy) else {
      'temperature': 0.8, 'top_p': 0.9, 'presence_penalty': 0.3}
  params = Models(target=TARGET, drafter=TARGET)
  state = run(Engine(LM, SMALL, rule), params, make_context(15, **sampled))
  np.testing.assert_array_equal(state.context.rounds, 15 // (NUM + 1))
  np.testing.assert_array_equal(
      state.metrics.histogram, [[0, 0, 0, 0, 3]] * ROWS)


def test_an_adversary_changes_nothing():
  """Drafts that the target never says: tau = 1, and the text is the same."""
  table = np.asarray(TARGET['table']).copy()
  table[..., 5] = -np.inf
  wrong = np.full_like(table, -np.inf)
  wrong[..., 5] = 0.0
  params = Models(target={'table': jnp.asarray(table)},
                  drafter={'table': jnp.asarray(wrong)})
  context = make_context(9, temperature=1.0)
  for rule in (Match(), Speculative()):
    state = run(Engine(LM, SMALL, rule), params, context)
    np.testing.assert_array_equal(state.context.rounds, 9)
    assert state.metrics.accepted.sum() == 0
    new = np.asarray(state.context.tokens)
    start = np.asarray(state.context.prompt_length)
    for b in range(ROWS):
      assert 5 not in new[b, start[b]:start[b] + 9]
  plain = run(Engine(LM, Null(0), Match()), params, context)
  match = run(Engine(LM, SMALL, Match()), params, context)
  np.testing.assert_array_equal(plain.context.tokens, match.context.tokens)


@pytest.mark.parametrize('rounds', [0, 3])
def test_stated_law_is_teacher_forced_law(rounds):
  """q of every slot, recomputed in numpy from the text and the drafts."""
  columns = {'temperature': 0.9, 'top_k': 4, 'top_p': 0.95,
             'presence_penalty': 0.4, 'repetition_penalty': 1.2}
  draft, state = draft_after(
      Engine(LM, SMALL, Block()), Models(target=TARGET, drafter=OTHER),
      make_context(15, **columns), rounds)
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
  draft, _ = draft_after(
      Engine(LM, SMALL, Greedy()), Models(target=TARGET, drafter=OTHER),
      make_context(15), 1)
  assert draft.draft_law is None
  assert (np.asarray(draft.mode) == POINT).all()


def test_one_draft():
  """K = 1: the loop over drafts is empty, the last draw is the only one."""
  one = dataclasses.replace(SMALL, num_speculative_tokens=1)
  params = Models(target=TARGET, drafter=TARGET)
  state = run(Engine(LM, one, Block()), params,
              make_context(10, temperature=1.0))
  np.testing.assert_array_equal(state.context.rounds, 5)


@pytest.mark.parametrize('threshold', [0.0, 0.2, 1.0])
def test_the_stop_keeps_the_weak_token(threshold):
  """The draft ends after the first token below the threshold, not at it."""
  drafter = dataclasses.replace(SMALL, confidence_threshold=threshold)
  draft, _ = draft_after(
      Engine(LM, drafter, Block()), Models(target=TARGET, drafter=OTHER),
      make_context(15, temperature=1.0), 1)
  sure = np.asarray(draft.aux['confidence'])
  want = np.ones((ROWS, NUM), bool)
  for slot in range(1, NUM):
    want[:, slot] = want[:, slot - 1] & (sure[:, slot - 1] >= threshold)
  np.testing.assert_array_equal(draft.valid, want)
  lengths = want.sum(axis=1)
  assert (lengths.min(), lengths.max()) == {
      0.0: (NUM, NUM), 0.2: (1, NUM), 1.0: (1, 1)}[threshold]


def test_the_end_token_ends_a_draft():
  """It is drafted; what would follow it is not."""
  context = make_context(15, temperature=1.0)
  context = context.replace(options=context.options.replace(
      eos=jnp.full((ROWS, 1), 2, jnp.int32)))
  draft, _ = draft_after(
      Engine(LM, SMALL, Block()), Models(target=TARGET, drafter=OTHER),
      context, 0)
  tokens, valid = np.asarray(draft.tokens), np.asarray(draft.valid)
  ended = np.cumsum(tokens == 2, axis=1) - (tokens == 2) > 0
  np.testing.assert_array_equal(valid, ~ended)
  assert ended.any()


def test_resync_feeds_only_what_was_missed():
  """Accepted drafts are held already: nothing is fed twice.

  `held` must be what the cache really has, after every round.
  """
  drafter = SMALL.resyncing()
  params = Models(target=TARGET, drafter=OTHER)
  context = make_context(15, temperature=1.0)
  for rounds in (1, 2, 3):
    state = run(Engine(LM, drafter, Block()), params, context, rounds)
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
    SmallLM(**{'model': LM, **kwargs})
