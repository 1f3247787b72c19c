"""A variational autoencoder whose latents are continuous tokens (KL-16).

Images are float32[B,H,W,3] in [-1, 1]; tokens f32[B,h,w,C], one for every
`factor` x `factor` pixels. The convolutions are those of `models.vq`.

Reference: Rombach et al. 2022, arXiv:2112.10752; with 16 channels as the
tokenizer of MAR, Li et al. 2024, arXiv:2406.11838, whose checkpoint
(`kl16.ckpt`) `from_published` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import re
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from specjax.models import vq_weights
from specjax.models.vq import ConvConfig, Decoder, Encoder

Array = jax.Array

_LEAST, _MOST = -30.0, 20.0  # of log variances
# The published training loss holds networks of its own.
_IGNORED = re.compile(r'^loss\.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(ConvConfig):
  """An autoencoder's shape; the default is the published one. Hashable.

  Attributes:
    latent_channels: C.
    scale: tokens are latents times this, so that their deviation is 1.
  """

  latent_channels: int = 16
  scale: float = 0.2325

  def __post_init__(self):
    super().__post_init__()
    if not self.scale > 0:
      raise ValueError(f'scale={self.scale}: must be > 0')

  @property
  def encoded_dim(self) -> int:
    """Channels that the encoder ends in: means and log variances."""
    return 2 * self.latent_channels

  @property
  def up_attention(self) -> bool:
    """No attention in the decoder but in its middle."""
    return False


class Posterior(NamedTuple):
  """The normal law of an image's latents.

  Attributes:
    mean: f32[B,h,w,C]. log_variance: likewise, in [-30, 20].
  """

  mean: Array
  log_variance: Array

  def sample(self, key: Array) -> Array:
    """Draws latents f32[B,h,w,C]."""
    noise = jax.random.normal(key, self.mean.shape)
    return self.mean + jnp.exp(0.5 * self.log_variance) * noise

  def kl(self) -> Array:
    """Returns f32[B], the divergence from the standard normal law, in nats."""
    terms = jnp.square(self.mean) + jnp.exp(
        self.log_variance) - 1 - self.log_variance
    return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


class VAE(nn.Module):
  """Encoder and decoder; methods are used through `apply`."""

  config: VAEConfig

  def setup(self):
    c = self.config
    self.encoder = Encoder(c)
    self.decoder = Decoder(c)
    self.quant_conv = nn.Conv(c.encoded_dim, (1, 1), dtype=c.dtype)
    self.post_quant_conv = nn.Conv(c.latent_channels, (1, 1), dtype=c.dtype)

  def __call__(self, image: Array, key: Array) -> tuple[Array, Posterior]:
    """Returns `(reconstruction of drawn latents, their law)`."""
    law = self.encode(image)
    return self.from_latents(law.sample(key)), law

  def encode(self, image: Array) -> Posterior:
    """Returns the law of an image's latents."""
    found = self.quant_conv(self.encoder(image)).astype(jnp.float32)
    mean, log_variance = jnp.split(found, 2, axis=-1)
    return Posterior(mean, jnp.clip(log_variance, _LEAST, _MOST))

  def tokens(self, image: Array, key: Array | None = None) -> Array:
    """Returns tokens f32[B,h,w,C], drawn with `key` or at their mean."""
    law = self.encode(image)
    latents = law.mean if key is None else law.sample(key)
    return latents * self.config.scale

  def decode(self, tokens: Array) -> Array:
    """Returns f32[B,H,W,3] of tokens f32[B,h,w,C]."""
    return self.from_latents(tokens / self.config.scale)

  def from_latents(self, latents: Array) -> Array:
    """Returns f32[B,H,W,3] of latents f32[B,h,w,C]."""
    return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)


def init(config: VAEConfig, key: Array) -> Any:
  """Returns random float32 parameters."""
  image = jnp.zeros((1, config.factor, config.factor, 3))
  return jax.jit(VAE(config).init)(key, image, key)['params']


def abstract(config: VAEConfig) -> Any:
  """Returns the parameter tree with `jax.ShapeDtypeStruct` leaves."""
  return jax.eval_shape(lambda key: init(config, key), jax.random.key(0))


def to_published(
    config: VAEConfig, params: Any
) -> dict[str, np.ndarray]:
  """Returns tensors as the published checkpoint names and lays them out."""
  official = _official(config)
  return {official(path): x
          for path, x in vq_weights.laid_out(params).items()}


def from_published(
    config: VAEConfig, tensors: Mapping[str, np.ndarray]
) -> Any:
  """Returns the parameters of a published checkpoint.

  Args:
    config: the shape that is expected.
    tensors: by published name, convolutions as (out, in, height, width).

  Raises:
    FormatError: tensors that are missing, left over, or of another shape; the
      message names them.
  """
  return vq_weights.placed(
      abstract(config), _official(config),
      {n: x for n, x in tensors.items() if not _IGNORED.search(n)},
      f'an autoencoder with {config}')


def _official(config: VAEConfig):
  """Returns what gives the published name of one of our paths."""
  last = len(config.multipliers) - 1
  middle = {'mid_0': 'mid/block_1', 'mid_1': 'mid/attn_1',
            'mid_2': 'mid/block_2'}

  def name(path: str) -> str:
    side, *rest = path.split('/')
    parts = [side]
    for part in rest:
      kind, _, number = part.rpartition('_')
      if kind == 'conv_blocks':  # the decoder's are counted from the finest
        parts.append(f'down.{number}' if side == 'encoder'
                     else f'up.{last - int(number)}')
      elif kind in ('res', 'attn'):
        parts.append(f'{"block" if kind == "res" else "attn"}.{number}')
      else:
        parts.append(middle.get(part, part).replace('/', '.'))
    return re.sub(r'\.(kernel|scale)$', '.weight', '.'.join(parts))

  return name
