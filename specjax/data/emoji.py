"""Captioned emoji, drawn from the icon sets of the npm package iconify.

    npm pack @iconify/json@2.2.535

fetches the tarball (104 MB). Ten sets of emoji in colour are 25,979 images in
ten styles. The sets have licences of their own: Apache-2.0, MIT, CC-BY-4.0
and, openmoji and emojione-v1, CC-BY-SA-4.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import io
import json
from pathlib import Path
import re
import tarfile
from typing import Any, NamedTuple
import zlib

import numpy as np
import numpy.typing as npt

from specjax.data.images import (
    Images,
    Watch,
    check_size,
    check_split,
    describe,
    to_rgb,
)

SETS = (
    'noto', 'noto-v1', 'twemoji', 'openmoji', 'emojione', 'emojione-v1',
    'fluent-emoji', 'fluent-emoji-flat', 'fxemoji', 'streamline-emojis')
_TONE = re.compile(r' (light|medium light|medium|medium dark|dark) skin tone')
# One concept in so many is for the test.
_ONE_IN = 20
# Least standard deviation of the pixels: less is white on white.
_LEAST_CONTRAST = 4.0

Draw = Callable[[str, int], bytes]


class Icon(NamedTuple):
  """One drawing: its set, its caption, and an SVG on a square canvas."""

  style: str
  caption: str
  svg: str


def read_emoji(
    path: str | Path, size: int, split: str, *, sets: Sequence[str] = SETS,
    watch: Watch = iter,
) -> Images:
  """Draws emoji on white: 2 ms each.

  A concept (a caption, whatever the skin tone) is in one split, in all
  styles: in 'test' if the crc32 of its UTF-8 text is a multiple of 20.

  Args:
    path: the tarball of the npm package `@iconify/json`.
    size: height and width, >= 1.
    split: 'train' or 'test'.
    sets: icon sets (styles) to draw, in this order.
    watch: goes through the icons, for progress.

  Returns:
    uint8[N,size,size,3], captions, and the set of each as its label. What
    is blank (standard deviation below 4) or cannot be drawn is dropped.

  Raises:
    ValueError: no such file, set or split, a damaged tarball, or nothing is
      left. ImportError: resvg_py is not installed.
  """
  check_size(size)
  check_split(split)
  draw = _rasteriser()
  images: list[npt.NDArray[np.uint8]] = []
  captions: list[str] = []
  labels: list[int] = []
  dropped: dict[str, list[str]] = {}
  for icon in watch([icon for icon in icons(path, sets)
                     if is_test(icon.caption) == (split == 'test')]):
    image, reason = _draw(draw, icon.svg, size)
    if image is None:
      dropped.setdefault(reason, []).append(f'{icon.style}/{icon.caption}')
      continue
    images.append(image)
    captions.append(icon.caption)
    labels.append(sets.index(icon.style))
  if not images:
    raise ValueError(f'{path}: no emoji is left in the split {split!r}: '
                     f'{describe(dropped) or "the sets have none"}')
  return Images(
      np.stack(images), np.asarray(labels, np.int32), tuple(captions),
      tuple(sets), 'emoji',
      {reason: tuple(names) for reason, names in dropped.items()})


def is_test(caption: str) -> bool:
  """Returns whether the concept of a caption is in the test split."""
  return zlib.crc32(_TONE.sub('', caption).encode()) % _ONE_IN == 0


def icons(path: str | Path, sets: Sequence[str] = SETS) -> Iterator[Icon]:
  """Yields the icons of the sets, in order.

  Raises:
    ValueError: as `read_emoji`.
  """
  if not sets or len(set(sets)) < len(sets):
    raise ValueError(f'sets={tuple(sets)}: one or more, all different')
  found = _read(Path(path).expanduser(), sets)
  for style in sets:
    data = found[style]
    try:
      for name, icon in data['icons'].items():
        yield Icon(style, name.replace('-', ' '), _svg(data, icon))
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'{path}: {style}.json is not a set of icons '
                       f'({type(error).__name__}: {error})') from error


def _read(path: Path, sets: Sequence[str]) -> dict[str, Any]:
  """Returns the JSON of each set, read in one pass over the tarball."""
  if not path.is_file():
    raise ValueError(f'{path}: no such file; `npm pack @iconify/json` '
                     'fetches one')
  wanted = {f'package/json/{name}.json': name for name in sets}
  found: dict[str, Any] = {}
  try:
    with tarfile.open(path, 'r|gz') as archive:
      for member in archive:
        file = archive.extractfile(member) if member.name in wanted else None
        if file is not None:
          found[wanted[member.name]] = json.load(file)
        if len(found) == len(wanted):
          break
  except (tarfile.TarError, OSError, EOFError, zlib.error,
          ValueError) as error:
    raise ValueError(f'{path}: not a tarball of icons that can be read '
                     f'({type(error).__name__}: {error})') from error
  missing = [name for name in wanted if wanted[name] not in found]
  if missing:
    raise ValueError(f'{path}: lacks {", ".join(missing)}; a tarball of the '
                     'npm package @iconify/json has them')
  return found


def _svg(data: Mapping[str, Any], icon: Mapping[str, Any]) -> str:
  """Returns an icon as an SVG, centred on a square."""
  def get(key: str, default: int) -> float:
    return icon.get(key, data.get(key, default))
  width, height = get('width', 16), get('height', 16)
  side = max(width, height)
  left = get('left', 0) - (side - width) / 2
  top = get('top', 0) - (side - height) / 2
  return (
      '<svg xmlns="http://www.w3.org/2000/svg" '
      'xmlns:xlink="http://www.w3.org/1999/xlink" '
      f'viewBox="{left} {top} {side} {side}" width="{side}" height="{side}">'
      f'{icon["body"]}</svg>')


def _rasteriser() -> Draw:
  try:
    import resvg_py
  except ImportError as error:
    raise ImportError('drawing emoji needs the package resvg-py: '
                      'pip install resvg-py') from error

  def draw(svg: str, size: int) -> bytes:
    # Fonts differ from machine to machine.
    return bytes(resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, skip_system_fonts=True))
  return draw


def _draw(
    draw: Draw, svg: str, size: int,
) -> tuple[npt.NDArray[np.uint8] | None, str]:
  """Returns `(image, '')`, or `(None, reason)`."""
  from PIL import Image
  try:
    with Image.open(io.BytesIO(draw(svg, size))) as image:
      array = np.asarray(to_rgb(image))
  except Exception:  # the package raises its errors as several types
    return None, 'cannot be drawn'
  if array.shape != (size, size, 3):
    return None, 'not square'
  if array.std() < _LEAST_CONTRAST:
    return None, 'blank'
  return array, ''
