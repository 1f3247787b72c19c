"""Diversity, copies, PSNR and accuracy on small cases."""

import math

import numpy as np
import pytest

from specjax.eval import diversity

RNG = np.random.default_rng(0)


def test_mean_distance_within_classes():
  x = np.array([[0.0, 0], [3, 4], [1, 1], [1, 1], [7, 7]])
  found = diversity.diversity(x, np.array([0, 0, 4, 4, 9]))
  assert found.by_class == {0: pytest.approx(5), 4: 0}  # 9: one sample
  assert found.mean == pytest.approx(2.5)
  d = [np.linalg.norm(a - b) for i, a in enumerate(x) for b in x[:i]]
  assert diversity.diversity(x).mean == pytest.approx(np.mean(d))
  assert diversity.diversity(np.full((9, 700), 1e3)).mean == 0
  for bad, labels, text in (
      (x, np.arange(5), 'two samples'), (x[:1], None, 'at least 2'),
      (x, np.zeros(4, int), 'labels'), (x, np.zeros(5), 'labels')):
    with pytest.raises(ValueError, match=text):
      diversity.diversity(bad, labels)


def test_near_duplicates():
  x = RNG.normal(size=(100, 8))
  radius = diversity.duplicate_radius(x, 0.05)
  assert diversity.near_duplicates(x, radius) == pytest.approx(0.05, abs=0.02)
  copies = np.concatenate([x[:50], x[:25] + 1e-7, x[75:]])
  assert diversity.near_duplicates(copies, 1e-3) == 0.5  # both of a pair
  # Of training images: each copy once.
  assert diversity.near_duplicates(x[:10], 0, reference=x) == 1
  assert diversity.near_duplicates(
      np.concatenate([x[:10], x[:30] + 9]), 1e-3, reference=x) == 0.25
  for call, text in (
      (lambda: diversity.near_duplicates(x, -1), 'radius=-1'),
      (lambda: diversity.near_duplicates(x, math.nan), 'radius=nan'),
      (lambda: diversity.near_duplicates(x[:1], 1), 'at least 2'),
      (lambda: diversity.near_duplicates(x, 1, x[:, :3]), '3 features'),
      (lambda: diversity.duplicate_radius(x, 2), 'quantile=2')):
    with pytest.raises(ValueError, match=text):
      call()


def test_psnr():
  a = np.full((3, 5, 4, 3), 250, np.uint8)
  b = a.copy()
  b[1] -= 10
  b[2, 0, 0, 0] = 0  # must not wrap round
  wanted = [math.inf, 20 * math.log10(25.5),
            10 * math.log10(255 ** 2 / (250 ** 2 / 60))]
  np.testing.assert_allclose(diversity.psnr(a, b), wanted)
  np.testing.assert_allclose(diversity.psnr(b, a), wanted)
  for bad, text in ((b[:2], 'differ'), (b / 255, 'uint8')):
    with pytest.raises(ValueError, match=text):
      diversity.psnr(a, bad)


def test_accuracy():
  logits = np.array([[3.0, 1, 0], [0, 2, 1], [0, 1, 2], [5, 0, 0]])
  found = diversity.per_class_accuracy(logits, np.array([0, 1, 1, 0]))
  assert found.mean == 0.75
  np.testing.assert_array_equal(found.by_class, [1, 0.5, np.nan])
  np.testing.assert_array_equal(found.num_samples, [2, 2, 0])
  for labels, text in (([0, 1, 1, 3], 'of 3 classes'), ([0, 1], 'labels'),
                       ([0, -1, 1, 1], 'of 3 classes'), (None, 'needed')):
    with pytest.raises(ValueError, match=text):
      diversity.per_class_accuracy(logits, labels)
