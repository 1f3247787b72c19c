"""Executes the notebooks: `python notebooks/run.py`.

Prints the time of each and exits with 1 if a cell of any raises. The stored
notebooks are not changed; `--out FOLDER` keeps the executed copies.

  python notebooks/run.py notebooks/01_losslessness.ipynb --out out/notebooks
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import sys
import time

from nbclient import NotebookClient
from nbclient.exceptions import (
  CellExecutionError,
  CellTimeoutError,
  DeadKernelError,
)
import nbformat

FOLDER = Path(__file__).resolve().parent


def execute(path: Path, out: Path | None, timeout_s: int) -> str | None:
  """Runs a notebook; returns what went wrong, or None.

  Args:
    path: the notebook, left as it is.
    out: folder for the executed copy, written also after an error.
    timeout_s: of each cell, seconds.
  """
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  if any(cell.get('outputs') for cell in notebook.cells):
    return 'holds outputs: clear them before it is stored'
  client = NotebookClient(
      notebook, timeout=timeout_s, kernel_name='python3',
      resources={'metadata': {'path': str(FOLDER)}})
  try:
    client.execute()
  except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
    return f'{type(error).__name__}: {error}'
  finally:
    if out is not None:
      out.mkdir(parents=True, exist_ok=True)
      nbformat.write(notebook, out / path.name)
  return None


def main() -> int:
  """Runs the notebooks given, or all; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('notebooks', nargs='*', type=Path)
  parser.add_argument('--out', type=Path)
  parser.add_argument('--timeout_s', type=int, default=600)
  args = parser.parse_args()
  # The kernel is to import this checkout, also where it is not installed.
  places = [str(FOLDER.parent), os.environ.get('PYTHONPATH', '')]
  os.environ['PYTHONPATH'] = os.pathsep.join(p for p in places if p)
  failures = 0
  for path in args.notebooks or sorted(FOLDER.glob('*.ipynb')):
    start = time.perf_counter()
    wrong = execute(path, args.out, args.timeout_s)
    failures += wrong is not None
    print(f"{path.name}: {'failed' if wrong else 'ok'}, "
          f'{time.perf_counter() - start:.1f} s', flush=True)
    if wrong:
      print(wrong, file=sys.stderr)
  return int(failures > 0)


if __name__ == '__main__':
  raise SystemExit(main())
