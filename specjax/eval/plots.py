"""Figures of a benchmark; each takes the rows of `eval.speed.rows`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
from pathlib import Path
from typing import Any

# Figures are drawn without pyplot: no window system, no global state.
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from specjax.eval.speed import OVERALL

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette: told apart with colour-blind eyes and in print.
_PLAIN = '#7f7f7f'
COLOURS = ('#0072b2', '#e69f00', '#009e73', '#d55e00', '#cc79a7', '#56b4e9',
            '#000000')
MARKERS = 'osD^vPX'
# Above this many bars their values would touch.
_MAX_LABELS = 30


def speedup_by_category(rows: Rows, path: Path, title: str) -> None:
  """Draws speed-ups over plain decoding, one group of bars per category.

  Shows the smallest batch size of `rows`; whiskers span the repeats.

  Args:
    rows: all rows; the first run is plain decoding.
    path: of the PNG, which appears whole or not at all.
    title: first line says of what.
  """
  batch_size = min(r['batch_size'] for r in rows)
  rows = [r for r in rows if r['batch_size'] == batch_size]
  runs = _runs(rows)
  shown = runs[1:]
  groups = list(dict.fromkeys(r['category'] for r in rows))
  cells = {(r['run'], r['category']): r for r in rows}
  figure, axes = new_figure(max(
      7.0, 1.0 + len(groups) * max(1.0, 0.45 * len(shown))))
  _bars(axes, groups, shown, lambda run, group: cells[run, group], 'speedup',
        '{:.2f}', runs)
  axes.axhline(1.0, color='black', linestyle='--', linewidth=1.5,
               label='plain decoding', zorder=1)
  axes.set_xticks(range(len(groups)), [
      f"{g.replace('_', chr(10))}\nn = {cells[runs[0], g]['num_prompts']}"
      for g in groups], fontsize=9)
  axes.set_xlabel('category, with its number of prompts')
  axes.set_ylabel('speed-up over plain decoding (×)')
  finish(figure, axes, f'{title}\nSpeed-up by category, batch size '
          f'{batch_size}; whiskers: range over '
          f"{rows[0]['num_repeats']} repeats", path)


def acceptance_by_position(rows: Rows, path: Path, title: str) -> None:
  """Draws joint (solid) and conditional (dotted) acceptance per position."""
  batch_size = min(r['batch_size'] for r in rows)
  rows = [r for r in rows
          if r['batch_size'] == batch_size and r['category'] == OVERALL]
  runs = _runs(rows)
  figure, axes = new_figure(7.5)
  for row in rows:
    joint = row['per_position_acceptance']
    if not joint:
      continue
    place = list(range(1, len(joint) + 1))
    style: dict[str, Any] = dict(
        color=_colour(row['run'], runs),
        # Runs often agree: smaller markers on top leave both visible.
        markersize=max(9 - 2 * runs.index(row['run']), 3),
        marker=MARKERS[runs.index(row['run']) % len(MARKERS)])
    axes.plot(place, joint, '-', label=f"{row['run']}, joint", **style)
    # None (never drafted there) becomes a gap.
    conditional = [float('nan') if c is None else c
                   for c in row['conditional_acceptance']]
    axes.plot(place, conditional, ':', markerfacecolor='white',
              label=f"{row['run']}, conditional", **style)
  axes.set_ylim(0, 1.02)
  axes.yaxis.set_major_formatter(PercentFormatter(1.0))
  # Small steps, whole numbers, and 1 rather than 0 at the left.
  longest = max(len(r['per_position_acceptance']) for r in rows)
  step = 1 + longest // 17
  axes.set_xticks(range(1, longest + 1, step))
  axes.set_xlabel('position in the draft (tokens)')
  axes.set_ylabel('accepted (%)')
  finish(figure, axes, f'{title}\nAcceptance by position, batch size '
          f'{batch_size} (joint: all up to there; conditional: given all '
          'before)', path)


def speed_by_batch(rows: Rows, path: Path, title: str) -> None:
  """Draws tokens per second at each batch size, plain decoding included."""
  rows = [r for r in rows if r['category'] == OVERALL]
  runs = _runs(rows)
  sizes = sorted({r['batch_size'] for r in rows})
  cells = {(r['run'], r['batch_size']): r for r in rows}
  figure, axes = new_figure(max(6.5, 1.0 + 0.7 * len(sizes) * len(runs)))
  _bars(axes, sizes, runs, lambda run, size: cells[run, size],
        'tokens_per_s', '{:.1f}', runs)
  axes.set_xticks(range(len(sizes)), [str(s) for s in sizes])
  axes.set_xlabel('batch size (sequences decoded at once)')
  axes.set_ylabel('speed, wall clock (tokens/s)')
  finish(figure, axes, f'{title}\nSpeed by batch size; whiskers: range over '
          f"{rows[0]['num_repeats']} repeats", path)


def _runs(rows: Rows) -> list[str]:
  return list(dict.fromkeys(r['run'] for r in rows))


def _colour(run: str, runs: Sequence[str]) -> str:
  """Returns the colour of a run, the same in all figures; plain is grey."""
  index = runs.index(run)
  return _PLAIN if index == 0 else COLOURS[(index - 1) % len(COLOURS)]


def new_figure(width: float) -> tuple[Figure, Any]:
  """Returns a figure `width` inches wide and its axes."""
  figure = Figure(figsize=(width, 4.8), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  axes.grid(axis='y', color='#dddddd', zorder=0)
  axes.spines[['top', 'right']].set_visible(False)
  return figure, axes


def _bars(axes, groups, shown, cell, name: str, form: str, runs) -> None:
  """Draws a bar per (group, run) with its range and its value."""
  width = 0.8 / len(shown)
  for i, run in enumerate(shown):
    values = [cell(run, g) for g in groups]
    heights = [v[name] for v in values]
    places = [g + (i - (len(shown) - 1) / 2) * width
              for g in range(len(groups))]
    # A median of two can lie a rounding error outside their range.
    below = [max(v[name] - v[f'{name}_min'], 0) for v in values]
    above = [max(v[f'{name}_max'] - v[name], 0) for v in values]
    axes.bar(places, heights, 0.9 * width, color=_colour(run, runs),
             label=run, zorder=2)
    axes.errorbar(places, heights, [below, above], fmt='none',
                  ecolor='#222222', elinewidth=1, capsize=2, zorder=3)
    if len(shown) * len(groups) > _MAX_LABELS:
      continue
    # At the foot of the bar: no whisker comes there, and it does not read as
    # the value of the whisker's end.
    for place, height in zip(places, heights, strict=True):
      axes.annotate(form.format(height), (place, 0), (0, 4),
                    textcoords='offset points', ha='center', fontsize=8,
                    zorder=4, bbox=dict(
                        boxstyle='round,pad=0.15', facecolor='white',
                        edgecolor='none'))
  axes.set_xlim(-0.7, len(groups) - 0.3)
  axes.margins(y=0.1)


def finish(figure: Figure, axes, title: str, path: Path) -> None:
  """Adds title and legend, and writes the file."""
  # On the figure, not the axes: a long name must not be cut off.
  figure.suptitle(title, fontsize=11)
  handles, labels = axes.get_legend_handles_labels()
  if handles:
    # About a dozen letters an inch; a legend too wide would be cut off.
    room = 12 * figure.get_size_inches()[0]
    columns = int(room / (max(map(len, labels)) + 8))
    figure.legend(handles, labels, loc='outside lower center', fontsize=9,
                  ncols=max(1, min(len(labels), columns)), frameon=False)
  partial = path.with_name(path.name + '.partial')
  figure.savefig(partial, dpi=150, format='png')
  os.replace(partial, path)
