"""A row's text while it grows (stop strings, timing), and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specjax.host.requests import Request, Result, by_round
from specjax.io.stream import StopStrings, StreamDecoder


class RowText:
  """Follows one row.

  Attributes:
    request: what is being decoded. tokens: emitted so far. text: final text
      so far. begun: host time of admission. ttft_s: until the first token.
    rounds: rounds already counted by the decoder.
  """

  def __init__(
      self, request: Request, tokenizer: Any, begun: float,
      eos: Sequence[int] = (),
  ):
    self.request, self.begun = request, begun
    self._eos = () if request.sampling.ignore_eos else tuple(eos)
    self.tokens: list[int] = []
    self.text = ''
    self.ttft_s = 0.0
    self.rounds = 0
    self.stopped = False
    self._stream = StreamDecoder(tokenizer) if tokenizer else None
    self._stops = None
    if request.sampling.stop:
      if tokenizer is None:
        raise ValueError('stop strings need a tokenizer')
      self._stops = StopStrings(request.sampling.stop)

  @property
  def stops(self) -> bool:
    """Whether the host has to look for stop strings."""
    return self._stops is not None

  def update(self, tokens: np.ndarray, now: float) -> str:
    """Takes all new tokens of the row; returns the text that they add."""
    fresh = tokens[len(self.tokens):].tolist()
    if fresh and not self.tokens:
      self.ttft_s = now - self.begun
    pieces = []
    for token in fresh:
      self.tokens.append(token)
      pieces.append(self._push(token))
      if self.stopped:  # tokens after the stop string are not emitted
        break
    return ''.join(pieces)

  def _push(self, token: int) -> str:
    if self._stream is None or token in self._eos:
      return ''  # an end token is no text, however the vocabulary marks it
    piece = self._stream.push([token])
    return self._filter(piece)

  def _filter(self, piece: str) -> str:
    if self._stops is not None:
      piece = self._stops.push(piece)
      self.stopped = self._stops.hit is not None
    self.text += piece
    return piece

  def close(self) -> str:
    """Returns the text held back for a character or stop string."""
    if self._stream is None or self.stopped:
      return ''
    piece = self._filter(self._stream.flush())
    if self._stops is not None and not self.stopped:
      rest = self._stops.flush()
      self.text += rest
      piece += rest
    return piece

  @property
  def reason(self) -> str:
    """Why the row ended: 'stop', 'eos' or 'length'."""
    if self.stopped:
      return 'stop'
    ends = self.tokens and self.tokens[-1] in self._eos
    return 'eos' if ends else 'length'


def finish(
    text: RowText, row: int, seen: Mapping[str, Any], now: float
) -> tuple[Result, str]:
  """Returns what came of a finished row, and the text that it still held.

  Args:
    text: of the row; it is closed. row: of the batch.
    seen: the state of the batch on the host, by name: 'token_round' and
      'token_kept' [B,S], 'metrics', and 'log_probs' where they were asked for.
    now: host time.
  """
  start = len(text.request.tokens)
  end = start + len(text.tokens)
  steps = np.bincount(seen['token_round'][row, start:end])
  kept = np.asarray(seen['token_kept'][row, start:end])
  drafted, accepted = _counts(seen, row, steps, kept, text.stopped)
  log_probs = None
  if text.request.sampling.log_probs:
    log_probs = {k: v[row, start:end] for k, v in seen['log_probs'].items()}
  tail = text.close()
  return Result(
      request=text.request, tokens=tuple(text.tokens), text=text.text,
      finish_reason=text.reason,
      step_lengths=tuple(steps.tolist()), kept=kept, drafted=drafted,
      accepted=accepted, ranks=np.asarray(seen['metrics'].ranks[row]),
      excess=float(seen['metrics'].excess[row]),
      gave_up=int(seen['metrics'].gave_up[row]), ttft_s=text.ttft_s,
      wall_s=now - text.begun, log_probs=log_probs), tail


def _counts(
    seen: Mapping[str, Any], row: int, steps: np.ndarray, kept: np.ndarray,
    stopped: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns `(drafted, accepted)` of a row.

  After a stop string the row ran on until the host looked: rounds that the
  text does not contain are left out.
  """
  drafted = seen['metrics'].drafted[row]
  accepted = seen['metrics'].accepted[row]
  if not stopped:
    return drafted, accepted
  accepted = by_round(steps.tolist(), kept, len(accepted)).sum(axis=0)
  return np.minimum(drafted, len(steps)), accepted
