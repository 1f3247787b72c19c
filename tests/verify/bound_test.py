"""Bounds and closed forms against enumeration, subsets and linear programs."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verify import closed_form

from specjax.core import numerics
from specjax.verify import bound, transport_plan

A, B = closed_form.A, closed_form.B
WOR = 'without_replacement'

# (mode or rule, n) -> value for laws A and B.
BOUNDS = {
    ('iid', 1): (0.6, 0.8), ('iid', 2): (0.79, 1), ('iid', 3): (0.871, 1),
    (WOR, 1): (0.6, 0.8), (WOR, 2): (0.8345238095, 1), (WOR, 3): (1, 1),
    ('top_plus_one', 1): (0.6, 0.8), ('top_plus_one', 2): (0.7666666667, 1),
    ('top_plus_one', 3): (0.9333333333, 1),
    ('top', 1): (0.1, 0.25), ('top', 2): (0.3, 0.75), ('top', 3): (0.6, 0.9)}
RULES = {
    ('speculative', 1): (0.6, 0.8), ('kseq', 1): (0.6, 0.8),
    ('kseq', 2): (0.75, 0.8965097170),
    ('kseq', 3): (0.7939499683, 0.9505418388),
    ('top_plus_one', 2): (0.7666666667, 1), ('top', 2): (0.3, 0.75)}
RHO = {1: (1, 1), 2: (1.5, 1.3216990566), 3: (1.9394996831, 1.5018061295)}
NUM, VOCAB = 40, 5  # the shape of all small laws


@pytest.fixture(params=[True, False], ids=['bisection', 'sections'])
def search(request, monkeypatch):
  """The way to search on CPUs, and the one on accelerators."""
  monkeypatch.setattr(numerics, 'on_cpu', lambda: request.param)


@functools.partial(jax.jit, static_argnums=(2, 3))
def best(p, q, num, mode):
  return bound.acceptance_upper_bound(p, q, num, mode)


def kseq_rho(p, q, num):
  """Traced anew, for the search that is set."""
  return jax.jit(lambda *x: bound.kseq_rho(*x))(p, q, jnp.asarray(num))


def laws(seed, zeros=0.0):
  return closed_form.random_laws(seed, NUM, VOCAB, zeros=zeros)


def run(p, q, num, mode, dtype=np.float32):
  """Returns the bound of each row (or of the only one), in that precision."""
  with jax.enable_x64(dtype == np.float64):
    found = best(*(jnp.asarray(closed_form.pad(x, NUM, VOCAB), dtype)
                   for x in (p, q)), num, mode)
    assert found.dtype == dtype
  return np.asarray(found)[:len(p)] if np.ndim(p) > 1 else found[0]


def exact(p, q, num, mode):
  return run(p, q, num, mode, np.float64)


def enumerated(p, q, num, mode):
  return np.array([
      closed_form.optimum(a, closed_form.draft_law(b, num, mode))
      for a, b in zip(p, q)])


@pytest.mark.parametrize('mode,num', BOUNDS)
def test_reference_bounds(mode, num):
  p, q = np.stack([A, B], axis=1)
  np.testing.assert_allclose(
      exact(p, q, num, mode), BOUNDS[mode, num], atol=1e-9)
  np.testing.assert_allclose(
      run(p, q, num, mode), BOUNDS[mode, num], atol=1e-6)


@pytest.mark.parametrize('rule,num', RULES)
def test_reference_rules(rule, num):
  p, q = np.stack([A, B], axis=1)
  with jax.enable_x64(True):
    found = jax.jit(
        lambda p, q: bound.expected_acceptance(p, q, num, rule))(p, q)
    assert found.dtype == np.float64
  np.testing.assert_allclose(found, RULES[rule, num], atol=1e-9)


def test_reference_division_factors(search):
  """The number of drafts is traced, and differs between the rows."""
  p, q = (np.stack([x, y] * 3) for x, y in zip(A, B))
  num, want = np.repeat([1, 2, 3], 2), np.concatenate(list(RHO.values()))
  rho, beta = kseq_rho(jnp.float32(p), jnp.float32(q), num)
  np.testing.assert_allclose(rho, want, atol=1e-6)
  np.testing.assert_allclose(
      beta, np.minimum(q, p / np.asarray(rho)[:, None]).sum(-1), atol=1e-6)
  np.testing.assert_array_equal(rho[:2], 1)
  if numerics.on_cpu():
    with jax.enable_x64(True):
      rho, _ = kseq_rho(p, q, num)
    np.testing.assert_allclose(rho, want, atol=1e-9)


@pytest.mark.parametrize('mode', transport_plan.MODES)
@pytest.mark.parametrize('num', [2, 3])
@pytest.mark.parametrize('zeros', [0.0, 0.3])
def test_bound_is_the_optimum_of_the_linear_program(mode, num, zeros):
  """V = 4 and 5; 320 pairs of laws in all."""
  pairs = [closed_form.random_laws(s, NUM // 2, v, VOCAB, zeros)
           for s, v in ((num, 4), (10 + num, 5))]
  p, q = (np.concatenate(x) for x in zip(*pairs))
  found = exact(p, q, num, mode)
  for row, (a, b) in enumerate(zip(p, q)):
    if mode == WOR and np.sum(b > 0) <= num:
      want = a[b > 0].sum()
    else:
      want, _ = transport_plan.solve(a, b, num, mode)
    assert found[row] == pytest.approx(want, abs=1e-6), (a, b)
  np.testing.assert_allclose(run(p, q, num, mode), found, atol=2e-6)
  assert np.ptp(found) > 0.1


@pytest.mark.parametrize('mode', bound.MODES)
@pytest.mark.parametrize('num', [1, 2, 3])
def test_bound_is_the_best_subset(mode, num):
  """Exact in float64 to what is stated; zeros in both laws."""
  p, q = laws(40 + num, zeros=0.3)
  np.testing.assert_allclose(
      exact(p, q, num, mode), enumerated(p, q, num, mode), atol=2e-7)


@pytest.mark.parametrize('num', [2, 3, 4])
def test_draws_that_take_long(num):
  """Rare tokens must be drawn where the frequent ones run out."""
  rng = np.random.default_rng(3)
  scale = 10.0 ** -rng.choice([0, 3, 9, 15], (NUM, VOCAB))
  scale[:, :num - 1] = 1
  q = rng.dirichlet(np.ones(VOCAB), NUM) * scale
  q /= q.sum(-1, keepdims=True)
  p = rng.dirichlet(np.ones(VOCAB), NUM)
  want = enumerated(p, q, num, WOR)
  np.testing.assert_allclose(exact(p, q, num, WOR), want, atol=1e-8)
  np.testing.assert_allclose(run(p, q, num, WOR), want, atol=2e-6)


@pytest.mark.parametrize('num', [1, 2, 3, 5])
def test_top_plus_one_is_the_linear_program_of_its_own_drafts(num):
  p, q = laws(60 + num, zeros=0.3)
  want = [closed_form.linear_program(
      a, closed_form.draft_law(b, num, 'top_plus_one')) for a, b in zip(p, q)]
  np.testing.assert_allclose(
      exact(p, q, num, 'top_plus_one'), want, atol=1e-6)


def test_kseq_is_valid_and_within_its_guarantee(search):
  """2, 3 or 8 drafts, by row."""
  p, q = laws(80, zeros=0.2)
  num = np.resize([2, 3, 8], NUM)
  rho, beta = map(np.asarray, kseq_rho(jnp.float32(p), jnp.float32(q), num))
  some = np.asarray(bound.kseq_acceptance(beta, num))
  want = [closed_form.kseq(*row)[1] for row in zip(p, q, num)]
  np.testing.assert_allclose(some, want, atol=1e-6)
  kept = np.minimum(q, p / rho[:, None]) * (some / beta)[:, None]
  assert (p - kept).min() > -1e-6
  optimum = np.select(
      [num == n for n in (2, 3, 8)],
      [exact(p, q, n, 'iid') for n in (2, 3, 8)])
  assert (some >= (1 - (1 - 1 / num) ** num) * optimum - 1e-6).all()
  assert (some <= optimum + 1e-6).all()
  assert (some < optimum - 0.01).any()


def test_kseq_with_any_leading_axes():
  """No drafts at all count as one, as in rows that are done."""
  p, q = (x[:6].reshape(2, 3, VOCAB) for x in laws(90))
  rho, beta = kseq_rho(jnp.float32(p), jnp.float32(q), [[2, 3, 0], [1, 4, 5]])
  assert rho.shape == beta.shape == (2, 3)
  assert rho[0, 2] == rho[1, 0] == 1
  alone, _ = kseq_rho(jnp.float32(p[1, 1]), jnp.float32(q[1, 1]), 4)
  np.testing.assert_allclose(rho[1, 1], alone, atol=1e-6)


ONE = np.eye(4)
HALF = np.array([.5, .5, 0, 0])
DEGENERATE = [
    ('equal', A[0], A[0], dict(iid=1, without_replacement=1, kseq=1)),
    ('same one-hot', ONE[1], ONE[1], dict(
        iid=1, without_replacement=1, top_plus_one=1, top=1, kseq=1)),
    ('other one-hot', ONE[1], ONE[2], dict(
        iid=0, without_replacement=0, kseq=0)),
    ('disjoint', HALF, HALF[::-1], dict(
        iid=0, without_replacement=0, kseq=0)),
    ('sure draft', A[0], ONE[2], dict(iid=.3, without_replacement=.3)),
    ('few drafts', A[0], HALF, dict(iid=.3, without_replacement=.3)),
    ('few drafts, one rare', A[0], np.array([1 - 1e-6, 1e-6, 0, 0]), dict(
        without_replacement=.3)),
    ('sure target', ONE[3], A[1], dict(
        iid=1 - .9 ** 3, top=0, top_plus_one=1 / 3)),
]


@pytest.mark.parametrize('name,p,q,want', DEGENERATE, ids=lambda x: (
    x if isinstance(x, str) else ''))
def test_degenerate_laws(name, p, q, want):
  """Three drafts, in float32."""
  del name
  for mode, value in want.items():
    if mode == 'kseq':
      found = bound.expected_acceptance(jnp.float32(p), q, 3, mode)
    else:
      found = run(p, q, 3, mode)
    np.testing.assert_allclose(found, value, atol=1e-6, err_msg=mode)


@pytest.mark.parametrize('mode', [WOR, 'top', 'top_plus_one'])
def test_more_drafts_than_tokens(mode):
  p, q = laws(1)
  np.testing.assert_allclose(run(p, q, VOCAB, mode), 1, atol=1e-6)
  np.testing.assert_allclose(run(p, q, 20, mode), 1, atol=1e-6)
  assert best(np.ones(1), np.ones(1), 2, mode) == 1


@pytest.mark.parametrize('mode', bound.MODES)
def test_tokens_that_the_draft_excludes(mode):
  """Likeliest tokens are drafts all the same; drawn ones are not."""
  q = np.array([0, 1, 0, 0])
  want = {'iid': .2, WOR: .2, 'top_plus_one': .3, 'top': .6}
  assert run(A[0], q, 3, mode) == pytest.approx(want[mode], abs=1e-6)


@pytest.mark.parametrize('mode', bound.MODES)
def test_rows_and_names_of_tokens_do_not_matter(mode):
  p, q = laws(95)
  together = run(p, q, 3, mode)
  other = np.random.default_rng(0).permutation(VOCAB)
  for row in (0, 7):
    assert run(p[row, other], q[row, other], 3, mode) == pytest.approx(
        together[row], abs=1e-6)


@pytest.mark.parametrize('mode', bound.MODES)
def test_large_batches_are_quick(mode, num=3):
  """V = 1000, in 16 rows of two axes."""
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(2, 4, 4, 1000)) * 3
  p, q = jax.nn.softmax(jnp.float32(logits.cumsum(0)))
  best(p, q, num, mode).block_until_ready()
  start = time.perf_counter()
  found = best(p, q, num, mode).block_until_ready()
  assert time.perf_counter() - start < 2
  assert found.shape == (4, 4) and found.dtype == jnp.float32
  assert ((found > 0) & (found < 1)).all()
  if mode in ('iid', WOR):  # no worse than one draft
    assert (found > np.minimum(p, q).sum(-1)).all()


@pytest.mark.parametrize('call,words', [
    (lambda: bound.acceptance_upper_bound(*A, 2, 'beam'),
     "mode='beam'.*iid, without_replacement, top_plus_one, top"),
    (lambda: bound.acceptance_upper_bound(*A, 0, 'iid'), 'num_drafts=0'),
    (lambda: bound.acceptance_upper_bound(A[0], A[1][:3], 2, 'iid'), 'V'),
    (lambda: bound.acceptance_upper_bound(np.float32(1), 1., 2, 'iid'), 'V'),
    (lambda: bound.expected_acceptance(*A, 2, 'block'),
     "rule='block'.*speculative, kseq, top_plus_one, top"),
    (lambda: bound.expected_acceptance(*A, 2, 'speculative'), 'num_drafts=2'),
    (lambda: bound.expected_acceptance(*A, jnp.array(2), 'top'), 'static'),
    (lambda: bound.kseq_rho(*A, 0), 'num_drafts=0'),
])
def test_errors(call, words):
  with pytest.raises(ValueError, match=words):
    call()
