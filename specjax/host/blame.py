"""Says which numbers made a row of a decoder stop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core import keys
from specjax.core.round import Engine
from specjax.core.types import Models, SpecState


def report(
    engine: Engine, params: Models, state: SpecState, row: int, start: int
) -> str:
  """Returns what is wrong with a row whose `bad_round` is set.

  Args:
    engine, params: as decoded with. state: after the bad round, which left
      the row as it was.
    row: of the batch. start: length of its prompt.
  """
  context = state.context
  bad = int(state.metrics.bad_round[row])
  if context.tokens.ndim == 2:
    return (f'NaN or infinite logits in round {bad}, or bans and constraints '
            'that leave no token')
  at = int(context.length[row]) - start
  return (f'NaN or infinite numbers in round {bad}, from token {at} on: '
          + _origin(engine, params, state, row))


def _origin(
    engine: Engine, params: Models, state: SpecState, row: int
) -> str:
  """Does the round again, with other noise; returns who went wrong where."""
  context = state.context
  state = state.replace(context=context.replace(
      done=jnp.zeros_like(context.done)))
  draft, state = engine.drafter.propose(params, state)
  event = draft.tokens if draft.event is None else draft.event
  drafted = np.asarray(jax.tree.leaves(event)[0])[row]
  for slot in np.flatnonzero(np.asarray(draft.valid)[row]):
    found = _where(drafted[slot])
    if found is not None:
      return f"the drafter's draft {slot + 1}{found}"
  scores, state = engine.target.score(params, state, draft, ())
  index = jnp.zeros((len(context.length),), jnp.int32)
  law: Any = scores.target_law.at(index)
  made = law.sample(keys.row(context, keys.Purpose.RESIDUAL))
  found = _where(np.asarray(made)[row])
  return 'the target' + ('' if found is None else f"'s law of it{found}")


def _where(event: np.ndarray) -> str | None:
  """Returns where an event is not finite, [C] or [T+1,C]; None if it is."""
  if np.isfinite(event).all():
    return None
  if event.ndim == 1:
    return ''
  states = np.isfinite(event).all(axis=-1)
  return f', denoising step {int(np.argmin(states))} of {len(states) - 1}'
