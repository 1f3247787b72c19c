"""Mean and covariance of features: what a Fréchet distance compares."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any
import zipfile

import numpy as np
import numpy.typing as npt

from specjax.eval.features import FeatureExtractor, check_images, names
from specjax.io.errors import FormatError

Float = npt.NDArray[np.float64]

_FORMAT = 'specjax-statistics'
_FIELDS = ('mean', 'covariance', 'n', 'extractor', 'metric', 'dataset')


def check_features(
    name: str, x: Any, least: int = 1, dim: int | None = None) -> Float:
  """Returns features as f64[N,D].

  Raises:
    ValueError: no finite matrix of numbers, D = 0 or not `dim`, N < `least`.
  """
  x = np.asarray(x)
  if x.ndim != 2 or x.dtype.kind not in 'fiu' or not x.shape[1]:
    raise ValueError(f'{name}: {x.dtype}{list(x.shape)}; expected features '
                     '[N,D]')
  if dim is not None and x.shape[1] != dim:
    raise ValueError(f'{name}: {x.shape[1]} features, the other has {dim}')
  if len(x) < least:
    raise ValueError(f'{name}: {len(x)} samples; at least {least} are needed')
  x = x.astype(np.float64)
  if not np.isfinite(x).all():
    raise ValueError(f'{name}: holds values that are not finite')
  return x


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """Moments of the features of one set of images.

  Attributes:
    mean: f64[D]. covariance: f64[D,D], of divisor n - 1.
    n: samples, >= 2.
    extractor: name of the extractor; others are not compared with it.
    metric: what a Fréchet distance of it is called.
    dataset: of what images.
  """

  mean: Float
  covariance: Float
  n: int
  extractor: str
  metric: str = 'FD'
  dataset: str = ''

  def __post_init__(self):
    dim = self.mean.shape[0] if self.mean.ndim == 1 else 0
    if not dim or self.covariance.shape != (dim, dim):
      raise ValueError(f'mean {self.mean.shape}, covariance '
                       f'{self.covariance.shape}: expected [D], [D,D]')
    if self.n < 2:
      raise ValueError(f'n={self.n}: at least 2 samples are needed')
    if not self.extractor:
      raise ValueError('extractor: must be named')
    if not (np.isfinite(self.mean).all()
            and np.isfinite(self.covariance).all()):
      raise ValueError('mean or covariance holds values that are not finite')
    bound = 1e-9 * max(np.abs(self.covariance).max(), 1e-300)
    if np.abs(self.covariance - self.covariance.T).max() > bound:
      raise ValueError('covariance is not symmetric')

  @property
  def dim(self) -> int:
    """D."""
    return len(self.mean)

  @functools.cached_property
  def spectrum(self) -> tuple[Any, Any]:
    """Eigenvalues f64[D] and eigenvectors f64[D,D] of the covariance.

    Worked out once, for what many sets are compared with.
    """
    values, vectors = np.linalg.eigh(self.covariance)
    return values, vectors

  @classmethod
  def of(
      cls, features: npt.ArrayLike, *, extractor: str, metric: str = 'FD',
      dataset: str = '',
  ) -> Statistics:
    """Returns the statistics of features [N,D], N >= 2.

    Raises:
      ValueError: see `check_features`.
    """
    total = Moments()
    total.add(check_features('features', features, 2))
    return total.finish(extractor=extractor, metric=metric, dataset=dataset)

  def save(self, path: str | Path) -> None:
    """Writes an `.npz` file, which appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
    values: dict[str, Any] = {n: getattr(self, n) for n in _FIELDS}
    try:
      with open(partial, 'wb') as file:
        np.savez(file, format=_FORMAT, **values)
      os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)

  @classmethod
  def load(cls, path: str | Path) -> Statistics:
    """Reads what `save` wrote.

    Raises:
      FormatError: no such file, or damaged.
    """
    try:
      with np.load(path, allow_pickle=False) as file:
        if str(file['format']) != _FORMAT:
          raise FormatError(f'{path}: format {file["format"]!s}, expected '
                            f'{_FORMAT}')
        return cls(
            mean=file['mean'].astype(np.float64),
            covariance=file['covariance'].astype(np.float64),
            n=int(file['n']), extractor=str(file['extractor']),
            metric=str(file['metric']), dataset=str(file['dataset']))
    except FormatError:
      raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError,
            EOFError, IndexError, zipfile.BadZipFile) as error:
      raise FormatError(
          f'{path}: not a file of statistics: {error}') from error


class Moments:
  """Sums up statistics chunk by chunk, in float64.

  Chunks are centred before they are summed (Chan et al. 1979), so that a
  large mean costs no digits.
  """

  def __init__(self):
    self.n = 0
    self._mean: Any = None
    self._scatter: Any = None

  def add(self, features: npt.ArrayLike) -> None:
    """Takes in features [N,D].

    Raises:
      ValueError: see `check_features`; nothing is then taken in.
    """
    dim = None if self._mean is None else len(self._mean)
    x = check_features('features', features, dim=dim)
    mean = x.mean(0)
    x = x - mean
    scatter = x.T @ x
    if dim is None:
      self.n, self._mean, self._scatter = len(x), mean, scatter
      return
    n, step = self.n + len(x), mean - self._mean
    self._scatter += scatter + np.outer(step, step) * (self.n * len(x) / n)
    self._mean = self._mean + step * (len(x) / n)
    self.n = n

  def finish(
      self, *, extractor: str, metric: str = 'FD', dataset: str = '',
  ) -> Statistics:
    """Returns the statistics of all that was added.

    Raises:
      ValueError: fewer than 2 samples.
    """
    if self.n < 2:
      raise ValueError(f'{self.n} samples; at least 2 are needed')
    covariance = self._scatter / (self.n - 1)
    return Statistics(
        self._mean.copy(), (covariance + covariance.T) / 2, self.n,
        extractor=extractor, metric=metric, dataset=dataset)


def measure(
    images: npt.NDArray[np.uint8] | Iterable[npt.NDArray[np.uint8]],
    extractor: FeatureExtractor, *, dataset: str = '', chunk: int = 1024,
) -> Statistics:
  """Returns the statistics of images, a chunk of features at a time.

  Args:
    images: uint8[N,H,W,3], or an iterable of such arrays.
    extractor: of the features. dataset: name of the images.
    chunk: images in one call of the extractor, where `images` is an array.

  Raises:
    ValueError: images of another form, or fewer than 2.
  """
  if isinstance(images, np.ndarray):
    whole = check_images(images, 2)
    images = (whole[i:i + chunk] for i in range(0, len(whole), chunk))
  total = Moments()
  for part in images:
    features = extractor(check_images(part))
    if np.shape(features) != (len(part), extractor.dim):
      raise ValueError(
          f'{extractor.name}: gave features {np.shape(features)} for '
          f'{len(part)} images, dim={extractor.dim}')
    total.add(features)
  return total.finish(
      extractor=extractor.name, metric=names(extractor).frechet,
      dataset=dataset)
