"""Denoising steps drafted without a network: what was predicted last, held."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import density, keys, tree
from specjax.core.types import IID, Draft, Models, SpecState
from specjax.drafters import base

Array = jax.Array

HOLDS = ('token', 'noise')


@dataclasses.dataclass(frozen=True)
class Held(base.ChainDrafter):
  """Takes K steps as if the target's head said what it said last.

  For texts of states (`models.denoising.Denoising`), whose target hands over
  what its head said (taps 'noise' and 'range'). Costs no call of a network.
  The first step of a chain is the target's own.

  Attributes:
    num_speculative_tokens: K >= 1.
    process: the target's `models.diffusion.Diffusion`.
    hold: 'token', the clean token that was predicted, or 'noise'.

  Reference: De Bortoli et al. 2025, arXiv:2501.05370, section 3 (a draft from
  the target's last prediction).
  """

  num_speculative_tokens: int = 4
  process: Any = None
  hold: str = 'token'

  taps = ('noise', 'range')
  modes = (IID,)

  def __post_init__(self):
    super().__post_init__()
    if self.process is None:
      raise ValueError('process: give the chain whose steps are drafted')
    if self.hold not in HOLDS:
      raise ValueError(f'hold={self.hold!r}: known are {", ".join(HOLDS)}')

  def empty(self, batch: int, capacity: int) -> Any:
    """Returns that nothing was said yet; buffers are distinct."""
    del capacity
    shape = (batch, self.process.channels)
    return {'held': jnp.zeros(shape), 'range': jnp.zeros(shape),
            'known': jnp.zeros((batch,), bool)}

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Draws K states one after another."""
    del params
    context, said = state.context, state.drafter
    num, batch = self.num_speculative_tokens, context.length.shape[0]
    assert context.options.temperature is not None
    tau = jnp.log(context.options.temperature)[:, None]

    def body(x, step):
      index = jnp.minimum(context.root + step, self.process.num_steps - 1)
      level = self.process.level(index)
      mean, log_std = self.process.moments(
          x, level, self._noise(said['held'], x, level), said['range'])
      key = keys.row(context, keys.Purpose.DRAFT, step)
      noise = density.normal(key, x.shape[-1:])
      new = mean + jnp.exp(log_std + tau) * noise
      return new, (new, mean, log_std + tau)

    start = tree.take_row(context.tokens, context.root)
    _, outs = jax.lax.scan(body, start, jnp.arange(num))
    tokens, mean, log_std = (jnp.moveaxis(x, 0, 1) for x in outs)
    drafting = said['known'] & ~context.done
    return Draft(
        topology=self.topology, tokens=tokens,
        valid=jnp.broadcast_to(drafting[:, None], (batch, num)),
        mode=jnp.full((num,), IID, jnp.int32),
        draft_law=density.Gaussian(mean, log_std)), state

  def sync(self, params, state, draft, scores, verdict) -> SpecState:
    """Holds what the head said of the last state that was kept."""
    del params
    context, row = state.context, verdict.num_accepted
    noise, between = (tree.take_row(scores.taps[name], row)
                      for name in self.taps)
    held = noise
    if self.hold == 'token':
      pending = tree.take_row(context.tokens, context.root)
      states = jnp.concatenate([pending[:, None], draft.tokens], axis=1)
      at = self.process.at(self.process.level(jnp.minimum(
          context.root + row, self.process.num_steps - 1)))
      held = at['scale'] * (
          tree.take_row(states, row) - at['spread'] * noise)
    return state.replace(drafter={
        'held': held, 'range': between,
        'known': jnp.ones_like(state.drafter['known'])})

  def _noise(self, held: Array, x: Array, level: Array) -> Array:
    """Returns the noise f32[B,C] that a head would say at a state."""
    if self.hold == 'noise':
      return held
    at = self.process.at(level)
    return (x - held / at['scale']) / at['spread']
