"""How much the samples of a class differ, and whether they are of the class.

No learnt perceptual distance is needed: distances are of any extractor's
features (`features.FeatureExtractor`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from specjax.eval import neighbours
from specjax.eval.features import check_images
from specjax.eval.statistics import Float, check_features


class Diversity(NamedTuple):
  """Mean Euclidean distance of two different samples of one class.

  Attributes:
    mean: of the classes' means, each class counting alike.
    by_class: class to mean; classes of one sample are left out.
  """

  mean: float
  by_class: dict[int, float]


class Accuracy(NamedTuple):
  """How often a classifier says the class that was asked for.

  Attributes:
    mean: over all samples.
    by_class: f64[C], NaN where a class has no sample.
    num_samples: i64[C], of each class.
  """

  mean: float
  by_class: Float
  num_samples: npt.NDArray[np.int64]


def diversity(
    features: npt.ArrayLike, labels: npt.ArrayLike | None = None
) -> Diversity:
  """Returns the mean pairwise distance within each class, over all pairs.

  Compare with the same number of real images of the same classes.

  Args:
    features: [N,D]. labels: int[N]; None is one class.

  Raises:
    ValueError: no class has two samples; see `check_features`.
  """
  x = check_features('features', features, 2)
  y = _labels(labels, len(x))
  found = {}
  for label in np.unique(y):
    part = x[y == label]
    n = len(part)
    if n < 2:
      continue
    part = part - part.mean(0)
    total = sum(float(np.sqrt(d).sum())
                for _, d in neighbours.blocks(part, part))
    found[int(label)] = total / (n * (n - 1))
  if not found:
    raise ValueError('no class has two samples')
  return Diversity(float(np.mean(list(found.values()))), found)


def duplicate_radius(real: npt.ArrayLike, quantile: float = 0.01) -> float:
  """Returns a distance that real images seldom fall below.

  Args:
    real: features [N,D], N as for the samples to be judged.
    quantile: of the distances to the nearest other image, in [0, 1].

  Raises:
    ValueError: another quantile; see `check_features`.
  """
  if not 0 <= quantile <= 1:
    raise ValueError(f'quantile={quantile}: must be in [0, 1]')
  return float(np.quantile(neighbours.nearest(real), quantile))


def near_duplicates(
    features: npt.ArrayLike, radius: float,
    reference: npt.ArrayLike | None = None,
) -> float:
  """Returns the share of samples with another one within `radius`.

  Args:
    features: [N,D]. radius: >= 0, see `duplicate_radius`.
    reference: [M,D], for example the training images, to be compared with
      in place of the other samples: a share of copies.

  Raises:
    ValueError: a negative radius; see `check_features`.
  """
  if not radius >= 0:
    raise ValueError(f'radius={radius}: must be >= 0')
  return float((neighbours.nearest(features, reference) <= radius).mean())


def psnr(
    images: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> Float:
  """Returns f64[N], 10 log10(255^2 / MSE) in dB; inf for equal images.

  Args:
    images: uint8[N,H,W,3]. reference: of the same shape.

  Raises:
    ValueError: other dtypes, or shapes that differ.
  """
  a, b = check_images(images), check_images(reference)
  if a.shape != b.shape:
    raise ValueError(f'images {a.shape} and reference {b.shape} differ')
  error = np.square(a.astype(np.float64) - b).mean((1, 2, 3))
  with np.errstate(divide='ignore'):
    return 10 * np.log10(255.0 ** 2 / error)


def per_class_accuracy(
    logits: npt.ArrayLike, labels: npt.ArrayLike) -> Accuracy:
  """Returns how often the greatest logit is that of the label.

  Args:
    logits: [N,C] of any classifier. labels: int[N] in [0, C), what the
      samples were conditioned on.

  Raises:
    ValueError: other shapes or labels; see `check_features`.
  """
  x = check_features('logits', logits)
  if labels is None:
    raise ValueError('labels are needed')
  y, classes = _labels(labels, len(x)), x.shape[1]
  if y.min() < 0 or y.max() >= classes:
    raise ValueError(f'labels in [{y.min()}, {y.max()}]; the logits are of '
                     f'{classes} classes')
  right = x.argmax(1) == y
  count = np.bincount(y, minlength=classes)
  with np.errstate(invalid='ignore'):
    by_class = np.bincount(y, right, classes) / count
  return Accuracy(float(right.mean()), by_class, count)


def _labels(labels: npt.ArrayLike | None, n: int) -> npt.NDArray[np.int64]:
  if labels is None:
    return np.zeros(n, np.int64)
  y = np.asarray(labels)
  if y.shape != (n,) or y.dtype.kind not in 'iu':
    raise ValueError(f'labels: {y.dtype}{list(y.shape)}; expected int[{n}]')
  return y.astype(np.int64)
