"""Figures and the table of `sample.lantern_sweep`.

  python -m sample.lantern_plots --results out/sweep
  python -m sample.lantern_plots --results out/a out/b --out out/both
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import pathlib
import sys
from typing import Any

from sample import judging, sweeps
from specjax.eval.plots import COLOURS, MARKERS, finish, new_figure
from specjax.host import cli
from specjax.io import output

Data = Mapping[str, Any]


def settings(data: Data) -> list[tuple[float, float]]:
  """Returns the (temperature, guidance) of a sweep, in its order."""
  return list(dict.fromkeys(
      (p['temperature'], p['guidance']) for p in data['points'].values()))


def draw(
    data: Data, out: pathlib.Path, against: str = 'speed'
) -> list[pathlib.Path]:
  """Draws a figure for each temperature and guidance; writes the table.

  Up: the distance to the test images, or where there is none the one-step
  total variation. Right, `against` 'speed': the speed-up at the smallest
  batch; 'rounds': tokens a round, which no device changes. Points of which a
  part is missing are in the table only.
  """
  parts = sweeps.PARTS if against == 'speed' else ('quality',)
  made = []
  for temperature, guidance in settings(data):
    rows = [p for p in data['points'].values()
            if (p['temperature'], p['guidance']) == (temperature, guidance)
            and sweeps.has(p, *parts)]
    if not rows:
      continue
    name = 'sweep' if against == 'speed' else 'rounds'
    path = out / f'{name}_T{temperature:g}_guidance{guidance:g}.png'
    _figure(data, rows, path, f'T={temperature:g}, guidance {guidance:g}',
            against)
    made.append(path)
  output.write_text(out / 'sweep.md', table(data))
  return made


def _figure(
    data: Data, rows: list[Any], path: pathlib.Path, which: str, against: str
) -> None:
  judged = all('distance' in row for row in rows)
  figure, axes = new_figure(8.0)
  axes.grid(color='#dddddd', zorder=0)
  axes.margins(x=0.15)  # labels stand to the right of points
  families = list(dict.fromkeys(row['family'] for row in rows))
  for number, family in enumerate(families):
    of = [row for row in rows if row['family'] == family]
    fast = [_right(row, against) for row in of]
    high = [row['distance' if judged else 'one_step_tv'] for row in of]
    axes.errorbar(
        [s['speedup'] for s in fast], high,
        [row['half_width'] for row in of] if judged else None,
        [[s['speedup'] - s['least'] for s in fast],
         [s['most'] - s['speedup'] for s in fast]],
        fmt=MARKERS[number % len(MARKERS)], capsize=2, label=family,
        color=COLOURS[number % len(COLOURS)], zorder=3)
    for index, (row, one, y) in enumerate(zip(of, fast, high, strict=True)):
      # In turn above and below: neighbours in a family are often close.
      axes.annotate(row['label'], (one['speedup'], y), (4, (-9, 4)[index % 2]),
                    fontsize=6, textcoords='offset points')
  if judged:
    plain = [r['distance'] for r in rows if r['family'] == 'plain']
    for name, value in [(n, x * y) for y in plain for n, x in (
        ('plain', 1), ('plain + 2 %', 1.02))]:
      axes.axhline(value, color='black', linewidth=0.8,
                   linestyle='-' if name == 'plain' else '--')
  axes.set_xlabel(
      'tokens a round' if against == 'rounds' else
      'speed-up over plain decoding (×), batch '
      f'{min(rows[0]["speed"], key=int)}')
  axes.set_ylabel(f'{data["reference"]["name"]} to the test images' if judged
                  else 'one-step total variation')
  finish(figure, axes, f'{data["setting"]["target"]} on {data["device"]}\n'
          f'{which}, {rows[0]["samples"]} images', path)


def _right(row: Mapping[str, Any], against: str) -> Mapping[str, float]:
  """Returns where a point is, and from where to where."""
  if against == 'rounds':
    return dict.fromkeys(('speedup', 'least', 'most'), row['tau'])
  return row['speed'][min(row['speed'], key=int)]


def table(data: Data) -> str:
  """Returns all points as a Markdown table."""
  batches = sorted({b for p in data['points'].values()
                    for b in p.get('speed', {})}, key=int)
  reference = data.get('reference')
  name = reference['name'] if reference else 'distance'
  head = ['way', 'T', 'guidance', 'tokens a round', 'one-step TV', name,
          *judging.HEADS[1:], *(f'speed-up, batch {b}' for b in batches)]
  lines = [f'| {" | ".join(head)} |', '|' + ' --- |' * len(head)]
  for p in data['points'].values():
    speeds = [s and f'{s["speedup"]:.2f} ({s["least"]:.2f} to {s["most"]:.2f})'
              for s in (p.get('speed', {}).get(b, '') for b in batches)]
    quality = ['', '']
    if sweeps.has(p, 'quality'):
      quality = [f'{p["tau"]:.2f}', f'{p["one_step_tv"]:.3f}']
    cells = [f'{p["family"]} {p["label"]}'.strip(), f'{p["temperature"]:g}',
             f'{p["guidance"]:g}', *quality, *judging.cells(p), *speeds]
    lines.append(f'| {" | ".join(cells)} |')
  if reference:
    lines += ['', f'{name}: real images from real images '
              f'{reference["floor"]:.3f} (halves of '
              f'{reference["real_images"]}), what the tokenizer makes of them '
              f'{reference["tokenizer"]:.3f}.']
  return '\n'.join(lines) + '\n'


def main(arguments=None) -> int:
  """Runs the program; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--results', nargs='+', required=True,
                      help='folders of sweeps of one target')
  parser.add_argument('--out', default=None, help='default: the first folder')
  parser.add_argument('--against', choices=('speed', 'rounds'),
                      default='speed', help='what figures have to the right')
  args = parser.parse_args(arguments)
  data = sweeps.merged(args.results)
  out = pathlib.Path(output.prepare(args.out or args.results[0]))
  if args.out:
    output.write_json(out / 'sweep.json', data)
  draw(data, out, args.against)
  return 0


if __name__ == '__main__':
  sys.exit(cli.reported(main))
