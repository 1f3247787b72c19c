"""A small residual network that classifies small images.

It judges samples: per-class accuracy, and features for distances of its own
('FD-self'). Three stages of pre-activation blocks, each after the first at
half the resolution and twice the width. Group norm, so that a network is its
parameters alone and an image's features do not depend on its batch.

References: He et al. 2016, arXiv:1603.05027; Wu and He 2018, arXiv:1803.08494.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

DTYPES = ('float32', 'bfloat16')
_GROUPS = 8


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
  """The shape of a classifier. Hashable.

  Attributes:
    num_classes: C. width: channels of the first stage, a multiple of 8; the
      last of S stages has `width * 2**(S-1)`, the number of features.
    num_stages: S; an image is at least 2**(S-1) pixels wide.
    num_blocks: of a stage.
    dtype: of convolutions; features and logits are float32.
  """

  num_classes: int = 10
  width: int = 64
  num_stages: int = 3
  num_blocks: int = 2
  dtype: str = 'float32'

  def __post_init__(self):
    if self.num_classes < 2:
      raise ValueError(f'num_classes={self.num_classes}: must be >= 2')
    if self.width < _GROUPS or self.width % _GROUPS:
      raise ValueError(f'width={self.width}: must be a multiple of {_GROUPS}')
    if self.num_stages < 1 or self.num_blocks < 1:
      raise ValueError(f'num_stages={self.num_stages}, num_blocks='
                       f'{self.num_blocks}: must be >= 1')
    if self.dtype not in DTYPES:
      raise ValueError(f'dtype={self.dtype!r}: must be one of {DTYPES}')

  @property
  def num_features(self) -> int:
    """Width of the last stage."""
    return self.width * 2 ** (self.num_stages - 1)


@dataclasses.dataclass(frozen=True)
class Classifier:
  """Pure functions of a classifier. Hashable."""

  config: ClassifierConfig = ClassifierConfig()

  @classmethod
  def of(cls, options: Mapping[str, Any]) -> Classifier:
    """Returns the classifier whose `options` these are.

    Raises:
      ValueError: unknown options or values.
    """
    known = {f.name for f in dataclasses.fields(ClassifierConfig)}
    if unknown := sorted(set(options) - known):
      raise ValueError(f'unknown option {unknown[0]!r} of a classifier; known '
                       f'are {", ".join(sorted(known))}')
    return cls(ClassifierConfig(**options))

  @property
  def options(self) -> dict[str, Any]:
    """JSON values from which `of` makes the same classifier."""
    return dataclasses.asdict(self.config)

  @property
  def num_features(self) -> int:
    """Width of the features."""
    return self.config.num_features

  def init(self, key: Array) -> Any:
    """Returns parameters, float32, for images of any size."""
    side = 2 ** (self.config.num_stages - 1)
    images = jnp.zeros((1, side, side, 3), jnp.uint8)
    return _Net(self.config).init(key, images)['params']

  def apply(self, params: Any, images: Array) -> tuple[Array, Array]:
    """Returns (features f32[N,F], logits f32[N,C]) of uint8[N,H,W,3]."""
    found: Any = _Net(self.config).apply({'params': params}, images)
    return found


class _Block(nn.Module):
  """Two normed 3x3 convolutions beside the identity, or a 1x1 one."""

  width: int
  stride: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = _norm(x, self.dtype, 'norm_0')
    if x.shape[-1] != self.width or self.stride > 1:
      x = nn.Conv(self.width, (1, 1), self.stride, use_bias=False,
                  dtype=self.dtype, name='skip')(y)
    y = _conv(y, self.width, self.stride, self.dtype, 'conv_0')
    y = _norm(y, self.dtype, 'norm_1')
    return x + _conv(y, self.width, 1, self.dtype, 'conv_1')


class _Net(nn.Module):
  """uint8 images to features and logits."""

  config: ClassifierConfig

  @nn.compact
  def __call__(self, images: Array) -> tuple[Array, Array]:
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    x = (images.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)
    x = _conv(x, config.width, 1, dtype, 'stem')
    for stage in range(config.num_stages):
      for block in range(config.num_blocks):
        stride = 2 if stage and not block else 1
        x = _Block(config.width * 2 ** stage, stride, dtype,
                   name=f'block_{stage}_{block}')(x)
    x = _norm(x, dtype, 'norm').astype(jnp.float32).mean((1, 2))
    return x, nn.Dense(config.num_classes, name='head')(x)


def _conv(x: Array, width: int, stride: int, dtype: Any, name: str) -> Array:
  return nn.Conv(width, (3, 3), stride, use_bias=False, dtype=dtype,
                 kernel_init=nn.initializers.he_normal(), name=name)(x)


def _norm(x: Array, dtype: Any, name: str) -> Array:
  return nn.relu(nn.GroupNorm(_GROUPS, dtype=dtype, name=name)(x))
