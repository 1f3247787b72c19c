"""The arrays that the rows of a batch are made of."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from specjax.core.types import Context, Options
from specjax.host.requests import Request
from specjax.io.options import Sampling


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
