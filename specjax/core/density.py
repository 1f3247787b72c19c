"""Laws over real vectors: densities, where `core.law` has tables.

Batched like those: leaves are [B,R,...], or [B,...] after `at`. What is drawn
and scored is called an *event*. Of `Gaussian` and `Mixture` it is the token
f32[...,C]; of laws whose tokens are ends of chains (`core.chains`) it is states
of the chain. All arithmetic is float32.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
import math
from typing import Any, ClassVar, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from specjax.core import keys as keys_lib
from specjax.core import tree

Array = jax.Array

_LOG_ROOT = 0.5 * math.log(2 * math.pi)
# Draws without a network, see `Density.at_once`.
_AT_ONCE = 4


class Density(abc.ABC):
  """What all laws of real vectors share."""

  def at(self, index: Array) -> Any:
    """Returns the law of row `index int32[B]`, without the R axis.

    With `index int32[B,M]`, the laws of those rows.
    """
    return self._each(lambda x: tree.take_row(x, index))

  def rows(self, index: Array) -> Any:
    """Returns the laws int32[L] of [B], without the R axis."""
    return self._each(lambda x: x[index])

  def flat(self) -> Any:
    """Returns the laws [B,R] as [B*R], without the R axis."""
    return self._each(lambda x: x.reshape(-1, *x.shape[2:]))

  def _each(self, fn: Callable[[Array], Array]) -> Any:
    """Returns the laws whose leaves, those with rows, are `fn` of these."""
    return jax.tree.map(fn, self)

  @abc.abstractmethod
  def sample(self, keys: Array) -> Array:
    """Draws events with key[B(,R)] (consumed)."""

  def token(self, event: Array) -> Array:
    """Returns f32[...,C], what is fed on: a function of the event alone."""
    return event


class Scored(Density):
  """A law whose events have a density.

  Attributes:
    at_once: events a row that `residual` draws before it looks whether some
      are kept.
  """

  at_once: ClassVar[int] = 1

  @abc.abstractmethod
  def log_prob(self, event: Array) -> Array:
    """Returns the log-density f32[B(,R)] of events, in nats."""

  def residual(
      self, other: Any, keys: Array, use: Array, scale: Array | None = None,
      most: int | None = None,
  ) -> tuple[Array, Array]:
    """Draws events from `norm(relu(self - other))`; see `thin`.

    Rows with `use=False` draw from `self`. The number of draws is geometric:
    1 / TV(self, other) on average, so that a token costs one draw on average
    whatever the laws are (Wang et al., arXiv:2411.11925, section 3.4).
    """
    if scale is not None:
      raise ValueError('densities: residuals of weighted laws do not exist')
    def log_ratio(rows: Array, event: Array) -> Array:
      return (self.rows(rows).log_prob(event)
              - other.rows(rows).log_prob(event))

    return thin(self, log_ratio, keys, use, most, self.at_once)


class _Draws(NamedTuple):
  """Rows that draw until each keeps one.

  Attributes:
    tried: int32[B], draws so far. done: bool[B]. bad: bool[B], `gave_up`.
    event: what is kept, of rows that are done.
  """

  tried: Array
  done: Array
  bad: Array
  event: Array


def thin(
    law: Density, log_ratio: Callable[[Array, Array], Array],
    keys: Array, use: Array, most: int | None = None, at_once: int = 1,
) -> tuple[Array, Array]:
  """Draws from `norm(relu(p - q))` by drawing from p and keeping some.

  An event is kept with probability max(0, 1 - q / p): exact, and the mass of
  the residual need not be known. What a row draws does not depend on other
  rows; but those that are done draw for those that are not, so that a batch
  need not wait for its most patient row.

  Args:
    law: p, of B rows. log_ratio: log p - log q, f32[L], of events of rows
      int32[L]; called with `(rows, events)`.
    keys: key[B], consumed. use: bool[B]; elsewhere the first draw is kept.
    most: draws of a row at most, or None: until it has its event. A row that
      reaches it keeps its last draw, which is one from p.
    at_once: draws of a turn of the loop for each row: more where draws are
      cheap and turns are not.

  Returns:
    `(event, gave_up bool[B])`: `gave_up` where `most` ended a row (the law of
    what is emitted is then off by no more than the probability of that), and
    where a density is not finite.
  """
  batch = len(keys)
  lane = jnp.arange(batch * at_once)

  def body(draws: _Draws) -> _Draws:
    wait = ~draws.done
    left, place = jnp.sum(wait), jnp.cumsum(wait) - 1
    # Lanes go around the rows that wait: a row's draws are in order.
    row = jnp.argsort(draws.done, stable=True)[lane % left]
    turn = lane // left
    number = draws.tried[row] + turn
    mine = keys_lib.fold(keys[row], number)
    new = law.rows(row).sample(keys_lib.fold(mine, 0))
    more = log_ratio(row, new)
    u = keys_lib.uniform(keys_lib.fold(mine, 1), 1)[:, 0]
    kept = ~use[row] | (u < -jnp.expm1(-more))
    bad = use[row] & jnp.isnan(more)  # would never be kept
    if most is not None:
      bad |= ~kept & (number == most - 1)
    first = jax.ops.segment_min(
        jnp.where(kept | bad, turn, lane.size), row, batch)
    found = wait & (first < lane.size)
    which = jnp.where(found, first * left + place, 0)
    shape = (batch,) + (1,) * (new.ndim - 1)
    return _Draws(
        draws.tried + (lane.size - place + left - 1) // left,
        draws.done | found, draws.bad | (found & bad[which]),
        jnp.where(found.reshape(shape), new[which], draws.event))

  blank = jax.eval_shape(law.sample, keys)
  none = jnp.zeros_like(use)
  draws = jax.lax.while_loop(
      lambda draws: ~jnp.all(draws.done), body, _Draws(
          jnp.zeros(batch, jnp.int32), none, none,
          jnp.zeros(blank.shape, blank.dtype)))
  return draws.event, draws.bad


def normal(keys: Array, shape: tuple[int, ...]) -> Array:
  """Returns f32 standard normal noise of shape `keys.shape + shape`."""
  flat = jax.vmap(lambda k: jax.random.normal(k, shape))(keys.reshape(-1))
  return flat.reshape(keys.shape + shape)


def log_normal(x: Array, mean: Array, log_std: Array) -> Array:
  """Returns log N(x; mean, std^2), elementwise."""
  return -0.5 * jnp.square((x - mean) * jnp.exp(-log_std)) - log_std - _LOG_ROOT


@struct.dataclass
class Gaussian(Scored):
  """Independent normal channels.

  Attributes:
    mean, log_std: f32[B,R,C] or [B,C].
  """

  at_once: ClassVar[int] = _AT_ONCE

  mean: Array
  log_std: Array

  def sample(self, keys: Array) -> Array:
    """Draws tokens f32[B(,R),C]."""
    noise = normal(keys, self.mean.shape[-1:])
    return self.mean + jnp.exp(self.log_std) * noise

  def log_prob(self, event: Array) -> Array:
    """Returns the log-density f32[B(,R)] of tokens."""
    return jnp.sum(log_normal(event, self.mean, self.log_std), axis=-1)


@struct.dataclass
class Mixture(Scored):
  """A mixture of M normal laws, the head of GIVT (arXiv:2312.02116).

  Attributes:
    logits: f32[B,R,M], up to a constant. mean, log_std: f32[B,R,M,C].
  """

  logits: Array
  at_once: ClassVar[int] = _AT_ONCE

  mean: Array
  log_std: Array

  def sample(self, keys: Array) -> Array:
    """Draws tokens f32[B(,R),C]."""
    gumbel = keys_lib.gumbel(keys_lib.fold(keys, 0), self.logits.shape[-1])
    which = jnp.argmax(self.logits + gumbel, axis=-1)[..., None, None]
    mean, log_std = (
        jnp.take_along_axis(x, which, axis=-2)[..., 0, :]
        for x in (self.mean, self.log_std))
    noise = normal(keys_lib.fold(keys, 1), mean.shape[-1:])
    return mean + jnp.exp(log_std) * noise

  def log_prob(self, event: Array) -> Array:
    """Returns the log-density f32[B(,R)] of tokens."""
    parts = jnp.sum(
        log_normal(event[..., None, :], self.mean, self.log_std), axis=-1)
    return jax.nn.logsumexp(
        jax.nn.log_softmax(self.logits, axis=-1) + parts, axis=-1)
