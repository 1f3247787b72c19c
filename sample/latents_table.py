"""The table of `sample.latents_sweep`.

  python -m sample.latents_table --results out/a out/b --out out/both
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from sample import judging, sweeps
from specjax.host import cli
from specjax.io import output


def table(data: dict[str, Any]) -> str:
  """Returns all points as a table in Markdown."""
  batches = sorted({b for row in data['points'].values()
                    for b in row.get('speed', {})}, key=int)
  head = ['', 'tokens a round', 'drafts kept',
          *(f'speed-up at {b}' for b in batches), 'KS', *judging.HEADS]
  lines = [f'| {" | ".join(head)} |', '| --- ' * len(head) + '|']
  for key, row in data['points'].items():
    times = [row.get('speed', {}).get(b) for b in batches]
    quality = [''] * 3
    if sweeps.has(row, 'quality'):
      quality = [f'{row["tokens_per_round"]:.2f}',
                 '' if row['kept'] is None else f'{row["kept"]:.3f}',
                 f'{row["ks"]:.4f}']
    cells = [key + ' (lossy)' * bool(row.get('lossy')), *quality[:2],
             *('' if t is None else f'{t["speedup"]:.2f}' for t in times),
             quality[2], *judging.cells(row)]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def main(arguments=None) -> int:
  """Runs the program; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--results', nargs='+', required=True,
                      help='folders of sweeps of one target')
  parser.add_argument('--out', required=True)
  args = parser.parse_args(arguments)
  data = sweeps.merged(args.results)
  out = pathlib.Path(output.prepare(args.out))
  output.write_json(out / 'sweep.json', data)
  output.write_text(out / 'table.md', table(data))
  return 0


if __name__ == '__main__':
  sys.exit(cli.reported(main))
