"""What an image tokenizer is trained for: pixels, and codes that are used."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.fit.pixels import PixelObjective
from specjax.models import vq
from specjax.models.vq import VQ, VQConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VQObjective(PixelObjective):
  """Reconstruction, and codes and encoder that meet.

      l1 |x - y| + l2 |x - y|^2 + |sg(z) - c|^2 + commitment |z - sg(c)|^2

  means over pixels and over channels of unit vectors; gradients of the first
  two pass straight through the codes. A code that no token was nearest to for
  `dead_after` steps is put where a random token of the batch is.

  Attributes:
    config: the tokenizer's shape.
    commitment: weight of the last term (van den Oord et al. 2017,
      arXiv:1711.00937, equation 3).
    dead_after: steps; 0 revives none. For the others see `PixelObjective`.
  """

  config: VQConfig
  commitment: float = 0.25
  dead_after: int = 100

  @property
  def weights(self) -> tuple[float, ...]:
    """What must be >= 0."""
    return *super().weights, self.commitment, self.dead_after

  def init(self, key: Array) -> tuple[Any, Array]:
    """Returns weights, and int32[V]: steps since each code was used."""
    return (vq.init(self.config, key),
            jnp.zeros((self.config.num_codes,), jnp.int32))

  def loss(
      self, net: Any, memory: Array, batch: dict[str, Array], key: Array,
      train: bool = False,
  ) -> tuple[Array, tuple[dict[str, Array], Any]]:
    """Returns the loss of `batch['image'] uint8[B,H,W,3]`.

    Scalars: 'psnr' (dB, over the batch), 'codes' (the vectors' losses),
    'used' (share of codes used within `dead_after` steps, or in this batch).
    """
    del key, train
    image = vq.to_float(batch['image'])
    model: Any = VQ(self.config)
    out = model.apply({'params': net}, image)
    loss, psnr = self.compare(out.image, image)
    still = jax.lax.stop_gradient
    codes = jnp.mean(jnp.square(still(out.encoded) - out.codes))
    codes += self.commitment * jnp.mean(
        jnp.square(out.encoded - still(out.codes)))
    used = jnp.zeros(memory.shape, bool).at[out.ids.reshape(-1)].set(True)
    fresh = used | ((memory < self.dead_after) if self.dead_after
                    else jnp.zeros_like(used))
    scalars = {'psnr': psnr, 'codes': codes, 'used': jnp.mean(fresh)}
    seen = used, still(out.encoded).reshape(-1, self.config.code_dim)
    return loss + codes, (scalars, seen)

  def after(
      self, net: Any, memory: Array, seen: Any, key: Array
  ) -> tuple[Any, Array]:
    """Revives dead codes; those revived begin anew."""
    used, encoded = seen
    age = jnp.where(used, 0, memory + 1)
    if not self.dead_after:
      return net, age
    dead = age >= self.dead_after
    picks = jax.random.randint(key, dead.shape, 0, len(encoded))
    book = jnp.where(dead[:, None], encoded[picks], net['codebook'])
    return {**net, 'codebook': book}, jnp.where(dead, 0, age)
