"""Figures of `sample.ablate_drafter`, one for each axis, and a table.

Of kinds of drafters there is one more: tokens a round against the length of the
chain.

  python -m sample.ablate_plots --results out/ablations/ablations.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import json
import pathlib
import sys
from typing import Any

import numpy as np

from specjax.eval.plots import COLOURS, MARKERS, finish, new_figure
from specjax.host import cli
from specjax.io import output

# Axis -> its name, and what is told apart in the title.
_NAMES = {
    'loss': 'loss', 'kind': 'kind of drafter',
    'vocabulary': 'tokens that can be drafted',
    'slots': 'slots of a block', 'layers': 'layers of the drafter',
    'ttt': 'steps of training-time test (EAGLE-3)',
    'share': 'share of the text', 'markov': 'Markov head'}

Row = Mapping[str, Any]


def cells(
    data: Mapping[str, Any], axis: str
) -> dict[str, list[Row]]:
  """Returns the rows of every label of an axis that was trained.

  A label has a row for each seed; failed ones are left out.
  """
  out: dict[str, list[Row]] = {}
  for label, key in data['axes'][axis].items():
    rows = [row for name, row in data['runs'].items()
            if name.rsplit(' ', 1)[0] == key and 'tau' in row]
    if rows:
      out[label] = rows
  return out


def draw(
    data: Mapping[str, Any], axis: str, path: pathlib.Path
) -> bool:
  """Draws an axis: tokens a round, whiskers from seed to seed.

  Returns:
    Whether there was anything to draw.
  """
  found = cells(data, axis)
  if not found:
    return False
  values = [[r['tau'] for r in rows] for rows in found.values()]
  means = np.array([np.mean(v) for v in values])
  low = means - [min(v) for v in values]
  high = [max(v) for v in values] - means
  figure, axes = new_figure(max(6.0, 1.0 * len(found)))
  place = np.arange(len(found))
  axes.errorbar(place, means, [np.maximum(low, 0), np.maximum(high, 0)],
                fmt='-o' if is_number(found) else 'o', capsize=4,
                color=COLOURS[0], zorder=3)
  for at, mean in zip(place, means, strict=True):
    axes.annotate(f'{mean:.2f}', (at, mean), (6, 6), fontsize=8,
                  textcoords='offset points')
  axes.set_xticks(place, [label.replace(' ', '\n') for label in found])
  axes.set_xlim(-0.5, len(found) - 0.3)
  axes.margins(y=0.2)
  axes.set_xlabel(_NAMES.get(axis, axis))
  axes.set_ylabel('tokens a round, τ')
  setting = data['setting']
  seeds = max(map(len, values))
  finish(figure, axes, f'{setting["target"]} on {data["device"]}\n'
          f'{setting["seconds"]:g} s of training each, greedy chains'
          + (f'; whiskers: range of {seeds} seeds' if seeds > 1 else ''),
          path)
  return True


def draw_lengths(
    data: Mapping[str, Any], axis: str, path: pathlib.Path
) -> None:
  """Draws tokens a round against K, a line for each label of an axis.

  A chain of K tokens is the beginning of a longer one, so one run has them
  all: 1 + the sum of the chances to accept at least 1, ..., K drafts.
  """
  figure, axes = new_figure(7.0)
  longest = 1
  for number, (label, rows) in enumerate(cells(data, axis).items()):
    reached = np.mean([r['per_position'] for r in rows], axis=0)
    longest = max(longest, len(reached))
    axes.plot(np.arange(len(reached)) + 1, 1.0 + np.cumsum(reached),
              marker=MARKERS[number % len(MARKERS)], label=label,
              color=COLOURS[number % len(COLOURS)],
              linestyle='-' if number < len(COLOURS) else '--')
  axes.set_xticks(range(1, longest + 1))
  axes.set_xlabel('drafts a round, K')
  axes.set_ylabel('tokens a round, τ')
  setting = data['setting']
  finish(figure, axes, f'{setting["target"]} on {data["device"]}\n'
         f'{setting["seconds"]:g} s of training each, greedy chains', path)


def is_number(labels) -> bool:
  """Whether an axis is a quantity: its points are joined."""
  return all(label.replace('.', '', 1).isdigit() for label in labels)


def table(data: Mapping[str, Any]) -> str:
  """Returns Markdown: a table for each axis."""
  lines = []
  for axis in data['axes']:
    found = cells(data, axis)
    if not found:
      continue
    lines += [f'### {_NAMES.get(axis, axis)}', '',
              '| | tokens a round | accepted by position, given those '
              'before | steps | parameters | text covered |',
              '| --- | --- | --- | --- | --- | --- |']
    lines += [line(label, rows) for label, rows in found.items()]
    lines.append('')
  return '\n'.join(lines)


def line(label: str, rows: Sequence[Row]) -> str:
  """Returns the line of a drafter: means over its seeds."""
  mean = lambda name: np.mean([r[name] for r in rows], axis=0)  # noqa: E731
  accepted = ' '.join(f'{100 * x:.0f}' for x in mean('conditional'))
  return (f'| {label} | {mean("tau"):.3f} | {accepted} % | '
          f'{mean("step"):.0f} | {mean("parameters") / 1e6:.1f} M | '
          f'{mean("held_out_coverage"):.1%} |')


def main(arguments=None) -> None:
  """Runs the program."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--results', required=True)
  parser.add_argument('--out', default='', help='a folder; beside it')
  args = parser.parse_args(arguments)
  source = pathlib.Path(args.results)
  data = json.loads(source.read_text())
  folder = output.prepare(args.out or source.parent)
  for axis in data['axes']:
    if draw(data, axis, folder / f'ablation_{axis}.png'):
      print(f'wrote {folder}/ablation_{axis}.png')
  if 'kind' in data['axes'] and cells(data, 'kind'):
    draw_lengths(data, 'kind', folder / 'ablation_length.png')
    print(f'wrote {folder}/ablation_length.png')
  output.write_text(folder / 'ablations.md', table(data))


if __name__ == '__main__':
  sys.exit(cli.reported(main))
