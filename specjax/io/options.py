"""Sampling options as users give them; checked here, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
import numbers
import operator
from typing import Any

MAX_SEED = 2**63 - 1
_MAX_INT = 2**31 - 1  # what an int32 on the device holds

# Field -> (kind, test, what is allowed).
_NUMBERS: dict[str, tuple[Any, Any, str]] = {
    'temperature': (numbers.Real, lambda x: 0 <= x < math.inf,
                    '>= 0 and finite'),
    'top_k': (numbers.Integral, lambda x: -1 <= x <= _MAX_INT,
              'an integer >= 0 (0 or -1 keeps all)'),
    'top_p': (numbers.Real, lambda x: 0 < x <= 1, 'in (0, 1]'),
    'min_p': (numbers.Real, lambda x: 0 <= x <= 1, 'in [0, 1]'),
    'repetition_penalty': (numbers.Real, lambda x: 0 < x < math.inf,
                           '> 0 and finite'),
    'presence_penalty': (numbers.Real, math.isfinite, 'finite'),
    'frequency_penalty': (numbers.Real, math.isfinite, 'finite'),
    'max_new_tokens': (numbers.Integral, lambda x: 1 <= x <= _MAX_INT,
                       'an integer >= 1'),
    'min_new_tokens': (numbers.Integral, lambda x: x >= 0,
                       'an integer >= 0'),
    'n': (numbers.Integral, lambda x: x >= 1, 'an integer >= 1')}

# What says nothing of tokens that are real numbers.
_OF_IDS = {
    'top_k', 'top_p', 'min_p', 'repetition_penalty', 'presence_penalty',
    'frequency_penalty', 'logit_bias', 'allowed_ids', 'banned_ids',
    'min_new_tokens', 'stop', 'log_probs'}


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
    for name, (kind, is_ok, allowed) in _NUMBERS.items():
      value = getattr(self, name)
      is_number = isinstance(value, kind) and not isinstance(value, bool)
      self._check(name, is_number and is_ok(value), allowed)
    self._check('min_new_tokens', self.min_new_tokens <= self.max_new_tokens,
                f'in [0, max_new_tokens={self.max_new_tokens}]')
    if self.seed is not None:
      self._check('seed', isinstance(self.seed, numbers.Integral)
                  and 0 <= self.seed <= MAX_SEED, f'in [0, {MAX_SEED}]')
    self._check('stop', not isinstance(self.stop, str) and all(
        isinstance(s, str) and s for s in self.stop),
        'a tuple of non-empty strings')
    self._to_ids('banned_ids')
    if self.allowed_ids is not None:
      self._to_ids('allowed_ids')
      self._check('allowed_ids', self.allowed_ids,
                  'None or a non-empty tuple of token ids')
    for token, value in (self.logit_bias or {}).items():
      # +inf and NaN would make a law that is none; -inf bans.
      if not isinstance(token, numbers.Integral) or not value < math.inf:
        raise ValueError(f'logit_bias={{{token!r}: {value!r}}}: must map '
                         'token ids to finite numbers, or to -inf')

  def _check(self, name: str, is_ok: Any, allowed: str) -> None:
    if not is_ok:
      raise ValueError(
          f'{name}={getattr(self, name)!r}: must be {allowed}')

  def _to_ids(self, name: str) -> None:
    """Makes a tuple of ints of whatever sequence was given."""
    try:
      ids = tuple(operator.index(i) for i in getattr(self, name))
    except TypeError as error:
      raise ValueError(f'{name}={getattr(self, name)!r}: must be a tuple of '
                       'token ids') from error
    object.__setattr__(self, name, ids)

  def check_ids(self, vocab_size: int, eos: Sequence[int] = ()) -> None:
    """Raises ValueError for ids out of range, or when none can be drawn.

    With `vocab_size` 0 tokens are real numbers: options of ids must be off.
    """
    if not vocab_size:
      for field in dataclasses.fields(self):
        value = getattr(self, field.name)
        if field.name in _OF_IDS and value != field.default:
          raise ValueError(f'{field.name}={value!r}: is for ids, and this '
                           "model's tokens are real numbers")
      return
    bias = self.logit_bias or {}
    ids = [*bias, *(self.allowed_ids or ()), *self.banned_ids]
    bad = [i for i in ids if not 0 <= i < vocab_size]
    if bad:
      raise ValueError(f'token ids {bad[:5]} (logit_bias, allowed_ids or '
                       f'banned_ids): must be in [0, {vocab_size})')
    gone = {*self.banned_ids, *(i for i in bias if bias[i] == -math.inf)}
    if self.min_new_tokens > 0 and not self.ignore_eos:
      gone |= {i for i in eos if 0 <= i < vocab_size}
    left = vocab_size - len(gone)
    if self.allowed_ids is not None:
      left = len(set(self.allowed_ids) - gone)
    if not left:
      raise ValueError(
          'banned_ids, logit_bias and min_new_tokens (which bans end tokens) '
          'leave nothing of ' + ('the vocabulary' if self.allowed_ids is None
                                 else 'allowed_ids'))

  @property
  def is_greedy(self) -> bool:
    """Whether every step takes the likeliest token."""
    return self.temperature < 1e-5
