"""What decoders of continuous image tokens share: head, law, conditions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import chains
from specjax.core.types import Context
from specjax.models.diffusion import Diffusion
from specjax.models.diffusion_head import GuidedHead

Array = jax.Array


class DenoisedImages:
  """Tokens of an image, each denoised by a head.

  `context.condition` is as `models.masked_images` says.
  """

  process: Diffusion

  vocab_size = 0
  taps = ()
  follows = False

  @property
  def is_guided(self) -> bool:
    """Whether there are two views of each row, with its class and without."""
    return isinstance(self.process.head, GuidedHead)

  def conditions(self, context: Context) -> tuple[Array, Array]:
    """Returns order and label.

    Raises:
      ValueError: guidance without a `GuidedHead`, or the other way around.
    """
    condition = context.condition
    if self.is_guided != ('guidance' in condition):
      raise ValueError(
          f"{'no ' * self.is_guided}context.condition['guidance'], and a head "
          f"that is {'' if self.is_guided else 'not '}a GuidedHead")
    return condition['order'], condition['label']

  def law(
      self, params: Any, context: Context, features: Any
  ) -> chains.Path:
    """Returns the laws [B,R] of the tokens that follow."""
    assert context.options.temperature is not None
    rows = jax.tree.leaves(features)[0].shape[:2]
    return chains.Path(
        self.process, params['head'], features, jnp.broadcast_to(
            context.options.temperature[:, None], rows))
