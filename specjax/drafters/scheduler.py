"""How many drafts of each row to verify when rows share the target's time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def schedule(
    chance: Array, throughput: Array, active: Array | None = None
) -> Array:
  """Returns int32[R] in [0, G]: drafts of each row that are worth verifying.

  Drafts are admitted by falling chance of being reached and accepted, for as
  long as each one raises the expected tokens a second of the whole batch,
  `(rows + sum of admitted chances) * throughput[rows + admitted]`; the first
  that does not ends it. Ties go to the smaller row, then the smaller slot.

  Stopping there, and not at the best of all numbers, keeps the output law:
  whether a draft is verified depends on no chance that was estimated after
  it was drawn. For the same reason `chance[:, k]` may depend on drafts before
  slot k only.

  Args:
    chance: f32[R,G] in [0, 1], of a draft given that those before it were
      accepted.
    throughput: f32[R (G + 1) + 1], target steps a second by tokens in the
      step; entry n is for n tokens.
    active: bool[R], rows that are not done; the others get 0 and take no
      part. None for all.

  References: DSpark, arXiv:2607.05147, algorithm 1.
  """
  num_rows, num = chance.shape
  reached = jnp.cumprod(chance.astype(jnp.float32), axis=1)
  rows = jnp.int32(num_rows)
  if active is not None:
    reached = jnp.where(active[:, None], reached, -1.0)
    rows = jnp.sum(active, dtype=jnp.int32)
  flat = reached.reshape(-1)
  order = jnp.argsort(-flat, stable=True)
  value = flat[order]
  admitted = jnp.arange(num_rows * num + 1)
  tokens = jnp.pad(jnp.cumsum(jnp.maximum(value, 0.0)), (1, 0)) + rows
  rate = tokens * jnp.take(throughput, rows + admitted, mode='clip')
  better = (rate[1:] > rate[:-1]) & (value >= 0)
  kept = jnp.cumprod(better.astype(jnp.int32))
  return jnp.zeros((num_rows,), jnp.int32).at[order // num].add(kept)
