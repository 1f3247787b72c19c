"""What `train.rollout` decodes: answers, turn after turn, kept on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
from pathlib import Path
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from specjax.data import filters, store
from specjax.data.dialogues import Dialogue
from specjax.data.store import Record
from specjax.distill import rollout
from specjax.distill.rollout import Progress, Settings
from specjax.host import cli
from specjax.host.load import Model

# Why a prompt is dropped: it leaves too few tokens for its answer.
NO_ROOM = 'too long for the context'


def describe(settings: Settings) -> dict[str, Any]:
  """Returns settings as JSON values."""
  return dataclasses.asdict(settings)


def digest(prompts: Sequence[np.ndarray]) -> str:
  """Returns a hash of all prompts, in order."""
  found = hashlib.sha256()
  for tokens in prompts:
    found.update(len(tokens).to_bytes(8, 'little'))
    found.update(np.asarray(tokens, '<i4').tobytes())
  return found.hexdigest()


class Answers(NamedTuple):
  """What a target answered.

  Attributes:
    turns: records of each turn, by index; `prompt_index` is that of the first
      prompt of the conversation in all of them.
    tokens_per_s: of this run.
  """

  turns: list[list[Record]]
  tokens_per_s: float


@dataclasses.dataclass
class Writer:
  """Answers prompts, and what users say after that.

  Each turn is a pass of its own over the conversations that have it, in a
  folder of its own: it begins when the turn before it is complete.

  Attributes:
    target: who answers. settings: how.
    origin: JSON values that decide the texts beside these.
    out: where parts go. part_size: records a file.
    longest: tokens of a prompt, at most; conversations end before that.
    limits: what a loop is: a conversation does not go on after one.
    quiet: say nothing.
  """

  target: Model
  settings: Settings
  origin: Mapping[str, Any]
  out: Path
  part_size: int
  longest: int
  limits: filters.Limits
  quiet: bool = False

  def __call__(
      self, prompts: Sequence[np.ndarray],
      dialogues: Mapping[bytes, Dialogue], num_turns: int,
      dropped: Counter[str],
  ) -> Answers:
    """Answers up to `num_turns` turns.

    Args:
      prompts: of the first turn, int32[n] each.
      dialogues: by the bytes of their first prompt.
      dropped: counts conversations that end early, by turn and reason.
    """
    status = Status(self.quiet or jax.process_index() != 0)
    about = {**self.origin, **describe(self.settings),
             'prompts': digest(prompts)}
    asked = dict(enumerate(prompts))
    turns = [self._turn(0, asked, about, status)]
    going = {i: dialogues[p.tobytes()] for i, p in asked.items()
             if p.tobytes() in dialogues}
    for turn in range(1, num_turns):
      going = self._following(going, turns[-1], turn, dropped)
      asked = self._prompts(going, turn, dropped)
      if not asked:
        break
      # Indices choose noise and temperature.
      about = {**about, 'turn': turn, 'prompts': digest(list(asked.values())),
               'indices': digest([np.asarray(list(asked))])}
      turns.append(self._turn(turn, asked, about, status))
    return Answers(turns, status.speed)

  def _turn(
      self, turn: int, asked: Mapping[int, np.ndarray],
      about: dict[str, Any], status: Status,
  ) -> list[Record]:
    """Returns the answers to one turn, by index."""
    target = self.target

    def answers(skip):
      return rollout.generate(
          target.lm, target.params, asked, eos=target.eos,
          settings=self.settings, skip=skip, turn=turn, mesh=target.mesh,
          on_progress=status)

    name = f'turn {turn + 1}: ' if turn else ''
    folder = f'parts-{turn + 1}' if turn else 'parts'
    status.begin(f'{name}answers')
    return decode(self.out / folder, about, self.part_size, status, answers)

  def _following(
      self, going: Mapping[int, Dialogue], records: Sequence[Record],
      turn: int, dropped: Counter[str],
  ) -> dict[int, Dialogue]:
    """Returns the conversations that go on, up to their next user turn."""
    text: Any = self.target.tokenizer
    limits, out = self.limits, {}
    for record in records:
      dialogue = going.get(record.prompt_index)
      if dialogue is None or not dialogue.later:
        continue
      answer = record.answer[:-1] if record.finished else record.answer
      if filters.trailing_loop(answer, limits.max_period, limits.repeats):
        dropped[f'turn {turn + 1}: after a loop'] += 1
      elif not (said := text.decode(answer)).strip():
        dropped[f'turn {turn + 1}: after no answer'] += 1
      else:
        out[record.prompt_index] = dialogue.following(said)
    return out

  def _prompts(
      self, going: Mapping[int, Dialogue], turn: int, dropped: Counter[str]
  ) -> dict[int, np.ndarray]:
    """Returns prompts that fit, by index of their conversation."""
    longest = min(self.longest, self.settings.buckets[-1])
    free = rollout.room(self.target.lm, self.settings)
    out = {}
    for index, dialogue in going.items():
      tokens = encode(self.target, dialogue.messages)
      if len(tokens) > longest:
        dropped[f'turn {turn + 1}: too long'] += 1
      elif free is not None and len(tokens) > free:
        dropped[f'turn {turn + 1}: {NO_ROOM}'] += 1
      else:
        out[index] = np.asarray(tokens, np.int32)
    return out


def encode(target: Model, what: Any) -> list[int]:
  """Returns the token ids of a text, or of messages in the chat template."""
  text: Any = target.tokenizer
  if isinstance(what, str):
    return text.encode(what)
  return text.encode(text.apply_chat_template(what), add_bos=False)


def decode(
    folder: Path, about: dict[str, Any], part_size: int, status: Status,
    make: Callable[..., Any],
) -> list[Record]:
  """Returns all records by index; generates what is not on disk yet."""
  parts = store.Parts(folder, about, part_size)
  is_first = jax.process_index() == 0
  if parts.done:
    cli.note(f'{status.title}: {len(parts.done)} are there already',
             status.quiet)
  records = list(parts)
  try:
    for record in make(frozenset(parts.done)):
      records.append(record)
      if is_first:
        parts.add(record)
  finally:  # also when interrupted
    status.end()
    if is_first:
      parts.flush()
  return sorted(records, key=lambda r: r.prompt_index)


class Status:
  """Says on stderr how far things are."""

  def __init__(self, quiet: bool):
    self.title, self.quiet = '', quiet
    self._is_tty = sys.stderr.isatty()
    self._last, self._line = 0.0, ''
    # Tokens and seconds of what has ended.
    self._before: tuple[int, float] = (0, 0.0)
    self._now = (0, 0.0)

  @property
  def speed(self) -> float:
    """Tokens per second so far."""
    tokens, seconds = map(sum, zip(self._before, self._now, strict=True))
    return tokens / max(seconds, 1e-9)

  def begin(self, title: str) -> None:
    """Begins another pass."""
    self.title, self._line = title, ''

  def __call__(self, progress: Progress) -> None:
    """Shows progress: once a second, in a log every half minute."""
    self._now = (progress.new_tokens, progress.elapsed_s)
    self._line = self.text(progress)
    now = time.monotonic()
    if self.quiet or now - self._last < (1 if self._is_tty else 30):
      return
    self._last = now
    sys.stderr.write(
        '\r\x1b[2K' + self._line if self._is_tty else self._line + '\n')
    sys.stderr.flush()

  def text(self, progress: Progress) -> str:
    """Returns the line: rows, tokens/s, time left."""
    speed = progress.new_tokens / max(progress.elapsed_s, 1e-9)
    line = (f'{self.title}: {progress.num_done}/{progress.num_prompts}, '
            f'{progress.new_tokens} tokens, {speed:.0f} tokens/s, '
            f'{progress.share:.0%} of the slots busy')
    if 0 < progress.num_done < progress.num_prompts:
      left = progress.num_prompts - progress.num_done
      seconds = progress.elapsed_s / progress.num_done * left
      line += f', {seconds:.0f} s left'
    return line

  def end(self) -> None:
    """Writes the last line once more, to stay."""
    self._before = (self._before[0] + self._now[0],
                    self._before[1] + self._now[1])
    self._now = (0, 0.0)
    if not self.quiet and self._line:
      sys.stderr.write(
          ('\r\x1b[2K' if self._is_tty else '') + self._line + '\n')
      sys.stderr.flush()


def split(
    answers: Answers, prompts: Sequence[np.ndarray], share: float, seed: int
) -> tuple[list[Record], list[Record]]:
  """Returns `(train, held_out)`, whole conversations on either side.

  The first prompt decides; see `filters.is_held_out`.
  """
  sides: tuple[list[Record], list[Record]] = ([], [])
  for record in [r for turn in answers.turns for r in turn]:
    first = prompts[record.prompt_index]
    sides[filters.is_held_out(first, share, seed)].append(record)
  return sides
