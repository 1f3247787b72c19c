"""Precision and its relatives on sets where they are known."""

import numpy as np
import pytest

from specjax.eval import neighbours
from specjax.eval.neighbours import density_coverage, precision_recall

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('x', [
    RNG.normal(size=(50, 4)), RNG.normal(size=(50, 4)) * 1e-3 + 1e4,
    np.repeat(RNG.normal(size=(5, 700)), 10, axis=0) + 3,  # balls of radius 0
    np.ones((20, 3))])
def test_identical_sets(x):
  assert precision_recall(x, x[::-1]) == (1, 1)
  density, coverage = density_coverage(x, x[::-1])
  assert coverage == 1 and density >= 1


def test_density_of_a_set_in_itself():
  # Each ball holds its centre and k others.
  x = RNG.normal(size=(100, 3))
  assert density_coverage(x, x, k=5).density == pytest.approx(6 / 5)


def test_far_apart():
  x = RNG.normal(size=(30, 3))
  assert precision_recall(x, x + 100) == (0, 0)
  assert density_coverage(x, x + 100) == (0, 0)


def test_quality_without_diversity_and_the_reverse():
  real = np.concatenate(
      [RNG.normal(size=(50, 2)), RNG.normal(size=(50, 2)) + 50])
  half = RNG.normal(size=(100, 2)) * 0.5  # one of two modes
  found = precision_recall(real, half)
  assert found.precision > 0.85 and found.recall <= 0.5
  assert density_coverage(real, half).coverage <= 0.5
  swapped = precision_recall(half, real)
  assert (swapped.precision, swapped.recall) == (
      found.recall, found.precision)
  # A single outlier among the reals opens a wide ball: density resists.
  lonely = np.concatenate([RNG.normal(size=(99, 2)), [[1e3, 1e3]]])
  garbage = RNG.normal(size=(100, 2)) + 500
  assert precision_recall(lonely, garbage).precision > 0.9
  assert density_coverage(lonely, garbage).density < 0.5


def test_against_loops(monkeypatch):
  monkeypatch.setattr(neighbours, '_CHUNK', 7)  # several blocks
  real, fake, k = RNG.normal(size=(25, 3)), RNG.normal(size=(18, 3)) * 1.5, 2

  def radius(z, i):
    return sorted(np.linalg.norm(z - z[i], axis=1))[k]
  inside = [[np.linalg.norm(f - r) <= radius(real, i)
             for i, r in enumerate(real)] for f in fake]
  recalled = [any(np.linalg.norm(f - r) <= radius(fake, j)
                  for j, f in enumerate(fake)) for r in real]
  assert precision_recall(real, fake, k) == pytest.approx(
      (np.any(inside, 1).mean(), np.mean(recalled)))
  assert density_coverage(real, fake, k) == pytest.approx(
      (np.sum(inside) / (k * 18), np.any(inside, 0).mean()))
  for others in (None, fake):
    d = np.linalg.norm(
        real[:, None] - (real if others is None else fake), axis=2)
    if others is None:
      np.fill_diagonal(d, np.inf)
    np.testing.assert_allclose(neighbours.nearest(real, others), d.min(1))


@pytest.mark.parametrize('function', [precision_recall, density_coverage])
def test_refuses(function):
  x = RNG.normal(size=(6, 3))
  for real, fake, k, text in (
      (x, x, 6, 'real: 6 samples; at least 7'), (x, x[:3], 3, 'fake: 3 sampl'),
      (x, x[:, :2], 2, 'fake: 2 features'), (x, x, 0, 'k=0'),
      (x, np.full((6, 3), np.nan), 2, 'fake: holds values'),
      (x[0], x, 2, 'real: .*expected features')):
    with pytest.raises(ValueError, match=text):
      function(real, fake, k)
