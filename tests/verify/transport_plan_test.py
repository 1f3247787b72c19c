"""Plans are lossless by construction, and nearly optimal."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verify import closed_form

from specjax.verify import transport_plan

WOR = 'without_replacement'
by_mode = pytest.mark.parametrize('mode', transport_plan.MODES)
by_number = pytest.mark.parametrize('num', [2, 3])


NUM, VOCAB = 24, 5  # the shape of all laws


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def compiled(p, q, num, mode, iterations):
  return transport_plan.allocate(p, q, num, mode, iterations)


def allocate(p, q, num, mode, iterations=40):
  """Returns the plan with rows and vocabulary as given, [.., V]."""
  plan = compiled(*(np.float32(closed_form.pad(x, NUM, VOCAB))
                    for x in (p, q)), num, mode, iterations)
  cut = (0 if np.ndim(p) == 1 else slice(len(p)), slice(np.shape(p)[-1]))
  return jax.tree.map(lambda x: x[cut], plan)


share_of = jax.jit(transport_plan.share)


def all_tuples(vocab: int, num: int) -> np.ndarray:
  return np.array(list(itertools.product(range(vocab), repeat=num)))


def accepted(plan, q, num, mode):
  """Returns what every token gets, summed over all tuples: [rows, V]."""
  rows, vocab = q.shape
  tuples = all_tuples(vocab, num)
  some = jax.tree.map(lambda x: x[:, None], plan)
  tokens = jnp.broadcast_to(jnp.asarray(tuples), (rows,) + tuples.shape)
  some = jax.tree.map(
      lambda x: jnp.broadcast_to(x, tokens.shape[:2] + (vocab,)), some)
  share = np.asarray(
      share_of(some, tokens, jnp.ones(tokens.shape, bool)), np.float64)
  assert share.min() >= 0
  assert share.sum(-1).max() <= 1 + 1e-6
  got = np.zeros((rows, vocab))
  for row in range(rows):
    for drafts, part in zip(tuples, share[row]):
      assert not part[1:][[x in drafts[:k] for k, x in enumerate(
          drafts[1:], 1)]].any()
      np.add.at(got[row], drafts, part * closed_form.tuple_probability(
          q[row], drafts, mode))
  return got


@by_mode
@by_number
def test_solve(mode, num):
  """Optimal by the dual, within both marginals, in the stated layout."""
  for vocab in (3, 4):
    tuples = all_tuples(vocab, num)
    for p, q in zip(*closed_form.random_laws(num, 8, vocab)):
      if mode == WOR and np.sum(q > 0) < num:
        continue
      alpha, plan = transport_plan.solve(p, q, num, mode)
      law = closed_form.draft_law(q, num, mode)
      assert alpha == pytest.approx(closed_form.optimum(p, law), abs=1e-6)
      assert plan.shape == tuples.shape and plan.min() >= 0
      assert plan.sum() == pytest.approx(alpha)
      drawn = [closed_form.tuple_probability(q, t, mode) for t in tuples]
      assert (plan.sum(1) <= np.array(drawn) + 1e-7).all()
      got = np.bincount(tuples.ravel(), plan.ravel(), vocab)
      assert (got <= p + 1e-7).all()
      for k in range(1, num):
        again = (tuples[:, :k] == tuples[:, k:k + 1]).any(1)
        assert not plan[again, k].any()


@pytest.mark.parametrize('laws,mode,num,alpha', [
    (closed_form.A, 'iid', 2, 0.79), (closed_form.A, 'iid', 3, 0.871),
    (closed_form.A, WOR, 2, 0.8345238095), (closed_form.A, WOR, 3, 1),
    (closed_form.B, 'iid', 2, 1), (closed_form.B, WOR, 3, 1),
    (closed_form.A, 'iid', 1, 0.6), (closed_form.B, WOR, 1, 0.8)])
def test_reference_values(laws, mode, num, alpha):
  found, _ = transport_plan.solve(*laws, num, mode)
  assert found == pytest.approx(alpha, abs=1e-7)
  plan = allocate(*laws, num, mode)
  assert plan.load.sum() == pytest.approx(alpha, abs=1e-4)


@by_mode
@by_number
def test_allocate_is_feasible_and_nearly_optimal(mode, num):
  """And does what it says: the shares of all tuples add up to `load`."""
  p, q = closed_form.random_laws(20 + num, NUM, VOCAB, zeros=0.2)
  plan = allocate(p, q, num, mode)
  load = np.asarray(plan.load, np.float64)
  assert (p - load).min() >= -1e-6
  np.testing.assert_allclose(accepted(plan, q, num, mode), load, atol=1e-6)
  best = np.array([
      closed_form.optimum(a, closed_form.draft_law(b, num, mode))
      for a, b in zip(p, q)])
  gap = best - load.sum(-1)
  assert -1e-6 < gap.min() and gap.max() < 1e-3
  assert np.median(gap) < 1e-5
  # Splitting by p alone, without iterations, is lossless and far off.
  first = allocate(p, q, num, mode, 0)
  assert (p - np.asarray(first.load)).min() >= -1e-6
  assert (best - np.asarray(first.load).sum(-1)).max() > 1e-2


@by_mode
@by_number
def test_the_emitted_law_is_the_target(mode, num):
  """Accepted mass plus what is drawn after a rejection; any iterate."""
  p, q = closed_form.random_laws(30 + num, 10, 4)
  plan = allocate(p, q, num, mode, 0)
  got = accepted(plan, q, num, mode)
  left = np.maximum(p - np.asarray(plan.load, np.float64), 0)
  redrawn = left / np.maximum(left.sum(-1, keepdims=True), 1e-12)
  emitted = got + (1 - got.sum(-1, keepdims=True)) * redrawn
  np.testing.assert_allclose(emitted, p, atol=2e-6)
  # The same split without the clip is not lossless: the check can tell.
  loose = plan.replace(clip=jnp.ones_like(plan.clip))
  assert np.abs(accepted(loose, q, num, mode) - got).max() > 1e-2


ONE = np.eye(4, dtype=np.float32)
HALF = np.array([.5, .5, 0, 0], np.float32)


@pytest.mark.parametrize('p,q,mode,num,alpha', [
    (closed_form.A[0], closed_form.A[0], 'iid', 2, 1),
    (closed_form.A[0], closed_form.A[0], WOR, 3, 1),
    (HALF, HALF[::-1], 'iid', 2, 0), (HALF, HALF[::-1], WOR, 2, 0),
    (ONE[1], closed_form.A[1], 'iid', 3, 1 - .7 ** 3),
    (ONE[1], closed_form.A[1], WOR, 2, .3 + .4 * .3 / .6 + .2 * .3 / .8
     + .1 * .3 / .9),
    (closed_form.A[0], ONE[2], 'iid', 2, .3),
    (closed_form.A[0], HALF, WOR, 2, .3),
    (closed_form.A[0], [1 - 2e-7, 1e-7, 1e-7, 0], WOR, 2, .6),
    (closed_form.A[0], ONE[2], WOR, 2, 0),
], ids=str)
def test_degenerate_laws(p, q, mode, num, alpha):
  """The last one supports fewer tokens than there are drafts."""
  plan = allocate(p, q, num, mode)
  assert np.isfinite(plan.load).all() and np.isfinite(plan.clip).all()
  assert not np.isnan(plan.log_potential).any()
  assert plan.load.sum() == pytest.approx(alpha, abs=1e-5)
  assert (np.asarray(p) - np.asarray(plan.load)).min() >= -1e-6


def test_share_of_repeated_missing_and_excluded_drafts():
  p = np.array([.5, .3, .2, 0], np.float32)
  plan = transport_plan.Plan(
      log_potential=jnp.log(p), clip=jnp.array([1, .5, 1, 1.]), load=p)
  tokens = jnp.array([[0, 1, 2], [1, 1, 2], [0, 0, 1], [3, 3, 3], [1, 0, 0]])
  exists = jnp.array([[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1],
                      [0, 0, 0]], bool)
  many = jax.tree.map(lambda x: jnp.broadcast_to(x, (5, 4)), plan)
  np.testing.assert_allclose(
      share_of(many, tokens, exists),
      [[.5, .15, .2], [.3, 0, .4], [0, .625, .1875], [0, 0, 0], [0, 0, 0]],
      atol=1e-6)


def test_rows_do_not_mix():
  """Leading axes of any rank, and float64 callers get the same."""
  p, q = closed_form.random_laws(50, 6, VOCAB)
  want = allocate(p, q, 2, 'iid').load
  whole = compiled(
      *(np.float32(x).reshape(2, 3, VOCAB) for x in (p, q)), 2, 'iid', 40)
  assert whole.log_potential.shape == whole.clip.shape == (2, 3, VOCAB)
  np.testing.assert_allclose(whole.load.reshape(6, VOCAB), want, atol=1e-6)
  with jax.enable_x64(True):
    wide = compiled(jnp.asarray(p[0]), jnp.asarray(q[0]), 2, 'iid', 40)
  assert wide.load.dtype == np.float32
  np.testing.assert_allclose(wide.load, want[0], atol=1e-6)


P, Q = closed_form.A
WIDE = np.full(513, 1 / 513)


@pytest.mark.parametrize('call,words', [
    (lambda: compiled(P, Q, 2, 'top', 9), "mode='top'.*iid, without_repl"),
    (lambda: compiled(P, Q, 0, 'iid', 9), 'num_drafts=0'),
    (lambda: compiled(P, Q, 2, 'iid', -1), 'num_iterations=-1'),
    (lambda: compiled(P, Q[:2], 2, 'iid', 9), 'V'),
    (lambda: compiled(WIDE, WIDE, 2, 'iid', 9), f'limit is {2**18}'),
    (lambda: transport_plan.solve(WIDE, WIDE, 2, 'iid'), f'is {2**15}'),
    (lambda: transport_plan.solve(P, Q, 2, 'beam'), "mode='beam'"),
    (lambda: transport_plan.solve(P[None], Q[None], 2, 'iid'), 'V'),
    (lambda: transport_plan.solve(P, np.eye(4)[1], 2, WOR), '1 tokens'),
])
def test_errors(call, words):
  with pytest.raises(ValueError, match=words):
    call()
