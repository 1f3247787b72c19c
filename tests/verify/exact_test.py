"""Every rule, as coded, emits exactly the target's joint law.

By enumeration of all drafts and of all noise (`certificates.exact`): chains
and trees, every kind of draft that a rule takes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import exact, problems
from specjax.core import law as law_lib
from specjax.core import topologies, tree
from specjax.core.types import (
  IID,
  MATCH,
  MODE_NAMES,
  POINT,
  TOP_PLUS_ONE,
  WITHOUT_REPLACEMENT,
  Draft,
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
from specjax.verify import block as block_lib

# Laws are float32; sums of up to a thousand terms. Seen: below 2e-7.
CLOSE = 2e-6
# Expected acceptance is a sum of such laws.
NEAR = 1e-5
NUM = 4
CHAIN, SIDE = tree.chain(3), topologies.branching((2, 1))
WIDE, LONG = topologies.branching((2, 2)), topologies.branching((2, 1, 1))
PLAIN = {'temperature': np.resize([0.6, 1.0, 1.5], NUM)}
MIXED = problems.mixed_options(NUM, seed=1, greedy=1)
ALL_KINDS = (IID, WITHOUT_REPLACEMENT, TOP_PLUS_ONE, POINT, MATCH)


def check(rule, problem) -> exact.Found:
  found = exact.exact_law(rule, problem)
  np.testing.assert_allclose(found.target.sum(axis=1), 1, atol=1e-12)
  assert found.error < CLOSE
  assert not found.forbidden
  return found


def accepted(rule, p, q, topology, kind) -> np.ndarray:
  """Returns the expected number of accepted drafts, and checks the law."""
  problem = problems.context_free(p, q, topology, kind)
  return check(rule, problem).num_accepted


def name(x) -> str | None:
  return getattr(x, 'name', None)


# One position, n drafts: probabilities of acceptance (derived in float64).

A, B = [.1, .2, .3, .4], [.5, .25, .15, .1]
A_DRAFT, B_DRAFT = [.4, .3, .2, .1], [.3, .4, .2, .1]
ONE = [
    (Speculative(), IID, (.6, .72, .768), (.8, .86, .902)),
    (Speculative(), WITHOUT_REPLACEMENT,
     (.6, .7642857143, .8402976190), (.8, .89375, .9676785714)),
    (Speculative(), POINT, (.1, .3, .6), (.25, .75, .9)),
    (Match(), POINT, (None, None, .6), (None, None, .9)),
    (KSeq(), IID, (None, .75, .7939499683), (None, .8965097170, .9505418388)),
    (GreedyMultiDraft(), TOP_PLUS_ONE,
     (.6, .7666666667, .9333333333), (.8, 1, 1)),
    (GreedyMultiDraft(), POINT, (.1, .3, .6), (.25, .75, .9)),
]


@pytest.mark.parametrize('rule,kind,one,two', ONE, ids=name)
def test_one_position(rule, kind, one, two):
  """Closed forms of every rule, for drafts that are badly and nearly right."""
  for num, want in enumerate(zip(one, two), 1):
    if want[0] is not None:
      found = accepted(rule, [A, B], [A_DRAFT, B_DRAFT],
                       topologies.branching((num,)), kind)
      np.testing.assert_allclose(found, want, atol=NEAR)


@pytest.mark.parametrize('drafts,num,which,want', [
    ('iid', 2, [0, 1], (.79, 1)), ('iid', 3, [0], (.871,)),
    ('without_replacement', 2, [0, 1], (.8345238095, 1))], ids=str)
def test_one_position_of_optimal_transport(drafts, num, which, want):
  """Never above the optimum, and below it by no more than is promised."""
  p, q = np.array([A, B])[which], np.array([A_DRAFT, B_DRAFT])[which]
  found = accepted(OptimalTransport(drafts), p, q,
                   topologies.branching((num,)), MODE_NAMES.index(drafts))
  assert (found < np.add(want, NEAR)).all()
  assert (found > np.subtract(want, 6e-4)).all()


# Chains and trees, the same laws at every position.

P, Q = [.5, .3, .2], [.2, .3, .5]
THIRD = [1 / 3, 2 / 3]
CHAINS = [
    (Speculative(), P, Q, (.7, 1.19, 1.533)),
    (Block(), P, Q, (.7, 1.25, 1.695)),
    (Traversal(), P, Q, (None, None, 1.695)),
    (Block(), THIRD, THIRD[::-1], (None, 11 / 9)),
]
TREES = {
    (2,): (.82, .82, .76, .76),
    (2, 2): (1.4924, 1.5284, 1.3376, 1.3856),
    (2, 1): (1.394, 1.454, 1.292, 1.352),
    (1, 2): (1.274, 1.31, 1.232, 1.28),
    (2, 1, 1): (1.7958, 1.965, 1.6644, 1.83),
}


@pytest.mark.parametrize('rule,p,q,lengths', CHAINS)
def test_chain(rule, p, q, lengths):
  """Published and derived figures; Sun et al. 2025 for two tokens."""
  for depth, want in enumerate(lengths, 1):
    if want is not None:
      found = accepted(rule, p, q, tree.chain(depth), IID)
      np.testing.assert_allclose(found, want, atol=NEAR)


@pytest.mark.parametrize('widths', TREES, ids=str)
@pytest.mark.parametrize('which', [0, 1], ids=['recursive', 'traversal'])
def test_tree(widths, which):
  rule = (Speculative(), Traversal())[which]
  for kind, want in zip((WITHOUT_REPLACEMENT, IID), TREES[widths][which::2]):
    found = accepted(rule, P, Q, topologies.branching(widths), kind)
    np.testing.assert_allclose(found, want, atol=NEAR)


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
  found = accepted(rule, [A] * 3, q, topologies.branching((3,)), kind)
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


def test_match_accepts_what_it_says():
  """Drawn drafts sum p q; the siblings are drawn apart from the target."""
  found = accepted(Match(), [A, B], [A_DRAFT, B_DRAFT], tree.chain(1), IID)
  np.testing.assert_allclose(
      found, [np.dot(A, A_DRAFT), np.dot(B, B_DRAFT)], atol=1e-12)


# Order of merit, problem by problem.

def test_block_accepts_no_less_than_speculative():
  """And on a chain traversal verification is block verification."""
  made = problems.random_problem(CHAIN, IID, 3, num_problems=50, seed=12)
  token, block, traversal = (
      check(rule, made).num_accepted
      for rule in (Speculative(), Block(), Traversal()))
  assert (block >= token - 1e-6).all()
  assert (block > token + 1e-3).any()
  np.testing.assert_allclose(traversal, block, atol=1e-6)


@pytest.mark.parametrize('topology,kind,num', [
    (SIDE, IID, 12), (SIDE, WITHOUT_REPLACEMENT, 12),
    (WIDE, WITHOUT_REPLACEMENT, 6), (LONG, WITHOUT_REPLACEMENT, 2)])
def test_traversal_accepts_no_less_than_recursive_rejection(
    topology, kind, num):
  made = problems.random_problem(topology, kind, 3, num_problems=num, seed=13)
  recursive, traversal = (
      check(rule, made).num_accepted for rule in (Speculative(), Traversal()))
  assert (traversal >= recursive - 1e-6).all()
  assert (traversal > recursive + 1e-3).any()


def test_hazards_of_the_published_example():
  """The four drafts of the two-token example, accept test by accept test."""
  drafts = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int32)
  law = lambda p, rows: law_lib.Categorical(  # noqa: E731
      jnp.broadcast_to(jnp.log(jnp.asarray(p)), (4, rows, 2)))
  draft = Draft(topology=tree.chain(2), tokens=jnp.asarray(drafts),
                valid=jnp.ones((4, 2), bool), mode=jnp.full(2, IID),
                draft_law=law(THIRD[::-1], 2))
  scores = Scores(target_law=law(THIRD, 3))

  @jax.jit
  def both(draft, scores):
    log_w = block_lib._log_weights(draft, scores)
    return log_w, block_lib._hazards(
        draft, scores.target_law, log_w, jnp.full(4, 2))

  log_w, hazards = both(draft, scores)
  np.testing.assert_allclose(
      jnp.exp(log_w), [[.5, .25], [.5, 1], [1, .5], [1, 1]], atol=1e-6)
  np.testing.assert_allclose(
      hazards, [[0, .25], [0, 1], [1, .5], [1, 1]], atol=1e-6)
