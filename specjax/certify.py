"""Certifies all rules: `python -m specjax.certify --out out/certify`.

Compares the law of the emitted text with the target's for every drafter, rule
and topology, and plants faults that must be found. Prints a table, writes
`certificate.json` and `certificate.png` to `--out`; the exit code is 1 when a
row fails or a fault is missed. For a rule of one's own there is the function
`specjax.certify`.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time

from absl import flags

from specjax.certificates import cases, continuous, jobs, report
from specjax.host import certified, cli, results
from specjax.io import output
from specjax.version import __version__

_OUT = flags.DEFINE_string('out', 'out/certify', 'Folder for results.')
_FULL = flags.DEFINE_bool(
    'full', False, 'All trees, ten times the texts: for a nightly run.')
_ONLY = flags.DEFINE_string(
    'only', '', 'Regular expression; rows whose name has a match.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of everything.', lower_bound=0)
_LIST = flags.DEFINE_bool('list', False, 'Print the names of rows and stop.')
_JOBS = flags.DEFINE_integer(
    'jobs', min(os.cpu_count() or 1, 4),
    'Programs compiled and run at a time.', lower_bound=1)
_QUIET = flags.DEFINE_bool('quiet', False, 'No progress and no table.')


def main() -> int:
  """Runs the program; returns the exit code."""
  grid = (cases.grid(_FULL.value) + certified.grid(_FULL.value)
          + continuous.grid(_FULL.value))
  if _LIST.value:
    print('\n'.join(jobs.names(grid, _ONLY.value)))
    return 0
  total = len(jobs.names(grid, _ONLY.value))
  out = output.prepare(_OUT.value)
  cli.start(distributed=False)
  begin, made = time.perf_counter(), 0

  def tell(row: report.Row) -> None:
    nonlocal made
    made += 1
    why = f' ({row.note})' if row.note and not row.passed else ''
    cli.note(f'[{made}/{total}] {row.verdict}  {row.name}{why}',
             _QUIET.value)

  rows = jobs.run(
      grid, only=_ONLY.value, seed=_SEED.value, full=_FULL.value,
      workers=_JOBS.value, on_row=tell)
  certificate = report.Certificate(
      rows, about(time.perf_counter() - begin))
  report.figure(rows, out / 'certificate.png')
  output.write_text(out / 'certificate.txt', certificate.table() + '\n')
  # Last: who finds it finds the rest.
  output.write_json(out / 'certificate.json', certificate.to_dict())
  if not _QUIET.value:
    print(certificate.table())
    cli.note(f'wrote {out}/certificate.json, .txt and .png')
  return 0 if certificate.passed else 1


def about(seconds: float) -> dict:
  """Returns what the rows depend on, and how long they took."""
  return {
      'form': 'full' if _FULL.value else 'short', 'seed': _SEED.value,
      'only': _ONLY.value, 'seconds': seconds,
      'command': shlex.join(
          ['python', '-m', 'specjax.certify', *sys.argv[1:]]),
      'device': results.device_name(), 'num_cpu_cores': os.cpu_count(),
      'versions': {'specjax': __version__,
                   'python': platform.python_version(), **results.versions()},
      'tstamp': time.time()}


if __name__ == '__main__':
  cli.run(main)
