"""What an image decoder is trained for: the next code, given the class."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from specjax.fit.step import Objective
from specjax.models import weights
from specjax.models.image_lm import ImageLM
from specjax.models.transformer_config import TransformerConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ImageObjective(Objective):
  """Cross-entropy of the codes of an image.

  Attributes:
    config: the decoder's shape, with classes.
    dtype: of the pass; weights are float32.
  """

  config: TransformerConfig
  dtype: str = 'float32'

  def __post_init__(self):
    if self.config.num_conditions < 2 or self.config.grid_width is None:
      raise ValueError('an image decoder has classes and a grid; this config '
                       f'has num_conditions={self.config.num_conditions}, '
                       f'grid_width={self.config.grid_width}')

  @property
  def lm(self) -> ImageLM:
    """The decoder that the loss runs."""
    return ImageLM(dataclasses.replace(self.config, dtype=self.dtype),
                   chunk=2**30)

  def init(self, key: Array) -> tuple[Any, None]:
    """Returns random weights."""
    net = weights.random_params(
        dataclasses.replace(self.config, dtype='float32'), key)
    return net, None

  def loss(
      self, net: Any, memory: None, batch: dict[str, Array], key: Array,
      train: bool = False,
  ) -> tuple[Array, tuple[dict[str, Array], None]]:
    """Returns the loss of `{'codes': int32[B,T], 'label': int32[B]}`.

    A label is in [0, num_conditions); the last says nothing. Scalars:
    'accuracy' (share of codes that were most likely), 'entropy' (of the law,
    nats a code).
    """
    del memory
    logits = self.logits(net, batch['codes'], batch['label'],
                         key if train else None)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    loss = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch['codes'])
    right = jnp.argmax(logits, axis=-1) == batch['codes']
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.mean(loss), ({
        'accuracy': jnp.mean(right), 'entropy': jnp.mean(entropy)}, None)

  def logits(
      self, net: Any, codes: Array, label: Array,
      dropout: Array | None = None,
  ) -> Array:
    """Returns f32[B,T,V], one teacher-forced pass; see `ImageLM.whole`."""
    params = jax.tree.map(
        lambda x: x if x.ndim == 1 else x.astype(self.dtype), net)
    return self.lm.whole(params, codes, label, dropout)
