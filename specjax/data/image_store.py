"""Images on disk: a tfds dataset directory with array_record shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np

from specjax.data import shards
from specjax.data.images import Images

_LAYOUT = shards.Layout('images', '1.0.0', 'images.json')
_CHUNK = 512


def write(
    images: Mapping[str, Images], folder: str | Path,
    facts: Mapping[str, Any] | None = None,
) -> Path:
  """Writes splits of one set of images, whole or not at all.

  `tfds.builder_from_directory(folder).as_data_source()` reads it; rows have
  'image' (PNG inside, uint8[H,W,3] outside) and, where the set has them,
  'label' and 'caption'.

  Args:
    images: by name of the split ('train', 'test'): equal in size, name,
      classes, and in what they have.
    folder: must not exist, or be empty.
    facts: JSON values to keep, beside name, classes and counts.

  Raises:
    ValueError: no split, or splits that do not fit together.
    OutputError: the folder is in use, or cannot be written (disk full).
  """
  if not images:
    raise ValueError(f'{folder}: no split to write')
  kinds = {split: (x.name, x.size, x.classes, x.labels is None,
                   x.captions is None) for split, x in images.items()}
  if len(set(kinds.values())) > 1:
    raise ValueError(
        f'{folder}: the splits {", ".join(images)} must have the same name, '
        f'size, classes, labels and captions; (name, size, classes, no '
        f'labels, no captions) are {list(kinds.values())}')
  first = next(iter(images.values()))

  def features(tfds_features: Any) -> dict[str, Any]:
    out = {'image': tfds_features.Image(
        shape=(*first.size, 3), encoding_format='png')}
    if first.labels is not None:
      out['label'] = tfds_features.ClassLabel(names=list(first.classes))
    if first.captions is not None:
      out['caption'] = tfds_features.Text()
    return out

  about = {
      **(facts or {}), 'name': first.name, 'size': list(first.size),
      'classes': list(first.classes),
      'num_images': {split: len(x) for split, x in images.items()},
      'counts': {split: x.counts() for split, x in images.items()},
      'dropped': {split: {reason: len(names)
                          for reason, names in x.dropped.items()}
                  for split, x in images.items()}}
  return shards.write(
      folder, _LAYOUT, features,
      {split: functools.partial(_rows, x) for split, x in images.items()},
      about)


def _rows(images: Images) -> Iterator[dict[str, Any]]:
  from PIL import Image
  for i, image in enumerate(images.images):
    png = io.BytesIO()
    Image.fromarray(image).save(png, 'png')
    # Encoding an array is left to TensorFlow by tfds; bytes pass through.
    row: dict[str, Any] = {'image': png.getvalue()}
    if images.labels is not None:
      row['label'] = int(images.labels[i])
    if images.captions is not None:
      row['caption'] = images.captions[i]
    yield row


def source(folder: str | Path, split: str = 'train') -> Any:
  """Returns the random-access source of a split that `write` wrote.

  Its rows are dicts: 'image' uint8[H,W,3], 'label' int, 'caption' bytes.

  Raises:
    ValueError: the folder holds no such dataset, or split.
  """
  known = facts(folder)['num_images']
  if split not in known:
    raise ValueError(f'{folder}: no split {split!r}; has {", ".join(known)}')
  return shards.source(folder, split)


def read(folder: str | Path, split: str = 'train') -> Images:
  """Reads a split that `write` wrote into memory.

  Raises:
    ValueError: as `source`.
  """
  about, rows = facts(folder), source(folder, split)
  images = np.zeros((len(rows), *about['size'], 3), np.uint8)
  labels, captions = [], []
  for i, row in enumerate(_in_chunks(rows)):
    images[i] = row['image']
    if 'label' in row:
      labels.append(row['label'])
    if 'caption' in row:
      text = row['caption']
      captions.append(text.decode() if isinstance(text, bytes) else str(text))
  return Images(
      images, np.asarray(labels, np.int32) if labels else None,
      tuple(captions) if captions else None, tuple(about['classes']),
      about['name'])


def _in_chunks(rows: Any) -> Iterator[dict[str, Any]]:
  """Yields all rows; a call for several costs half of one each."""
  for start in range(0, len(rows), _CHUNK):
    yield from rows.__getitems__(
        list(range(start, min(start + _CHUNK, len(rows)))))


def facts(folder: str | Path) -> dict[str, Any]:
  """Returns name, size, classes, counts, and the facts given to `write`.

  Raises:
    ValueError: the folder holds no such dataset.
  """
  return _LAYOUT.read_facts(folder)
