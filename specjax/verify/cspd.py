"""The published rule for denoising paths, which is lossy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from specjax.core import chains, density, keys, tree
from specjax.verify import base, continuous
from specjax.verify.base import Array


@dataclasses.dataclass(frozen=True)
class CSpD(continuous.Continuous):
  """Lossy: continuous speculative decoding as published.

  As `continuous.PathExact` with `last_steps=1`, but the ratio is multiplied
  by the ratio of the deviations of all steps before. Where the models'
  deviations are the same this factor is 1 and the rule is exact; elsewhere it
  bends the law (two different paths are compared, which is no likelihood
  ratio of anything). The
  summary's `one_step_tv` is the acceptance that it changes; certificates
  measure the law.

  Attributes:
    align: the target's path is made of the drafter's noise; else of noise of
      its own, and the densities of all steps before enter as well.
    inner_temperature: divides deviations from the means in the test (not in
      the correction); the published code has 42, which accepts almost
      anything.
    inverted: the factor is divided by, as in the published code.
    max_tries: last steps drawn after a rejection; then the last one stays.

  References: Wang et al. 2024, arXiv:2411.11925, equations 7 to 10, and the
  code published with it.
  """

  align: bool = True
  inner_temperature: float = 1.0
  inverted: bool = False
  max_tries: int = 100

  name = 'cspd'
  lossy = True

  def __post_init__(self):
    if not self.inner_temperature > 0:
      raise ValueError(f'inner_temperature={self.inner_temperature}: must be '
                       '> 0')
    if self.max_tries < 1:
      raise ValueError(f'max_tries={self.max_tries}: must be >= 1')

  def tests(self, context, draft, p, q):
    """Returns the surrogate's log-ratio."""
    event = continuous.event_of(draft)
    if not isinstance(p, chains.Path):
      raise ValueError("verify='cspd' compares denoising paths, and this "
                       "model has none: use 'path_exact'")
    num = p.process.num_steps - 1
    used = given = q.noise(event, num)
    if not self.align:
      own = base.row_keys(
          keys.row(context, keys.Purpose.CONTROL), event.shape[1])
      used = density.normal(own, given.shape[2:])
    mine, theirs, end = continuous.ends(p, q, event, 1, used)
    states = p.run(event[..., 0, :], used)  # once more; compiled once
    factor = _spread(q, event[..., :-1, :]) - _spread(p, jnp.concatenate(
        [event[..., :1, :], states], axis=-2))
    factor = -factor if self.inverted else factor
    if not self.align:
      factor += 0.5 * jnp.sum(given**2 - used**2, axis=(-2, -1))
    log_ratio = factor + _last(mine, end, self.inner_temperature) - _last(
        theirs, end, self.inner_temperature)
    extra = jnp.exp(jnp.minimum(log_ratio, 0.0))
    if p.process.last_noise:  # else an exact rule would accept nothing
      exact = mine.log_prob(end) - theirs.log_prob(end)
      extra = jnp.abs(extra - jnp.exp(jnp.minimum(exact, 0.0)))
    return log_ratio, extra, (mine, theirs, factor)

  def correct(self, draft, p, q, key, slot, use, aux):
    """Draws the last step of the target's path again."""
    mine, theirs = (law.at(slot) for law in aux[:2])
    factor = tree.take_row(aux[2], slot)
    mean, log_std = (x[..., 0, :] for x in mine.moments(mine.state[:, None]))
    steps = density.Gaussian(mean, log_std)

    def log_ratio(rows, token):
      end = token[:, None]
      return (factor[rows] + _last(mine.rows(rows), end)
              - _last(theirs.rows(rows), end))

    token, gave_up = density.thin(
        steps, log_ratio, keys.fold(key, 0), use, self.max_tries)
    fresh = p.token(p.sample(keys.fold(key, 1)))
    return jnp.where(use[:, None], token, fresh), gave_up


def _spread(law: chains.Path, states: Array) -> Array:
  """Returns f32[B,N], the sum of log deviations of all steps but the last."""
  num = states.shape[-2] - 1
  _, log_std = law.moments(states[..., :-1, :], jnp.arange(num))
  return jnp.sum(log_std, axis=(-2, -1))


def _last(law: chains.Tail, end: Array, temperature: float = 1.0) -> Array:
  """Returns the log-density of an end of one state, up to a constant."""
  mean, log_std = law.moments(end)
  away = (end - mean) * jnp.exp(-log_std) / temperature
  return jnp.sum(-0.5 * jnp.square(away) - log_std, axis=(-2, -1))
