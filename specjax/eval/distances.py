"""Distances of two sets of images by their features, with their errors.

    real = measure(images, extractor, dataset='cifar10')
    fake = measure(samples, extractor, dataset='samples')
    value = frechet(real, fake)  # called `real.metric`
    null = floor(extractor(images), n=5000)

A Fréchet distance is biased upwards when samples are few, and hardly means
anything with fewer samples than features: state n and the distance of real
images from real images (`floor`), and give `kernel_distance`, which is
unbiased. All in float64 on the host.

References: Heusel et al. 2017, arXiv:1706.08500 (Fréchet); Binkowski et al.
2018, arXiv:1801.01401 (kernel); Salimans et al. 2016, arXiv:1606.03498
(inception score).
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import NamedTuple
import warnings

import numpy as np
import numpy.typing as npt

from specjax.eval.statistics import Float, Statistics, check_features

# Share of a trace that may be negative, by rounding.
_NEGATIVE = 1e-3


class KernelDistance(NamedTuple):
  """Unbiased squared MMD over subsets.

  Attributes:
    mean: over the subsets; about 0 for equal laws, and then negative as often
      as positive.
    standard_error: of that mean, the spread of the subsets over the root of
      their number. Subsets of one sample overlap: it says how much the choice
      of subsets matters, and bounds the sampling error from below.
    deviation: spread of the subsets, what is often reported.
  """

  mean: float
  standard_error: float
  deviation: float


class Score(NamedTuple):
  """A mean over splits and the splits' standard deviation."""

  mean: float
  deviation: float


class Estimate(NamedTuple):
  """A value and the standard error of its sampling."""

  value: float
  standard_error: float


class Interval(NamedTuple):
  """A value and its bootstrap percentile interval."""

  value: float
  low: float
  high: float


def frechet(a: Statistics, b: Statistics) -> float:
  """Returns the squared Fréchet distance of two Gaussians, >= 0.

      |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)

  with the last trace from the eigenvalues of the symmetric product; its
  negative ones, rounding errors, count as 0. Warns where n <= D, since the
  value is then dominated by its bias.

  Raises:
    ValueError: statistics of different extractors or widths; or one of the
      matrices is no covariance (its negative eigenvalues exceed 1e-3 of the
      trace).
  """
  _, product = _compared(a, b)
  return _frechet(a, b, np.linalg.eigvalsh(product))


def frechet_estimate(
    real: Statistics, features: npt.ArrayLike, *, dataset: str = '',
) -> Estimate:
  """Returns `frechet` of samples from real images, with its standard error.

  The error is the infinitesimal jackknife's: the deviation over the samples
  of what each adds to the distance,

      2 (m - m_r).(x - m) + |x - m|^2 - (x - m)' C_r^1/2 P^-1/2 C_r^1/2 (x - m)

  with P = C_r^1/2 C C_r^1/2, over the root of their number. It costs one
  decomposition where resampling costs hundreds. The real images stay: it is
  the error of a comparison of samplers by one set of real images, and holds
  nothing of the bias.

  Args:
    real: statistics of the real images.
    features: of the samples, [N,D]. dataset: their name.

  Raises:
    ValueError: see `frechet` and `check_features`.
  """
  x = check_features('features', features, 2)
  made = Statistics.of(x, extractor=real.extractor, dataset=dataset)
  root, product = _compared(real, made)
  values, vectors = np.linalg.eigh(product)
  # A direction without samples adds nothing: they have no part in it.
  seen = values > 1e-12 * max(values[-1], 0.0)
  x -= made.mean
  along = (x @ (root @ vectors[:, seen])) ** 2
  adds = (2 * x @ (made.mean - real.mean) + (x * x).sum(1)
          - along @ values[seen] ** -0.5)
  return Estimate(_frechet(real, made, values),
                  float(adds.std(ddof=1)) / math.sqrt(len(x)))


def _compared(a: Statistics, b: Statistics) -> tuple[Float, Float]:
  """Returns C_a^1/2 and C_a^1/2 C_b C_a^1/2; see `frechet`."""
  if a.extractor != b.extractor or a.dim != b.dim:
    raise ValueError(
        f'features of different extractors: {a.extractor!r} (D={a.dim}, '
        f'{a.dataset or "unnamed"}) and {b.extractor!r} (D={b.dim}, '
        f'{b.dataset or "unnamed"}) cannot be compared')
  if min(a.n, b.n) <= a.dim:
    warnings.warn(
        f'{a.metric}: {min(a.n, b.n)} samples for {a.dim} features; the '
        'value is mostly bias: compare it with `floor` at the same n',
        stacklevel=3)
  values, vectors = a.spectrum
  kept = _clipped(values, np.trace(a.covariance), a.dataset)
  root = (vectors * np.sqrt(kept)) @ vectors.T
  product = root @ b.covariance @ root
  return root, (product + product.T) / 2


def _frechet(a: Statistics, b: Statistics, values: npt.NDArray) -> float:
  """Returns the distance, from the eigenvalues of the product."""
  traces = np.trace(a.covariance), np.trace(b.covariance)
  overlap = np.sqrt(_clipped(values, traces[0] * traces[1], b.dataset)).sum()
  shift = a.mean - b.mean
  return max(float(shift @ shift + sum(traces) - 2 * overlap), 0.0)


def _clipped(values: npt.NDArray, scale: float, name: str) -> Float:
  """Returns eigenvalues with negative ones set to 0, if these are small.

  Where the two covariances share no direction, all are rounding errors of
  the `scale`.
  """
  negative = -values[values < 0].sum()
  if negative > _NEGATIVE * abs(values.sum()) + 1e-12 * abs(scale):
    raise ValueError(
        f'{name or "statistics"}: negative eigenvalues of {negative:.3g} in '
        f'all, trace {values.sum():.3g}: not a covariance, or damaged')
  return np.maximum(values, 0.0)


def kernel_distance(
    x: npt.ArrayLike, y: npt.ArrayLike, *, subsets: int = 100,
    size: int = 1000, seed: int = 0,
) -> KernelDistance:
  """Returns the unbiased squared MMD of kernel (x.y / D + 1)^3, as in KID.

  Args:
    x: features [N,D]. y: [M,D]; both have at least `size` samples.
    subsets: pairs of subsets, drawn without replacement within each, >= 2.
    size: of a subset, >= 2.
    seed: of the subsets.

  Raises:
    ValueError: too few samples, other ranges; see `check_features`.
  """
  if subsets < 2 or size < 2:
    raise ValueError(f'subsets={subsets}, size={size}: must be >= 2')
  x = check_features('x', x, size)
  y = check_features('y', y, size, x.shape[1])
  rng = np.random.default_rng(seed)
  found = np.array([
      mmd(x[rng.choice(len(x), size, replace=False)],
          y[rng.choice(len(y), size, replace=False)])
      for _ in range(subsets)])
  deviation = float(found.std(ddof=1))
  return KernelDistance(
      float(found.mean()), deviation / math.sqrt(subsets), deviation)


def mmd(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
  """Returns the unbiased squared MMD of all of x [N,D] and y [M,D].

  Raises:
    ValueError: fewer than 2 samples; see `check_features`.
  """
  x = check_features('x', x, 2)
  y = check_features('y', y, 2, x.shape[1])

  def kernel(u: Float, v: Float) -> Float:
    return (u @ v.T / u.shape[1] + 1.0) ** 3

  def within(u: Float) -> float:
    k = kernel(u, u)
    return float((k.sum() - np.trace(k)) / (len(u) * (len(u) - 1)))
  return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def inception_score(
    probabilities: npt.ArrayLike, *, splits: int = 10, seed: int | None = 0,
) -> Score:
  """Returns exp(mean KL(p(c|x) || p(c))) over splits; in [1, C].

  Args:
    probabilities: [N,C] of a classifier, rows that sum to 1.
    splits: parts of (nearly) equal size, each with its own p(c).
    seed: of the order in which samples are split, since samples are often
      sorted by class; None keeps their order, as some evaluators do.

  Raises:
    ValueError: no distributions, or fewer samples than splits.
  """
  if splits < 1:
    raise ValueError(f'splits={splits}: must be >= 1')
  p = check_features('probabilities', probabilities, splits)
  if (p < 0).any() or np.abs(p.sum(1) - 1).max() > 1e-3:
    raise ValueError('probabilities: rows must be >= 0 and sum to 1; logits '
                     'need a softmax first')
  if seed is not None:
    p = p[np.random.default_rng(seed).permutation(len(p))]
  scores = []
  for part in np.array_split(p, splits):
    mean = part.mean(0)
    # 0 log 0 = 0; where a row is positive, so is the mean.
    ratio = np.divide(part, mean, out=np.ones_like(part), where=part > 0)
    scores.append(np.exp((part * np.log(ratio)).sum(1).mean()))
  return Score(float(np.mean(scores)), float(np.std(scores)))


def bootstrap(
    fn: Callable[[npt.NDArray], float], x: npt.ArrayLike, *,
    resamples: int = 200, level: float = 0.95, seed: int = 0,
) -> Interval:
  """Returns `fn(x)` and an interval of its values on resampled rows.

  For means, shares and scores. Resampling repeats rows, which moves distances
  to neighbours and Fréchet distances as if there were fewer samples: the
  interval then lies beside the value, and its width is what it tells.

  Args:
    fn: of rows [N,...] to a finite number.
    x: [N,...], N >= 2.
    resamples: >= 2. level: share of the resamples inside, in (0, 1).
    seed: of the resamples.

  Raises:
    ValueError: on other ranges, or a value that is not finite.
  """
  x = np.asarray(x)
  if x.ndim < 1 or len(x) < 2:
    raise ValueError(f'x has shape {x.shape}; at least 2 rows are needed')
  if resamples < 2 or not 0 < level < 1:
    raise ValueError(f'resamples={resamples}, level={level}: must be >= 2, '
                     'in (0, 1)')
  rng = np.random.default_rng(seed)
  value = float(fn(x))
  found = [float(fn(x[rng.integers(len(x), size=len(x))]))
           for _ in range(resamples)]
  if not np.isfinite([value, *found]).all():
    raise ValueError('fn gave a value that is not finite')
  low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
  return Interval(value, float(low), float(high))


def floor(
    real: npt.ArrayLike, n: int, seed: int = 0, *, repeats: int = 1,
    distance: Callable[[Float, Float], float] | None = None,
) -> float:
  """Returns the distance of real from real images: two disjoint sets of n.

  What a perfect sampler would score with n samples against n real ones.

  Args:
    real: features [N,D], N >= 2 n.
    n: of each set, >= 2. seed: of the sets. repeats: mean over so many.
    distance: of two sets of features; None is `frechet`.

  Raises:
    ValueError: too few samples.
  """
  if n < 2 or repeats < 1:
    raise ValueError(f'n={n}, repeats={repeats}: must be >= 2, >= 1')
  real = check_features('real', real, 2 * n)
  distance = distance or _frechet_of
  rng = np.random.default_rng(seed)
  found = []
  for _ in range(repeats):
    order = rng.permutation(len(real))
    found.append(float(distance(real[order[:n]], real[order[n:2 * n]])))
  return float(np.mean(found))


def _frechet_of(x: Float, y: Float) -> float:
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # it is the floor that shows the bias
    return frechet(*(Statistics.of(z, extractor='same') for z in (x, y)))
