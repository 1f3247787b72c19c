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

  The time left is what decoding took so far, for the runs that are left, and
  what compiling took, for the programs that are left.
  """

  def __init__(
      self, quiet: bool, *, num_turns: int, num_runs: int, num_programs: int
  ):
    """Begins before anything is compiled.

    Args:
      quiet: say nothing.
      num_turns: answers of a run, unless dialogues end early.
      num_runs: how often `begin` will be called. num_programs: `compiled`.
    """
    self._quiet, self._num_turns = quiet, num_turns
    self._num_runs, self._num_programs = num_runs, num_programs
    self._is_live = sys.stderr.isatty() and not quiet
    self._runs_done = self._programs_done = 0
    self._decoding_s = self._compiling_s = 0.0
    self._mark = time.monotonic()

  def compiled(self, label: str, seconds: float) -> None:
    """Leaves a line about a program, compiled in `seconds`."""
    self._programs_done += 1
    self._compiling_s += self._lap()
    self.note(f'{label}: ready to run after {seconds:.1f} s of compilation')

  def begin(self, label: str, batch_size: int) -> None:
    """Starts a run."""
    self._label, self._batch_size = label, batch_size
    self._new = self._rounds = self._here = 0
    self._slot_s = 0.0
    self._prompts: set[int] = set()
    self._lap()
    self._show()

  def __call__(self, result: Result) -> None:
    """Counts an answer."""
    self._prompts.add(result.request.prompt_index)
    self._here += 1
    self._new += len(result.tokens)
    self._rounds += result.rounds
    self._slot_s += result.wall_s
    self._show()

  def end(self, wall_s: float) -> None:
    """Leaves a line about the run that is finished, in `wall_s` seconds."""
    self._decoding_s += self._lap()
    self._runs_done += 1
    self.note(self._text(wall_s, self._runs_done, self._decoding_s))

  def note(self, line: str) -> None:
    """Prints a line that stays."""
    self._clear()
    cli.note(line, self._quiet)

  def _lap(self) -> float:
    """Returns the seconds since it was called before."""
    before, self._mark = self._mark, time.monotonic()
    return self._mark - before

  def _show(self) -> None:
    if self._is_live:
      self._clear()
      done = self._runs_done + self._here / self._num_turns
      now = self._decoding_s + time.monotonic() - self._mark
      sys.stderr.write(self._text(self._slot_s / self._batch_size, done, now))
      sys.stderr.flush()

  def _clear(self) -> None:
    if self._is_live:
      sys.stderr.write('\r\x1b[2K')

  def _text(self, seconds: float, done: float, decoding_s: float) -> str:
    """Returns a line: answers, speed, share of the whole, time left.

    Args:
      seconds: that the answers of this run took.
      done: runs, this one in part. decoding_s: that they took.
    """
    text = f'{self._label}: {self._here} answers'
    if self._here > len(self._prompts):  # several turns or samples
      text += f' to {len(self._prompts)} prompts'
    if self._here:
      text += (f', {self._new / max(seconds, 1e-9):.1f} tokens/s, '
               f'{self._new / max(self._rounds, 1):.2f} tokens/round')
    text += f'; {done / self._num_runs:.0%}'
    if done:
      left = decoding_s / done * (self._num_runs - done)
      left += self._compiling_s / max(self._programs_done, 1) * (
          self._num_programs - self._programs_done)
      whole = round(left)
      text += f', {whole // 60}:{whole % 60:02d} left'
    return text
