"""MAR's denoising head: a small residual network a token, and guidance.

Li et al. 2024, arXiv:2406.11838, section 3: an MLP whose blocks are modulated
by the step and by what the decoder says of the token. Weights have the names
of the published checkpoints (`diffloss.net.*`, see `models.named`).
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from specjax.models.diffusion import UNSAVED, Time

Array = jax.Array

_SINUSOIDS = 256
_EPS = 1e-6
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class DenoisingMLP:
  """A `models.diffusion.Diffusion.head` with learned variances. Hashable.

  Parameters are a dict of f32 arrays by published name, matrices [in,out].

  Attributes:
    channels: C. condition_dim: of what it is conditioned on.
    width: of the blocks. num_blocks: published: 6 of 1024 (B), 8 of 1280
      (L), 12 of 1536 (H).
    dtype: of the blocks. What comes out is float32 either way, but only
      float32 blocks give densities that two programs agree on: in the first
      steps an error of the noise is multiplied by 300.
    exact: float32 products are of float32. False, for training: of what the
      hardware prefers (TF32, several times as fast).
  """

  channels: int = 16
  condition_dim: int = 768
  width: int = 1024
  num_blocks: int = 6
  dtype: str = 'float32'
  exact: bool = dataclasses.field(default=True, metadata=UNSAVED)

  def __post_init__(self):
    for name in ('channels', 'condition_dim', 'width', 'num_blocks'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: must be >= 1')
    if self.dtype not in DTYPES:
      raise ValueError(f'dtype={self.dtype!r}: must be one of {DTYPES}')

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name."""
    w, c = self.width, self.channels
    linear = {
        'time_embed.mlp.0': (_SINUSOIDS, w), 'time_embed.mlp.2': (w, w),
        'cond_embed': (self.condition_dim, w), 'input_proj': (c, w),
        'final_layer.linear': (w, 2 * c),
        'final_layer.adaLN_modulation.1': (w, 2 * w)}
    out: dict[str, tuple[int, ...]] = {}
    for i in range(self.num_blocks):
      block = f'res_blocks.{i}'
      linear |= {f'{block}.mlp.0': (w, w), f'{block}.mlp.2': (w, w),
                 f'{block}.adaLN_modulation.1': (w, 3 * w)}
      out |= {f'{block}.in_ln.weight': (w,), f'{block}.in_ln.bias': (w,)}
    for name, shape in linear.items():
      out |= {f'{name}.weight': shape, f'{name}.bias': shape[1:]}
    return dict(sorted(out.items()))

  @property
  def num_params(self) -> int:
    """Parameters."""
    return sum(math.prod(shape) for shape in self.shapes.values())

  def init(self, key: Array) -> dict[str, Array]:
    """Returns parameters as training begins with them.

    Gates and the last layer are zero: every token's noise is predicted 0.
    """
    out = {}
    for i, (name, shape) in enumerate(self.shapes.items()):
      one = jax.random.fold_in(key, i)
      zero = 'adaLN' in name or 'final_layer' in name or len(shape) == 1
      if name.endswith('in_ln.weight'):
        out[name] = jnp.ones(shape)
      elif zero:
        out[name] = jnp.zeros(shape)
      elif 'time_embed' in name:
        out[name] = 0.02 * jax.random.normal(one, shape)
      else:
        bound = math.sqrt(6 / sum(shape))
        out[name] = jax.random.uniform(one, shape, minval=-bound, maxval=bound)
    return out

  def __call__(
      self, params: Mapping[str, Array], x: Array, time: Time,
      condition: Array,
  ) -> tuple[Array, Array]:
    """Returns `(noise, range)`, f32[...,C].

    Args:
      params: see above. x: f32[...,C], noisy tokens. time: int32[...].
      condition: [...,condition_dim]; leading axes broadcast with those of x.
    """
    kind = jnp.dtype(self.dtype)
    # Drafts and scores come of calls of different shapes: float32 has to mean
    # float32, also where the hardware prefers TF32.
    precision = jax.lax.Precision.HIGHEST if (
        self.exact and kind == jnp.float32) else None

    def linear(name: str, h: Array) -> Array:
      out = jnp.matmul(
          h, params[f'{name}.weight'].astype(kind), precision=precision)
      return out + params[f'{name}.bias'].astype(kind)

    def modulation(name: str, parts: int) -> list[Array]:
      found = linear(f'{name}.adaLN_modulation.1', jax.nn.silu(y))
      return jnp.split(found, parts, axis=-1)

    step = linear('time_embed.mlp.0', sinusoids(time.number).astype(kind))
    step = linear('time_embed.mlp.2', jax.nn.silu(step))
    y = step + linear('cond_embed', condition.astype(kind))
    h = linear('input_proj', x.astype(kind))
    for i in range(self.num_blocks):
      name = f'res_blocks.{i}'
      shift, scale, gate = modulation(name, 3)
      inner = _norm(h) * params[f'{name}.in_ln.weight'].astype(
          kind) + params[f'{name}.in_ln.bias'].astype(kind)
      inner = linear(f'{name}.mlp.0', inner * (1 + scale) + shift)
      h = h + gate * linear(f'{name}.mlp.2', jax.nn.silu(inner))
    shift, scale = modulation('final_layer', 2)
    out = linear('final_layer.linear', _norm(h) * (1 + scale) + shift)
    noise, between = jnp.split(out.astype(jnp.float32), 2, axis=-1)
    return noise, between


@dataclasses.dataclass(frozen=True)
class GuidedHead:
  """A head under classifier-free guidance, which is part of the law.

  The condition is `{'with': [...,Z], 'without': [...,Z], 'scale': f32[...]}`:
  noise = without + scale (with - without); variances are those of 'with'.

  Attributes:
    head: the bare head.
  """

  head: Any

  def __call__(
      self, params: Any, x: Array, time: Time, condition: Mapping[str, Array]
  ) -> tuple[Array, Array]:
    """Returns `(noise, range)`, f32[...,C], of the guided law."""
    noise, between = self.head(params, x, time, condition['with'])
    bare, _ = self.head(params, x, time, condition['without'])
    return bare + condition['scale'][..., None] * (noise - bare), between


def bare(head: Any) -> DenoisingMLP:
  """Returns a head without guidance."""
  return head.head if isinstance(head, GuidedHead) else head


def sinusoids(number: Array) -> Array:
  """Returns f32[...,256] of steps: cosines in front, periods to 1e4."""
  half = _SINUSOIDS // 2
  angle = number[..., None].astype(jnp.float32) * jnp.exp(
      -math.log(1e4) * jnp.arange(half) / half)
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _norm(h: Array) -> Array:
  """Returns h with mean 0 and variance 1 in float32, in its own dtype."""
  wide = h.astype(jnp.float32)
  wide = wide - wide.mean(axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + _EPS)
  return (wide * scale).astype(h.dtype)
