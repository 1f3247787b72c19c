"""Every rule, as coded, emits exactly the target's joint law.

By enumeration of all drafts and of all noise (`certificates.exact`): chains
and trees, every kind of draft that a rule takes.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from verify.exact_law import CLOSE, NEAR, accepted, check, name

from specjax.certificates import exact, problems
from specjax.core import law as law_lib
from specjax.core import topologies, tree
from specjax.core.types import (
  IID,
  MATCH,
  POINT,
  TOP_PLUS_ONE,
  WITHOUT_REPLACEMENT,
  Scores,
)
from specjax.verify import (
  Block,
  GreedyMultiDraft,
  KSeq,
  Match,
  OptimalTransport,
  Speculative,
  Traversal,
)

NUM = 4
CHAIN, SIDE = tree.chain(3), topologies.branching((2, 1))
WIDE, LONG = topologies.branching((2, 2)), topologies.branching((2, 1, 1))
PLAIN = {'temperature': np.resize([0.6, 1.0, 1.5], NUM)}
MIXED = problems.mixed_options(NUM, seed=1, greedy=1)
ALL_KINDS = (IID, WITHOUT_REPLACEMENT, TOP_PLUS_ONE, POINT, MATCH)

# Random context-dependent laws.

SMALL = [
    (Block(), CHAIN), (KSeq(), SIDE), (KSeq(), topologies.sequences((2, 1))),
    (OptimalTransport(), topologies.branching((1, 2))),
    *((rule, t) for t in (CHAIN, SIDE) for rule in (
        Speculative(), Traversal(), Match(), GreedyMultiDraft()))]
LARGE = [(Speculative(), WIDE), (Traversal(), WIDE), (Match(), WIDE),
         (GreedyMultiDraft(), WIDE), (Speculative(), LONG),
         (Traversal(), LONG)]
by_rule, by_small = (pytest.mark.parametrize(
    'rule,topology', some, ids=lambda x: name(x) or exact.describe(x))
                     for some in (SMALL + LARGE, SMALL))


def kinds_of(rule, topology) -> list[int]:
  """Returns the kinds of drafts that a rule takes, each effect once."""
  kinds = [k for k in ALL_KINDS if k in rule.modes]
  if topology.is_chain:  # without siblings, all that are drawn are alike
    drawn = [k for k in kinds if k not in (POINT, MATCH)]
    kinds = drawn[:1] + [k for k in kinds if k not in drawn]
  if topology in (WIDE, LONG):
    kinds = [k for k in kinds if k not in (IID, MATCH)]
  return [IID] if isinstance(rule, OptimalTransport) else kinds


@by_rule
def test_all_filters_and_cut_drafts(rule, topology):
  """Temperatures, filters, penalties, greedy rows; nodes that lack children.

  Filters leave zeros in both laws, and fewer tokens than there are children.
  """
  for kind in kinds_of(rule, topology):
    row = exact.certify_rule(
        rule, topology=topology, kind=kind, vocab_size=3, num_problems=NUM,
        options=MIXED, cut=0.3, seed=5)
    assert row.passed, row
  assert row.error < CLOSE and 0 < row.num_accepted < topology.max_depth


@by_small
def test_drafts_of_other_options(rule, topology):
  """Drafts from the plain softmax: tokens that the target excludes."""
  kind = kinds_of(rule, topology)[0]
  check(rule, problems.random_problem(
      topology, kind, 3, num_problems=NUM, seed=6, options=MIXED,
      same_options=False))


P = [.5, .3, .2]
# Rows: p, q. Equal; disjoint; one-hot p; one-hot q; zeros that overlap;
# nothing to draw twice.
DEGENERATE = np.array([
    [P, P], [[1, 0, 0], [0, .5, .5]], [[0, 1, 0], P], [P, [0, 1, 0]],
    [[.5, .5, 0], [0, .5, .5]], [[.5, .5, 0], [0, 0, 1]]])


@by_small
def test_degenerate_laws(rule, topology):
  for kind in kinds_of(rule, topology):
    found = check(rule, problems.context_free(
        DEGENERATE[:, 0], DEGENERATE[:, 1], topology, kind))
    if kind == IID and not isinstance(rule, Match):
      np.testing.assert_allclose(
          found.num_accepted[0], topology.max_depth, atol=NEAR)
    if kind in (IID, WITHOUT_REPLACEMENT):
      assert found.num_accepted[1] == 0
      assert found.num_accepted[5] == 0


@pytest.mark.parametrize('rule,kind', [
    (Speculative(), WITHOUT_REPLACEMENT), (GreedyMultiDraft(), TOP_PLUS_ONE),
    (Traversal(), WITHOUT_REPLACEMENT)], ids=name)
def test_more_siblings_than_tokens_to_draw(rule, kind):
  """Three siblings and one or two tokens: the rest are not drafted."""
  q = np.array([[0, 0, 1, 0], [0, .3, .7, 0], [1e-9, .3, .7, 0]])
  p = [[.1, .2, .3, .4]] * 3
  found = accepted(rule, p, q, topologies.branching((3,)), kind)
  assert found[0] < found[1]


@pytest.mark.parametrize('rule,topology', [
    (Speculative(), CHAIN), (Block(), CHAIN), (Traversal(), SIDE),
    (Traversal(), CHAIN), (Traversal(), WIDE), (GreedyMultiDraft(), SIDE),
    (KSeq(), SIDE), (OptimalTransport(), topologies.branching((1, 2))),
    (Match(), CHAIN), (Speculative(), SIDE)],
    ids=name)
def test_rows_that_forbid_everything_are_never_reached(rule, topology):
  """Behind an excluded draft a law may be no law (NaN): rules stop before.

  A mask that allows nothing there must not make the draft acceptable.
  """
  def target_law(context, logits, history):
    dead = jnp.any(history == 2, axis=-1)
    return law_lib.Categorical(jnp.where(dead[..., None], -jnp.inf, logits))

  made = problems.context_free(
      [.5, .5, 0], P, topology, kinds_of(rule, topology)[0])
  check(rule, dataclasses.replace(made, target_law=target_law))


@pytest.mark.parametrize('rule,topology,kind,vocab', [
    (Speculative(), tree.chain(2), IID, 6), (Block(), tree.chain(2), IID, 6),
    (Speculative(), topologies.branching((3,)), WITHOUT_REPLACEMENT, 5)],
    ids=name)
def test_larger_vocabulary(rule, topology, kind, vocab):
  """Sharper laws over more tokens, with zeros in draft and target."""
  check(rule, problems.random_problem(
      topology, kind, vocab, num_problems=NUM, scale=3.0, options=MIXED))


@pytest.mark.parametrize('rule,topology,kinds', [
    *((rule, CHAIN, kinds) for rule in (Speculative(), Block())
      for kinds in ((IID, POINT, IID), (POINT, IID, MATCH))),
    (Speculative(), SIDE, (POINT, IID, IID, POINT)),
    (Speculative(), SIDE, (IID, POINT, IID, IID))], ids=name)
def test_drafts_of_mixed_kinds(rule, topology, kinds):
  """A deterministic slot stands for its one-hot law, whatever its row."""
  check(rule, problems.random_problem(
      topology, kinds, 3, num_problems=NUM, options=MIXED, seed=8))


@pytest.mark.parametrize('rule,kind', [
    (Speculative(), WITHOUT_REPLACEMENT), (GreedyMultiDraft(), TOP_PLUS_ONE),
    (KSeq(), IID), (Match(), WITHOUT_REPLACEMENT)],
    ids=name)
def test_parents_computed_by_the_drafter(rule, kind):
  """Trees that are grown hand over parents as an array."""
  made = problems.random_problem(
      SIDE, kind, 3, num_problems=NUM, options=PLAIN, cut=0.3, seed=10)
  static = check(rule, made)
  grown = check(rule, dataclasses.replace(made, is_dynamic=True))
  np.testing.assert_allclose(
      grown.num_accepted, static.num_accepted, atol=NEAR)


@dataclasses.dataclass(frozen=True)
class Shuffled(Speculative):
  """Hands over the children of the root in another order of slots."""

  slots: tuple[int, ...] = (2, 0, 1)

  def verify(self, params, context, draft, scores):
    slots = np.asarray(self.slots)
    rows = np.concatenate([[0], slots + 1])
    verdict = super().verify(params, context, draft.replace(
        tokens=draft.tokens[:, slots], valid=draft.valid[:, slots],
        sibling=jnp.asarray(slots, jnp.int32)), Scores(
            target_law=scores.target_law.at(jnp.broadcast_to(
                rows, (len(draft.tokens), len(rows))))))
    back = jnp.asarray([*rows, len(rows)])  # padding stays padding
    return verdict.replace(path=back[verdict.path])


def test_draw_order_of_slots_in_any_order():
  check(Shuffled(), problems.random_problem(
      topologies.branching((3,)), WITHOUT_REPLACEMENT, 4, num_problems=NUM,
      options=PLAIN))


@pytest.mark.parametrize('options', [PLAIN, {}], ids=['sampled', 'greedy'])
@pytest.mark.parametrize(
    'rule', [Speculative(), GreedyMultiDraft(), Traversal()], ids=name)
def test_drafts_without_a_law(rule, options):
  """Lookup and greedy drafters state none; greedy targets have point laws."""
  found = check(rule, dataclasses.replace(problems.random_problem(
      SIDE, POINT, 3, num_problems=NUM, options=options, seed=3),
      states_law=False))
  if not options:
    np.testing.assert_array_equal(found.num_accepted % 1, 0)
