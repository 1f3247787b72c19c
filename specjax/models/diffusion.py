"""Denoising diffusion of one token: schedule, means and deviations.

Ho et al. 2020 (arXiv:2006.11239), Nichol and Dhariwal 2021 (learned range of
variances, cosine schedule, respacing; arXiv:2102.09672), as the heads of MAR
(Li et al. 2024, arXiv:2406.11838) use them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

VARIANCES = ('learned', 'lower', 'upper')
# Marks fields that do not say what was trained, but how it is used.
UNSAVED = {'saved': False}
_MOST_BETA = 0.999


class Time(NamedTuple):
  """Where a chain is; what heads are told.

  Attributes:
    number: int32[...], step of the base schedule (0 is the cleanest).
    signal: f32[...], the share of variance that is signal (alpha bar).
  """

  number: Array
  signal: Array


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """The chain of steps from noise to a token, a `core.chains.Process`.

  Attributes:
    head: `head(params, x [...,C], Time, condition) -> (noise, range)`, both
      f32[...,C]; `range` is not read unless the variance is learned.
    channels: C.
    num_levels: steps of the respaced schedule, 2 to `num_base`.
    num_base: steps of the cosine schedule that the head was trained on.
    variance: 'learned' (between the two others, by the head's `range`),
      'lower' (that of the posterior) or 'upper' (beta).
    last_noise: whether the last step adds noise. MAR's own sampler does not;
      densities need it.
    first: level at which chains begin, None for the last. One level less
      leaves out the step whose mean is the most sensitive to the head: at
      100 levels of 1,000 the signal there is 3e-4.
    ahead: how chains are drawn: None step by step, or a `models.ahead.Ahead`,
      which takes fewer calls of the head.
  """

  head: Any = dataclasses.field(metadata=UNSAVED)
  channels: int
  num_levels: int = 100
  num_base: int = 1000
  variance: str = 'learned'
  last_noise: bool = True
  first: int | None = None
  ahead: Any = dataclasses.field(default=None, metadata=UNSAVED)

  def __post_init__(self):
    if not 2 <= self.num_levels <= self.num_base:
      raise ValueError(f'num_levels={self.num_levels}: must be in '
                       f'[2, num_base={self.num_base}]')
    if self.variance not in VARIANCES:
      raise ValueError(f'variance={self.variance!r}: known are '
                       f'{", ".join(VARIANCES)}')
    if self.first is not None and not 1 <= self.first < self.num_levels:
      raise ValueError(f'first={self.first}: must be in [1, num_levels='
                       f'{self.num_levels})')
    if self.ahead is not None and not self.last_noise:
      raise ValueError('ahead: steps are guessed by their densities, which a '
                       'last step without noise has not: set last_noise=True')

  @property
  def num_steps(self) -> int:
    """T."""
    return self.num_levels if self.first is None else self.first + 1

  @functools.cached_property
  def tables(self) -> dict[str, np.ndarray]:
    """Numbers of each level, f64 (`number`: int), the cleanest first."""
    grid = np.arange(self.num_base + 1) / self.num_base
    shape = np.cos((grid + 0.008) / 1.008 * math.pi / 2)**2
    beta = np.minimum(1 - shape[1:] / shape[:-1], _MOST_BETA)
    number = np.round(np.arange(self.num_levels) * (self.num_base - 1)
                      / (self.num_levels - 1)).astype(int)
    signal = np.cumprod(1 - beta)[number]
    before = np.concatenate([[1.0], signal[:-1]])
    beta = 1 - signal / before
    posterior = beta * (1 - before) / (1 - signal)
    posterior[0] = posterior[1]  # else its logarithm is infinite
    return {
        'number': number, 'signal': signal, 'log_beta': np.log(beta),
        'log_posterior': np.log(posterior),
        # Predicted token = scale * (x - spread * noise).
        'scale': 1 / np.sqrt(signal), 'spread': np.sqrt(1 - signal),
        'of_token': beta * np.sqrt(before) / (1 - signal),
        'of_state': (1 - before) * np.sqrt(1 - beta) / (1 - signal)}

  def level(self, index: Array) -> Array:
    """Returns the level of steps counted from the noise."""
    return self.num_steps - 1 - index

  def time(self, level: Array) -> Time:
    """Returns what heads are told at levels."""
    return Time(jnp.asarray(self.tables['number'], jnp.int32)[level],
                jnp.asarray(self.tables['signal'], jnp.float32)[level])

  def step(
      self, params: Any, x: Array, index: Array, condition: Any
  ) -> tuple[Array, Array]:
    """Returns mean and log std of the next state; see `Process.step`."""
    level = self.level(jnp.asarray(index))
    return self.moments(
        x, level, *self.head(params, x, self.time(level), condition))

  def moments(
      self, x: Array, level: Array, noise: Array, between: Array
  ) -> tuple[Array, Array]:
    """Returns mean and log std of what follows, of what a head says.

    Args:
      x: f32[...,C]. level: int32[...], see `level`.
      noise, between: of the head, f32[...,C].
    """
    at = self.at(level)
    token = at['scale'] * (x - at['spread'] * noise.astype(jnp.float32))
    mean = at['of_token'] * token + at['of_state'] * x
    share: Any = {'lower': 0.0, 'upper': 1.0}.get(self.variance)
    if share is None:
      share = (between.astype(jnp.float32) + 1) / 2
    log_variance = share * at['log_beta'] + (1 - share) * at['log_posterior']
    return mean, jnp.broadcast_to(0.5 * log_variance, mean.shape)

  def at(self, level: Array) -> dict[str, Array]:
    """Returns the numbers of levels, f32[...,1] by name (`tables`)."""
    return {name: jnp.asarray(values, jnp.float32)[level][..., None]
            for name, values in self.tables.items() if name != 'number'}

  def diffuse(self, token: Array, level: Array, noise: Array) -> Array:
    """Returns tokens f32[...,C] with the noise of levels int32[...]."""
    signal = self.at(level)['signal']
    return jnp.sqrt(signal) * token + jnp.sqrt(1 - signal) * noise

  def sensitivity(self) -> np.ndarray:
    """Returns f64[T]: KL of a step over the squared error of its noise.

    Two chains of equal variances whose predicted noises differ by d in a
    channel differ by `0.5 * sensitivity * d^2` nats in that channel and step;
    in order of the steps. Of learned variances: in the middle of the range.
    """
    t = self.tables
    share = {'lower': 0.0, 'upper': 1.0}.get(self.variance, 0.5)
    variance = np.exp(share * t['log_beta'] + (1 - share) * t['log_posterior'])
    change = t['of_token'] * t['scale'] * t['spread']
    return (change**2 / variance)[:self.num_steps][::-1]
