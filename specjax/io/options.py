"""Sampling options as users give them; checked here, on the host."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one request is decoded.

  Attributes:
    temperature: >= 0; 0 (below 1e-5) is greedy.
    top_k: tokens kept; 0 or -1 keeps all.
    top_p: in (0, 1]; 1 keeps all.
    min_p: in [0, 1]; keeps tokens of at least this share of the best.
    repetition_penalty: > 0; prompt and output; 1 is off.
    presence_penalty, frequency_penalty: logits; output only; 0 is off.
    logit_bias: token id -> logits added.
    allowed_ids: if given, only these can be drawn. banned_ids: never drawn.
    max_new_tokens: >= 1. min_new_tokens: no end token before that many.
    stop: strings that end the text (they are not part of it).
    ignore_eos: decode through end tokens.
    seed: in [0, 2**63); None derives one from the run's seed and the
      request's index.
    n: samples for each prompt, >= 1.
    log_probs: also return log-probabilities of the emitted tokens: raw (of
      the model) and processed (of the law that was sampled).

  Raises:
    ValueError: a value out of range; names it and the range.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: Mapping[int, float] | None = None
  allowed_ids: tuple[int, ...] | None = None
  banned_ids: tuple[int, ...] = ()
  max_new_tokens: int = 128
  min_new_tokens: int = 0
  stop: tuple[str, ...] = ()
  ignore_eos: bool = False
  seed: int | None = None
  n: int = 1
  log_probs: bool = False

  def __post_init__(self):
    check = self._check
    check('temperature', 0 <= self.temperature < math.inf, '>= 0 and finite')
    check('top_k', self.top_k >= -1 and self.top_k == int(self.top_k),
          'an integer >= 0 (0 or -1 keeps all)')
    check('top_p', 0 < self.top_p <= 1, 'in (0, 1]')
    check('min_p', 0 <= self.min_p <= 1, 'in [0, 1]')
    check('repetition_penalty', 0 < self.repetition_penalty < math.inf,
          '> 0 and finite')
    for name in ('presence_penalty', 'frequency_penalty'):
      check(name, math.isfinite(getattr(self, name)), 'finite')
    check('max_new_tokens', self.max_new_tokens >= 1, '>= 1')
    check('min_new_tokens', 0 <= self.min_new_tokens <= self.max_new_tokens,
          f'in [0, max_new_tokens={self.max_new_tokens}]')
    check('n', self.n >= 1, '>= 1')
    check('seed', self.seed is None or 0 <= self.seed <= MAX_SEED,
          f'in [0, {MAX_SEED}]')
    check('stop', all(self.stop) and not isinstance(self.stop, str),
          'a tuple of non-empty strings')
    check('allowed_ids', self.allowed_ids is None or len(self.allowed_ids),
          'None or a non-empty tuple of token ids')

  def _check(self, name: str, is_ok: Any, allowed: str) -> None:
    if not is_ok:
      raise ValueError(
          f'{name}={getattr(self, name)!r}: must be {allowed}')

  def check_ids(self, vocab_size: int) -> None:
    """Raises ValueError when a token id is not in the vocabulary."""
    ids = [*(self.logit_bias or {}), *(self.allowed_ids or ()),
           *self.banned_ids]
    bad = [i for i in ids if not 0 <= i < vocab_size]
    if bad:
      raise ValueError(f'token ids {bad[:5]} (logit_bias, allowed_ids or '
                       f'banned_ids): must be in [0, {vocab_size})')
    left = (set(self.allowed_ids) if self.allowed_ids is not None
            else None)
    if left is not None and not left - set(self.banned_ids):
      raise ValueError('banned_ids leaves nothing of allowed_ids')

  @property
  def is_greedy(self) -> bool:
    """Whether every step takes the likeliest token."""
    return self.temperature < 1e-5
