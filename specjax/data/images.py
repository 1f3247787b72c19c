"""Images in memory, and the readers of files that hold them.

Three sources: CIFAR-10 packed as JPEG in one `.npz`, a folder of images with
a subfolder a class, and emoji drawn from an npm tarball of icons (`emoji`).
All give the same class, `Images`. A file of the user's that cannot be used
is left out, under its reason; what is damaged in a packed file is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SPLITS = ('train', 'test')
Dropped = Mapping[str, tuple[str, ...]]
# Gives the items back one by one, and may show how far it is.
Watch = Callable[[Sequence[Any]], Iterable[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """Images of one size.

  Attributes:
    images: uint8[N,H,W,3], RGB, N >= 1.
    labels: int32[N] in [0, len(classes)), or None: no classes.
    captions: a text an image, or None.
    classes: names of the labels, all different; empty without labels.
    name: of the set.
    dropped: what the reader left out: names of files or items by reason.
  """

  images: npt.NDArray[np.uint8]
  labels: npt.NDArray[np.int32] | None = None
  captions: tuple[str, ...] | None = None
  classes: tuple[str, ...] = ()
  name: str = 'images'
  dropped: Dropped = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    shape, dtype = np.shape(self.images), getattr(self.images, 'dtype', None)
    if len(shape) != 4 or 0 in shape or shape[3] != 3 or dtype != np.uint8:
      raise ValueError(f'{self.name}: images are {dtype}{list(shape)}, must '
                       'be uint8[N,H,W,3], none of them 0')
    if not self.name:
      raise ValueError("name='': must not be empty")
    if self.captions is not None and len(self.captions) != shape[0]:
      raise ValueError(f'{self.name}: {len(self.captions)} captions for '
                       f'{shape[0]} images')
    if self.labels is None:
      if self.classes:
        raise ValueError(f'{self.name}: {len(self.classes)} classes, but no '
                         'labels')
      return
    check_labels(self.name, self.labels, shape[0], len(self.classes))
    bad = [c for c in self.classes  # tfds keeps one a line, stripped
           if c != c.strip() or not c or len(c.splitlines()) != 1]
    if bad or len(set(self.classes)) < len(self.classes):
      raise ValueError(
          f'{self.name}: classes={self.classes}: names must differ, and be '
          'one line without spaces around it')

  def __len__(self) -> int:
    return len(self.images)

  @property
  def num_classes(self) -> int:
    """Number of classes; 0 without labels."""
    return len(self.classes)

  @property
  def size(self) -> tuple[int, int]:
    """Height and width."""
    return self.images.shape[1], self.images.shape[2]

  def counts(self) -> dict[str, int]:
    """Returns the number of images of each class; empty without labels."""
    if self.labels is None:
      return {}
    found = np.bincount(self.labels, minlength=self.num_classes)
    return dict(zip(self.classes, found.tolist(), strict=True))


def check_labels(
    name: str, labels: npt.ArrayLike, num: int, num_classes: int) -> None:
  """Raises ValueError unless labels are int32[num] in [0, num_classes)."""
  labels = np.asarray(labels)
  if labels.shape != (num,) or labels.dtype != np.int32:
    raise ValueError(f'{name}: labels are {labels.dtype}{list(labels.shape)},'
                     f' must be int32[{num}]')
  if num and not 0 <= labels.min() <= labels.max() < num_classes:
    raise ValueError(f'{name}: labels in [{labels.min()}, {labels.max()}], '
                     f'must be in [0, {num_classes}): {num_classes} classes')


def check_split(split: str) -> None:
  """Raises ValueError unless the split is one that readers know."""
  if split not in SPLITS:
    raise ValueError(f'split={split!r}: one of {", ".join(SPLITS)}')


def check_size(size: int) -> None:
  """Raises ValueError unless images can have this height and width."""
  if size < 1:
    raise ValueError(f'size={size}: must be >= 1')


# --- CIFAR-10 -----------------------------------------------------------

_CIFAR_KEYS = {
    'blob': 'uint8[bytes], JPEG files one after another',
    'offsets': 'int[N+1], where they begin', 'labels': 'int[N]',
    'is_test': 'bool[N]', 'classes': 'str[C]'}
_CIFAR_SIZE = 32


def read_cifar10(
    path: str | Path, split: str, *, watch: Watch = iter) -> Images:
  """Reads CIFAR-10 out of an `.npz` of JPEG files.

  Args:
    path: a file with the keys `blob` uint8[bytes] (JPEG files one after
      another), `offsets` int[N+1], `labels` int[N], `is_test` bool[N] and
      `classes` str[C].
    split: 'train' or 'test'.
    watch: goes through the images, for progress.

  Returns:
    uint8[N,32,32,3] with labels, in the order of the file.

  Raises:
    ValueError: no such file, other keys, damaged contents, or no image of
      the split.
  """
  check_split(split)
  arrays = _cifar_arrays(Path(path).expanduser())
  blob, offsets = arrays['blob'], arrays['offsets'].astype(np.int64)
  index = np.flatnonzero(arrays['is_test'] == (split == 'test'))
  if not len(index):
    raise ValueError(f'{path}: no image of the split {split!r}')
  images = np.zeros((len(index), _CIFAR_SIZE, _CIFAR_SIZE, 3), np.uint8)
  for place, i in enumerate(watch(index.tolist())):
    images[place] = _jpeg(
        blob[offsets[i]:offsets[i + 1]].tobytes(), f'{path}: image {i}')
  return Images(
      images, arrays['labels'][index].astype(np.int32),
      classes=tuple(map(str, arrays['classes'])), name='cifar10')


def _cifar_arrays(path: Path) -> dict[str, np.ndarray]:
  """Returns the arrays of the file, checked against one another."""
  if not path.is_file():
    raise ValueError(f'{path}: no such file')
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
  except Exception as error:  # zip, header and other errors are of many types
    raise ValueError(f'{path}: not an .npz file that can be read '
                     f'({type(error).__name__}: {error})') from error
  missing = sorted(set(_CIFAR_KEYS) - set(arrays))
  if missing:
    expected = '; '.join(f'{k} {v}' for k, v in _CIFAR_KEYS.items())
    raise ValueError(f'{path}: keys {sorted(arrays)}, lacks {missing}; '
                     f'expected are {expected}')
  num = arrays['labels'].size
  kinds = {'blob': (np.uint8, arrays['blob'].size),
           'offsets': (np.integer, num + 1), 'labels': (np.integer, num),
           'is_test': (np.bool_, num),
           'classes': (np.str_, arrays['classes'].size)}
  for key, (kind, length) in kinds.items():
    found = arrays[key]
    if found.shape != (length,) or not np.issubdtype(found.dtype, kind):
      raise ValueError(
          f'{path}: {key} is {found.dtype}{list(found.shape)}, must be '
          f'{_CIFAR_KEYS[key]}, N = {num}')
  offsets = arrays['offsets'].astype(np.int64)
  if np.any(np.diff(offsets) < 0) or offsets[0] < 0 or (
      offsets[-1] > arrays['blob'].size):
    raise ValueError(f'{path}: offsets must not decrease, in '
                     f'[0, {arrays["blob"].size}]')
  check_labels(str(path), arrays['labels'].astype(np.int32), num,
               arrays['classes'].size)
  return arrays


def _jpeg(data: bytes, where: str) -> npt.NDArray[np.uint8]:
  from PIL import Image
  try:
    with Image.open(io.BytesIO(data)) as image:
      found = (image.mode, *image.size)
      array = np.asarray(image)
  except Exception as error:  # damaged files fail in many types
    raise ValueError(f'{where}: not an image ({error})') from error
  if found != ('RGB', _CIFAR_SIZE, _CIFAR_SIZE):
    raise ValueError(f'{where}: mode {found[0]}, {found[1]}x{found[2]}; must '
                     f'be RGB, {_CIFAR_SIZE}x{_CIFAR_SIZE}')
  return array


# --- A folder -----------------------------------------------------------


def splits_of(path: str | Path) -> tuple[str, ...]:
  """Returns the splits of a folder of images: 'train', 'test', or both.

  `train` and `test` are splits if they hold folders, else they are classes
  like any other, and all images are in the split 'train'.

  Raises:
    ValueError: no such folder.
  """
  path = Path(path).expanduser()
  if not path.is_dir():
    raise ValueError(f'{path}: no such folder')
  return tuple(s for s in SPLITS if _folders(path / s)) or ('train',)


def read_folder(
    path: str | Path, size: int, split: str, *, watch: Watch = iter,
) -> Images:
  """Reads a folder of images: one subfolder a class.

  Either `path/CLASS/FILE` or `path/{train,test}/CLASS/FILE` (`splits_of`).
  Classes are the names of the subfolders, sorted, those of both splits
  together. Images are turned as their camera says, laid over white where
  they are transparent, cut to the square in the middle and resized (Lanczos).

  Args:
    path: the folder. Hidden files in it are not looked at.
    size: height and width of the result, >= 1.
    split: 'train' or 'test'.
    watch: goes through the files, for progress.

  Returns:
    uint8[N,size,size,3] with labels, by class and name of the file.

  Raises:
    ValueError: no such folder or split, or no image is left.
  """
  check_size(size)
  check_split(split)
  path = Path(path).expanduser()
  splits = splits_of(path)
  if split not in splits:
    raise ValueError(f'{path}: no split {split!r}; has {", ".join(splits)}')
  apart = any(_folders(path / s) for s in SPLITS)
  classes = tuple(sorted({
      c.name for s in splits for c in _folders(path / s if apart else path)}))
  root = path / split if apart else path
  dropped: dict[str, list[str]] = {}
  if apart:
    _drop(dropped, 'beside train and test', path,
          (p for p in _visible(path) if p.name not in SPLITS))
  _drop(dropped, 'not in the folder of a class', path,
        (p for p in _visible(root) if not p.is_dir()))
  images, labels = [], []
  for label, file in watch([
      (label, file) for label, name in enumerate(classes)
      for file in _visible(root / name)]):
    try:
      images.append(_open(file, size))
      labels.append(label)
    except _Bad as reason:
      _drop(dropped, str(reason), path, [file])
  if not images:
    raise ValueError(f'{root}: no image is left: '
                     f'{describe(dropped) or "nothing in it"}')
  return Images(
      np.stack(images), np.asarray(labels, np.int32), classes=classes,
      name=path.resolve().name or 'folder',
      dropped={reason: tuple(names) for reason, names in dropped.items()})


def describe(dropped: Mapping[str, Sequence[str]]) -> str:
  """Returns counts and examples by reason as a line, most frequent first."""
  parts = []
  for reason, names in sorted(dropped.items(), key=lambda x: -len(x[1])):
    more = ', ...' if len(names) > 3 else ''
    parts.append(f'{len(names)} {reason} ({", ".join(names[:3])}{more})')
  return '; '.join(parts)


class _Bad(Exception):
  """Why a file is left out."""


def _visible(folder: Path) -> list[Path]:
  if not folder.is_dir():
    return []
  return sorted(p for p in folder.iterdir() if not p.name.startswith('.'))


def _folders(folder: Path) -> list[Path]:
  return [p for p in _visible(folder) if p.is_dir()]


def _drop(dropped: dict[str, list[str]], reason: str, root: Path,
          paths: Iterable[Path]) -> None:
  for path in paths:
    dropped.setdefault(reason, []).append(str(path.relative_to(root)))


def _open(path: Path, size: int) -> npt.NDArray[np.uint8]:
  """Returns a file as uint8[size,size,3]."""
  from PIL import Image, ImageOps, UnidentifiedImageError
  if path.is_dir():
    raise _Bad('a folder in the folder of a class')
  try:
    with Image.open(path) as image:
      turned = ImageOps.exif_transpose(image)
    square = ImageOps.fit(
        to_rgb(turned), (size, size), Image.Resampling.LANCZOS)
  except _Bad:
    raise
  except UnidentifiedImageError:
    raise _Bad('not an image') from None
  except PermissionError:
    raise _Bad('not readable') from None
  except Image.DecompressionBombError:
    raise _Bad('too many pixels') from None
  except Exception:  # damaged files fail in many types
    raise _Bad('damaged') from None
  return np.asarray(square)


def to_rgb(image: Any) -> Any:
  """Returns a PIL image as RGB; what is transparent is laid over white."""
  from PIL import Image
  if image.mode.startswith('I;16'):  # `convert` clips these at 255
    return Image.fromarray(
        (np.asarray(image) >> 8).astype(np.uint8)).convert('RGB')
  if image.mode in ('I', 'F'):
    raise _Bad(f'pixels of unknown range (mode {image.mode})')
  if image.mode in ('LA', 'PA', 'La', 'RGBa', 'RGBA') or (
      'transparency' in image.info):
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    white.alpha_composite(image)
    image = white
  return image.convert('RGB')
