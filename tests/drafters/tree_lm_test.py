"""A small LM drafts a tree: how children are drawn, and what is said of it.

Compiling is most of the time: one program a method, with the rows as data.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from specjax.certificates import reference as numpy_law
from specjax.certificates import toys
from specjax.core import keys, loop, topologies, tree
from specjax.core.round import Engine
from specjax.core.types import MODE_NAMES, POINT, Models
from specjax.drafters import TreeLM
from specjax.drafters.tree_lm import levels
from specjax.verify import Greedy

VOCAB = 5
LM = toys.ToyLM(VOCAB)
TARGET, OTHER = toys.toy_params(0, VOCAB), toys.toy_params(1, VOCAB, 1.0)
PARAMS = Models(target=TARGET, drafter=OTHER)
TABLE = np.asarray(OTHER['table'])
# Three children; two, one and none; then two and one again: depth 3.
TREE = topologies.from_paths(
    '[(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), '
    '(1, 0, 0)]')
KINDS = {'iid': 'iid', 'without_replacement': 'without_replacement',
         'top_plus_one': 'top_plus_one', 'top_k': 'point',
         'coupled': 'match'}
METHODS = tuple(KINDS)
DRAWN = METHODS[:3]  # they state a law
ROWS, LOOKED_AT = 12000, 24
PROMPTS = [[1], [2, 0, 4], [3, 3], [4, 1, 0, 2, 4]]
COLUMNS = {
    'temperature': (1.0, 0.7, 1.4, 0.0, 1.0, 1.0), 'top_k': (0, 2, 3, 0, 1, 0),
    'top_p': (1.0, 1.0, 0.9, 1.0, 1.0, 0.8),
    'presence_penalty': (0.0, 0.6, 0.0, 0.5, 0.0, 0.9)}
PLAIN = {'temperature': (1.3,), 'top_k': (0,), 'top_p': (1.0,),
         'presence_penalty': (0.0,)}
PROMPT = PROMPTS[1]
# Of a G-test: with fixed seeds a pass stays a pass.
ALPHA = 1e-4
# Little is computed here, and optimising it takes longer.
JIT = functools.partial(
    jax.jit, static_argnums=0,
    compiler_options={'xla_backend_optimization_level': 0})


def make(method: str, topology=TREE) -> TreeLM:
  return TreeLM(topology, LM, method)


def make_context(rows: int, prompts=PROMPTS, columns=None, **kwargs):
  """Returns rows with these prompts and options in turn; greedy without."""
  options = toys.context([[1]]).options
  if columns:
    options = options.replace(**{
        name: jnp.asarray(np.resize(value, rows), (
            jnp.int32 if name == 'top_k' else jnp.float32))
        for name, value in columns.items()})
  context = toys.context(
      [prompts[b % len(prompts)] for b in range(rows)], size=16)
  return context.replace(options=options.replace(**kwargs))


@JIT
def _propose(drafter, params, context):
  engine = Engine(LM, drafter, Greedy())
  state = loop.empty(engine, context)
  state = loop.start(
      engine, params, state, jnp.ones(context.length.shape, bool), chunk=4)
  return drafter.propose(params, state)[0]


def propose(drafter, context):
  """Returns the first draft after the prompts are fed, in numpy."""
  return jax.device_get(_propose(drafter, PARAMS, context))


@functools.cache
def mixed(method: str):
  """Returns ragged rows of many options, and their draft."""
  context = make_context(ROWS, columns=COLUMNS)
  return jax.device_get(context.replace(keys=None)), context, propose(
      make(method), context)


@functools.cache
def alike(method: str) -> np.ndarray:
  """Returns int[ROWS,N]: drafts after one text, under many keys."""
  context = make_context(ROWS, [PROMPT], PLAIN)
  return propose(make(method), context).tokens


def nodes(context, draft, rows: int, topology=TREE):
  """Yields (b, slots below a node, the prompt, the drafts down to it)."""
  up = (-1,) + topology.parents
  for b, (row, kids) in itertools.product(
      range(rows), enumerate(topology.children)):
    prompt, path = context.tokens[b, :context.length[b]].tolist(), []
    while row:
      path.insert(0, int(draft.tokens[b, row - 1]))
      row = up[row]
    if kids:
      yield b, list(kids), prompt, path


def law_after(prompt, path, **options) -> np.ndarray:
  """Returns f64[V], the drafter's law in numpy; the table's order is two."""
  text = [0, *prompt, *path]
  return numpy_law.law(TABLE[text[-2], text[-1]], prompt, path, **options)


def ranking(prompt, path, presence_penalty=0.0, **_) -> np.ndarray:
  """Returns tokens by what temperature and filters do not change."""
  text = [0, *prompt, *path]
  logits = TABLE[text[-2], text[-1]].astype(np.float64)
  logits[list(set(path))] -= presence_penalty
  return np.argsort(-logits, kind='stable')


@pytest.mark.parametrize('method', METHODS)
def test_children_of_rows_with_their_own_options(method):
  """Every slot against numpy, whatever was drafted above it.

  Top tokens are the likeliest; coupled ones maximise over the noise of their
  position and rank; a slot is left out exactly where its law has run out.
  """
  context, jax_context, draft = mixed(method)
  assert {MODE_NAMES[m] for m in draft.mode} == {KINDS[method]}
  noise = [np.asarray(keys.shared_gumbel(
      jax_context, context.length[:, None] + jnp.arange(3), k, VOCAB))
      for k in range(TREE.max_children)]
  for b, kids, prompt, path in nodes(context, draft, LOOKED_AT):
    options = {k: v[b % len(v)] for k, v in COLUMNS.items()}
    law = law_after(prompt, path, **options)
    best = ranking(prompt, path, **options)
    given, fine = draft.tokens[b, kids], draft.valid[b, kids]
    top = {'top_k': len(kids), 'top_plus_one': len(kids) - 1}.get(method, 0)
    np.testing.assert_array_equal(given[:top], best[:top])
    assert fine[:top].all()
    left = law.copy()
    left[best[:top]] = 0
    if method == 'coupled':
      with np.errstate(divide='ignore'):
        for rank in range(len(kids)):
          score = np.log(law) + noise[rank][b, len(path)]
          assert given[rank] == score.argmax()
    elif method == 'without_replacement':
      num = np.count_nonzero(law)
      assert list(fine) == [rank < num for rank in range(len(kids))]
      assert len(set(given[fine])) == fine.sum()
    else:
      assert (fine[top:] == left.any()).all()
    drawn = given[top:][fine[top:]]
    assert (left[drawn] > 0).all()
  if method in ('without_replacement', 'top_plus_one'):
    assert 0.05 < draft.valid[:, 2].mean() < 0.95


@pytest.mark.parametrize('method', METHODS)
def test_the_law_stated_is_the_law_after_the_path(method):
  """Options and penalties included; points state none."""
  context, _, draft = mixed(method)
  if method not in DRAWN:
    assert draft.draft_law is None
    return
  rows = np.broadcast_to(draft.law_row, draft.tokens.shape)
  logits = draft.draft_law.logits[:LOOKED_AT].astype(np.float64)
  probs, distinct = numpy_law.softmax(logits), set()
  for b, kids, prompt, path in nodes(context, draft, LOOKED_AT):
    options = {k: v[b % len(v)] for k, v in COLUMNS.items()}
    want = law_after(prompt, path, **options)
    for slot in kids:
      np.testing.assert_allclose(probs[b, rows[b, slot]], want, atol=1e-5)
    distinct.add((b, *np.round(want, 4)))
  assert len(distinct) > 2 * LOOKED_AT


@pytest.mark.parametrize('method', ['without_replacement', 'coupled'])
def test_greedy_rows_draft_the_likeliest(method):
  """Whatever the method, when all rows are greedy: points, no law.

  With two of the five tokens banned a third child is still there, and with
  three it is not.
  """
  bias = np.zeros((8, VOCAB), np.float32)
  bias[2:4, :2] = bias[4:, :3] = -np.inf
  context = make_context(8, bias=jnp.asarray(bias))
  draft = propose(make(method), context)
  assert draft.draft_law is None and (draft.mode == POINT).all()
  has_no_third = (np.arange(8) >= 4)[:, None] & (
      np.arange(TREE.num_nodes) == 2)
  np.testing.assert_array_equal(draft.valid, ~has_no_third)
  for b, kids, prompt, path in nodes(context, draft, 8):
    allowed = [t for t in ranking(prompt, path) if bias[b, t] == 0]
    fine = draft.valid[b, kids]
    np.testing.assert_array_equal(
        draft.tokens[b, kids][fine], allowed[:fine.sum()])


# The joint law of a draft.


def draw_law(method: str, q: np.ndarray, num: int) -> dict:
  """Returns {children in draw order: probability} of one node."""
  if method == 'iid':
    return {x: float(np.prod(q[list(x)]))
            for x in itertools.product(range(VOCAB), repeat=num)}
  top = tuple(np.argsort(-q, kind='stable')[:num - 1])
  out = {}
  for x in itertools.permutations(range(VOCAB), num):
    if method == 'top_plus_one':
      left = 1 - q[list(top)].sum()
      out[x] = q[x[-1]] / left if x[:-1] == top else 0.0
    else:
      gone = np.concatenate([[0], np.cumsum(q[list(x[:-1])])])
      out[x] = float(np.prod(q[list(x)] / (1 - gone)))
  return out


def g_test(seen: np.ndarray, law: dict) -> float:
  """Returns the p-value of rows `seen int[R,n]`; rare cells are pooled."""
  cells, times = np.unique(seen, axis=0, return_counts=True)
  count = {tuple(x.tolist()): n for x, n in zip(cells, times, strict=True)}
  possible = [x for x, p in law.items() if p > 0]
  have = np.array([count.get(x, 0) for x in possible], float)
  want = np.array([law[x] for x in possible]) * len(seen)
  if have.sum() < len(seen):
    return 0.0  # something impossible was drawn
  big = want >= 10
  have = np.append(have[big], have[~big].sum())
  want = np.append(want[big], want[~big].sum())
  have, want = have[want > 0], want[want > 0]
  hit = have > 0
  statistic = 2 * (have[hit] * np.log(have[hit] / want[hit])).sum()
  return float(stats.chi2.sf(statistic, len(want) - 1))


def law_at(*path) -> np.ndarray:
  return law_after(PROMPT, [int(x) for x in path], temperature=1.3)


@pytest.mark.parametrize('method', DRAWN)
def test_joint_law_of_siblings(method):
  """In draw order: at the root, and below it given what was drawn there."""
  tokens = alike(method)
  assert g_test(tokens[:, :3], draw_law(method, law_at(), 3)) > ALPHA
  first, kids = tokens[:, 0], tokens[:, [3, 4]]
  for x in np.unique(first):
    law = draw_law(method, law_at(x), 2)
    assert g_test(kids[first == x], law) > ALPHA
  # The law of one node is not that of another: this could fail.
  x = np.bincount(first).argmax()
  wrong = draw_law(method, law_at(), 2)
  assert g_test(kids[first == x], wrong) < ALPHA / 100


def test_draw_order_is_not_the_order_of_probability():
  """Sorting siblings by probability is another law."""
  x = alike('without_replacement')[:, :3]
  order = np.argsort(-law_at()[x], axis=1)
  law = draw_law('without_replacement', law_at(), 3)
  assert g_test(np.take_along_axis(x, order, axis=1), law) < ALPHA / 100


@pytest.mark.parametrize('method', ['iid', 'without_replacement'])
def test_nodes_draw_independently(method):
  """First children of two siblings, and of three levels: no noise twice."""
  tokens = alike(method)
  pairs, times = np.unique(tokens[:, :2], axis=0, return_counts=True)
  x, y = pairs[times.argmax()]
  here = (tokens[:, :2] == (x, y)).all(axis=1)
  product = {(i, j): float(law_at(x)[i] * law_at(y)[j])
             for i, j in itertools.product(range(VOCAB), repeat=2)}
  assert g_test(tokens[here][:, [3, 5]], product) > ALPHA
  chain = {
      (i, j, k): float(law_at()[i] * law_at(i)[j] * law_at(i, j)[k])
      for i, j, k in itertools.product(range(VOCAB), repeat=3)}
  assert g_test(tokens[:, [0, 3, 6]], chain) > ALPHA


def test_one_child_is_drawn_from_the_law():
  """A single child under 'top_plus_one': nothing is fixed."""
  tokens = alike('top_plus_one')
  x = tokens[0, 1]  # deterministic itself
  assert (tokens[:, 1] == x).all()
  law = {(i,): float(q) for i, q in enumerate(law_at(x))}
  assert g_test(tokens[:, 5:6], law) > ALPHA


@pytest.mark.parametrize('method', METHODS)
def test_noise_belongs_to_row_and_round(method):
  """Neighbours do not matter; the next round draws afresh, unless coupled."""
  _, context, draft = mixed(method)
  moved = np.random.default_rng(0).permutation(ROWS) // 2  # some are gone
  other = propose(
      make(method), jax.tree.map(lambda x: x[moved], context))
  np.testing.assert_array_equal(other.tokens, draft.tokens[moved])
  np.testing.assert_array_equal(other.valid, draft.valid[moved])
  later = propose(
      make(method), context.replace(rounds=context.rounds + 1))
  same = (later.tokens == draft.tokens).mean()
  assert same == 1 if method in ('coupled', 'top_k') else same < 0.9


def test_slots_in_any_order():
  """Depth-first slots: the draft of the same tree, slot by slot."""
  deep = tree.from_parents((0, 1, 1, 0, 4, 2))
  depth = (0,) + deep.depth
  for i, level in enumerate(levels(deep)):
    assert [depth[row] for row in level.rows] == [i] * len(level.rows)
    assert level.children == tuple(deep.children[row] for row in level.rows)
  paths = topologies.to_paths(deep)
  wide = topologies.from_paths(paths)
  a, b = (propose(make('top_k', t), make_context(8)) for t in (deep, wide))
  order = [topologies.to_paths(wide).index(path) for path in paths]
  assert order != sorted(order)
  np.testing.assert_array_equal(a.tokens, b.tokens[:, order])


@pytest.mark.parametrize('kwargs,match', [
    (dict(model=None), 'needs a model'), (dict(tree=None), 'static topology'),
    (dict(tree='medusa-63'), 'medusa-63'),
    (dict(tree=tree.chain(0)), 'no drafted slots'),
    (dict(tree=dataclasses.replace(TREE, parents=None)), 'static topology'),
    (dict(draft_sample_method='best'), "'best': known are coupled, iid")])
def test_bad_values_raise(kwargs, match):
  with pytest.raises(ValueError, match=match):
    TreeLM(**{'tree': TREE, 'model': LM, **kwargs})
