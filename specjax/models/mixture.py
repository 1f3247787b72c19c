"""Denoisers that are known in closed form: mixtures of normal laws.

For certificates and for drawings: the law of the last state is the mixture
itself up to the discretisation of the chain, and no network is in the way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.models.diffusion import Time

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MixtureHead:
  """The noise that tokens of a mixture carry on average, a diffusion head.

  Tokens are `shift + mean_m + std_m * normal` with probability `weight_m`.
  Parameters: `{'logits': f32[M], 'mean': f32[M,C], 'log_std': f32[M]}`, and
  `'range': f32[]`, the place of learned variances between -1 (lower) and 1
  (upper). The condition is `shift f32[...,C]`.
  """

  def __call__(
      self, params: Any, x: Array, time: Time, condition: Array
  ) -> tuple[Array, Array]:
    """Returns `(noise, range)`, f32[...,C]."""
    signal = time.signal[..., None, None]
    x, shift = x[..., None, :], condition[..., None, :]
    mean = params['mean'] + shift
    variance = jnp.exp(2 * params['log_std'])[:, None]
    spread = signal * variance + 1 - signal
    away = x - jnp.sqrt(signal) * mean
    share = jax.nn.softmax(params['logits'] - 0.5 * jnp.sum(
        jnp.square(away) / spread + jnp.log(spread), axis=-1), axis=-1)
    # E[noise | x, m]: what the token does not explain.
    noise = jnp.sqrt(1 - signal) * away / spread
    noise = jnp.sum(share[..., None] * noise, axis=-2)
    return noise, jnp.full_like(noise, params.get('range', 0.0))
