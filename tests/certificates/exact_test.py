"""The machinery of exact certificates: drafts, boxes of noise, scripts.

And that it rejects every fault that is planted in a rule or a law.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import (
  cells,
  enumeration,
  exact,
  faulty_rules,
  problems,
)
from specjax.core import keys, topologies, tree
from specjax.core.types import (
  IID,
  POINT,
  TOP_PLUS_ONE,
  WITHOUT_REPLACEMENT,
)
from specjax.verify import Gumbel, Lenient, Speculative, base

# A fault must stand out from rounding by orders of magnitude.
WRONG = 1e-2
PAIR, THREE = topologies.branching((2,)), topologies.branching((3,))


# What is drafted, and how likely.

Q = np.array([.4, .3, .2, .1])


def weights(q, topology, kind) -> dict[tuple, float]:
  """Returns the probability of every draft and whether slots are drafted."""
  made = enumeration.drafts(
      problems.context_free(np.full(len(q), 1 / len(q)), q, topology, kind))
  return {tuple(map(int, t)): (float(w), tuple(map(bool, v)))
          for t, v, w in zip(made.tokens, made.valid, made.weight)}


def test_independent_siblings():
  found = weights(Q, PAIR, IID)
  assert len(found) == 16
  for (x, y), (weight, _) in found.items():
    np.testing.assert_allclose(weight, Q[x] * Q[y], rtol=1e-6)


def test_siblings_without_replacement():
  """In draw order, each from what is left; never twice."""
  found = weights(Q, THREE, WITHOUT_REPLACEMENT)
  assert set(found) == set(itertools.permutations(range(4), 3))
  for (x, y, z), (weight, _) in found.items():
    want = Q[x] * Q[y] / (1 - Q[x]) * Q[z] / (1 - Q[x] - Q[y])
    np.testing.assert_allclose(weight, want, rtol=1e-5)


def test_top_tokens_and_one_that_is_drawn():
  found = weights(Q[::-1], THREE, TOP_PLUS_ONE)
  assert set(found) == {(3, 2, 1), (3, 2, 0)}
  np.testing.assert_allclose(found[3, 2, 1][0], 2 / 3, rtol=1e-6)


def test_deterministic_siblings_are_ranked_lowest_id_first_on_ties():
  assert set(weights([.2, .3, .3, .2], THREE, POINT)) == {(1, 2, 0)}


@pytest.mark.parametrize('kind', [WITHOUT_REPLACEMENT, TOP_PLUS_ONE])
def test_nothing_left_to_draw(kind):
  """The slot is not drafted, and may hold anything."""
  found = weights([0, 0, 1, 0], PAIR, kind)
  assert len(found) == 4
  for x, (weight, valid) in found.items():
    assert x[0] == 2 and valid == (True, False) and weight == 0.25


def test_drafts_of_random_problems_are_a_law():
  """With filters, cuts, and a token's law looked up after its own path."""
  made = problems.random_problem(
      topologies.branching((2, 1)), IID, 3, num_problems=3, cut=0.5,
      options=problems.mixed_options(3))
  drafts = enumeration.drafts(made)
  np.testing.assert_allclose(
      np.bincount(drafts.problem, drafts.weight), 1, atol=1e-9)
  texts = problems.prefixes(3, 2)
  for tokens, after in zip(drafts.tokens, drafts.after):
    a, b, c, d = map(int, tokens)
    assert [texts[t] for t in after] == [(), (a,), (b,), (a, c), (b, d)]
  one = drafts.problem == 0
  assert drafts.valid[one].all(axis=0).tolist() == (
      [made.limit[0, 0] > 0, made.limit[0, 0] > 1,
       *drafts.valid[one].all(axis=0).tolist()[2:]])


def test_laws_of_the_target_are_those_of_the_reference():
  """Greedy rows, filters and penalties, after every prefix."""
  made = problems.random_problem(
      topologies.branching((2, 1)), POINT, 3, num_problems=4,
      options=problems.mixed_options(4, greedy=1))
  want = problems.conditionals(made)
  found = enumeration.softmax(enumeration.drafts(made).target_law.logits)
  np.testing.assert_allclose(found[:, :want.shape[1]], want, atol=1e-6)


def test_wrong_sizes_are_refused():
  with pytest.raises(ValueError, match='2 kinds for 3 slots'):
    problems.kinds_of(THREE, (IID, IID))
  with pytest.raises(ValueError, match="'top_k'.*2 rows for 3"):
    problems.random_problem(PAIR, IID, 3, num_problems=3, options={
        'temperature': np.ones(3), 'top_k': np.ones(2)})


# Boxes of noise, on decisions that are written down here.

def explored(decide, num_uniforms, num_draws, vocab=3):
  """Returns boxes and their probabilities, of `decide(u, y, keys)`.

  `decide` returns (accepted, token, law of draws [S,V]) of one point.
  """
  def run(points):
    out = [decide(u, y, k) for u, y, k in zip(
        points.uniform, points.draw, points.keys)]
    accepted = np.array([o[0] for o in out])
    tokens = np.full((len(out), 4), -1)
    for row, (a, token, _) in enumerate(out):
      tokens[row, :a], tokens[row, a] = 0, token
    law = np.array([o[2] for o in out]).reshape(len(out), num_draws, vocab)
    return cells.Seen(tokens, accepted, law, np.zeros(len(out)))

  found, seen = cells.explore(run, np.zeros(1, int), num_uniforms, num_draws,
                              vocab)
  width, drawn = found.chance(seen.law)
  return found, seen, width * drawn


def by_outcome(seen, chance) -> dict[int, float]:
  return {int(k): chance[seen.accepted == k].sum()
          for k in np.unique(seen.accepted)}


def test_boxes_of_nested_tests():
  """A threshold that depends on an earlier test, and a rare outcome."""
  def decide(u, y, keys):
    if u[0] < 0.3:
      return (2 if u[1] < 1e-4 else 1), 0, []
    return (3 if u[1] >= 0.75 else 0), 0, []

  _, seen, chance = explored(decide, 2, 0)
  found = by_outcome(seen, chance)
  for accepted, want in {2: 3e-5, 1: .29997, 3: .175, 0: .525}.items():
    np.testing.assert_allclose(found[accepted], want, atol=1e-7)


def test_boxes_of_alternatives():
  """Either test passes: no single noise changes the verdict at a corner."""
  def decide(u, y, keys):
    return int(u[0] < 0.2 or u[2] < 0.1), 0, []

  _, seen, chance = explored(decide, 3, 0)
  np.testing.assert_allclose(by_outcome(seen, chance)[1], .28, atol=1e-7)


def test_a_single_value_has_a_box_of_width_zero():
  found, seen, chance = explored(lambda u, y, k: (int(u[0] <= 0), 0, []), 1, 0)
  assert (seen.accepted == 1).any()
  np.testing.assert_allclose(by_outcome(seen, chance)[1], 0, atol=1e-7)


def test_draws_that_decide_and_draws_that_are_emitted():
  law = np.array([[.5, .2, .3], [.1, .2, .7]])

  def decide(u, y, keys):
    return (1, y[1], law) if y[0] == 2 else (0, y[0], law)

  found, seen, chance = explored(decide, 0, 2)
  np.testing.assert_allclose(by_outcome(seen, chance)[1], .3)
  assert (found.final[seen.accepted == 1] == 1).all()
  assert (found.value[seen.accepted == 1, 0] == 2).all()


def test_a_law_that_depends_on_a_uniform():
  """The emitted draw is the same, its law is not."""
  def decide(u, y, keys):
    return 0, y[0], [[1, 0, 0]] if u[0] < 0.4 else [[0, 1, 0]]

  found, seen, chance = explored(decide, 1, 1)
  first = seen.law[:, 0, 0] == 1
  np.testing.assert_allclose(chance[first].sum(), .4, atol=1e-7)


def test_what_cannot_be_enumerated_is_refused(monkeypatch):
  with pytest.raises(cells.NotEnumerable, match='neither'):
    explored(lambda u, y, keys: (int(keys), 0, []), 1, 0)
  monkeypatch.setattr(cells, '_MAX_CELLS', 200)
  with pytest.raises(cells.NotEnumerable, match='more than 200 boxes'):
    explored(lambda u, y, k: (0, y[0], [[u[0], 1 - u[0], 0]]), 1, 1)


# Rules whose noise is not what it seems.

class OneKey(Speculative):
  """Uses the uniforms' key for the correction."""

  def verify(self, params, context, draft, scores):
    key = keys.row(context, keys.Purpose.RESIDUAL)
    u = keys.uniform(key, draft.topology.num_nodes)
    token = scores.target_law.at(jnp.zeros(len(u), jnp.int32)).sample(key)
    count = (u[:, 0] < 0.5).astype(jnp.int32)
    return base.finish(draft, count, token)


class OwnNoise(Speculative):
  """Draws without asking `core.keys`."""

  def verify(self, params, context, draft, scores):
    u = jax.vmap(jax.random.uniform)(context.keys)
    return base.finish(
        draft, (u < 0.5).astype(jnp.int32), draft.tokens[:, 0])


@pytest.mark.parametrize('rule,what', [
    (OneKey(), 'one key twice'), (OwnNoise(), 'neither'),
    (Gumbel(2), 'neither')], ids=['one key', 'own noise', 'gumbel'])
def test_rules_that_cannot_be_enumerated_are_refused(rule, what):
  made = problems.random_problem(tree.chain(1), POINT, 3, num_problems=2)
  with pytest.raises(cells.NotEnumerable, match=what):
    exact.exact_law(rule, made)


# Rows of a table.

def test_rows_of_a_table():
  row = exact.certify_rule(
      Speculative(), topology=tree.chain(2), kind=IID, vocab_size=3, cut=0.2)
  assert row.passed and not row.note
  assert (row.rule, row.topology, row.kind) == (
      'speculative', 'chain 2', 'iid')
  assert row.options == 'temperature, cut 0.2'
  assert 0 < row.num_accepted < 2


@pytest.mark.parametrize('lenience', [1.0, 0.5])
def test_lossy_rows_report_their_distortion(lenience):
  """One token: the distortion is what is reported, exactly."""
  made = problems.random_problem(tree.chain(1), IID, 3, num_problems=4)
  found = exact.exact_law(Lenient(lenience), made)
  np.testing.assert_allclose(found.tv, found.excess, atol=1e-6)
  assert (found.tv.max() > WRONG) == (lenience < 1)
  row = exact.certify_rule(
      Lenient(lenience), topology=tree.chain(1), kind=IID, vocab_size=3)
  assert row.passed and 'lossy' in row.note


def test_a_rule_that_refuses_the_drafts_is_not_certified():
  with pytest.raises(ValueError, match="'gumbel' needs"):
    exact.certify_rule(Gumbel(), topology=PAIR, kind=IID, vocab_size=3)


@pytest.mark.parametrize('topology,text', [
    (tree.chain(3), 'chain 3'), (topologies.branching((2, 1)), 'tree (2,1)'),
    (topologies.sequences((2, 1)), 'tree of parents 0,0,1')])
def test_topologies_in_words(topology, text):
  assert exact.describe(topology) == text


# Planted faults.

@pytest.mark.parametrize('fault', faulty_rules.FAULTS, ids=lambda f: f.name)
def test_planted_faults_are_caught(fault):
  row = fault.examine()
  assert not row.passed
  assert row.error > WRONG or row.forbidden
  assert row.forbidden == (fault.name == 'u q <= p')


@pytest.mark.parametrize('fault', [
    f for f in faulty_rules.FAULTS if f.laws],
    ids=lambda f: f.name)
def test_the_same_problems_without_the_fault_pass(fault):
  made = dataclasses.replace(fault, laws={}).problem()
  assert exact.certify_problem(Speculative(), made).passed
