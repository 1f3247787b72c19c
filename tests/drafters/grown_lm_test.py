"""Trees grown by confidence, against EAGLE-2's procedure one row at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import toys
from specjax.core import loop, tree
from specjax.core.round import Engine
from specjax.core.types import POINT, Models
from specjax.drafters import GrownLM
from specjax.verify import Greedy

VOCAB, ROWS = 7, 24
LM = toys.ToyLM(VOCAB)
TARGET, OTHER = toys.toy_params(0, VOCAB), toys.toy_params(1, VOCAB, 1.0)
PROMPTS = [[1], [2, 0, 4], [3, 3], [4, 1, 0, 2, 6]]
PENALTY = (0.0, 0.7, 2.5)
# num_speculative_tokens, tree_depth, tree_top_k.
SHAPES = [(10, 3, 3), (5, 5, 2), (7, 2, 4), (4, 1, 7), (3, 3, 1), (21, 3, 3)]
# Little is computed here, and optimising it takes longer.
JIT = functools.partial(
    jax.jit, static_argnums=0,
    compiler_options={'xla_backend_optimization_level': 0})


def make(num: int, depth: int, top_k: int) -> GrownLM:
  return GrownLM(num, LM, depth, top_k)


def make_context(options=None, *, rows: int = ROWS, seed: int = 0, **kwargs):
  """Returns ragged rows with three strengths of a penalty."""
  context = toys.context([PROMPTS[b % 4] for b in range(rows)], size=16,
                         seed=seed, options=options)
  penalty = jnp.asarray(np.resize(PENALTY, rows), jnp.float32)
  return context.replace(options=context.options.replace(
      presence_penalty=penalty, **kwargs))


@JIT
def _propose(drafter, table, context):
  engine = Engine(LM, drafter, Greedy())
  params = Models(target=TARGET, drafter={'table': table})
  state = loop.empty(engine, context)
  state = loop.start(
      engine, params, state, jnp.ones(context.length.shape, bool), chunk=4)
  return drafter.propose(params, state)[0]


def propose(drafter, context, table=OTHER['table']):
  """Returns the first draft after the prompts are fed, in numpy."""
  return jax.device_get(_propose(drafter, jnp.asarray(table), context))


def log_probs(prompt, path, penalty: float, table, bias) -> np.ndarray:
  """Returns f64[V] after a path, penalties applied; -inf where banned."""
  text = [0, *prompt, *path]
  z = table[text[-2], text[-1]].astype(np.float64) + bias
  z[list(set(path))] -= penalty
  return z - z.max() - np.log(np.exp(z - z.max()).sum())


def grow(num: int, depth: int, top_k: int, after):
  """Expands and reranks: the kept `(path, score)` in order of discovery.

  `after(path)` are log-probabilities f64[V]. Earlier found wins a tie.
  """
  found: list[tuple[tuple[int, ...], float]] = []
  frontier = [((), 0.0)]
  for _ in range(depth):
    level = []
    for path, score in frontier:
      law = after(path)
      for token in np.argsort(-law, kind='stable')[:top_k]:
        level.append(((*path, int(token)), score + law[token]))
    found += level
    frontier = sorted(level, key=lambda x: -x[1])[:top_k]
  kept = sorted(range(len(found)), key=lambda i: (-found[i][1], i))[:num]
  return [found[i] for i in sorted(kept)]


def check_tree(drafter, draft) -> None:
  """Parents come first, nothing is deeper or wider than promised."""
  topology, num = drafter.topology, drafter.num_speculative_tokens
  assert ((draft.parents >= 0) & (draft.parents <= np.arange(num))).all()
  for parents in draft.parents:
    made = tree.from_parents(parents)
    assert made.max_depth <= topology.max_depth
    assert made.max_children <= topology.max_children


def compare(drafter, context, draft, table, bias=None) -> None:
  """Every slot of every row: its path, its score, whether it is there."""
  num = drafter.num_speculative_tokens
  bias = np.zeros((ROWS, VOCAB)) if bias is None else bias
  length, tokens = jax.device_get((context.length, context.tokens))
  check_tree(drafter, draft)
  for b in range(len(length)):
    prompt = tokens[b, :length[b]].tolist()
    after = functools.cache(lambda path, b=b, prompt=prompt: log_probs(
        prompt, path, PENALTY[b % 3], table, bias[b]))
    want = grow(num, drafter.tree_depth, drafter.tree_top_k, after)
    paths: list[tuple[int, ...]] = [()]
    for parent, token in zip(draft.parents[b], draft.tokens[b], strict=True):
      paths.append((*paths[parent], int(token)))
    fine = np.isfinite([score for _, score in want])
    np.testing.assert_array_equal(draft.valid[b], fine)
    assert [p for p, ok in zip(paths[1:], fine, strict=True) if ok] == [
        p for (p, _), ok in zip(want, fine, strict=True) if ok]
    np.testing.assert_allclose(
        draft.aux['log_prob'][b], [score for _, score in want], atol=1e-4)


@pytest.mark.parametrize('shape', SHAPES)
def test_expand_and_rerank_against_numpy(shape):
  """Ragged rows, own penalties: tokens, parents and scores.

  The last shape keeps every candidate, (3, 3, 1) is a chain.
  """
  drafter, context = make(*shape), make_context()
  draft = propose(drafter, context)
  assert draft.draft_law is None and (draft.mode == POINT).all()
  compare(drafter, context, draft, np.asarray(OTHER['table']))
  if shape in SHAPES[:3]:
    assert len(np.unique(draft.parents, axis=0)) > 3


@pytest.mark.parametrize('scale', [0.05, 6.0])
def test_flat_and_peaked_laws(scale):
  """Flat laws make wide trees, peaked ones long paths; same program."""
  table = np.asarray(OTHER['table']) * np.float32(scale)
  drafter, context = make(10, 3, 3), make_context()
  draft = propose(drafter, context, table)
  compare(drafter, context, draft, table)
  depth = np.asarray(tree.node_depth(drafter.topology, draft.parents))
  share = [(depth == d).mean() for d in (1, 2, 3)]
  if scale < 1:
    np.testing.assert_allclose(share, [0.3, 0.7, 0.0], atol=1e-6)
  else:
    assert share[2] > 0.35 > share[0]


def test_equal_probabilities_keep_what_was_found_first():
  """A flat law: all scores of a level tie, and children never win."""
  table = np.zeros((VOCAB,) * 3, np.float32)
  context = make_context()
  context = context.replace(options=context.options.replace(
      presence_penalty=jnp.zeros(ROWS)))
  draft = propose(make(10, 3, 3), context, table)
  np.testing.assert_array_equal(
      draft.parents, [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3]] * ROWS)
  np.testing.assert_array_equal(
      draft.tokens, [[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]] * ROWS)


def test_certain_children_tie_with_their_parents():
  """Probability one: a child scores as its parent does, and stays below."""
  table = np.full((VOCAB,) * 3, -200.0, np.float32)
  table[..., 2] = 0.0
  drafter, context = make(5, 5, 2), make_context(rows=4)
  context = context.replace(options=context.options.replace(
      presence_penalty=jnp.zeros(4)))
  draft = propose(drafter, context, table)
  check_tree(drafter, draft)
  depth = np.asarray(tree.node_depth(drafter.topology, draft.parents))
  np.testing.assert_array_equal(depth, [[1, 2, 3, 4, 5]] * 4)
  assert (draft.tokens == 2).all()


def test_banned_tokens_are_not_drafted():
  """Fewer tokens than children: the rest is not valid, and still a tree."""
  bias = np.zeros((ROWS, VOCAB), np.float32)
  bias[::2, 2:] = bias[1::2, 1:] = -np.inf
  drafter = make(10, 3, 3)
  context = make_context(bias=jnp.asarray(bias))
  draft = propose(drafter, context)
  compare(drafter, context, draft, np.asarray(OTHER['table']), bias)
  assert draft.valid[1::2].sum(axis=1).max() == 3


@pytest.mark.parametrize('token', [0, 3])
def test_a_model_that_fails_still_drafts_trees(token):
  """NaN after one token: nothing valid below it, all the rest as before."""
  table = np.asarray(OTHER['table']).copy()
  table[:, token] = np.nan
  drafter, context = make(10, 3, 3), make_context()
  draft = propose(drafter, context, table)
  check_tree(drafter, draft)
  # As if nothing could follow that token.
  with np.errstate(invalid='ignore'):
    table[:, token] = -np.inf
  dead = propose(drafter, context, table)
  for b in range(ROWS):
    prompt = PROMPTS[b % 4]
    above = np.append(prompt[-1], draft.tokens[b])[draft.parents[b]]
    assert not draft.valid[b][above == token].any()
    assert draft.valid[b].any() == (prompt[-1] != token)
    assert draft.valid[b].sum() >= 3 * (prompt[-1] != token)
  np.testing.assert_array_equal(dead.tokens, draft.tokens)
  np.testing.assert_array_equal(dead.parents, draft.parents)


def test_neither_noise_nor_neighbours_matter():
  """Deterministic given the text, also for sampled rows; done rows rest."""
  drafter = make(10, 3, 3)
  plain = propose(drafter, make_context())
  context = make_context(toys.sampled(ROWS, temperature=0.7, top_k=2), seed=5)
  context = context.replace(done=jnp.arange(ROWS) == 4)
  moved = np.random.default_rng(0).permutation(ROWS)
  got = propose(drafter, jax.tree.map(lambda x: x[moved], context))
  np.testing.assert_array_equal(got.tokens, plain.tokens[moved])
  np.testing.assert_array_equal(got.parents, plain.parents[moved])
  np.testing.assert_array_equal(got.valid.all(axis=1), moved != 4)
  assert not got.valid[moved == 4].any()


@pytest.mark.parametrize('kwargs,match', [
    (dict(model=None), 'needs a model'),
    (dict(tree_depth=0), 'tree_depth=0'), (dict(tree_top_k=0), 'tree_top_k='),
    (dict(num_speculative_tokens=2), 'holds 3 to 21'),
    (dict(num_speculative_tokens=22), '=22: .* holds 3 to 21')])
def test_bad_values_raise(kwargs, match):
  good = dict(num_speculative_tokens=10, model=LM, tree_depth=3, tree_top_k=3)
  assert GrownLM(**good).topology.max_children == 3
  with pytest.raises(ValueError, match=match):
    GrownLM(**{**good, **kwargs})
