"""What an autoencoder is trained for: pixels, and latents that stay small."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.fit.pixels import PixelObjective
from specjax.models import vae, vq
from specjax.models.vae import VAE, VAEConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VAEObjective(PixelObjective):
  """Reconstruction of drawn latents, and a law that is nearly normal.

      l1 |x - y| + l2 |x - y|^2 + kl KL(q(z | x) || N(0, 1))

  The first two are means over pixels, y decoded from a draw of q. The last is
  a sum over an image's latents, in nats, and a mean over the batch, as that of
  Rombach et al. 2022, arXiv:2112.10752. They sum the pixels' differences as
  well, so a weight w of theirs is w / (3 H W) here: ours weighs more the
  larger the images are.

  Attributes:
    config: the autoencoder's shape.
    kl: weight of the last term. For the others see `PixelObjective`.
  """

  config: VAEConfig
  kl: float = 1e-6

  @property
  def weights(self) -> tuple[float, ...]:
    """What must be >= 0."""
    return *super().weights, self.kl

  def init(self, key: Array) -> tuple[Any, None]:
    """Returns random weights, and no memory."""
    return vae.init(self.config, key), None

  def loss(
      self, net: Any, memory: None, batch: dict[str, Array], key: Array,
      train: bool = False,
  ) -> tuple[Array, tuple[dict[str, Array], None]]:
    """Returns the loss of `batch['image'] uint8[B,H,W,3]`.

    The key is consumed: it draws the latents. Scalars: 'psnr' (dB, over the
    batch), 'kl' (nats an image), 'std' (deviation of the drawn latents, all
    places and channels together; before `config.scale`).
    """
    del memory, train
    image = vq.to_float(batch['image'])
    model: Any = VAE(self.config)
    law = model.apply({'params': net}, image, method='encode')
    latents = law.sample(key)
    made = model.apply({'params': net}, latents, method='from_latents')
    pixels, psnr = self.compare(made, image)
    kl = jnp.mean(law.kl())
    return pixels + self.kl * kl, (
        {'psnr': psnr, 'kl': kl, 'std': jnp.std(latents)}, None)
