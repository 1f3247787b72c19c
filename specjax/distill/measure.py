"""Acceptance measured by the decoder itself, for use while training."""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Context, Models, Options, SpecState

Array = jax.Array


class Measured(NamedTuple):
  """What decoding showed.

  Attributes:
    tau: tokens emitted a round, the bonus token counted; over all rows.
    per_position: f64[D], share of rounds that drafted a position and
      accepted it (jointly with those before it).
    conditional: f64[D], the same given that all before it were accepted.
    rounds, tokens: int, totals. texts: int32 arrays, prompt included.
    one_step_tv: of a lossy rule, estimated, mean of the tokens; 0 for exact
      ones.
  """

  tau: float
  per_position: np.ndarray
  conditional: np.ndarray
  rounds: int
  tokens: int
  texts: tuple[np.ndarray, ...]
  one_step_tv: float = 0.0


def context(
    prompts: Sequence[Any] | np.ndarray, new_tokens: int, *,
    size: int | None = None, eos: Sequence[int] = (),
    temperature: float = 0.0, seed: int = 0,
) -> Context:
  """Returns a batch of prompts, ready to decode.

  Args:
    prompts: token ids. new_tokens: most tokens generated a row.
    size: capacity S; None is what is needed.
    eos: end tokens. temperature: of all rows. seed: of all draws.
  """
  num = len(prompts)
  lengths = np.asarray([len(p) for p in prompts], np.int32)
  size = size or int(lengths.max()) + new_tokens
  tokens = np.zeros((num, size), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[:len(prompt)] = prompt
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(seed), jnp.arange(num))
  options = Options(
      eos=jnp.tile(jnp.asarray(eos, jnp.int32), (num, 1)) if eos else None,
      temperature=(jnp.full((num,), temperature, jnp.float32)
                   if temperature else None))
  return Context(
      tokens=jnp.asarray(tokens), length=jnp.asarray(lengths),
      prompt_length=jnp.asarray(lengths),
      limit=jnp.asarray(np.minimum(lengths + new_tokens, size)),
      done=jnp.zeros((num,), bool), rounds=jnp.zeros((num,), jnp.int32),
      keys=keys, options=options)


def decoded(
    engine: Engine, params: Models, start: Context, chunk: int
) -> SpecState:
  """Returns the state after all rows are done; to be compiled."""
  state = loop.empty(engine, start)
  rows = jnp.ones(start.length.shape, bool)
  state = loop.start(engine, params, state, rows, chunk=chunk)
  return loop.run(engine, params, state, jnp.int32(2**30))


@functools.partial(jax.jit, static_argnums=0, static_argnames='chunk')
def _decode(engine: Engine, params: Models, start: Context, chunk: int):
  state = decoded(engine, params, start, chunk)
  return state.context.tokens, state.context.length, state.metrics


def acceptance(
    engine: Engine, params: Models, start: Context, *, chunk: int = 128
) -> Measured:
  """Decodes a batch with the real loop and reports what was accepted."""
  tokens, lengths, counts = jax.device_get(
      _decode(engine, params, start, chunk=chunk))
  new = int((lengths - np.asarray(start.length)).sum())
  rounds = int(counts.histogram.sum())
  drafted = counts.drafted.sum(axis=0).astype(float)
  accepted = counts.accepted.sum(axis=0).astype(float)
  # A position is reached when the one before it was accepted; a draft may
  # have been cut in between.
  reached = np.minimum(np.concatenate([drafted[:1], accepted[:-1]]), drafted)
  return Measured(
      tau=new / max(rounds, 1),
      per_position=accepted / np.maximum(drafted, 1),
      conditional=accepted / np.maximum(reached, 1), rounds=rounds,
      tokens=new, one_step_tv=float(counts.excess.sum()) / max(new, 1),
      texts=tuple(t[:n] for t, n in zip(tokens, lengths, strict=True)))
