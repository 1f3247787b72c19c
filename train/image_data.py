"""Images for the programs that learn from them: read, checked, told apart."""

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


def read(data: Any, seed: int, *, labels: bool = False) -> Data:
  """Reads what a config's section `data` names.

  Args:
    data: `path` is a dataset that `train.images` wrote, an .npz of CIFAR-10's
      JPEG files, a plain .npz or 'synthetic'. `test` is a plain .npz to be
      tested on, or None: the test split of `path`. Where that has none, the
      share `held_out` of its images is drawn at random.
    seed: of that draw.
    labels: whether images without labels are an error.

  A plain .npz holds `images` uint8[N,H,W,3], `labels` int[N] if there are
  such, and `classes` str[C], their names; classes without names are numbered.

  Raises:
    ValueError: nothing such is there, or the two do not fit together.
  """
  if not data.path:
    raise ValueError('config.data.path: give a dataset of train.images or an '
                     ".npz of images; 'synthetic' for a dry run")
  if not 0 < data.held_out < 1:
    raise ValueError(f'config.data.held_out={data.held_out}: must be in '
                     '(0, 1)')
  train, test = _splits(data.path, seed)
  if data.test:
    test = plain(data.test, train)
  if test is None:
    found = Data(*_apart(train, data.held_out, seed))
  else:
    found = Data(train, test)
  if labels and train.labels is None:
    raise ValueError(f'config.data.path={data.path}: these images have no '
                     'labels')
  return found


def _splits(path: str, seed: int) -> tuple[Images, Images | None]:
  """Returns images to learn from, and the test's if it has its own."""
  if path == 'synthetic':
    return synthetic(seed), synthetic(seed + 1)
  place = Path(path).expanduser()
  if not place.exists():
    raise ValueError(f'config.data.path={path}: not there')
  if place.is_dir():
    has_test = 'test' in image_store.facts(place)['counts']
    return (image_store.read(place, 'train'),
            image_store.read(place, 'test') if has_test else None)
  with _open(place) as file:
    if 'blob' not in file:
      return plain(place), None
  return (images.read_cifar10(place, 'train'),
          images.read_cifar10(place, 'test'))


def _apart(
    found: Images, share: float, seed: int) -> tuple[Images, Images]:
  """Returns some images and, drawn from among them, a share for a test."""
  if len(found) < 2:
    raise ValueError(f'{found.name}: a single image; one is needed to learn '
                     'from and one for the test')
  cut = min(max(1, round(share * len(found))), len(found) - 1)
  order = np.random.default_rng(seed).permutation(len(found))
  return part(found, np.sort(order[cut:])), part(found, np.sort(order[:cut]))


def part(found: Images, rows: np.ndarray) -> Images:
  """Returns the images of some rows, int[M]."""
  return Images(
      found.images[rows],
      None if found.labels is None else found.labels[rows],
      None if found.captions is None else tuple(
          found.captions[i] for i in rows),
      found.classes, found.name)


def plain(path: str | Path, like: Images | None = None) -> Images:
  """Reads a plain .npz; see `read`.

  Args:
    path: of the file.
    like: images whose size and classes these share; their names of classes
      are taken where the file has none.

  Raises:
    ValueError: no such file or array, an array of another form, labels that
      are no class, or images that are not alike.
  """
  path = Path(path).expanduser()
  with _open(path) as file:
    try:
      arrays = {name: file[name] for name in (
          'images', 'labels', 'classes') if name in file}
    except Exception as error:  # damaged files fail in many types
      raise ValueError(f'{path}: damaged: {error}') from error
    if 'images' not in arrays:
      raise ValueError(f"{path}: no array 'images'; found "
                       f'{", ".join(file.files) or "none"}')
  labels = arrays.get('labels')
  if labels is None or (like is not None and like.labels is None):
    found = Images(arrays['images'], name=path.stem)
  else:
    if labels.ndim != 1 or labels.dtype.kind not in 'iu' or not labels.size:
      raise ValueError(f'{path}: labels are {labels.dtype}'
                       f'{list(labels.shape)}, must be int[N]')
    classes = tuple(map(str, arrays.get('classes', ())))
    if not classes and like is None and labels.max() >= len(labels) > 1:
      raise ValueError(
          f'{path}: label {labels.max()} of {len(labels)} images: more '
          "classes than images; give their names, 'classes'")
    if not classes:
      classes = like.classes if like is not None else tuple(
          map(str, range(int(labels.max()) + 1)))
    found = Images(arrays['images'], labels.astype(np.int32), None, classes,
                   path.stem)
  if like is not None:
    _check_alike(path, found, like)
  return found


def _check_alike(path: Path, found: Images, like: Images) -> None:
  if found.size != like.size:
    raise ValueError(
        f'{path}: images of {found.size[0]} x {found.size[1]}, but those to '
        f'learn from are {like.size[0]} x {like.size[1]}: they differ in '
        'size')
  if like.labels is not None and found.labels is None:
    raise ValueError(f'{path}: these images have no labels, but those to '
                     'learn from do')
  if found.classes != like.classes:
    raise ValueError(f'{path}: classes {found.classes}, but those to learn '
                     f'from are {like.classes}')


def _open(path: Path) -> Any:
  try:
    found = np.load(path, allow_pickle=False)
  except Exception as error:  # zip, header and other errors are of many types
    raise ValueError(f'{path}: cannot be read as .npz: {error}') from error
  if not isinstance(found, np.lib.npyio.NpzFile):
    raise ValueError(f'{path}: a single array, expected an .npz')
  return found


def synthetic(seed: int, num: int = _SYNTHETIC) -> Images:
  """Returns 16 x 16 images of discs, whose colour is their class."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, _CLASSES, num).astype(np.int32)
  place = np.mgrid[:_SIDE, :_SIDE]
  centre = rng.uniform(4, _SIDE - 4, (num, 2, 1, 1))
  inside = np.sum((place - centre) ** 2, axis=1) < 16
  picture = np.full((num, _SIDE, _SIDE, 3), 30, np.uint8)
  for label in range(_CLASSES):
    picture[inside & (labels == label)[:, None, None], label] = 220
  return Images(picture, labels, None, tuple('abc'), 'synthetic')
