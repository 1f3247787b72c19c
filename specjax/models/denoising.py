"""Denoising as a text: each state is a token, each step of the chain its law.

The head of a continuous decoder runs its steps one after another. Drafting
some of them with a cheaper head and checking all at once is speculative
decoding of a text whose tokens are the states: same loop, rules, metrics (De
Bortoli et al. 2025, arXiv:2501.05370).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import density, tree
from specjax.core.types import Context, Models, Scores, SpecState

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Denoising:
  """A chain of states as a target, and as the model of a `ChainDensity`.

  A text's prompt is its start, one token of standard normal noise; T more
  tokens end it, the last being the result. `context.condition` holds what
  steps are conditioned on, leaves [B,...]; `options.temperature` multiplies
  deviations. Nothing is cached: a step depends on the state before it.

  Attributes:
    process: a `core.chains.Process`; parameters are the head's.
  """

  process: Any

  vocab_size = 0

  def __post_init__(self):
    if not self.process.last_noise:
      raise ValueError('steps are drafted by their densities, which a last '
                       'step without noise has not: set last_noise=True')

  def empty(self, batch: int, capacity: int) -> Any:
    """Nothing is stored."""
    del batch, capacity
    return {}

  def feed(self, params, state, tokens, base, fed) -> Any:
    """Nothing to store."""
    del params, tokens, base, fed
    return state

  def extend(
      self, params: Any, state: Any, tokens: Array, base: Array, fed: Array
  ) -> tuple[Array, Any]:
    """Returns the last state and its step, f32[B,C+1], for `law`."""
    del params, fed
    step = base + tokens.shape[1] - 1
    return self.features(tokens[:, -1], step), state

  def features(self, x: Array, step: Array) -> Array:
    """Returns states f32[...,C] with the steps that follow them behind."""
    return jnp.concatenate(
        [x, step[..., None].astype(jnp.float32)], axis=-1)

  def law(
      self, params: Any, context: Context, features: Array
  ) -> density.Gaussian:
    """Returns the laws [B,R] of the states that follow."""
    assert context.options.temperature is not None
    step = features[..., -1].astype(jnp.int32)
    mean, log_std = self.process.step(
        params, features[..., :-1],
        jnp.clip(step, 0, self.process.num_steps - 1),
        jax.tree.map(lambda x: x[:, None], context.condition))
    tau = jnp.log(context.options.temperature)[:, None, None]
    return density.Gaussian(mean, log_std + tau)

  def init(
      self, params: Models, state: SpecState, position: Array, fed: Array,
      taps: tuple[str, ...],
  ) -> tuple[SpecState, dict[str, Array]]:
    """Nothing to take in."""
    del params, position, fed, taps
    return state, {}

  def score(self, params: Models, state: SpecState, draft, taps):
    """Returns the laws of what follows the root and each drafted state.

    Taps: what the head said of each, 'noise' and 'range' f32[B,N+1,C] (of
    processes that are a `models.diffusion.Diffusion`).
    """
    context = state.context
    pending = tree.take_row(context.tokens, context.root)
    x = jnp.concatenate([pending[:, None], draft.tokens], axis=1)
    step = context.root[:, None] + jnp.arange(x.shape[1])
    law = self.law(params.target, context, self.features(x, step))
    found = {}
    if taps:  # the same call of the head as the law's, to the compiler
      index = jnp.clip(step, 0, self.process.num_steps - 1)
      said = self.process.head(
          params.target, x, self.process.time(self.process.level(index)),
          jax.tree.map(lambda y: y[:, None], context.condition))
      found = dict(zip(('noise', 'range'), said, strict=True))
    return Scores(
        target_law=law, taps=found,
        finite=jnp.all(jnp.isfinite(law.mean), axis=-1)), state

  def commit(self, state: SpecState, draft, verdict) -> SpecState:
    """Nothing is stored."""
    del draft, verdict
    return state
