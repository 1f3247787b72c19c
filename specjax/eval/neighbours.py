"""Precision, recall, density and coverage: who lies among whose neighbours.

Each sample has a ball that reaches to its k-th nearest neighbour of its own
set. Precision is about quality (fakes in balls of real samples), recall and
coverage about diversity.

References: Kynkäänniemi et al. 2019, arXiv:1904.06991 (precision, recall);
Naeem et al. 2020, arXiv:2002.09797 (density, coverage).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from specjax.eval.statistics import Float, check_features

_CHUNK = 1024  # rows of a block of distances
# A squared distance below this share of the squared norms is rounding.
_ROUNDING = 1e-12


class PrecisionRecall(NamedTuple):
  """Shares in [0, 1].

  Attributes:
    precision: of fakes that lie in the ball of some real sample.
    recall: of real samples that lie in the ball of some fake.
  """

  precision: float
  recall: float


class DensityCoverage(NamedTuple):
  """Robust relatives of precision and recall.

  Attributes:
    density: real balls around a fake, over k; near 1 for equal laws, not
      bounded by 1.
    coverage: share of real samples whose ball holds a fake, in [0, 1].
  """

  density: float
  coverage: float


def precision_recall(
    real: npt.ArrayLike, fake: npt.ArrayLike, k: int = 3) -> PrecisionRecall:
  """Returns precision and recall by balls of k neighbours.

  Both depend on the numbers of samples: compare at equal sizes.

  Args:
    real: features [N,D]. fake: [M,D]; N and M > k.
    k: neighbours, >= 1, the sample itself not counted.

  Raises:
    ValueError: too few samples; see `check_features`.
  """
  real, fake = _pair(real, fake, k)
  real_radius, fake_radius = _balls(real, k), _balls(fake, k)
  inside = []
  recalled = np.zeros(len(real), bool)
  for rows, d in blocks(fake, real):
    inside.append((d <= real_radius).any(1))
    recalled |= (d <= fake_radius[rows, None]).any(0)
  return PrecisionRecall(
      float(np.concatenate(inside).mean()), float(recalled.mean()))


def density_coverage(
    real: npt.ArrayLike, fake: npt.ArrayLike, k: int = 5) -> DensityCoverage:
  """Returns density and coverage by real balls of k neighbours.

  Args:
    real: features [N,D], N > k. fake: [M,D], M > k.
    k: neighbours, >= 1, the sample itself not counted.

  Raises:
    ValueError: too few samples; see `check_features`.
  """
  real, fake = _pair(real, fake, k)
  radius = _balls(real, k)
  count, covered = 0, np.zeros(len(real), bool)
  for _, d in blocks(fake, real):
    hits = d <= radius
    count += int(hits.sum())
    covered |= hits.any(0)
  return DensityCoverage(count / (k * len(fake)), float(covered.mean()))


def nearest(
    x: npt.ArrayLike, others: npt.ArrayLike | None = None) -> Float:
  """Returns f64[N], the distance of each x to its nearest other sample.

  Args:
    x: features [N,D]. others: [M,D], M >= 1; None is x, where a sample is
      not its own neighbour and N >= 2.

  Raises:
    ValueError: see `check_features`.
  """
  x = check_features('x', x, 1 if others is not None else 2)
  if others is None:
    return np.sqrt(_radii(x - x.mean(0), 1))
  y = check_features('others', others, 1, x.shape[1])
  centre = y.mean(0)
  return np.sqrt(np.concatenate(
      [d.min(1) for _, d in blocks(x - centre, y - centre)]))


def blocks(x: Float, y: Float) -> Iterator[tuple[slice, Float]]:
  """Yields (rows, squared distances f64[rows,M]) of x and y.

  All are >= 0, and exactly 0 between equal samples, so that duplicates lie in
  balls of radius 0.
  """
  y_norm = np.square(y).sum(1)
  for start in range(0, len(x), _CHUNK):
    rows = slice(start, min(start + _CHUNK, len(x)))
    part = x[rows]
    norms = np.square(part).sum(1)[:, None] + y_norm
    d = norms - 2 * (part @ y.T)
    d[d <= _ROUNDING * norms] = 0.0
    yield rows, d


def _pair(
    real: npt.ArrayLike, fake: npt.ArrayLike, k: int) -> tuple[Float, Float]:
  """Returns both sets, centred: distances lose fewer digits."""
  if k < 1:
    raise ValueError(f'k={k}: must be >= 1')
  real = check_features('real', real, k + 1)
  fake = check_features('fake', fake, k + 1, real.shape[1])
  centre = real.mean(0)
  return real - centre, fake - centre


def _balls(x: Float, k: int) -> Float:
  """Returns squared radii; the k-th neighbour is inside despite rounding."""
  return _radii(x, k) * (1 + 1e-9)


def _radii(x: Float, k: int) -> Float:
  """Returns f64[N], squared distances to the k-th other sample."""
  found = []
  for rows, d in blocks(x, x):
    d[np.arange(len(d)), np.arange(rows.start, rows.stop)] = np.inf
    found.append(np.partition(d, k - 1, axis=1)[:, k - 1])
  return np.concatenate(found)
