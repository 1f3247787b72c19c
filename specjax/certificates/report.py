"""Rows of a certificate: as a table, as JSON, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

# Level of a sampled row's first test.
SIZE = 1e-3
# Up to this an error of an enumerated law is rounding.
TOLERANCE = 2e-6
# The smallest value that is drawn.
_FLOOR = 1e-12


@dataclasses.dataclass
class Row:
  """One line. `None`: does not apply.

  Attributes:
    name: what was certified. method: 'exact' (enumeration), 'sampled' (texts
      of the compiled loop), 'equal' (bitwise comparison of texts), 'fault' (a
      planted fault, which must not pass its test), 'skipped' (it could not be
      enumerated) or 'error' (it raised).
    passed: the law is right; of a fault: it was caught.
    p_value: of the sampled texts. error: largest difference of a probability
      (exact), or texts that differ (equal).
    count: texts. detectable_tv: total variation that would have been found
      with probability 0.99; of a lossy rule, what chance may add to `tv`.
    tv: total variation, exact (the worst problem) or plug-in.
    lossy: held against what the rule reports. excess: that report, sampled:
      per token, exact: of the round of the worst problem.
    accepted, expected: drafts kept in the first round, and what they should
      be. tokens_per_round: over whole texts.
    attempts: 2 where a row was repeated. seconds: compilation included.
    note: why it failed, or what else is to be said.
  """

  name: str
  method: str
  passed: bool
  p_value: float | None = None
  error: float | None = None
  count: int | None = None
  detectable_tv: float | None = None
  tv: float | None = None
  lossy: bool = False
  excess: float | None = None
  accepted: float | None = None
  expected: float | None = None
  tokens_per_round: float | None = None
  attempts: int = 1
  seconds: float = 0.0
  note: str = ''

  @property
  def verdict(self) -> str:
    """One word for the table."""
    if self.method == 'fault':
      return 'CAUGHT' if self.passed else 'MISSED'
    if self.method == 'skipped':
      return '-'
    return 'pass' if self.passed else 'FAIL'


@dataclasses.dataclass(frozen=True)
class Certificate:
  """All rows of a run.

  Attributes:
    rows: in the order of the grid. about: versions, device, seed, command.
  """

  rows: tuple[Row, ...]
  about: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def passed(self) -> bool:
    """Whether every row passed, and there is one."""
    return bool(self.rows) and all(r.passed for r in self.rows)

  @property
  def failed(self) -> tuple[Row, ...]:
    """Rows that did not pass."""
    return tuple(r for r in self.rows if not r.passed)

  def table(self) -> str:
    """Returns the rows as lines of text, and a summary."""
    head = ('row', 'method', 'result', 'p-value', 'error', 'texts',
            'finds TV', 'TV', 'excess', 'accepted', 'expected', 'note')
    body = [_line(r) for r in self.rows]
    widths = [max(map(len, column)) for column in zip(head, *body)]
    lines = ['  '.join(c.ljust(w) for c, w in zip(line, widths)).rstrip()
             for line in (head, ['-' * w for w in widths], *body)]
    return '\n'.join([*lines, '', self.summary()])

  def summary(self) -> str:
    """Returns one sentence."""
    faults = [r for r in self.rows if r.method == 'fault']
    rest = [r for r in self.rows if r.method not in ('fault', 'skipped')]
    text = f'{sum(r.passed for r in rest)} of {len(rest)} rows pass'
    if faults:
      caught = sum(r.passed for r in faults)
      text += f'; {caught} of {len(faults)} planted faults caught'
    return text

  def to_dict(self) -> dict[str, Any]:
    """Returns plain values, for JSON."""
    rows = [{**dataclasses.asdict(r), 'verdict': r.verdict}
            for r in self.rows]
    return {'passed': self.passed, **self.about, 'rows': [
        {k: _plain(v) for k, v in row.items()} for row in rows]}


def _plain(value: Any) -> Any:
  """Returns a value that JSON has: a law that broke down has NaN."""
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def _line(row: Row) -> tuple[str, ...]:
  """Returns the cells of a row."""
  def number(x: float | None, form: str = '.3f') -> str:
    return '' if x is None else format(x, form)

  # Without a claim to be held against, the plug-in TV is mostly chance.
  return (row.name, row.method, row.verdict, number(row.p_value, '.2g'),
          number(row.error, '.2g'), number(row.count, 'd'),
          number(row.detectable_tv), number(row.tv if row.lossy else None),
          number(row.excess, '.4f'), number(row.accepted),
          number(row.expected), row.note)


def figure(rows: Sequence[Row], path: Path) -> None:
  """Draws p-values and errors: laws above, planted faults below.

  Args:
    rows: of a certificate.
    path: of the PNG, which appears whole or not at all. Without a p-value or
      an error among the rows nothing is drawn.
  """
  # No pyplot: no window system, no global state.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  shown = [[r for r in rows if (r.method == 'fault') == is_fault
            and getattr(r, name) is not None and r.method != 'equal']
           for is_fault in (False, True) for name in ('p_value', 'error')]
  if not any(shown):
    return
  heights = [max(len(shown[i]), len(shown[i + 1]), 3) for i in (0, 2)]
  drawn = Figure(figsize=(15, 3 + 0.17 * sum(heights)), layout='constrained')
  FigureCanvasAgg(drawn)
  grid = drawn.add_gridspec(2, 2, height_ratios=heights)
  for i, some in enumerate(shown):
    if some:
      _panel(drawn.add_subplot(grid[i // 2, i % 2]), some, i >= 2,
             is_p_value=i % 2 == 0)
  drawn.suptitle('Certificates. Filled: passed, or caught; orange crosses: '
                 'failed, or missed; hollow: lossy, or nothing but the '
                 f'impossible. Values below {_FLOOR:g} stand at the edge.',
                 fontsize=10)
  partial = path.with_name(path.name + '.partial')
  drawn.savefig(partial, dpi=110, format='png')
  os.replace(partial, path)


def _panel(
    axes: Any, rows: Sequence[Row], faulty: bool, *, is_p_value: bool
) -> None:
  """Draws a dot a row, beside the rows' names, and the limit."""
  limit = SIZE if is_p_value else TOLERANCE
  for i, row in enumerate(rows):
    value = row.p_value if is_p_value else row.error
    value = max(value or 0.0, _FLOOR)
    is_hollow = row.lossy or (faulty and not is_p_value and value <= limit)
    colour = '#0072b2' if row.passed else '#d55e00'
    axes.plot(value, i, 'o' if row.passed else 'X', markersize=5,
              color=colour, markerfacecolor='white' if is_hollow else colour)
  axes.axvline(limit, color='black', linestyle='--', linewidth=1)
  axes.set_yticks(range(len(rows)), [r.name for r in rows], fontsize=6)
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xscale('log')
  axes.set_xlim(_FLOOR / 3, 3)
  axes.grid(axis='x', color='#dddddd', zorder=0)
  what = 'p-value of the texts' if is_p_value else 'largest error'
  side = 'left' if is_p_value else 'right'
  axes.set_title((f'planted faults: {what}' if faulty else what)
                 + f' ({side} of the line: off the law)', fontsize=8)
