"""Lookup and input-guided drafting: against brute force, and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import toys
from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models, Options
from specjax.drafters import InputGuided, Lookup, Null
from specjax.verify import Greedy

SIZE = 24


@functools.partial(jax.jit, static_argnums=0)
def propose(drafter, context):
  state = loop.empty(Engine(toys.ToyLM(), drafter, Greedy()), context)
  return drafter.propose(None, state)[0]


def brute_force(row, length, drafter, eos=()):
  """Returns the draft as a list, by trying every earlier place."""
  best = None
  for n in range(drafter.prompt_lookup_max, drafter.prompt_lookup_min - 1, -1):
    if n > length:
      continue
    suffix = list(row[length - n:length])
    ends = [e for e in range(n - 1, length - 1)
            if list(row[e - n + 1:e + 1]) == suffix]
    if ends:
      best = max(ends) if drafter.prefer == 'newest' else min(ends)
      break
  if best is None:
    return []
  out = []
  for token in row[best + 1:min(best + 1 + drafter.topology.num_nodes, length)]:
    out.append(int(token))
    if token in eos:
      break
  return out


@pytest.mark.parametrize('prefer', ['newest', 'oldest'])
@pytest.mark.parametrize('low,high,num,eos', [
    (1, 3, 4, ()), (2, 3, 2, (0,)), (1, 1, 6, (2, 3))])
def test_against_brute_force(prefer, low, high, num, eos):
  """500 ragged buffers with ghosts of earlier text behind their ends."""
  rng = np.random.default_rng(low + num)
  drafter = Lookup(num, prompt_lookup_max=high, prompt_lookup_min=low,
                   prefer=prefer)
  length = rng.integers(1, SIZE + 1, 500)
  tokens = rng.integers(0, 4, (500, SIZE))
  tokens[::5] = rng.integers(0, 2, (100, SIZE))  # long and overlapping runs
  options = Options(eos=jnp.asarray(np.resize(eos, (500, len(eos))), jnp.int32)
                    if eos else None)
  context = toys.context([[0]] * 500, size=SIZE, options=options).replace(
      tokens=jnp.asarray(tokens, jnp.int32), length=jnp.asarray(length))
  draft = propose(drafter, context)
  got, valid = np.asarray(draft.tokens), np.asarray(draft.valid)
  hits = 0
  for b in range(500):
    want = brute_force(tokens[b], length[b], drafter, eos)
    assert list(got[b][valid[b]]) == want, b
    assert valid[b, :len(want)].all()
    hits += bool(want)
  assert 100 < hits < 500


def test_check_vector():
  """1 2 3 4 2 3, n in [2, 3], K = 4: 4 2 3 (and not the text's end)."""
  drafter = Lookup(4, prompt_lookup_max=3, prompt_lookup_min=2)
  draft = propose(drafter, toys.context([[1, 2, 3, 4, 2, 3]]))
  np.testing.assert_array_equal(draft.tokens[0, :3], [4, 2, 3])
  np.testing.assert_array_equal(draft.valid[0], [True, True, True, False])


def test_oldest_and_newest():
  """1 7 1 8 1: what followed the first, or the last, 1."""
  context = toys.context([[1, 7, 1, 8, 1]])
  for prefer, want in (('oldest', 7), ('newest', 8)):
    draft = propose(Lookup(1, prefer=prefer), context)
    assert draft.tokens[0, 0] == want


@pytest.mark.parametrize('kwargs,match', [
    (dict(prompt_lookup_min=0), 'min=0'),
    (dict(prompt_lookup_min=4), 'min=4'),
    (dict(prefer='best'), "'best'"),
    (dict(num_speculative_tokens=0), 'needs >= 1')])
def test_bad_values_raise(kwargs, match):
  with pytest.raises(ValueError, match=match):
    Lookup(**kwargs)


# Input-guided drafting. A target that recites: logits[previous, current] of
# a table whose argmax is the next word of a fixed text without repeated
# pairs.

WORDS = 16


def reciter(text):
  table = np.zeros((WORDS,) * 3, np.float32)
  for before, now, after in zip([0] + text, text, text[1:]):
    table[before, now, after] = 9.0
  return Models(target={'table': jnp.asarray(table)})


@functools.partial(jax.jit, static_argnums=0)
def decode(engine, params, context):
  state = loop.empty(engine, context)
  rows = jnp.ones(context.length.shape, bool)
  state = loop.start(engine, params, state, rows, chunk=8)
  return loop.run(engine, params, state, jnp.int32(100))


def recite(drafter, source, output):
  """Decodes `output` after a prompt of `source`: (new tokens, rounds)."""
  prompt = source + [15]
  context = toys.context(
      [prompt], size=48, new=len(output),
      condition={'source': jnp.asarray([[0, len(source)]])})
  params = reciter(prompt[-2:] + output)
  state = decode(Engine(toys.ToyLM(WORDS), drafter, Greedy()),
                 params, context)
  new = np.asarray(state.context.tokens)[0, len(prompt):][:len(output)]
  assert list(new) == output  # greedy text does not depend on the drafter
  return int(state.context.rounds[0]), state


COPY = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


def test_a_copy_takes_a_round_for_each_block():
  """K + 1 tokens a round, although words occur several times."""
  rounds, _ = recite(InputGuided(4), COPY, COPY)
  assert rounds == len(COPY) // 5
  rounds, _ = recite(InputGuided(14), COPY, COPY)
  assert rounds == 1
  rounds, _ = recite(Null(0), COPY, COPY)
  assert rounds == len(COPY)


def test_a_substitution_realigns():
  """A changed word: one rejection, then the next unique word is found."""
  output = COPY[:6] + [11] + COPY[7:]
  rounds, state = recite(InputGuided(14), COPY, output)
  # Copy up to 11; plain steps until 6 5 or a longer run is unique; copy on.
  assert rounds <= 4
  assert int(state.metrics.accepted.sum()) >= len(COPY) - 4


def test_an_insertion_and_a_deletion_realign():
  """Words more or less than in the source, not only other words."""
  rounds, _ = recite(InputGuided(14), COPY, COPY[:5] + [12, 13] + COPY[5:])
  assert rounds <= 6
  rounds, _ = recite(InputGuided(14), COPY, COPY[:4] + COPY[6:])
  assert rounds <= 5


def test_a_repeated_word_does_not_resume_at_the_wrong_copy():
  """After "9 2" the word 2 is ambiguous: nothing is drafted before 6."""
  rounds, state = recite(
      InputGuided(3), [1, 2, 3, 4, 2, 6, 8], [1, 9, 2, 6, 8])
  # 1 2 3 is drafted, 9 said instead; 2 and 6 come without drafts; then 8.
  np.testing.assert_array_equal(state.metrics.drafted[0], [2, 1, 1])
  np.testing.assert_array_equal(state.metrics.accepted[0], [2, 0, 0])
  assert rounds == 4


def test_nothing_is_drafted_beyond_the_source():
  """The end of the source ends the draft; EOS inside cuts it."""
  context = toys.context(
      [[1, 2, 3, 4, 5]], condition={'source': jnp.asarray([[1, 3]])})
  draft = propose(InputGuided(4), context)
  np.testing.assert_array_equal(draft.valid[0], [True, True, False, False])
  np.testing.assert_array_equal(draft.tokens[0, :2], [2, 3])
  context = toys.context(
      [[1, 2, 3, 4, 5]], options=Options(eos=jnp.asarray([[2, -1]])))
  draft = propose(InputGuided(4), context)
  np.testing.assert_array_equal(draft.valid[0], [True, True, False, False])
