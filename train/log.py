"""What a training run says: metrics in files, a line on stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import csv
import io
import json
from pathlib import Path
import sys
import time
from typing import Any

import numpy as np

from specjax.io import output
from specjax.io.errors import OutputError

Row = dict[str, Any]


def _read(path: Path) -> list[Row]:
  """Returns the rows of a file whose last line may have been cut off.

  Raises:
    ValueError: another line is no row; names it.
  """
  rows: list[Row] = []
  lines = path.read_text().splitlines()
  for number, line in enumerate(lines, 1):
    try:
      rows.append(json.loads(line))
    except ValueError as error:
      if number < len(lines):
        raise ValueError(f'{path}: line {number}: {error}') from error
  return rows


def summary(reports: Sequence[Mapping[str, Any]]) -> Row:
  """Returns the means of some steps' reports (host arrays).

  Sums by position are divided by the places counted; steps that were left
  out (`bad`) count in `bad_steps` only.
  """
  fine = [r for r in reports if not r.get('bad', 0)]
  row: Row = {'bad_steps': len(reports) - len(fine)}
  if not fine:
    return row
  weight = np.sum([r.get('weight', 1.0) for r in fine], axis=0)
  for name in fine[0]:
    values = np.asarray([r[name] for r in fine], np.float64)
    if name in ('weight', 'bad'):
      continue
    if values.ndim == 1:
      row[name] = float(values.mean())
    else:
      mean = values.sum(axis=0) / np.maximum(weight, 1e-9)
      row[name] = [round(float(x), 6) for x in mean]
  return row


class Metrics:
  """Rows in `metrics.jsonl`, each on disk at once; `metrics.csv` at the end.

  Also scalars for TensorBoard, where a package that writes them is installed.
  """

  def __init__(self, folder: Path, step: int = 0, enabled: bool = True):
    """Opens the files; drops rows of a run that went on after `step`."""
    self._folder, self._enabled = folder, enabled
    self._path = folder / 'metrics.jsonl'
    self.rows: list[Row] = []
    if step and self._path.exists():
      self.rows = [r for r in _read(self._path) if r['step'] <= step]
    self._writer = _tensorboard(folder) if enabled else None
    if enabled:
      output.write_text(self._path, ''.join(map(_line, self.rows)))
      self._file = open(self._path, 'a', encoding='utf-8')

  def write(self, kind: str, row: Mapping[str, Any]) -> Row:
    """Appends a row of a kind ('train', 'eval'); it holds its `step`."""
    row = {'kind': kind, **row}
    self.rows.append(row)
    if self._enabled:
      try:
        self._file.write(_line(row))
        self._file.flush()
      except OSError as error:
        raise OutputError(f'{self._path}: {error.strerror or error}') from error
    if self._writer is not None:
      for name, value in flat(row).items():
        if isinstance(value, (int, float)) and name != 'step':
          self._writer.add_scalar(f'{kind}/{name}', value, row['step'])
    return row

  def of(self, kind: str) -> list[Row]:
    """Returns the rows of a kind, those before an interruption too."""
    return [r for r in self.rows if r['kind'] == kind]

  def close(self) -> None:
    """Writes the table and closes the files."""
    if not self._enabled:
      return
    self._file.close()
    if self._writer is not None:
      self._writer.close()
    rows = [flat(r) for r in self.rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline='')
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(rows)
    output.write_text(self._folder / 'metrics.csv', text.getvalue())

  def __enter__(self) -> Metrics:
    return self

  def __exit__(self, kind: Any, *unused: Any) -> None:
    try:
      self.close()
    except (OSError, OutputError):
      if kind is None:  # what ended the run is what is to be told
        raise


def flat(row: Mapping[str, Any], prefix: str = '') -> Row:
  """Returns a row of scalars: `match.2` is the second position's."""
  out: Row = {}
  for name, value in row.items():
    if isinstance(value, Mapping):
      out.update(flat(value, f'{prefix}{name}.'))
    elif isinstance(value, (list, tuple)):
      out.update({f'{prefix}{name}.{i}': x for i, x in enumerate(value, 1)})
    else:
      out[prefix + name] = value
  return out


class Status:
  """A line on stderr; in a log, a line every half minute."""

  def __init__(self, quiet: bool):
    self._quiet = quiet
    self._is_tty = sys.stderr.isatty()
    self._last = -1e9

  def __call__(self, line: str, last: bool = False) -> None:
    """Shows a line; `last` makes it stay."""
    now = time.monotonic()
    wait = 0.2 if self._is_tty else 30.0
    if self._quiet or (now - self._last < wait and not last):
      return
    self._last = now
    if self._is_tty:
      line = '\r\x1b[2K' + line + ('\n' if last else '')
    else:
      line += '\n'
    sys.stderr.write(line)
    sys.stderr.flush()


def said(
    row: Mapping[str, Any], num_steps: int, scores: str, unit: str
) -> str:
  """Returns the progress line of a 'train' row with these scores.

  Steps that were left out have no scores; where all were, that is said.
  """
  bad = row.get('bad_steps', 0)
  found = [f'step {row["step"]}/{num_steps}']
  if 'loss' in row:
    found += [f'loss {row["loss"]:.4f}', scores]
  if bad:
    found.append(f'loss or gradient not finite in {bad} '
                 f'{"step" if bad == 1 else "steps"}')
  return ', '.join([*found, f'{row["tokens_per_s"]:.0f} {unit}/s',
                    f'{clock(row["left_s"])} left'])


def train_line(row: Mapping[str, Any], num_steps: int) -> str:
  """Returns the progress line of a 'train' row."""
  percent = lambda name: ' '.join(  # noqa: E731
      f'{100 * x:.0f}' for x in row.get(name, []))
  return said(row, num_steps, (
      f'acceptance {percent("acceptance")} %, match {percent("match")} %'),
      'tokens')


def eval_line(row: Mapping[str, Any]) -> str:
  """Returns the line of an 'eval' row."""
  accepted = ' '.join(f'{100 * x:.0f}' for x in row['conditional'])
  return (f'step {row["step"]}, {row["minutes"]:.1f} min: tau '
          f'{row["tau"]:.3f}, accepted given those before {accepted} %, '
          f'held-out loss {row["held_out"].get("loss", 0):.4f}')


def clock(seconds: float) -> str:
  """Returns 'm:ss'."""
  minutes, rest = divmod(int(round(seconds)), 60)
  return f'{minutes}:{rest:02d}'


def _line(row: Row) -> str:
  return json.dumps(row) + '\n'


def _tensorboard(folder: Path) -> Any:
  """Returns a writer of scalars, or None where no package has one."""
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    try:
      from torch.utils.tensorboard import SummaryWriter
    except ImportError:
      return None
  return SummaryWriter(str(folder / 'tensorboard'))
