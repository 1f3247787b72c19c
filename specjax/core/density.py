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
from typing import Any, ClassVar

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
    at_once: events that `residual` draws before it looks whether one is kept.
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
    return thin(
        self.sample, lambda e: self.log_prob(e) - other.log_prob(e), keys,
        use, most, self.at_once)


def thin(
    sample: Callable[[Array], Array], log_ratio: Callable[[Array], Array],
    keys: Array, use: Array, most: int | None = None, at_once: int = 1,
) -> tuple[Array, Array]:
  """Draws from `norm(relu(p - q))` by drawing from p and keeping some.

  An event is kept with probability max(0, 1 - q / p): exact, and the mass of
  the residual need not be known.

  Args:
    sample: draws events from p with keys. log_ratio: log p - log q of events.
    keys: key[B], consumed. use: bool[B]; elsewhere the first draw is kept.
    most: draws at most, or None: until the last row has its event. A row that
      reaches it keeps its last draw, which is one from p.
    at_once: draws of a turn of the loop, more where draws are cheap and turns
      are not. With `most` it is one.

  Returns:
    `(event, gave_up bool[B])`: `gave_up` where `most` ended a row (the law of
    what is emitted is then off by no more than the probability of that), and
    where a density is not finite.
  """
  blank = jax.eval_shape(sample, keys)
  carry = (jnp.int32(0), jnp.zeros_like(use), jnp.zeros_like(use),
           jnp.zeros(blank.shape, blank.dtype))

  def cond(carry):
    count, done, _, _ = carry
    going = ~jnp.all(done)
    return going if most is None else going & (count < most)

  def draw(count):
    mine = keys_lib.fold(keys, count)
    new = sample(keys_lib.fold(mine, 0))
    more = log_ratio(new)
    u = keys_lib.uniform(keys_lib.fold(mine, 1), 1)[:, 0]
    broken = use & jnp.isnan(more)  # would never be kept
    return new, ~use | (u < -jnp.expm1(-more)) | broken, broken

  def turn(count):
    if at_once == 1 or most is not None:
      return 1, draw(count)
    found = jax.vmap(draw)(count + jnp.arange(at_once))
    first = jnp.argmax(found[1], axis=0)  # that is kept, if one is
    row = jnp.arange(len(first))
    return at_once, tuple(x[first, row] for x in found)

  def body(carry):
    count, done, bad, event = carry
    drawn, (new, kept, broken) = turn(count)
    shape = done.shape + (1,) * (new.ndim - done.ndim)
    event = jnp.where(done.reshape(shape), event, new)
    return count + drawn, done | kept, bad | (broken & ~done), event

  _, done, bad, event = jax.lax.while_loop(cond, body, carry)
  return event, bad | ~done


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
