"""Laws of tokens that a chain of normal steps ends in: denoising.

The density of the end of a chain is an integral over all chains that end
there, which nobody can compute. Of its states given those before it is a
product of normal densities: events are states, and what the token is follows
from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from flax import struct
import jax
import jax.numpy as jnp

from specjax.core import density
from specjax.core import keys as keys_lib

Array = jax.Array
# States that a network is told of in one call, about: what it holds of each
# (some KB) would else fill a device at large batches.
_MOST_STATES = 1 << 17


class Process(Protocol):
  """What the steps of a `Path` are: a frozen, hashable dataclass.

  Attributes:
    num_steps: T. channels: C.
    last_noise: whether the last step is drawn; else it is its mean, and the
      chain has no density.
    ahead: how chains are drawn, None for step by step: a function of `(path,
      state, keys, first)` that does what `Path.draw` says.
  """

  num_steps: int
  channels: int
  last_noise: bool
  ahead: Callable[[Path, Array, Array, int], Array] | None

  def step(
      self, params: Any, x: Array, index: Array, condition: Any
  ) -> tuple[Array, Array]:
    """Returns mean and log std, f32[...,C], of the state after `x f32[...,C]`.

    `index int32[...]` counts steps from the noise, 0 to T - 1; the leaves of
    `condition` lead with the axes of `x` (1 where they do not vary).
    """
    ...


@struct.dataclass
class Path(density.Density):
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
    """Draws paths f32[B(,R),T+1,C]."""
    start = density.normal(keys_lib.fold(keys, 0), (self.process.channels,))
    states = self.draw(start, keys_lib.fold(keys, 1))
    return jnp.concatenate([start[..., None, :], states], axis=-2)

  def draw(self, state: Array, keys: Array, first: int = 0) -> Array:
    """Draws states f32[...,T-first,C] after `state`, before step `first`."""
    if self.process.ahead is not None:
      return self.process.ahead(self, state, keys, first)
    noise = density.normal(
        keys, (self.process.num_steps - first, self.process.channels))
    return self.run(state, noise, first)

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
      steps = max(1, _MOST_STATES // (x.size // (x.shape[-2] * x.shape[-1])))
      if steps < x.shape[-2]:
        return self._in_parts(x, index, steps)
    mean, log_std = self.process.step(
        self.params, x, jnp.broadcast_to(index, x.shape[:-1]), condition)
    return mean, log_std + jnp.log(temperature)[..., None]

  def _in_parts(self, x: Array, index: Array, num: int) -> tuple[Array, Array]:
    """Returns `moments` of f32[B(,R),M,C], worked out `num` steps at a time."""
    found = jax.lax.map(
        lambda one: self.moments(*one), (jnp.moveaxis(x, -2, 0), index),
        batch_size=num)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, -2), found)

  def noise(self, event: Array, num: int) -> Array:
    """Returns f32[...,M,C], what the first M = `num` steps were made of."""
    mean, log_std = self.moments(event[..., :num, :], jnp.arange(num))
    return (event[..., 1:num + 1, :] - mean) * jnp.exp(-log_std)

  def tail(self, state: Array, first: int) -> Tail:
    """Returns the law of what follows `state f32[...,C]`, from a step on."""
    return Tail(self, state, first)


@struct.dataclass
class Tail(density.Scored):
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
    """Draws what follows."""
    return self.path.draw(self.state, keys, self.first)

  def log_prob(self, event: Array) -> Array:
    """Returns the log-density f32[B(,R)] of what follows."""
    if not self.path.process.last_noise:
      raise ValueError(
          'a chain without noise in its last step has no density: set '
          'last_noise=True (in both models)')
    mean, log_std = self.moments(event)
    return jnp.sum(density.log_normal(event, mean, log_std), axis=(-2, -1))

  def moments(self, event: Array) -> tuple[Array, Array]:
    """Returns mean and log std, f32[...,M,C], of each state of events."""
    before = jnp.concatenate(
        [self.state[..., None, :], event[..., :-1, :]], axis=-2)
    return self.path.moments(before, self.first + jnp.arange(self.size))
