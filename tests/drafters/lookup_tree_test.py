"""Several matches side by side, against a search in plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import toys
from specjax.core import loop, topologies, types
from specjax.core.round import Engine
from specjax.core.types import POINT, Models
from specjax.drafters import LookupTree, Null
from specjax.verify import Match

ROWS, SIZE, VOCAB, END = 96, 36, 4, 3
# Branches of any lengths, the longest not the first.
LENGTHS = (3, 5, 1, 2)


def make_context(texts, eos=None):
  """Returns rows of these texts; what is stored after them is stale."""
  context = toys.context([list(text) for text in texts], size=SIZE)
  stale = np.random.default_rng(9).integers(0, VOCAB, (len(texts), SIZE))
  live = np.arange(SIZE) < np.asarray(context.length)[:, None]
  tokens = jnp.where(live, context.tokens, stale)
  return context.replace(tokens=tokens.astype(jnp.int32),
                         options=types.Options(eos=eos))


def random_texts(seed: int = 0):
  """Returns texts of two to four different tokens, of any length."""
  rng = np.random.default_rng(seed)
  return [rng.integers(0, rng.integers(2, VOCAB + 1), rng.integers(
      1, SIZE)).tolist() for _ in range(ROWS)]


def propose(drafter, context):
  """Returns the draft, in numpy."""
  state = types.SpecState(
      context=context, target={}, drafter={},
      metrics=types.empty_metrics(len(context.length), drafter.topology))
  params = Models(target=None)
  return jax.device_get(jax.jit(drafter.propose)(params, state)[0])


def search(text, drafter: LookupTree, end_tokens) -> list[list[int]]:
  """Returns the tokens of each branch."""
  found = []
  for end in range(len(text) - 1):
    run = 0
    while run < min(drafter.prompt_lookup_max, end + 1) and (
        text[end - run] == text[-1 - run]):
      run += 1
    if run >= drafter.prompt_lookup_min:
      newest = end if drafter.prefer == 'newest' else -end
      found.append((run, newest, end))
  found.sort(reverse=True)
  begun, branches = set(), []
  for _, _, end in found:
    if text[end + 1] not in begun and len(branches) < len(drafter.lengths):
      begun.add(text[end + 1])
      branches.append(text[end + 1:end + 1 + drafter.lengths[len(branches)]])
  for i, branch in enumerate(branches):
    ends = [k for k, token in enumerate(branch) if token in end_tokens]
    branches[i] = branch[:ends[0] + 1] if ends else branch
  return branches + [[]] * (len(drafter.lengths) - len(branches))


def branches_of(draft, b: int) -> list[list[int]]:
  """Returns what was drafted in each branch; it must have no holes."""
  paths = topologies.to_paths(draft.topology)
  out: list[list[int]] = [[] for _ in draft.topology.children[0]]
  for slot, path in enumerate(paths):  # parents come first
    assert not any(path[1:])
    if draft.valid[b, slot]:
      assert len(out[path[0]]) == len(path) - 1
      out[path[0]].append(int(draft.tokens[b, slot]))
  return out


@pytest.mark.parametrize('kwargs', [
    dict(), dict(prefer='oldest'), dict(prompt_lookup_min=2),
    dict(prompt_lookup_max=1), dict(lengths=(4,)),
    dict(prompt_lookup_max=5, prompt_lookup_min=3, prefer='oldest')])
@pytest.mark.parametrize('with_eos', [False, True])
def test_against_a_search_in_python(kwargs, with_eos):
  """Random ragged texts; half of the rows have an end token."""
  drafter = LookupTree(**{'lengths': LENGTHS, **kwargs})
  texts = random_texts()
  ends = [[END] if with_eos and b % 2 else [-1] for b in range(ROWS)]
  eos = jnp.asarray(ends, jnp.int32) if with_eos else None
  draft = propose(drafter, make_context(texts, eos))
  assert draft.draft_law is None and (draft.mode == POINT).all()
  used = np.zeros(len(drafter.lengths) + 1, int)
  for b, text in enumerate(texts):
    want = search(text, drafter, ends[b])
    assert branches_of(draft, b) == want
    used[sum(map(bool, want))] += 1
  assert used[0] and used[1:].sum() > 20


def test_by_hand():
  """Suffix 1 2: followed by 3 (twice), 0 and, after 2 alone, by 1."""
  text = [1, 2, 3, 0, 1, 2, 0, 2, 1, 2, 3, 3, 1, 2]
  for prefer, first, second in [
      ('newest', [3, 3, 1], [0, 2, 1]), ('oldest', [3, 0, 1], [0, 2, 1])]:
    drafter = LookupTree((3, 3, 2), prompt_lookup_max=2, prefer=prefer)
    draft = propose(drafter, make_context([text]))
    assert branches_of(draft, 0) == [first, second, [1, 2]]
  # No two branches begin alike, so siblings differ.
  assert len({int(x) for x in draft.tokens[0, :3]}) == 3


@pytest.mark.parametrize('text', [[1], [0, 1, 2, 3]])
def test_no_match_drafts_nothing(text):
  draft = propose(LookupTree(LENGTHS), make_context([text]))
  assert not draft.valid.any()


@functools.partial(jax.jit, static_argnums=0, compiler_options={
    'xla_backend_optimization_level': 0})
def run(engine, params, context):
  state = loop.empty(engine, context)
  rows = jnp.ones(context.length.shape, bool)
  state = loop.start(engine, params, state, rows, chunk=4)
  return loop.run(engine, params, state, 50)


def replay(drafter, tokens, token_round, start: int, num_rounds: int):
  """Returns (drafted [D], ranks [D,C]) of a row, from its text alone."""
  topology = drafter.topology
  drafted = np.zeros(topology.max_depth, int)
  ranks = np.zeros((topology.max_depth, topology.max_children), int)
  for i in range(num_rounds):
    text = tokens[:start].tolist()
    end = start + np.count_nonzero(token_round[start:] == i)
    branches = search(text, drafter, ())
    drafted[:max(map(len, branches))] += 1
    said = tokens[start:end].tolist()
    for rank, branch in enumerate(branches):
      for depth, (a, b) in enumerate(zip(branch, said, strict=False)):
        if a != b:
          break
        ranks[depth, rank if depth == 0 else 0] += 1
    start = end
  return drafted, ranks


def test_around_the_loop():
  """The same text as without drafts; the counters, from the text."""
  params = Models(target=toys.toy_params(0, VOCAB, 3.0))
  context = toys.context(
      [[1], [2, 0], [3, 3, 1]] * 8, size=32, new=24,
      options=toys.sampled(24, temperature=0.7),
      token_round=jnp.full((24, 32), -1))
  lm, drafter = toys.ToyLM(VOCAB), LookupTree((4, 2, 1))
  plain = jax.device_get(run(
      Engine(lm, Null(0), Match()), params, context).context.tokens)
  fast = run(Engine(lm, drafter, Match()), params, context)
  np.testing.assert_array_equal(fast.context.tokens, plain)
  tokens, when, start, rounds, metrics = jax.device_get((
      fast.context.tokens, fast.context.token_round,
      fast.context.prompt_length, fast.context.rounds, fast.metrics))
  for b in range(24):
    drafted, ranks = replay(drafter, tokens[b], when[b], start[b], rounds[b])
    np.testing.assert_array_equal(metrics.drafted[b], drafted)
    np.testing.assert_array_equal(metrics.ranks[b], ranks)
  np.testing.assert_array_equal(metrics.ranks.sum(axis=-1), metrics.accepted)
  assert rounds.sum() < 0.8 * 24 * 24
  assert (metrics.drafted[:, 0] < rounds).any()
  assert (metrics.ranks.sum(axis=0)[0] > 0).all()  # by which sibling


@pytest.mark.parametrize('kwargs,match', [
    (dict(lengths=()), 'must be whole'), (dict(lengths=(3, 0)), 'whole'),
    (dict(prompt_lookup_min=0), 'min <= max'),
    (dict(prefer='best'), "'newest' or 'oldest'")])
def test_bad_values_raise(kwargs, match):
  with pytest.raises(ValueError, match=match):
    LookupTree(**kwargs)
