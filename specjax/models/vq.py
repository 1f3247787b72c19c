"""A VQ tokenizer for images: convolutions around an l2-normalised codebook.

Images are float32[B,H,W,3] in [-1, 1]; tokens are int32[B,h,w], one for every
`factor` x `factor` pixels. Modules are named as LlamaGen's, whose checkpoints
`vq_weights` reads.

Reference: Sun et al. 2024, arXiv:2406.06525, after Esser et al. 2021,
arXiv:2012.09841, and Yu et al. 2021, arXiv:2110.04627 (normalised codes).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple, Self

from flax import linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

def groups(channels: int) -> int:
  """Returns the groups of a norm over this many channels."""
  return min(32, channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvConfig(abc.ABC):
  """The shape of the convolutions around a latent space. Hashable.

  A subclass says what the encoder ends in (`encoded_dim`).

  Attributes:
    channels: of the finest level. multipliers: of each level, finest first;
      each level but the last halves the size of the image.
    num_res_blocks: of a level (the decoder has one more).
    attention: at the coarsest level, and in the middle.
    dtype: of activations; weights are float32.
  """

  channels: int = 128
  multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  attention: bool = True
  dtype: str = 'float32'

  def __post_init__(self):
    sizes = [v for v in vars(self).values() if type(v) is int]
    if not self.multipliers or min(*sizes, *self.multipliers) < 1:
      raise ValueError(f'{self}: all sizes must be >= 1')
    for multiplier in self.multipliers:
      size = self.channels * multiplier
      if size % groups(size):
        raise ValueError(f'{size} channels do not divide into '
                         f'{groups(size)} groups')

  @classmethod
  def of(cls, values: Mapping[str, Any]) -> Self:
    """Returns the shape of JSON values, in which `multipliers` is a list."""
    return cls(**{**values, 'multipliers': tuple(values['multipliers'])})

  @property
  def factor(self) -> int:
    """Pixels a token is wide and high."""
    return 2 ** (len(self.multipliers) - 1)

  @property
  @abc.abstractmethod
  def encoded_dim(self) -> int:
    """Channels that the encoder ends in."""

  @property
  def up_attention(self) -> bool:
    """Whether the decoder's coarsest level attends as the encoder's does."""
    return self.attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQConfig(ConvConfig):
  """A tokenizer's shape. Hashable.

  Attributes:
    num_codes: V. code_dim: channels of a code.
    latent_dim: channels between the convolutions and the codes.
  """

  num_codes: int = 16_384
  code_dim: int = 8
  latent_dim: int = 256

  @property
  def encoded_dim(self) -> int:
    """Channels that the encoder ends in."""
    return self.latent_dim


VQ16 = VQConfig()
VQ8 = VQConfig(multipliers=(1, 2, 2, 4))


class Quantised(NamedTuple):
  """What `VQ.__call__` returns.

  Attributes:
    image: f32[B,H,W,3], reconstructed. ids: int32[B,h,w].
    encoded: f32[B,h,w,C], unit vectors before quantisation.
    codes: f32[B,h,w,C], unit rows of the codebook that replaced them.
  """

  image: Array
  ids: Array
  encoded: Array
  codes: Array


class VQ(nn.Module):
  """Encoder, codebook, decoder; methods are used through `apply`."""

  config: VQConfig

  def setup(self):
    c = self.config
    self.encoder = Encoder(c)
    self.decoder = Decoder(c)
    self.quant_conv = _conv(c, c.code_dim, 1)
    self.post_quant_conv = _conv(c, c.latent_dim, 1)
    self.codebook = self.param(
        'codebook', nn.initializers.normal(1.0), (c.num_codes, c.code_dim),
        jnp.float32)

  def __call__(self, image: Array) -> Quantised:
    """Reconstructs; gradients pass straight through to the encoder."""
    encoded = self.encode(image)
    ids = nearest(encoded, self.codebook)
    codes = unit(self.codebook)[ids]
    through = encoded + jax.lax.stop_gradient(codes - encoded)
    return Quantised(self.from_codes(through), ids, encoded, codes)

  def encode(self, image: Array) -> Array:
    """Returns unit vectors [B,h,w,C] of images."""
    return unit(self.quant_conv(self.encoder(image)).astype(jnp.float32))

  def tokens(self, image: Array) -> Array:
    """Returns int32[B,h,w] of images."""
    return nearest(self.encode(image), self.codebook)

  def decode(self, ids: Array) -> Array:
    """Returns f32[B,H,W,3] of tokens int32[B,h,w] in [0, V)."""
    return self.from_codes(unit(self.codebook)[ids])

  def from_codes(self, codes: Array) -> Array:
    """Returns f32[B,H,W,3] of unit vectors [B,h,w,C]."""
    return self.decoder(self.post_quant_conv(codes)).astype(jnp.float32)


def unit(x: Array) -> Array:
  """Returns vectors of length 1; zeros stay."""
  norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
  return x / jnp.maximum(norm, 1e-12)


def nearest(encoded: Array, codebook: Array) -> Array:
  """Returns int32[...], the code nearest to each unit vector; lowest id."""
  return jnp.argmax(jnp.einsum(
      '...c,vc->...v', encoded, unit(codebook),
      precision=jax.lax.Precision.HIGHEST), axis=-1).astype(jnp.int32)


def to_float(image: Array) -> Array:
  """Returns f32 in [-1, 1] of uint8."""
  return image.astype(jnp.float32) / 127.5 - 1.0


def to_bytes(image: Array) -> Array:
  """Returns uint8 of images in [-1, 1]; what is outside is clipped."""
  return jnp.clip(jnp.round((image + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


class Encoder(nn.Module):
  """Pixels to [B,h,w,encoded_dim]."""

  config: ConvConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    x = _conv(c, c.channels, name='conv_in')(x.astype(c.dtype))
    last = len(c.multipliers) - 1
    for level, multiplier in enumerate(c.multipliers):
      x = Level(c, c.channels * multiplier, c.num_res_blocks,
                c.attention and level == last,
                'down' if level < last else None,
                name=f'conv_blocks_{level}')(x)
    return _ending(c, x, c.encoded_dim)


class Decoder(nn.Module):
  """Latents [B,h,w,...] to pixels; its first level is the coarsest."""

  config: ConvConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    wide = c.channels * c.multipliers[-1]
    x = _conv(c, wide, name='conv_in')(x.astype(c.dtype))
    x = _middle(c, x)
    last = len(c.multipliers) - 1
    for level, multiplier in enumerate(reversed(c.multipliers)):
      x = Level(c, c.channels * multiplier, c.num_res_blocks + 1,
                c.up_attention and not level, 'up' if level < last else None,
                name=f'conv_blocks_{level}')(x)
    return _conv(c, 3, name='conv_out')(
        nn.silu(_norm(c, 'norm_out')(x)))


def _ending(c: ConvConfig, x: Array, size: int) -> Array:
  x = _middle(c, x)
  return _conv(c, size, name='conv_out')(nn.silu(_norm(c, 'norm_out')(x)))


def _middle(c: ConvConfig, x: Array) -> Array:
  """Two blocks, attention between them; inside a compact method."""
  size = x.shape[-1]
  x = ResBlock(c, size, name='mid_0')(x)
  if c.attention:
    x = Attention(c, name='mid_1')(x)
  return ResBlock(c, size, name='mid_2')(x)


class Level(nn.Module):
  """Blocks at one resolution, then half or twice of it."""

  config: ConvConfig
  size: int
  num_blocks: int
  attention: bool
  resample: str | None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    for i in range(self.num_blocks):
      x = ResBlock(c, self.size, name=f'res_{i}')(x)
      if self.attention:
        x = Attention(c, name=f'attn_{i}')(x)
    if self.resample == 'down':
      # One side only: published weights are trained so.
      x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
      x = Resample(c, self.size, 2, 'VALID', name='downsample')(x)
    elif self.resample == 'up':
      x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
      x = Resample(c, self.size, 1, 'SAME', name='upsample')(x)
    return x


class Resample(nn.Module):
  """A convolution; a module of its own for its name."""

  config: ConvConfig
  size: int
  stride: int
  padding: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return nn.Conv(self.size, (3, 3), self.stride, padding=self.padding,
                   dtype=self.config.dtype, name='conv')(x)


class ResBlock(nn.Module):
  """Two normed convolutions around a shortcut."""

  config: ConvConfig
  size: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    h = _conv(c, self.size, name='conv1')(nn.silu(_norm(c, 'norm1')(x)))
    h = _conv(c, self.size, name='conv2')(nn.silu(_norm(c, 'norm2')(h)))
    if x.shape[-1] != self.size:
      x = _conv(c, self.size, 1, name='nin_shortcut')(x)
    return x + h


class Attention(nn.Module):
  """Attention of one head over all places."""

  config: ConvConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c, size = self.config, x.shape[-1]
    h = _norm(c, 'norm')(x)
    q, k, v = (_conv(c, size, 1, name=n)(h).reshape(x.shape[0], -1, size)
               for n in 'qkv')
    scores = jnp.einsum('bqc,bkc->bqk', q, k).astype(jnp.float32)
    share = jax.nn.softmax(scores * size ** -0.5, axis=-1).astype(v.dtype)
    out = jnp.einsum('bqk,bkc->bqc', share, v).reshape(x.shape)
    return x + _conv(c, size, 1, name='proj_out')(out)


def _conv(c: ConvConfig, size: int, width: int = 3, name: str | None = None):
  return nn.Conv(size, (width, width), dtype=c.dtype, name=name)


class _GroupNorm(nn.Module):
  """A norm over groups of channels, in float32."""

  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    size = x.shape[-1]
    scale = self.param('scale', nn.initializers.ones_init(), (size,))
    bias = self.param('bias', nn.initializers.zeros_init(), (size,))
    wide = x.astype(jnp.float32).reshape(
        x.shape[0], -1, groups(size), size // groups(size))
    mean = jnp.mean(wide, axis=(1, 3), keepdims=True)
    power = jnp.mean(jnp.square(wide - mean), axis=(1, 3), keepdims=True)
    normed = ((wide - mean) * jax.lax.rsqrt(power + 1e-6)).reshape(x.shape)
    return (normed * scale + bias).astype(self.dtype)


def _norm(c: ConvConfig, name: str):
  return _GroupNorm(c.dtype, name=name)


def init(config: VQConfig, key: Array) -> Any:
  """Returns random float32 parameters."""
  image = jnp.zeros((1, config.factor, config.factor, 3))
  return jax.jit(VQ(config).init)(key, image)['params']


def abstract(config: VQConfig) -> Any:
  """Returns the parameter tree with `jax.ShapeDtypeStruct` leaves."""
  return jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
