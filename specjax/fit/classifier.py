"""What a classifier is trained for: the class of an image, also moved."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from specjax.fit.step import Objective
from specjax.models.classifier import Classifier

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ClassifierObjective(Objective):
  """Cross-entropy of an image's class, each time on another view of it.

  Attributes:
    network: the classifier.
    label_smoothing: share of the wanted law that is spread over all classes,
      in [0, 1).
    flip: whether half of the images are mirrored left to right.
    padding: black pixels on each side, >= 0, of which a crop of the image's
      size is taken at random.
  """

  network: Classifier
  label_smoothing: float = 0.0
  flip: bool = False
  padding: int = 0

  def __post_init__(self):
    if not 0 <= self.label_smoothing < 1:
      raise ValueError(f'label_smoothing={self.label_smoothing}: must be in '
                       '[0, 1)')
    if self.padding < 0:
      raise ValueError(f'padding={self.padding}: must be >= 0')

  def init(self, key: Array) -> tuple[Any, None]:
    """Returns random weights."""
    return self.network.init(key), None

  def loss(
      self, net: Any, memory: None, batch: dict[str, Array], key: Array,
      train: bool = False,
  ) -> tuple[Array, tuple[dict[str, Array], None]]:
    """Returns the loss of `{'image': uint8[B,H,W,3], 'label': int32[B]}`.

    The key draws the views. Scalars: 'accuracy' (share of views whose class
    was the likeliest).
    """
    del memory, train
    image = views(key, batch['image'], flip=self.flip, padding=self.padding)
    logits = self.network.apply(net, image)[1]
    wanted = optax.smooth_labels(
        jax.nn.one_hot(batch['label'], logits.shape[-1]),
        self.label_smoothing)
    right = jnp.argmax(logits, axis=-1) == batch['label']
    loss = optax.softmax_cross_entropy(logits, wanted)
    return jnp.mean(loss), ({'accuracy': jnp.mean(right)}, None)


def views(key: Array, images: Array, *, flip: bool, padding: int) -> Array:
  """Returns uint8[B,H,W,3]: each image mirrored at random, and a random crop.

  The key is consumed; for the rest see `ClassifierObjective`.
  """
  mirror, place = jax.random.split(key)
  n, height, width, _ = images.shape
  if flip:
    flipped = jax.random.bernoulli(mirror, shape=(n, 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)
  if padding:
    padded = jnp.pad(
        images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    starts = jax.random.randint(place, (n, 2), 0, 2 * padding + 1)
    images = jax.vmap(lambda x, at: jax.lax.dynamic_slice(
        x, (at[0], at[1], 0), (height, width, 3)))(padded, starts)
  return images
