"""Copies as candidates of a lattice: found, inserted, mixed."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.distill import measure
from specjax.drafters import GrownLattice, lattice
from specjax.drafters.copying import Copy, Copying, insert, mix
from specjax.drafters.grown_lm import best_of
from specjax.drafters.lattice import Table

SHARES = (0.2, 0.5, 0.8)


def brute(text, num, most):
  """Returns what follows the longest, then newest, match and its length."""
  best, end = 0, 0
  for at in range(len(text) - 1):
    run = 0
    while run <= at and run < most and text[at - run] == text[-1 - run]:
      run += 1
    if run and run >= best:
      best, end = run, at + 1
  return (list(text[end:end + num]) if best else []), best


@pytest.mark.parametrize('temperature', [0.0, 0.7])
def test_copies_are_the_longest_newest_match(temperature):
  rng = np.random.default_rng(3)
  texts = [rng.integers(0, 4, rng.integers(1, 14)).tolist()
           for _ in range(60)] + [[1, 2, 3, 1, 2, 3, 1, 2, 3], [5], [1, 2, 3]]
  start = measure.context(texts, 4, temperature=temperature)
  copy = jax.jit(lambda c: Copying(SHARES).find(c, 5))(start)
  lengths = set()
  for text, tokens, share in zip(texts, copy.tokens, copy.share, strict=True):
    want, run = brute(text, 5, len(SHARES))
    lengths.add(run)
    assert tokens.tolist() == want + [-1] * (5 - len(want))
    for slot in range(5):
      known = SHARES[min(run + slot, 3) - 1] ** (1 + temperature)
      np.testing.assert_allclose(
          share[slot], known if slot < len(want) else 0, rtol=1e-6)
  assert lengths == {0, 1, 2, 3}


def test_nothing_is_copied_beyond_an_end_token():
  start = measure.context([[1, 2, 9, 5, 1]], 4, eos=[9])
  assert Copying(SHARES).find(start, 4).tokens.tolist() == [[2, 9, -1, -1]]


def test_copies_take_the_last_place_unless_they_are_there():
  tokens = jnp.asarray([[[7, 3, 5], [7, 3, 5], [7, 3, 5]]])
  got, new = insert(tokens, jnp.asarray([[3, 9, -1]]))
  assert got.tolist() == [[[7, 3, 5], [7, 3, 9], [7, 3, 5]]]
  assert new.tolist() == [[[False] * 3, [False, False, True], [False] * 3]]


def test_a_mixture_is_a_law():
  rng = np.random.default_rng(0)
  p = rng.dirichlet(np.ones(5), (4, 3))
  p[1, :, 4] = 0  # a candidate that the drafter does not know
  p /= p.sum(-1, keepdims=True)
  hit = np.zeros((4, 3, 5), bool)
  hit[:2, :, 4] = True
  share = rng.uniform(0, 1, (4, 3))
  share[0, 0] = 0.0
  with np.errstate(divide='ignore'):
    got = np.exp(mix(jnp.log(p), jnp.asarray(hit), jnp.asarray(share)))
  want = p.copy()
  want[:2] = (1 - share[:2, :, None]) * p[:2] + share[:2, :, None] * hit[:2]
  np.testing.assert_allclose(got, want, atol=1e-6)
  np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize('share', Copying.shares)
def test_certain_copies_keep_their_parents(share):
  """Rounding makes no path likelier than what it goes on from."""
  depth, num = 5, 4
  tokens = jnp.arange(depth)[:, None] * 10 + jnp.arange(num)  # slot, candidate
  step = jax.nn.log_softmax(jnp.where(jnp.eye(num, dtype=bool), 0.0, -42.0))
  table = Table(
      tokens[None], jax.nn.log_softmax(jnp.asarray([[1.0, 0.6, -6.0, -7.0]])),
      jnp.broadcast_to(step, (1, depth - 1, num, num)))
  copy = Copy(tokens[None, :, 1], jnp.full((1, depth), share).at[:, 0].set(0))
  mixed = lattice._mixed(table, copy)
  assert float(jnp.max(mixed.step)) <= 0
  drafter = GrownLattice(
      types.SimpleNamespace(num_slots=depth), num, num_speculative_tokens=6,
      tree_depth=depth, tree_top_k=2)
  token, parent, _ = best_of(drafter._expand(mixed), 6)
  slot = np.concatenate([[-1], np.asarray(token[0]) // 10])
  np.testing.assert_array_equal(slot[np.asarray(parent[0])], slot[1:] - 1)


@pytest.mark.parametrize('shares', [(), (1.0,), (-0.1,), (0.2, float('nan'))])
def test_shares_are_chances(shares):
  with pytest.raises(ValueError, match='shares='):
    Copying(shares)


def test_matches_are_searched_for_as_lookup_does():
  with pytest.raises(ValueError, match='prefer='):
    Copying(SHARES, prefer='best')
