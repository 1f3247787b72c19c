"""Requests and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from specjax.io.options import Sampling


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
  """A prompt that is tokens, and what the model is told besides.

  Attributes:
    tokens: ids, or f32[T,C] where tokens are real numbers; T >= 1.
    condition: arrays by name, without the row axis (`Context.condition`):
      a class, a caption's features. All prompts of a run have the same names
      and shapes.
    id: None is the number of the prompt.
  """

  tokens: Any
  condition: Mapping[str, Any] | None = None
  id: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
  """One row's worth of work.

  Attributes:
    id: shown in errors and results.
    tokens: prompt, at least one token: ids, or tuples of C real numbers.
    sampling: options.
    seed: of this row's key; text is a function of it and of the options.
    stream: index of the sample of this prompt, folded into the key; so is
      the turn, or an answer would be drawn with the noise of the one before.
    source: span `(start, end)` of the prompt that input-guided drafting
      copies from; None is the whole prompt.
    prompt_index, turn: where the result belongs.
    condition: of `Start`, numpy arrays.
  """

  id: str
  tokens: tuple[Any, ...]
  sampling: Sampling
  seed: int = 0
  stream: int = 0
  source: tuple[int, int] | None = None
  prompt_index: int = 0
  turn: int = 0
  condition: Mapping[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
  """What came of a request.

  Attributes:
    request: the request.
    tokens: new tokens, up to and including an end token; lists of C real
      numbers where tokens are such.
    text: decoded, without end tokens and stop strings; '' without a
      tokenizer.
    finish_reason: 'eos', 'stop' or 'length'.
    step_lengths: tokens emitted by each round, in order; their number is
      the number of target calls, their sum the number of tokens.
    kept: bool per new token: it was an accepted draft.
    drafted, accepted: rounds that drafted / accepted at each depth, [D].
    ranks: rounds that accepted at each depth, by draw order among siblings,
      [D,C] (a row that a stop string ended may count a few rounds more).
    excess: summed one-step TV estimate of a lossy rule.
    gave_up: rounds in which a cap of the rule ended a residual draw.
    ttft_s: from admission to the first new token, seconds.
    wall_s: from admission to the end, seconds (as seen at chunk ends).
    log_probs: `{'raw', 'processed'}`, f32 per new token, when asked for.
  """

  request: Request
  tokens: tuple[Any, ...]
  text: str
  finish_reason: str
  step_lengths: tuple[int, ...]
  kept: np.ndarray
  drafted: np.ndarray
  accepted: np.ndarray
  ranks: np.ndarray
  excess: float
  gave_up: int
  ttft_s: float
  wall_s: float
  log_probs: dict[str, np.ndarray] | None = None

  @property
  def rounds(self) -> int:
    """Target calls."""
    return len(self.step_lengths)

  @property
  def histogram(self) -> np.ndarray:
    """Rounds by number of accepted drafts, int[D+1]."""
    return np.bincount(
        np.sum(by_round(self.step_lengths, self.kept, len(self.accepted)),
               axis=1), minlength=len(self.accepted) + 1)


def by_round(
    step_lengths: Sequence[int], kept: np.ndarray, depth: int
) -> np.ndarray:
  """Returns bool[rounds,D]: the round emitted its draft at depth d + 1."""
  out = np.zeros((len(step_lengths), depth), bool)
  ends = np.cumsum(step_lengths)
  for row, end, num in zip(out, ends, step_lengths, strict=True):
    mine = kept[end - num:end][:depth]
    row[:len(mine)] = mine
  return out


def check_context(
    request: Request, max_length: int | None, capacity: int | None = None,
    who: str = 'this model',
) -> None:
  """Raises ValueError for a text longer than a model is made for, if known.

  `capacity` is where the text ends at the latest, if anywhere; `who` is the
  model in the message.
  """
  num, new = len(request.tokens), request.sampling.max_new_tokens
  most = num + new if capacity is None else min(num + new, capacity)
  if max_length is not None and max(num + 1, most) > max_length:
    raise ValueError(
        f'prompt {_name(request)}: {num} tokens and max_new_tokens={new}; '
        f'the context of {who} is {max_length}')


def _name(request: Request) -> str:
  return f'{request.id} (turn {request.turn + 1})' if (
      request.turn) else request.id


def check(request: Request, size: int, num_ids: int) -> None:
  """Raises ValueError for a prompt that a slot of `size` cannot hold.

  `num_ids` are the ids that it may hold; 0 says real numbers.
  """
  name, num, room = _name(request), len(request.tokens), size - 1
  if not num:
    raise ValueError(f'prompt {name}: no tokens')
  if num > room:
    raise ValueError(
        f'prompt {name}: {num} tokens, {num - room} more than the capacity '
        f'of {size} allows (one new token must fit)')
  if bool(num_ids) == isinstance(request.tokens[0], tuple):
    raise ValueError(f"prompt {name}: this model's tokens are "
                     f'{"ids" if num_ids else "real numbers"}')
  if not num_ids:
    if not np.isfinite(np.asarray(request.tokens)).all():
      raise ValueError(f'prompt {name}: numbers that are not finite')
    return
  bad = [i for i in request.tokens if not 0 <= i < num_ids]
  if bad:
    raise ValueError(f'prompt {name}: token ids {bad[:5]}: must be in '
                     f'[0, {num_ids})')
