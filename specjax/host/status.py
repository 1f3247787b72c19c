"""How far a benchmark is, on stderr."""

from __future__ import annotations

import sys
import time

from specjax.host import cli
from specjax.host.requests import Result


class BenchStatus:
  """Says how far the benchmark is; a hook of `generate` for its results.

  On a terminal one line changes with every answer; in a pipe there is a line
  for each run. It looks at answers only: a look between rounds would stop
  the loop that is being timed.
  """

  def __init__(self, quiet: bool, num_turns: int):
    """Takes `num_turns`, the answers expected of all runs together."""
    self._quiet, self._num_turns = quiet, num_turns
    self._is_live = sys.stderr.isatty() and not quiet
    self._start = time.monotonic()
    self._num_done = 0

  def begin(self, label: str, batch_size: int) -> None:
    """Starts a run."""
    self._label, self._batch_size = label, batch_size
    self._new = self._rounds = self._here = 0
    self._slot_s = 0.0
    self._show()

  def __call__(self, result: Result) -> None:
    """Counts an answer."""
    self._num_done += 1
    self._here += 1
    self._new += len(result.tokens)
    self._rounds += result.rounds
    self._slot_s += result.wall_s
    self._show()

  def end(self, wall_s: float) -> None:
    """Leaves a line about the run that is finished, in `wall_s` seconds."""
    self.note(self._text(wall_s))

  def note(self, line: str) -> None:
    """Prints a line that stays."""
    self._clear()
    cli.note(line, self._quiet)

  def _show(self) -> None:
    if self._is_live:
      self._clear()
      sys.stderr.write(self._text(self._slot_s / self._batch_size))
      sys.stderr.flush()

  def _clear(self) -> None:
    if self._is_live:
      sys.stderr.write('\r\x1b[2K')

  def _text(self, seconds: float) -> str:
    text = f'{self._label}: {self._here} answers'
    if self._here:
      text += (f', {self._new / max(seconds, 1e-9):.1f} tokens/s, '
               f'{self._new / max(self._rounds, 1):.2f} tokens/round')
    share = self._num_done / self._num_turns
    text += f'; {share:.0%}'
    if self._num_done:
      left = (time.monotonic() - self._start) * (1 / share - 1)
      text += f', {int(left) // 60}:{int(left) % 60:02d} left'
    return text
