"""Typical acceptance: the mask, its two forms, greedy rows."""

import functools

import jax
import numpy as np
import one_step
import pytest

from specjax.core import law as law_lib
from specjax.core import tree
from specjax.core.types import (
  IID,
  MATCH,
  POINT,
  TOP_PLUS_ONE,
  WITHOUT_REPLACEMENT,
)
from specjax.verify import Greedy, Typical

VOCAB, NUM = 6, 300
# Laws are float32: closer to a threshold than this, either side will do.
CLOSE = 1e-6


def make_node() -> one_step.Node:
  """Returns random laws; the first ones uniform, then nearly one-hot ones."""
  node = one_step.random_node(4, NUM, VOCAB, 3)
  for size in range(1, VOCAB + 1):  # uniform over `size` tokens
    node.target[size - 1] = np.where(np.arange(VOCAB) < size, 0.5, -np.inf)
  node.target[VOCAB:2 * VOCAB] = 8 * np.eye(VOCAB)
  return node


NODE = make_node()
P = one_step.softmax(NODE.target)
ENTROPY = -np.sum(P * np.log(np.where(P > 0, P, 1)), axis=1, keepdims=True)
SETTINGS = [(0.09, 0.3), (0.3, 0.09), (0.25, 0.5), (1.0, 1.0), (0.0, 0.3)]
by_setting = pytest.mark.parametrize('epsilon,delta', SETTINGS, ids=str)


@functools.cache
def mask(epsilon: float, delta: float, form: str = 'medusa') -> np.ndarray:
  """Returns bool[P,V]: which tokens pass as deterministic drafts.

  On the largest uniform, where the exact test passes sure tokens only.
  """
  rows, _ = one_step.build(NODE, [POINT])
  u = np.full(rows.draft.tokens.shape, one_step.TOP)
  verdict, _ = one_step.decide(Typical(epsilon, delta, form), None, rows, u)
  return np.asarray(verdict.num_accepted).reshape(P.shape) == 1


@by_setting
def test_mask_is_the_formula(epsilon, delta):
  """p > min(epsilon, delta exp(-H)), in float64; a sure token passes."""
  limit = np.minimum(epsilon, delta * np.exp(-ENTROPY))
  want = (P > limit) | (P == 1)
  sure = (np.abs(P - limit) > CLOSE) | (P == 0)
  assert sure.mean() > 0.9 and want.any() and not want.all()
  np.testing.assert_array_equal(mask(epsilon, delta)[sure], want[sure])
  assert not mask(epsilon, delta)[P == 0].any()


def test_both_forms_have_the_same_mask():
  np.testing.assert_array_equal(
      mask(0.25, 0.5), mask(0.25, 0.5, 'residual'))


def test_uniform_and_one_hot_laws():
  """Uniform over n: all tokens pass, as 1 / n > delta / n; one-hot: one."""
  for size in range(1, VOCAB + 1):
    np.testing.assert_array_equal(
        mask(0.3, 0.09)[size - 1], np.arange(VOCAB) < size)


def test_unit_settings_keep_what_surprises_less_than_the_entropy():
  """epsilon = delta = 1 is -log p < H, a second formula."""
  with np.errstate(divide='ignore'):
    surprise = -np.log(P)
  sure = np.abs(surprise - ENTROPY) > 1e-5
  np.testing.assert_array_equal(
      mask(1.0, 1.0)[sure], (surprise < ENTROPY)[sure])


def test_a_smaller_epsilon_accepts_no_less():
  """Nested masks, and each step matters."""
  masks = [mask(0.0, 0.3), mask(0.09, 0.3), mask(0.25, 0.3)]
  for looser, tighter in zip(masks, masks[1:]):
    assert (looser >= tighter).all()
    assert (looser > tighter).any()


def test_second_child_is_held_to_the_target_law():
  """Typical is what p says, not what rejections left of it."""
  rows, weight = one_step.build(NODE, [POINT] * 2)
  top = np.full(rows.draft.tokens.shape, one_step.TOP)
  verdict, _ = one_step.decide(Typical(0.25, 0.5), None, rows, top)
  drafted = weight.reshape(-1) > 0
  tokens, problem = rows.draft.tokens[drafted], np.arange(NUM)
  one, two = (mask(0.25, 0.5)[problem, tokens[:, j]] for j in range(2))
  # Where one draft is left of p, the exact test takes it for sure.
  open_end = (P[problem[:, None], tokens].sum(axis=1) < 0.99)
  want = np.where(one, 1, np.where(two, 2, 0))
  stop = np.asarray(verdict.path)[drafted, 1] % 3  # 3 is padding
  np.testing.assert_array_equal(stop[open_end], want[open_end])
  assert (np.bincount(want[open_end]) > 5).all()


TREE = (0, 0, 1, 1, 2, 4, 4, 0)


def medusa_rows() -> one_step.Rows:
  """Returns drafts on a tree, some not drafted, under continuous laws."""
  rng = np.random.default_rng(8)
  rows = one_step.random_rows(9, TREE, batch=400, vocab=4)
  logits = rng.normal(size=(400, len(TREE) + 1, 4)).astype(np.float32)
  return rows._replace(scores=rows.scores.replace(
      target_law=law_lib.Categorical(logits)))


def test_medusa_form_on_a_tree():
  """The longest path, ties by probability, then a plain draw at its end."""
  rule, rows = Typical(0.25, 0.6, 'medusa'), medusa_rows()
  u = np.zeros(rows.draft.tokens.shape, np.float32)
  verdict, law = one_step.decide(rule, None, rows, u)
  p = one_step.softmax(rows.scores.target_law.logits)
  limit = np.minimum(0.25, 0.6 * np.exp(np.sum(p * np.log(p), axis=-1)))
  counts, ties = np.zeros(4, int), 0
  for b, tokens in enumerate(rows.draft.tokens):
    log_p, alive, depth = [0.0], [True], [0]
    for slot, parent in enumerate(TREE):
      chance = p[b, parent, tokens[slot]]
      log_p.append(log_p[parent] + np.log(chance))
      alive.append(alive[parent] and rows.draft.valid[b, slot]
                   and chance > limit[b, parent])
      depth.append(depth[parent] + 1)
    longest = max(d for d, a in zip(depth, alive) if a)
    ends = [r for r in range(len(depth)) if alive[r] and depth[r] == longest]
    best = max(ends, key=lambda r: log_p[r])
    path = [best]
    while path[0]:
      path.insert(0, TREE[path[0] - 1])
    assert list(verdict.path[b, :longest + 1]) == path
    assert verdict.num_accepted[b] == longest
    np.testing.assert_allclose(law[b], p[b, best], atol=1e-6)
    distance = sum(1 - p[b, TREE[r - 1], tokens[r - 1]] for r in path[1:])
    np.testing.assert_allclose(verdict.excess[b], distance, atol=1e-5)
    counts[longest] += 1
    ties += best != ends[0]
  assert (counts > 10).all() and ties > 10


# At epsilon = delta = 1 the threshold is 1: a sure token must pass even so.
@pytest.mark.parametrize('rule,shape,law', [
    (Typical(), 'tree', 'mixed'), (Typical(), 'tree', 'point'),
    (Typical(1.0, 1.0), 'chain', 'mixed'),
    (Typical(form='medusa'), 'tree', 'mixed'),
    (Typical(1.0, 1.0, 'medusa'), 'tree', 'point')],
    ids=['residual', 'residual point', 'residual at 1', 'medusa',
         'medusa at 1'])
def test_greedy_rows_match_exactly(rule, shape, law):
  """Nothing is relaxed at temperature 0: the greedy rule's verdicts.

  But where siblings are equal: there only the first one's subtree is seen.
  """
  rows = one_step.random_rows(5, one_step.SHAPES[shape])
  tokens, parents = rows.draft.tokens, one_step.SHAPES[shape]
  equal = tokens[:, :, None] == tokens[:, None]
  twins = np.equal.outer(parents, parents) & ~np.eye(len(parents), dtype=bool)
  distinct = ~(equal & twins).any(axis=(1, 2))
  greedy = (rows.context.options.temperature == 0) & distinct
  if law == 'point':
    value = np.asarray(rows.scores.target_law.logits).argmax(axis=-1)
    rows = rows._replace(scores=rows.scores.replace(
        target_law=law_lib.Point(value.astype(np.int32), VOCAB)))
    greedy = distinct
  got, want = (jax.tree.map(lambda x: np.asarray(x)[greedy],
                            one_step.verify(r, None, rows))
               for r in (rule, Greedy()))
  assert len(set(want.num_accepted.tolist())) > 1
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('mode', [IID, WITHOUT_REPLACEMENT, TOP_PLUS_ONE])
def test_medusa_form_refuses_drawn_drafts(mode):
  """It would ignore their law; the other form does not."""
  rule = Typical(form='medusa')
  with pytest.raises(ValueError, match="form='residual'"):
    rule.check(tree.chain(2), (POINT, mode), VOCAB, None)
  rule.check(tree.chain(2), (POINT, MATCH), VOCAB, None)
  Typical().check(tree.chain(2), (mode,), VOCAB, None)
