"""Figures and the table of `sample.lantern_sweep`.

  python -m sample.lantern_plots --results out/sweep/sweep.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import json
import pathlib
from typing import Any

from sample import judging
from specjax.eval.plots import COLOURS, MARKERS, finish, new_figure
from specjax.io import output

Data = Mapping[str, Any]


def read(path: pathlib.Path, fresh: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the results of an earlier run.

  Args:
    path: of its file. fresh: what a new run would begin with.

  Raises:
    ValueError: of another setting or device, or no such file.
  """
  try:
    data = json.loads(path.read_text())
    found = {name: data[name] for name in ('setting', 'device')}
    data['points'].items()
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{path}: no results of a sweep: {error!r}') from error
  for name, value in found.items():
    if value != json.loads(json.dumps(fresh[name])):
      raise ValueError(
          f'{path}: of another {name}, {value}; give another --out')
  return data


def settings(data: Data) -> list[tuple[float, float]]:
  """Returns the (temperature, guidance) of a sweep, in its order."""
  return list(dict.fromkeys(
      (p['temperature'], p['guidance']) for p in data['points'].values()))


def draw(data: Data, out: pathlib.Path) -> list[pathlib.Path]:
  """Draws a figure for each temperature and guidance; writes the table.

  Up: the distance to the test images, or where there is none the one-step
  total variation. Right: the speed-up at the smallest batch.
  """
  made = []
  for temperature, guidance in settings(data):
    rows = [p for p in data['points'].values()
            if (p['temperature'], p['guidance']) == (temperature, guidance)]
    path = out / f'sweep_T{temperature:g}_guidance{guidance:g}.png'
    _figure(data, rows, path, f'T={temperature:g}, guidance {guidance:g}')
    made.append(path)
  output.write_text(out / 'sweep.md', table(data))
  return made


def _figure(data: Data, rows: list[Any], path: pathlib.Path, which: str):
  judged = all('distance' in row for row in rows)
  figure, axes = new_figure(8.0)
  axes.grid(color='#dddddd', zorder=0)
  families = list(dict.fromkeys(row['family'] for row in rows))
  for number, family in enumerate(families):
    of = [row for row in rows if row['family'] == family]
    fast = [_first(row) for row in of]
    high = [row['distance' if judged else 'one_step_tv'] for row in of]
    axes.errorbar(
        [s['speedup'] for s in fast], high,
        [row['half_width'] for row in of] if judged else None,
        [[s['speedup'] - s['least'] for s in fast],
         [s['most'] - s['speedup'] for s in fast]],
        fmt=MARKERS[number % len(MARKERS)], capsize=2, label=family,
        color=COLOURS[number % len(COLOURS)], zorder=3)
    for row, one, y in zip(of, fast, high, strict=True):
      axes.annotate(row['label'], (one['speedup'], y), (4, 4), fontsize=6,
                    textcoords='offset points')
  if judged:
    plain = next(r['distance'] for r in rows if r['family'] == 'plain')
    for name, value in (('plain', plain), ('plain + 2 %', 1.02 * plain)):
      axes.axhline(value, color='black', linewidth=0.8,
                   linestyle='-' if name == 'plain' else '--')
  batch = min(rows[0]['speed'], key=int)
  axes.set_xlabel(f'speed-up over plain decoding (×), batch {batch}')
  axes.set_ylabel(f'{data["reference"]["name"]} to the test images' if judged
                  else 'one-step total variation')
  finish(figure, axes, f'{data["setting"]["target"]} on {data["device"]}\n'
          f'{which}, {rows[0]["samples"]} images', path)


def _first(row: Mapping[str, Any]) -> Mapping[str, Any]:
  return row['speed'][min(row['speed'], key=int)]


def table(data: Data) -> str:
  """Returns all points as a Markdown table."""
  batches = sorted({b for p in data['points'].values() for b in p['speed']},
                   key=int)
  reference = data.get('reference')
  name = reference['name'] if reference else 'distance'
  head = ['way', 'T', 'guidance', 'tokens a round', 'one-step TV', name,
          *judging.HEADS[1:], *(f'speed-up, batch {b}' for b in batches)]
  lines = [f'| {" | ".join(head)} |', '|' + ' --- |' * len(head)]
  for p in data['points'].values():
    speeds = [f'{s["speedup"]:.2f} ({s["least"]:.2f} to {s["most"]:.2f})'
              for s in (p['speed'][b] for b in batches)]
    cells = [f'{p["family"]} {p["label"]}'.strip(), f'{p["temperature"]:g}',
             f'{p["guidance"]:g}', f'{p["tau"]:.2f}',
             f'{p["one_step_tv"]:.3f}', *judging.cells(p), *speeds]
    lines.append(f'| {" | ".join(cells)} |')
  if reference:
    lines += ['', f'{name}: real images from real images '
              f'{reference["floor"]:.3f} (halves of '
              f'{reference["real_images"]}), what the tokenizer makes of them '
              f'{reference["tokenizer"]:.3f}.']
  return '\n'.join(lines) + '\n'


def main(arguments=None) -> None:
  """Runs the program."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--results', required=True)
  path = pathlib.Path(parser.parse_args(arguments).results)
  draw(json.loads(path.read_text()), path.parent)


if __name__ == '__main__':
  main()
