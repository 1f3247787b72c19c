"""Denoising chains drawn in fewer calls of their head, with the same law.

Speculative sampling of the states of a chain (De Bortoli et al. 2025,
arXiv:2501.05370): some states are guessed as if the head went on saying what
it said last, one call of the head scores all of them, and the first that is
refused is drawn again from what is left of its law. What `models.denoising`,
`drafters.held` and the rules do in the loop of texts, for any drafter, is here
in a loop of its own, since its bookkeeping would cost as much as a small head.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax.core import density, tree
from specjax.core import keys as keys_lib
from specjax.core.chains import Path

Array = jax.Array

# Draws of a residual at a time where deviations differ: turns of a loop cost
# more than draws.
_AT_ONCE = 16


class _Chain(NamedTuple):
  """Chains as far as they are drawn.

  Attributes:
    turn: int32[], calls of the head. step: int32[B], how many are taken.
    states: f32[B,T+1,C], of which those up to `step` are drawn.
    token, between: f32[B,C], the token and the range that the head said last.
  """

  turn: Array
  step: Array
  states: Array
  token: Array
  between: Array


@dataclasses.dataclass(frozen=True)
class Ahead:
  """Draws chains of a `models.diffusion.Diffusion`; its field `ahead`.

  Chains have the law that drawing them step by step has, for any head.
  A refused state is mirrored where the two deviations are fixed, and else
  drawn by thinning. Chains do not depend on their neighbours.

  Attributes:
    num: states that are guessed, K >= 1. A call is of K + 1 states a chain.
  """

  num: int

  def __post_init__(self):
    if self.num < 1:
      raise ValueError(f'num={self.num}: must be >= 1')

  def __call__(
      self, path: Path, state: Array, keys: Array, first: int
  ) -> Array:
    """Returns the states f32[...,T-first,C] that follow `state f32[...,C]`.

    Args:
      path: the law, of one chain for each of `keys`. state: before step
        `first`. keys: key[...], consumed.
    """
    lead, rows = keys.shape, math.prod(keys.shape)
    total, channels = path.process.num_steps, path.process.channels
    path = path._each(lambda x: x.reshape(rows, *x.shape[len(lead):]))
    states = jnp.zeros((rows, total + 1, channels), jnp.float32)
    nothing = jnp.zeros((rows, channels), jnp.float32)
    chain = _Chain(
        jnp.int32(0), jnp.full((rows,), first, jnp.int32),
        states.at[:, first].set(state.reshape(rows, channels)), nothing,
        nothing)
    keys = keys.reshape(rows)
    # Each turn takes a step at least.
    chain = jax.lax.while_loop(
        lambda c: jnp.any(c.step < total) & (c.turn < total),
        lambda c: self._turn(path, keys, c), chain)
    return chain.states[:, first + 1:].reshape(
        *lead, total - first, channels)

  def _turn(self, path: Path, keys: Array, chain: _Chain) -> _Chain:
    """Takes 1 to K + 1 steps of each chain."""
    process, num = path.process, self.num
    key = keys_lib.fold(keys, chain.turn)
    tau = jnp.log(path.temperature)[:, None]
    noise = density.normal(
        keys_lib.fold(key, 0), (num + 1, process.channels))
    index = chain.step[:, None] + jnp.arange(num + 1)
    level = process.level(jnp.minimum(index, process.num_steps - 1))

    x = [tree.take_row(chain.states, chain.step)]
    guessed = []
    for k in range(num):  # arithmetic only, that becomes one kernel
      guessed.append(_guess(process, chain, x[-1], level[:, k], tau))
      x.append(guessed[-1].mean + jnp.exp(guessed[-1].log_std) * noise[:, k])
    y = jnp.stack(x, axis=1)

    said = process.head(
        path.params, y, process.time(level),
        jax.tree.map(lambda c: c[:, None], path.condition))
    mean, log_std = process.moments(y, level, *said)
    p = density.Gaussian(mean, log_std + tau[:, None])
    q = density.Gaussian(*(
        jnp.stack([getattr(g, f) for g in guessed], 1)
        for f in ('mean', 'log_std')))

    u = keys_lib.uniform(keys_lib.fold(key, 1), num)
    before = density.Gaussian(p.mean[:, :num], p.log_std[:, :num])
    # 1 - u is in (0, 1]; a ratio that is not a number is a refusal.
    kept = jnp.log1p(-u) <= before.log_prob(y[:, 1:]) - q.log_prob(y[:, 1:])
    count = jnp.sum(jnp.cumprod(kept, axis=1), axis=1, dtype=jnp.int32)
    slot = jnp.minimum(count, num - 1)
    refused = (count < num) & (chain.step + count < process.num_steps)
    new = _left(
        p.at(count), q.at(slot), tree.take_row(noise[:, :num], slot), refused,
        keys_lib.fold(key, 2), process.variance == 'learned')
    drawn = p.at(count).mean + jnp.exp(p.at(count).log_std) * noise[:, num]
    new = jnp.where(refused[:, None], new, drawn)

    taken = jnp.where((jnp.arange(1, num + 2) <= count[:, None])[..., None],
                      jnp.roll(y, -1, axis=1), new[:, None])
    at = process.at(tree.take_row(level, count))
    last = [tree.take_row(z, count) for z in (y, *said)]
    # What lies behind the new state is written over later, or never read.
    return _Chain(
        chain.turn + 1,
        jnp.minimum(chain.step + count + 1, process.num_steps),
        chain.states.at[jnp.arange(len(count))[:, None], index + 1].set(
            taken, mode='drop'),
        at['scale'] * (last[0] - at['spread'] * last[1]), last[2])


def _guess(
    process: Any, chain: _Chain, x: Array, level: Array, tau: Array
) -> density.Gaussian:
  """Returns the step that the head would ask for, had it not changed."""
  at = process.at(level)
  noise = (x - chain.token / at['scale']) / at['spread']
  mean, log_std = process.moments(x, level, noise, chain.between)
  return density.Gaussian(mean, log_std + tau)


def _left(
    p: density.Gaussian, q: density.Gaussian, noise: Array, use: Array,
    key: Array, thinned: bool,
) -> Array:
  """Returns f32[B,C] of the law of what q leaves of p, where `use`.

  Args:
    noise: f32[B,C] that a refused state was made of.
    thinned: deviations differ; else it is mirrored at the plane halfway
      between the means.
  """
  if thinned:
    return density.thin(
        p, lambda row, e: p.rows(row).log_prob(e) - q.rows(row).log_prob(e),
        key, use, at_once=_AT_ONCE)[0]
  away = (q.mean - p.mean) * jnp.exp(-p.log_std)
  # Equal means refuse nothing: any direction will do.
  along = jnp.sum(noise * away, axis=-1, keepdims=True) / jnp.maximum(
      jnp.sum(away**2, axis=-1, keepdims=True), 1e-24)
  return p.mean + jnp.exp(p.log_std) * (noise - 2 * along * away)
