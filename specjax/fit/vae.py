"""What an autoencoder is trained for: pixels, and latents that stay small."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.models import vae, vq
from specjax.models.vae import VAE, VAEConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VAEObjective:
  """Reconstruction of drawn latents, and a law that is nearly normal.

      l1 |x - y| + l2 |x - y|^2 + kl KL(q(z | x) || N(0, 1))

  The first two are means over pixels, y decoded from a draw of q. The last is
  a sum over an image's latents, in nats, and a mean over the batch, as that of
  Rombach et al. 2022, arXiv:2112.10752. They sum the pixels' differences as
  well, so a weight w of theirs is w / (3 H W) here: ours weighs more the
  larger the images are.

  Attributes:
    config: the autoencoder's shape.
    l1, l2: weights of the pixels' differences (images are in [-1, 1]).
    kl: weight of the last term.
    features: None, or a pure function of images f32[B,H,W,3] in [-1, 1] whose
      squared differences are added with weight `feature_weight`.
    feature_weight: >= 0.
  """

  config: VAEConfig
  l1: float = 1.0
  l2: float = 1.0
  kl: float = 1e-6
  features: Callable[[Array], Array] | None = None
  feature_weight: float = 0.0

  def __post_init__(self):
    weights = self.l1, self.l2, self.kl, self.feature_weight
    if not all(w >= 0 for w in weights) or not self.l1 + self.l2 > 0:
      raise ValueError(f'{self}: weights must be >= 0, and one of l1 and l2 '
                       'positive')
    if bool(self.feature_weight) != (self.features is not None):
      raise ValueError('features and feature_weight go together')

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
    gap = made - image
    square = jnp.mean(gap * gap)
    kl = jnp.mean(law.kl())
    loss = self.l1 * jnp.mean(jnp.abs(gap)) + self.l2 * square + self.kl * kl
    if self.features is not None:
      apart = self.features(made) - self.features(image)
      loss += self.feature_weight * jnp.mean(apart * apart)
    return loss, ({
        'psnr': -10 * jnp.log10(jnp.maximum(square / 4, 1e-10)),
        'kl': kl, 'std': jnp.std(latents)}, None)

  def after(
      self, net: Any, memory: None, seen: None, key: Array
  ) -> tuple[Any, None]:
    """Changes nothing."""
    del seen, key
    return net, memory
