"""Distances with known values, their floors, and what is refused."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
from scipy import linalg

from specjax.eval import distances
from specjax.eval.distances import (
  bootstrap,
  frechet,
  frechet_estimate,
  inception_score,
)
from specjax.eval.distances import floor as floor_of
from specjax.eval.statistics import Statistics

RNG = np.random.default_rng(0)


def gaussian(mean, covariance, n=10_000, extractor='e'):
  return Statistics(np.asarray(mean, float), np.asarray(covariance, float), n,
                    extractor)


def spread(dim, rank=None):
  """Returns a covariance of a rank."""
  a = RNG.normal(size=(dim, rank or dim))
  return a @ a.T / dim


def test_known_means():
  mean, shift, c = RNG.normal(size=8), RNG.normal(size=8), spread(8)
  value = frechet(gaussian(mean, c), gaussian(mean + shift, c))
  assert value == pytest.approx(shift @ shift, rel=1e-9)
  assert frechet(gaussian(mean, c), gaussian(mean, c)) < 1e-9


def test_known_covariances():
  a, b = RNG.uniform(0, 3, 9), RNG.uniform(0, 3, 9)
  turn = np.linalg.qr(RNG.normal(size=(9, 9)))[0]  # the same for both
  value = frechet(gaussian(np.zeros(9), turn @ np.diag(a ** 2) @ turn.T),
                  gaussian(np.zeros(9), turn @ np.diag(b ** 2) @ turn.T))
  assert value == pytest.approx(np.square(a - b).sum(), rel=1e-9)
  c, d = spread(9), spread(9)  # these do not commute
  wanted = np.trace(c + d - 2 * linalg.sqrtm(c @ d).real)
  one, two = gaussian(np.zeros(9), c), gaussian(np.zeros(9), d)
  assert frechet(one, two) == pytest.approx(wanted, rel=1e-8)
  assert frechet(two, one) == pytest.approx(wanted, rel=1e-8)


def test_covariances_without_full_rank():
  c, zero = spread(12, 3), np.zeros((12, 12))
  assert frechet(gaussian(np.zeros(12), c), gaussian(np.zeros(12), c)) < (
      1e-6 * np.trace(c))
  for a, b in ((c, zero), (zero, c)):
    assert frechet(gaussian(np.zeros(12), a), gaussian(
        np.zeros(12), b)) == pytest.approx(np.trace(c))
  # No direction in common, turned so that the product is rounding alone.
  turn = np.linalg.qr(RNG.normal(size=(12, 12)))[0]
  a = turn[:, :6] @ turn[:, :6].T
  value = frechet(gaussian(np.zeros(12), a),
                  gaussian(np.zeros(12), np.eye(12) - a))
  assert value == pytest.approx(12, rel=1e-6)


def test_the_same_samples_and_samples_of_the_same_law():
  x = RNG.normal(size=(4000, 5)) @ np.diag([1, 2, 3, 1, 1])
  one = Statistics.of(x, extractor='e')
  assert frechet(one, one) < 1e-9
  two = Statistics.of(RNG.normal(size=(4000, 5)) @ np.diag(
      [1, 2, 3, 1, 1]) + 2, extractor='e')
  assert frechet(one, two) == pytest.approx(20, rel=0.05)


def test_the_standard_error_of_one_feature_is_known():
  # (m - m_r)^2 + (s - s_r)^2: of normal samples the variance of its estimate
  # is (2 shift s)^2 / n + (2 (s - s_r))^2 s^2 / (2 n).
  n, shift, s = 4000, 0.7, 1.6
  x = np.random.default_rng(0).normal(shift, s, (n, 1))
  real = gaussian(np.zeros(1), np.eye(1))
  found = frechet_estimate(real, x)
  wanted = np.sqrt(((2 * shift * s) ** 2 + 2 * ((s - 1) * s) ** 2) / n)
  assert found.standard_error == pytest.approx(wanted, rel=0.05)
  assert found.value == pytest.approx(shift**2 + (s - 1) ** 2, rel=0.1)


@pytest.mark.parametrize('dim, n', [(6, 400), (24, 1500)])
def test_the_standard_error_is_the_spread_over_sets(dim, n):
  rng = np.random.default_rng(1)
  real = gaussian(np.zeros(dim), np.diag(np.linspace(0.2, 2, dim)))
  mix = rng.normal(size=(dim, dim)) / np.sqrt(dim)
  sets = rng.standard_t(8, (60, n, dim)) @ mix + 0.3
  found = [frechet_estimate(real, x) for x in sets]
  spread = np.std([f.value for f in found], ddof=1)
  told = np.mean([f.standard_error for f in found])
  assert told == pytest.approx(spread, rel=0.3)  # 60 sets: 9 % deviation
  one = Statistics.of(sets[0], extractor=real.extractor)
  assert found[0].value == pytest.approx(frechet(real, one), rel=1e-9)
  again = bootstrap(
      lambda x: frechet_estimate(real, x).value, sets[0], resamples=100)
  assert found[0].standard_error == pytest.approx(
      (again.high - again.low) / 3.92, rel=0.35)


def test_the_standard_error_without_full_rank_is_finite():
  rng = np.random.default_rng(2)
  real = Statistics.of(rng.normal(size=(50, 9)), extractor='x')
  with pytest.warns(UserWarning, match='mostly bias'):
    found = frechet_estimate(real, rng.normal(size=(5, 9)))
  assert np.isfinite(found.standard_error) and found.standard_error > 0


def test_what_cannot_be_compared():
  one = gaussian(np.zeros(3), np.eye(3))
  for other in (dataclasses.replace(one, extractor='f'),
                gaussian(np.zeros(4), np.eye(4))):
    with pytest.raises(ValueError, match='different extractors'):
      frechet(one, other)
  bad = gaussian(np.zeros(3), np.diag([1, 1, -0.1]))
  for pair in ((one, bad), (bad, one)):
    with pytest.raises(ValueError, match='not a covariance'):
      frechet(*pair)
  rounded = gaussian(np.zeros(3), np.diag([1, 1, -1e-5]))
  assert frechet(rounded, rounded) < 1e-4


def test_too_few_samples_are_told():
  few = gaussian(np.zeros(3), np.eye(3), n=3)
  with pytest.warns(UserWarning, match='3 samples for 3 features'):
    frechet(few, gaussian(np.zeros(3), np.eye(3)))
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    enough = gaussian(np.zeros(3), np.eye(3), n=4)
    frechet(enough, enough)
    floor_of(RNG.normal(size=(8, 6)), 4)


def test_mmd_is_the_sum_over_pairs():
  x, y = RNG.normal(size=(5, 3)), RNG.normal(size=(4, 3))

  def k(u, v):
    return (sum(a * b for a, b in zip(u, v, strict=True)) / 3 + 1) ** 3
  within = [sum(k(u, v) for i, u in enumerate(z) for j, v in enumerate(z)
                if i != j) / (len(z) * (len(z) - 1)) for z in (x, y)]
  across = sum(k(u, v) for u in x for v in y) / 20
  assert distances.mmd(x, y) == pytest.approx(sum(within) - 2 * across)


def test_mmd_is_unbiased_under_the_null():
  found = [distances.mmd(*RNG.normal(size=(2, 10, 4))) for _ in range(2000)]
  error = np.std(found) / math.sqrt(len(found))
  assert abs(np.mean(found)) < 4 * error
  # The biased estimate would be found out: its diagonal adds this much.
  bias = 2 / 10 * (np.mean([
      (np.square(v).sum() / 4 + 1) ** 3
      for v in RNG.normal(size=(2000, 4))]) - 1)
  assert bias > 10 * error


def test_kernel_distance_of_a_known_shift():
  # In one dimension the moments are compared: 3 (1-0)^2 + 3 (2-1)^2 + 4^2.
  x, y = RNG.normal(size=(6000, 1)), RNG.normal(size=(6000, 1)) + 1
  found = distances.kernel_distance(x, y, subsets=40, size=300)
  assert found.mean == pytest.approx(22, rel=0.2)
  assert found.standard_error == pytest.approx(
      found.deviation / math.sqrt(40))
  null = distances.kernel_distance(x[:3000], x[3000:], subsets=40, size=300)
  assert abs(null.mean) < 0.05 * found.mean
  again = distances.kernel_distance(x, y, subsets=40, size=300)
  assert again == found != distances.kernel_distance(
      x, y, subsets=40, size=300, seed=1)


@pytest.mark.parametrize('change, text', [
    (dict(size=11), 'x: 10 samples; at least 11'), (dict(size=1), 'size=1'),
    (dict(subsets=1), 'subsets=1'),
    (dict(y=np.zeros((10, 3))), 'y: 3 features, the other has 2'),
    (dict(y=np.full((10, 2), np.nan)), 'y: holds values'),
    (dict(y=np.zeros(10)), 'y: .*expected features')])
def test_kernel_distance_refuses(change, text):
  good = dict(x=RNG.normal(size=(10, 2)), y=RNG.normal(size=(10, 2)), size=5,
              subsets=3)
  assert np.isfinite(distances.kernel_distance(**good)).all()
  with pytest.raises(ValueError, match=text):
    distances.kernel_distance(**{**good, **change})


def test_inception_score():
  sure = np.eye(4)[np.arange(200) % 4]
  assert inception_score(sure).mean == pytest.approx(4, rel=0.1)
  even = inception_score(sure, splits=5, seed=None)
  assert even.mean == pytest.approx(4) and even.deviation < 1e-12
  unsure = np.full((20, 4), 0.25)
  assert inception_score(unsure) == pytest.approx((1, 0))
  # One class alone; sorted classes in the order given; and shuffled.
  assert inception_score(np.eye(4)[[1] * 20]).mean == pytest.approx(1)
  ordered = np.repeat(np.eye(4), 50, axis=0)
  assert inception_score(ordered, splits=4, seed=None).mean == (
      pytest.approx(1))
  assert inception_score(ordered, splits=4).mean > 3.5
  p = RNG.dirichlet(np.ones(3), 50)
  wanted = math.exp(np.mean(
      [sum(r[c] * math.log(r[c] / p[:, c].mean()) for c in range(3))
       for r in p]))
  assert inception_score(p, splits=1).mean == pytest.approx(wanted)
  for bad, options, text in (
      (p * 2, {}, 'sum to 1'), (np.array([[1.5, -0.5]] * 20), {}, 'sum to 1'),
      (p[:9], {}, 'at least 10'), (p, {'splits': 0}, 'splits=0')):
    with pytest.raises(ValueError, match=text):
      inception_score(bad, **options)


def test_bootstrap_covers_the_mean():
  hits = 0
  for seed in range(60):
    x = np.random.default_rng(seed).normal(3, 2, 100)
    found = bootstrap(np.mean, x, seed=seed)
    assert found.low <= found.value <= found.high
    hits += found.low <= 3 <= found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.2, rel=0.4)
  assert hits >= 50  # of 60, for 95 %
  wide, narrow = (bootstrap(np.mean, np.arange(50.0), level=level)
                  for level in (0.99, 0.5))
  assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
  for bad, options, text in (
      (np.zeros(1), {}, 'at least 2'), (np.zeros(5), {'level': 1}, 'level=1'),
      (np.zeros(5), {'resamples': 1}, 'resamples=1'),
      (np.array([0, np.nan]), {}, 'not finite')):
    with pytest.raises(ValueError, match=text):
      bootstrap(np.mean, bad, **options)


def test_floor():
  x = RNG.normal(size=(2000, 6))
  small, large = floor_of(x, 50, repeats=5), floor_of(x, 1000)
  assert 0 < large < small / 5  # the bias falls with n
  assert floor_of(x, 50) == floor_of(x, 50) != floor_of(x, 50, seed=1)
  # Disjoint, and of the size asked for.
  rows = np.arange(20.0)[:, None]
  seen = []
  floor_of(rows, 10, distance=lambda a, b: seen.append((a, b)) or 0.0)
  (a, b), = seen
  assert sorted(np.concatenate([a, b]).ravel()) == list(range(20))
  assert len(a) == len(b) == 10
  for options, text in ((dict(n=11), 'at least 22'), (dict(n=1), 'n=1'),
                        (dict(n=5, repeats=0), 'repeats=0')):
    with pytest.raises(ValueError, match=text):
      floor_of(rows, **options)
