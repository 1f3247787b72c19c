"""Requests, results, and the arrays that rows of a batch are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from specjax.core.types import Context, Options
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


@dataclasses.dataclass(frozen=True)
class Stages:
  """Which options any request of a run uses; decides what is compiled.

  Attributes:
    active: names of `Options` fields that are arrays.
    num_eos: E, padded number of end tokens a row. log_probs, source:
    whether any row wants them.
    condition: name, shape and dtype of what the model is told.
    channels: C of tokens of real numbers; 0 for ids.
  """

  active: frozenset[str]
  num_eos: int
  log_probs: bool
  source: bool
  condition: tuple[tuple[str, tuple[int, ...], str], ...] = ()
  channels: int = 0


_NEUTRAL: dict[str, Any] = {
    'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'repetition_penalty': 1.0,
    'presence_penalty': 0.0, 'frequency_penalty': 0.0}


def stages(requests: Sequence[Request], num_eos: int) -> Stages:
  """Returns the union of what these requests need.

  Raises:
    ValueError: tokens or conditions of several shapes.
  """
  active: set[str] = set()
  told, channels = _form(requests[0]) if requests else ((), 0)
  for request in requests:
    if _form(request) != (told, channels):
      raise ValueError(
          f'prompt {request.id}: condition {_form(request)[0]} and '
          f'{_form(request)[1]} channels; others have {told} and {channels}')
  for s in {id(r.sampling): r.sampling for r in requests}.values():
    if not s.is_greedy:
      active.add('temperature')
    active |= {k for k, off in _NEUTRAL.items()
               if getattr(s, k) != off and not (k == 'top_k' and s.top_k < 1)}
    if s.logit_bias or s.banned_ids or s.allowed_ids is not None:
      active.add('bias')
    if s.min_new_tokens > 0:
      active.add('min_new')
  if 'temperature' not in active:  # filters cannot change an argmax
    active -= {'top_k', 'top_p', 'min_p'}
  return Stages(
      active=frozenset(active), num_eos=max(num_eos, 1),
      log_probs=any(r.sampling.log_probs for r in requests),
      source=any(r.source is not None for r in requests), condition=told,
      channels=channels)


def _form(
    request: Request
) -> tuple[tuple[tuple[str, tuple[int, ...], str], ...], int]:
  """Returns `(name, shape, dtype of conditions, channels of tokens)`."""
  told = tuple(sorted(
      (name, x.shape, str(x.dtype))
      for name, x in (request.condition or {}).items()))
  return told, np.asarray(request.tokens[:1]).size if isinstance(
      request.tokens[0], tuple) else 0


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


def bias_row(sampling: Sampling, vocab_size: int) -> np.ndarray:
  """Returns f32[V]: logit bias, with -inf on what must not be drawn."""
  row = np.zeros((vocab_size,), np.float32)
  if sampling.allowed_ids is not None:
    row[:] = -np.inf
    row[list(sampling.allowed_ids)] = 0.0
  for token, value in (sampling.logit_bias or {}).items():
    row[token] += value
  row[list(sampling.banned_ids)] = -np.inf
  return row


def build_context(
    slots: Sequence[Request | None], *, size: int, vocab_size: int,
    eos: Sequence[int], what: Stages, constraint: Any = None,
) -> Context:
  """Returns the host-side context of these rows (numpy leaves).

  Args:
    slots: a request per row; None for a vacant row (done from the start).
    size: S, token capacity. vocab_size: V. eos: end tokens.
    what: the run's stages; the structure of the context depends on it only.
    constraint: fresh `pipeline.Constraint` for these rows, or None.
  """
  batch = len(slots)
  shape = (batch, size)
  tokens = (np.zeros((*shape, what.channels), np.float32) if what.channels
            else np.zeros(shape, np.int32))
  length = np.ones((batch,), np.int32)
  limit = np.ones((batch,), np.int32)
  source = np.zeros((batch, 2), np.int32)
  seeds = np.zeros((batch, 3), np.int64)
  for row, request in enumerate(slots):
    if request is None:
      continue
    num = len(request.tokens)
    tokens[row, :num] = request.tokens
    length[row] = num
    limit[row] = min(num + request.sampling.max_new_tokens, size)
    source[row] = request.source or (0, num)
    seeds[row] = request.seed, request.stream, request.turn
  samplings = [r.sampling if r is not None else None for r in slots]
  options = _options(samplings, vocab_size, eos, what)
  zeros = np.zeros((batch, size), np.float32)
  fields: dict[str, Any] = dict(  # numpy here, jax arrays once placed
      tokens=tokens, length=length, prompt_length=length.copy(), limit=limit,
      done=np.asarray([r is None for r in slots]),
      rounds=np.zeros((batch,), np.int32), keys=_keys(seeds),
      options=options.replace(constraint=constraint),
      condition=_condition(slots, what, source),
      token_round=np.zeros((batch, size), np.int32),
      token_kept=np.zeros((batch, size), bool),
      log_probs=({'raw': zeros, 'processed': zeros.copy()}
                 if what.log_probs else None))
  return Context(**fields)


def _condition(
    slots: Sequence[Request | None], what: Stages, source: np.ndarray
) -> dict[str, np.ndarray] | None:
  """Returns what rows are told, [B,...] by name; vacant rows get zeros."""
  out: dict[str, np.ndarray] = {'source': source} if what.source else {}
  for name, shape, dtype in what.condition:
    blank = np.zeros(shape, dtype)
    out[name] = np.stack([
        blank if r is None else (r.condition or {})[name] for r in slots])
  return out or None


def _keys(seeds: np.ndarray) -> jax.Array:
  """Returns a key per row from its (seed, stream, turn)."""
  low = (seeds[:, 0] & 0xFFFFFFFF).astype(np.uint32)
  high = (seeds[:, 0] >> 32).astype(np.uint32)
  stream, turn = seeds[:, 1:].astype(np.uint32).T

  def one(first, *more):
    key = jax.random.key(first)
    for data in more:
      key = jax.random.fold_in(key, data)
    return key

  return jax.vmap(one)(low, high, stream, turn)


def _options(
    samplings: Sequence[Sampling | None], vocab_size: int,
    eos: Sequence[int], what: Stages,
) -> Options:
  """Returns the option arrays; vacant rows get neutral values."""
  def values(name: str, neutral: float, dtype) -> np.ndarray:
    return np.asarray([neutral if s is None else getattr(s, name)
                       for s in samplings], dtype)

  arrays: dict[str, Any] = {}
  for name, neutral in _NEUTRAL.items():
    if name in what.active:
      dtype = np.int32 if name == 'top_k' else np.float32
      arrays[name] = values(name, neutral, dtype)
  if 'temperature' in what.active:
    arrays['temperature'] = values('temperature', 0.0, np.float32)
  if 'min_new' in what.active:
    arrays['min_new'] = values('min_new_tokens', 0, np.int32)
  if 'bias' in what.active:
    blank = Sampling()
    arrays['bias'] = np.stack(
        [bias_row(s or blank, vocab_size) for s in samplings])
  ends = np.full((len(samplings), what.num_eos), -1, np.int32)
  for row, s in enumerate(samplings):
    if s is not None and not s.ignore_eos:
      ends[row, :len(eos)] = eos
  if not what.channels:  # a real number ends nothing
    arrays['eos'] = ends
  return Options(**arrays)
