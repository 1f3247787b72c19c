"""Images for `train.vq` and `train.image_ar`: read, checked, told apart."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specjax.data import image_store, images
from specjax.data.images import Images

# Of a dry run: discs of a colour by class.
_SYNTHETIC, _SIDE, _CLASSES = 64, 16, 3


class Data(NamedTuple):
  """Images to learn from and to be tested on; equal sizes and classes."""

  train: Images
  test: Images

  @property
  def digest(self) -> str:
    """A hash of what is trained on."""
    found = hashlib.sha256(self.train.images.tobytes())
    if self.train.labels is not None:
      found.update(self.train.labels.tobytes())
    return found.hexdigest()

  @property
  def facts(self) -> dict[str, Any]:
    """JSON values for the model card."""
    return {'name': self.train.name, 'train': len(self.train),
            'test': len(self.test), 'size': list(self.train.size),
            'classes': list(self.train.classes)}


def read(data: Any, seed: int) -> Data:
  """Reads `config.data.path`.

  A dataset that `train.images` wrote, an .npz of CIFAR-10's JPEG files, or
  'synthetic'. Without a test split the last tenth of the training split is
  taken from it.

  Raises:
    ValueError: nothing such is there.
  """
  if data.path is None:
    raise ValueError('config.data.path: give a dataset of train.images, or '
                     "an .npz of CIFAR-10; 'synthetic' for a dry run")
  if data.path == 'synthetic':
    return Data(_synthetic(seed), _synthetic(seed + 1))
  path = Path(data.path).expanduser()
  if not path.exists():
    raise ValueError(f'config.data.path={data.path}: not there')
  if path.is_file():
    return Data(*(images.read_cifar10(path, s) for s in images.SPLITS))
  splits = image_store.facts(path)['counts']
  train = image_store.read(path, 'train')
  if 'test' in splits:
    return Data(train, image_store.read(path, 'test'))
  cut = len(train) - max(len(train) // 10, 1)
  return Data(part(train, slice(cut)), part(train, slice(cut, None)))


def part(found: Images, rows: slice) -> Images:
  """Returns some of the images."""
  return Images(
      found.images[rows],
      None if found.labels is None else found.labels[rows],
      None if found.captions is None else found.captions[rows],
      found.classes, found.name)


def _synthetic(seed: int) -> Images:
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, _CLASSES, _SYNTHETIC).astype(np.int32)
  place = np.mgrid[:_SIDE, :_SIDE]
  centre = rng.uniform(4, _SIDE - 4, (_SYNTHETIC, 2, 1, 1))
  inside = np.sum((place - centre) ** 2, axis=1) < 16
  picture = np.full((_SYNTHETIC, _SIDE, _SIDE, 3), 30, np.uint8)
  for label in range(_CLASSES):
    picture[inside & (labels == label)[:, None, None], label] = 220
  return Images(picture, labels, None, tuple('abc'), 'synthetic')
