"""How far what is decoded is from an image: what tokenizers are trained for."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from specjax.fit.step import Objective

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelObjective(Objective):
  """What objectives share whose models decode images.

  Attributes:
    l1, l2: weights of the pixels' differences (images are in [-1, 1]).
    features: None, or a pure function of images f32[B,H,W,3] in [-1, 1] whose
      squared differences are added with weight `feature_weight`.
    feature_weight: >= 0.
  """

  l1: float = 1.0
  l2: float = 1.0
  features: Callable[[Array], Array] | None = None
  feature_weight: float = 0.0

  @property
  def weights(self) -> tuple[float, ...]:
    """What must be >= 0."""
    return self.l1, self.l2, self.feature_weight

  def __post_init__(self):
    if not all(w >= 0 for w in self.weights) or not self.l1 + self.l2 > 0:
      raise ValueError(f'{self}: weights must be >= 0, and one of l1 and l2 '
                       'positive')
    if bool(self.feature_weight) != (self.features is not None):
      raise ValueError('features and feature_weight go together')

  def compare(self, made: Array, image: Array) -> tuple[Array, Array]:
    """Returns the loss of images in [-1, 1], and their PSNR in dB.

        l1 |x - y| + l2 |x - y|^2 + feature_weight |f(x) - f(y)|^2

    means over the batch and its pixels; so is the squared error of the PSNR.
    """
    gap = made - image
    square = jnp.mean(gap * gap)
    loss = self.l1 * jnp.mean(jnp.abs(gap)) + self.l2 * square
    if self.features is not None:
      apart = self.features(made) - self.features(image)
      loss += self.feature_weight * jnp.mean(apart * apart)
    return loss, -10 * jnp.log10(jnp.maximum(square / 4, 1e-10))
