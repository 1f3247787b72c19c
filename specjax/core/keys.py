"""Randomness: every draw is a pure function of (row key, purpose, counter).

Row keys are never advanced, so a row's text does not depend on its
neighbours, its slot or on when other rows finish. Two counters exist:

* `position`: the absolute position of the token that is drawn. Coupled rules
  (sample-and-match, Gumbel coupling) use it: their text does not depend on
  the draft length or on the drafter.
* `row`: the row's round. Rules with a ratio or a residual use it. They must
  not use positions: the noise of a rejected tail would be used again, which
  biases block verification.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp

Array = jax.Array


class Purpose(enum.IntEnum):
  """Names of independent streams; a number, once given, never changes."""

  DRAFT = 1
  ACCEPT = 2
  RESIDUAL = 3
  MATCH = 4
  CONTROL = 5


def fold(keys: Array, data: Array | int) -> Array:
  """Returns keys of any shape, told apart by `data`, which broadcasts."""
  data = jnp.broadcast_to(jnp.asarray(data, jnp.uint32), keys.shape)
  flat = jax.vmap(jax.random.fold_in)(keys.reshape(-1), data.reshape(-1))
  return flat.reshape(keys.shape)


def row(context, purpose: Purpose, index: Array | int = 0) -> Array:
  """Returns key[B] for this round; `index` tells draws in a round apart."""
  keys = fold(context.keys, int(purpose))
  return fold(fold(keys, context.rounds), index)


def position(context, position: Array, purpose: Purpose = Purpose.MATCH):
  """Returns key[B] or [B,T], one for each absolute position int32[B(,T)]."""
  return _at_position(context, position, purpose)


def _at_position(context, position: Array, purpose: Purpose) -> Array:
  keys = fold(context.keys, int(purpose))
  if position.ndim == 2:
    keys = jnp.broadcast_to(keys[:, None], position.shape)
  return fold(keys, position)


def shared_gumbel(context, position: Array, index: int, size: int) -> Array:
  """Returns f32[B(,T),size]: the noise that draft and target share.

  `index` tells siblings apart; 0 is the noise that sample-and-match uses.
  """
  keys = _at_position(context, position, Purpose.MATCH)
  return gumbel(fold(keys, index) if index else keys, size)


def uniform(keys: Array, num: int) -> Array:
  """Returns f32[B,num] in [0, 1) from key[B]."""
  return jax.vmap(lambda k: jax.random.uniform(k, (num,)))(keys)


def gumbel(keys: Array, size: int) -> Array:
  """Returns f32 standard Gumbel noise of shape `keys.shape + (size,)`."""
  flat = jax.vmap(lambda k: jax.random.gumbel(k, (size,)))(keys.reshape(-1))
  return flat.reshape(keys.shape + (size,))
