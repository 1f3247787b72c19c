"""Endless batches of images, or of their tokens, for training.

A batch is a pure function of the fields, the seed among them, and the step,
so a run that is interrupted goes on exactly: its position is a number.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from specjax.data import packing
from specjax.data.images import Images, check_labels

Batch = dict[str, np.ndarray]
# What else of a batch is drawn; not 0, which a SeedSequence ignores.
_COINS = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
  """Images as tokens.

  Attributes:
    codes: int32[N,T], >= 0, a row an image; or float32[N,T,C], finite, where
      tokens are real numbers. None of N, T, C is 0.
    labels: int32[N], or None: no classes.
    flipped: like `codes`, the tokens of the mirrored images, or None. They
      are not the mirrored tokens, so a tokenizer has to make them.
  """

  codes: npt.NDArray
  labels: npt.NDArray[np.int32] | None = None
  flipped: npt.NDArray | None = None

  def __post_init__(self):
    for name in ('codes', 'flipped'):
      value = getattr(self, name)
      if value is None and name == 'flipped':
        continue
      shape, dtype = np.shape(value), getattr(value, 'dtype', None)
      axes = {'int32': 2, 'float32': 3}.get(str(dtype))
      if len(shape) != axes or 0 in shape:
        raise ValueError(f'{name} are {dtype}{list(shape)}, must be '
                         'int32[N,T] or float32[N,T,C], none of them 0')
      if shape != self.codes.shape:
        raise ValueError(f'{name} are {list(shape)}, codes '
                         f'{list(self.codes.shape)}: must be equal')
      if dtype == np.float32:
        if not np.isfinite(value).all():
          raise ValueError(f'{name}: numbers that are not finite')
      elif value.min() < 0:
        raise ValueError(f'{name}: the least is {value.min()}, must be >= 0')

  def __len__(self) -> int:
    return len(self.codes)


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """A stream of batches without end.

  Every pass over the images is a shuffle of its own; a batch may span two.
  Each image is mirrored with probability 1/2, and loses its label, for
  classifier-free guidance, with probability `class_dropout` (Ho & Salimans
  2022, algorithm 1); a new coin at every step.

  Attributes:
    images: `Images` or `Codes`.
    batch_size: B >= 1; may exceed the number of images.
    seed: in [0, 2**32).
    flip: mirror images left to right; codes, where `flipped` is there.
    class_dropout: in [0, 1].
    num_classes: the null class, which stands for no label; labels are below.
      Default: that of `images`; codes do not know it.
  """

  images: Images | Codes
  batch_size: int
  seed: int = 0
  flip: bool = True
  class_dropout: float = 0.0
  num_classes: int | None = None

  def __post_init__(self):
    if self.batch_size < 1:
      raise ValueError(f'batch_size={self.batch_size}: must be >= 1')
    if not 0 <= self.seed < 1 << 32:
      raise ValueError(f'seed={self.seed}: must be in [0, 2**32)')
    if not 0 <= self.class_dropout <= 1:
      raise ValueError(
          f'class_dropout={self.class_dropout}: must be in [0, 1]')
    if self.num_classes is None and isinstance(self.images, Codes):
      raise ValueError('num_classes: must be given for codes')
    if self.null_class < 0:
      raise ValueError(f'num_classes={self.num_classes}: must be >= 0')
    if self.images.labels is not None:
      check_labels('images', self.images.labels, len(self.images),
                   self.null_class)

  @property
  def null_class(self) -> int:
    """The label of an image without one: the number of classes."""
    if self.num_classes is not None:
      return self.num_classes
    assert isinstance(self.images, Images)  # by `__post_init__`
    return self.images.num_classes

  def batch(self, step: int) -> Batch:
    """Returns batch number `step >= 0`.

    Returns:
      `image` uint8[B,H,W,3], or `codes` [B,T] or [B,T,C]; `label` int32[B] in
      [0, num_classes], the null class for all where there are no labels.
    """
    index = packing.order(
        len(self.images), step, self.batch_size, self.seed)
    rng = np.random.default_rng([self.seed, step, _COINS])
    # Both are drawn always: an option does not change the others' coins.
    mirrored = rng.random(self.batch_size) < 0.5
    dropped = rng.random(self.batch_size) < self.class_dropout
    label = np.full(self.batch_size, self.null_class, np.int32)
    if self.images.labels is not None:
      label = np.where(dropped, label, self.images.labels[index])
    if isinstance(self.images, Codes):
      return {'codes': self._codes(index, mirrored), 'label': label}
    image = self.images.images[index]
    if self.flip:
      image[mirrored] = image[mirrored, :, ::-1]
    return {'image': image, 'label': label}

  def _codes(
      self, index: npt.NDArray[np.int64], mirrored: npt.NDArray[np.bool_],
  ) -> npt.NDArray:
    assert isinstance(self.images, Codes)
    codes = self.images.codes[index]
    if self.flip and self.images.flipped is not None:
      codes[mirrored] = self.images.flipped[index[mirrored]]
    return codes

  def stream(self, start: int = 0) -> Iterator[Batch]:
    """Yields batches `start`, `start + 1`, ... without end."""
    return map(self.batch, itertools.count(start))
