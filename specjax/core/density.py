"""Laws over real vectors: densities, where `core.law` has tables.

Batched like those: leaves are [B,R,...], or [B,...] after `at`. A law scores
*events*. Of `Gaussian` and `Mixture` the event is the token f32[...,C]; of
`Path`, whose token is the end of a chain of Gaussian steps, it is the chain,
since the density of its end alone is an integral that nobody can compute.
All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, Protocol

from flax import struct
import jax
import jax.numpy as jnp

from specjax.core import keys as keys_lib
from specjax.core import tree

Array = jax.Array

_LOG_ROOT = 0.5 * math.log(2 * math.pi)


class Process(Protocol):
  """What the steps of a `Path` are: a frozen, hashable dataclass.

  Attributes:
    num_steps: T. channels: C.
    last_noise: whether the last step is drawn; else it is its mean, and the
      chain has no density.
  """

  num_steps: int
  channels: int
  last_noise: bool

  def step(
      self, params: Any, x: Array, index: Array, condition: Any
  ) -> tuple[Array, Array]:
    """Returns mean and log std, f32[...,C], of the state after `x f32[...,C]`.

    `index int32[...]` counts steps from the noise, 0 to T - 1; the leaves of
    `condition` lead with the axes of `x` (1 where they do not vary).
    """
    ...


class Density:
  """What all densities share."""

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

  def sample(self, keys: Array) -> Array:
    """Draws events with key[B(,R)] (consumed)."""
    raise NotImplementedError

  def log_prob(self, event: Array) -> Array:
    """Returns the log-density f32[B(,R)] of events, in nats."""
    raise NotImplementedError

  def token(self, event: Array) -> Array:
    """Returns f32[...,C], what is fed on: a function of the event alone."""
    return event

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
        use, most)


def thin(
    sample: Callable[[Array], Array], log_ratio: Callable[[Array], Array],
    keys: Array, use: Array, most: int | None = None,
) -> tuple[Array, Array]:
  """Draws from `norm(relu(p - q))` by drawing from p and keeping some.

  An event is kept with probability max(0, 1 - q / p): exact, and the mass of
  the residual need not be known.

  Args:
    sample: draws events from p with keys. log_ratio: log p - log q of events.
    keys: key[B], consumed. use: bool[B]; elsewhere the first draw is kept.
    most: draws at most, or None: until the last row has its event. A row that
      reaches it keeps its last draw, which is one from p.

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

  def body(carry):
    count, done, bad, event = carry
    mine = keys_lib.fold(keys, count)
    new = sample(keys_lib.fold(mine, 0))
    more = log_ratio(new)
    u = keys_lib.uniform(keys_lib.fold(mine, 1), 1)[:, 0]
    broken = use & jnp.isnan(more)  # would never be kept
    kept = ~use | (u < -jnp.expm1(-more)) | broken
    shape = done.shape + (1,) * (new.ndim - done.ndim)
    event = jnp.where(done.reshape(shape), event, new)
    return count + 1, done | kept, bad | (broken & ~done), event

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
class Gaussian(Density):
  """Independent normal channels.

  Attributes:
    mean, log_std: f32[B,R,C] or [B,C].
  """

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
class Mixture(Density):
  """A mixture of M normal laws, the head of GIVT (arXiv:2312.02116).

  Attributes:
    logits: f32[B,R,M], up to a constant. mean, log_std: f32[B,R,M,C].
  """

  logits: Array
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


@struct.dataclass
class Path(Density):
  """The chain of states that ends in a token: a denoising trajectory.

  Starts at standard normal noise; each step is Gaussian given the state
  before it. Events are f32[...,T+1,C], the start in front; the token is the
  last state. The laws of two models are compared as `tail`s.

  Attributes:
    process: a `Process`, static. params: of it, shared by all rows.
    condition: leaves [B,R,...] or [B,...]; what steps are conditioned on.
    temperature: f32[B,R] or [B]; multiplies all deviations.
  """

  process: Any = struct.field(pytree_node=False)
  params: Any
  condition: Any
  temperature: Array

  def _each(self, fn: Callable[[Array], Array]) -> Path:
    return Path(self.process, self.params,
                jax.tree.map(fn, self.condition), fn(self.temperature))

  def token(self, event: Array) -> Array:
    """Returns the last state, f32[...,C]."""
    return event[..., -1, :]

  def sample(self, keys: Array) -> Array:
    """Draws paths f32[B(,R),T+1,C], step by step."""
    shape = (self.process.num_steps + 1, self.process.channels)
    noise = normal(keys, shape)
    states = self.run(noise[..., 0, :], noise[..., 1:, :])
    return jnp.concatenate([noise[..., :1, :], states], axis=-2)

  def run(self, state: Array, noise: Array, first: int = 0) -> Array:
    """Returns f32[...,M,C], states after `state f32[...,C]`, one by one.

    Args:
      state: before step `first`. noise: f32[...,M,C], standard normal, of
        M >= 0 steps.
    """
    num = noise.shape[-2]

    def body(x, inputs):
      index, eps = inputs
      mean, log_std = self.moments(x, index)
      new = mean + jnp.exp(log_std) * eps
      if not self.process.last_noise:
        new = jnp.where(index == self.process.num_steps - 1, mean, new)
      return new, new

    _, states = jax.lax.scan(
        body, state, (first + jnp.arange(num), jnp.moveaxis(noise, -2, 0)))
    return jnp.moveaxis(states, 0, -2)

  def moments(self, x: Array, index: Array) -> tuple[Array, Array]:
    """Returns mean and log std, like `x`, of what follows states.

    Args:
      x: f32[B(,R),C], or [B(,R),M,C] for M states of one path.
      index: int32[], or [M], their steps.
    """
    condition, temperature = self.condition, self.temperature
    if x.ndim > temperature.ndim + 1:
      condition, temperature = jax.tree.map(
          lambda y: jnp.expand_dims(y, temperature.ndim),
          (condition, temperature))
    mean, log_std = self.process.step(
        self.params, x, jnp.broadcast_to(index, x.shape[:-1]), condition)
    return mean, log_std + jnp.log(temperature)[..., None]

  def noise(self, event: Array, num: int) -> Array:
    """Returns f32[...,M,C], what the first M = `num` steps were made of."""
    mean, log_std = self.moments(event[..., :num, :], jnp.arange(num))
    return (event[..., 1:num + 1, :] - mean) * jnp.exp(-log_std)

  def tail(self, state: Array, first: int) -> Tail:
    """Returns the law of what follows `state f32[...,C]`, from a step on."""
    return Tail(self, state, first)


@struct.dataclass
class Tail(Density):
  """The last steps of a `Path`, given the state that they begin with.

  Events are f32[...,M,C], the states after it; one call of the network
  scores all of them. Two tails may begin with different states.

  Attributes:
    path: the law of the whole chain. state: f32[B(,R),C].
    first: step that follows `state`, static; M = T - first.
  """

  path: Path
  state: Array
  first: int = struct.field(pytree_node=False)

  @property
  def size(self) -> int:
    """M."""
    return self.path.process.num_steps - self.first

  def _each(self, fn: Callable[[Array], Array]) -> Tail:
    return Tail(self.path._each(fn), fn(self.state), self.first)

  def token(self, event: Array) -> Array:
    """Returns the last state, f32[...,C]."""
    return event[..., -1, :]

  def sample(self, keys: Array) -> Array:
    """Draws what follows, step by step."""
    noise = normal(keys, (self.size, self.path.process.channels))
    return self.path.run(self.state, noise, self.first)

  def log_prob(self, event: Array) -> Array:
    """Returns the log-density f32[B(,R)] of what follows."""
    if not self.path.process.last_noise:
      raise ValueError(
          'a chain without noise in its last step has no density: set '
          'last_noise=True (in both models)')
    mean, log_std = self.moments(event)
    return jnp.sum(log_normal(event, mean, log_std), axis=(-2, -1))

  def moments(self, event: Array) -> tuple[Array, Array]:
    """Returns mean and log std, f32[...,M,C], of each state of events."""
    before = jnp.concatenate(
        [self.state[..., None, :], event[..., :-1, :]], axis=-2)
    return self.path.moments(before, self.first + jnp.arange(self.size))
