"""How many drafts rules accept: closed forms, and an order of merit.

By the enumeration of `verify.exact_law`, which checks the law on the way.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verify.exact_law import NEAR, accepted, check, name

from specjax.certificates import problems
from specjax.core import law as law_lib
from specjax.core import topologies, tree
from specjax.core.types import (
  IID,
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

CHAIN, SIDE = tree.chain(3), topologies.branching((2, 1))
WIDE, LONG = topologies.branching((2, 2)), topologies.branching((2, 1, 1))

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
