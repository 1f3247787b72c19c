"""Pictures of samples: labelled grids, and maps over the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from specjax.eval.plots import COLOURS, finish, new_figure

# Inches that a letter of a title or a name takes at most.
_LETTER = 0.1


def grid(
    images: np.ndarray, path: Path, *, columns: int, title: str = '',
    rows: Sequence[str] = (),
) -> None:
  """Writes images as one PNG, in rows.

  Args:
    images: uint8[N,H,W,3], row after row; an incomplete last row is filled
      with white.
    path: of the PNG, which appears whole or not at all.
    columns: images a row, >= 1.
    title: above it. rows: what to write beside each row.

  Raises:
    ValueError: other images, or another number of names.
  """
  if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
    raise ValueError(f'images are {images.dtype}{list(images.shape)}: must be '
                     'uint8[N,H,W,3], at least one')
  if columns < 1:
    raise ValueError(f'columns={columns}: must be >= 1')
  num, height, width, _ = images.shape
  count = -(-num // columns)
  if rows and len(rows) != count:
    raise ValueError(f'{len(rows)} names for {count} rows')
  gap = max(height // 16, 1)
  whole = np.full((count * (height + gap) - gap,
                   columns * (width + gap) - gap, 3), 255, np.uint8)
  for i, image in enumerate(images):
    top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
    whole[top:top + height, left:left + width] = image
  beside = _LETTER * max(map(len, rows), default=0) + 0.5
  wide = min(0.8 * columns, 14.0)
  figure, axes = new_figure(max(wide + beside, _LETTER * len(title)))
  figure.set_size_inches(
      figure.get_figwidth(), wide * whole.shape[0] / whole.shape[1] + 0.5)
  axes.grid(False)
  axes.imshow(whole, interpolation='nearest')
  axes.set_xticks([])
  axes.set_yticks([i * (height + gap) + height / 2 for i in range(count)]
                  if rows else [], list(rows) or None)
  axes.tick_params(length=0)
  for side in axes.spines.values():
    side.set_visible(False)
  finish(figure, axes, title, path)


def heat_map(values: np.ndarray, path: Path, title: str) -> None:
  """Writes f64[h,w] in [0, 1] as a map with a scale; see `grid`."""
  if values.ndim != 2:
    raise ValueError(f'a map has 2 axes, not {values.ndim}')
  figure, axes = new_figure(5.0)
  axes.grid(False)
  shown = axes.imshow(values, vmin=0.0, vmax=1.0, cmap='viridis')
  axes.set_xlabel('column')
  axes.set_ylabel('row')
  figure.colorbar(shown, ax=axes)
  finish(figure, axes, title, path)


def curve(values: np.ndarray, path: Path, title: str, axis: str) -> None:
  """Writes f64[n] in [0, 1] over their index as a line; see `grid`."""
  figure, axes = new_figure(6.0)
  axes.plot(np.arange(len(values)), values, color=COLOURS[0])
  axes.set_ylim(0, 1)
  axes.set_xlabel(axis)
  finish(figure, axes, title, path)
