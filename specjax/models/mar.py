"""MAR's decoder: what is said of every masked token, given the others.

Li et al. 2024, arXiv:2406.11838. An encoder reads the tokens that are there
behind a buffer that holds the class; a decoder fills the places of the others
and gives each a vector, on which `diffusion_head.DenoisingMLP` is
conditioned. Attention is bidirectional. Weights have the names of the
published checkpoints.

Shapes: N tokens of C channels, P buffer slots, D the width.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

_EPS = 1e-6
TABLES = ('class_emb.weight',)  # see `named.load`
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class MAR:
  """Pure functions of a masked decoder. Hashable.

  Parameters are a dict of f32 arrays by published name, matrices [in,out].

  Attributes:
    num_tokens: N. channels: C. num_classes: classes; one more vector stands
      for "any" (guidance).
    width: D. num_encoder, num_decoder: blocks. num_heads: of attention.
    buffer: P.
    dtype: of the blocks; what comes out is float32.
  """

  num_tokens: int = 256
  channels: int = 16
  num_classes: int = 1000
  width: int = 768
  num_encoder: int = 12
  num_decoder: int = 12
  num_heads: int = 12
  buffer: int = 64
  dtype: str = 'float32'

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, int) and value < 1:
        raise ValueError(f'{field.name}={value}: must be >= 1')
    if self.width % self.num_heads:
      raise ValueError(f'width={self.width}: must be a multiple of num_heads='
                       f'{self.num_heads}')
    if self.dtype not in DTYPES:
      raise ValueError(f'dtype={self.dtype!r}: must be one of {DTYPES}')

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name."""
    d, size = self.width, self.num_tokens
    out: dict[str, tuple[int, ...]] = {
        'class_emb.weight': (self.num_classes, d), 'fake_latent': (1, d),
        'mask_token': (1, 1, d),
        'encoder_pos_embed_learned': (1, self.buffer + size, d),
        'decoder_pos_embed_learned': (1, self.buffer + size, d),
        'diffusion_pos_embed_learned': (1, size, d)}
    layers = {'z_proj': (self.channels, d), 'decoder_embed': (d, d)}
    norms = ['z_proj_ln', 'encoder_norm', 'decoder_norm']
    for side, num in (('encoder', self.num_encoder),
                      ('decoder', self.num_decoder)):
      for i in range(num):
        block = f'{side}_blocks.{i}'
        norms += [f'{block}.norm1', f'{block}.norm2']
        layers |= {f'{block}.attn.qkv': (d, 3 * d),
                   f'{block}.attn.proj': (d, d),
                   f'{block}.mlp.fc1': (d, 4 * d),
                   f'{block}.mlp.fc2': (4 * d, d)}
    for name in norms:
      out |= {f'{name}.weight': (d,), f'{name}.bias': (d,)}
    for name, shape in layers.items():
      out |= {f'{name}.weight': shape, f'{name}.bias': shape[1:]}
    return dict(sorted(out.items()))

  @property
  def num_params(self) -> int:
    """Parameters, without the denoising head's."""
    return sum(math.prod(shape) for shape in self.shapes.values())

  def init(self, key: Array) -> dict[str, Array]:
    """Returns parameters as training begins with them."""
    out = {}
    for i, (name, shape) in enumerate(self.shapes.items()):
      one = jax.random.fold_in(key, i)
      if name.endswith('.bias'):
        out[name] = jnp.zeros(shape)
      elif len(shape) == 1:  # of norms
        out[name] = jnp.ones(shape)
      elif name.endswith('.weight') and name not in TABLES:
        bound = math.sqrt(6 / sum(shape))
        out[name] = jax.random.uniform(one, shape, minval=-bound, maxval=bound)
      else:
        out[name] = 0.02 * jax.random.normal(one, shape)
    return out

  def classes(self, params: Mapping[str, Array], label: Array) -> Array:
    """Returns the vectors f32[B,D] of classes int32[B]; `num_classes`: any."""
    table = jnp.concatenate([params['class_emb.weight'],
                             params['fake_latent']])
    return table[label]

  def __call__(
      self, params: Mapping[str, Array], tokens: Array, is_masked: Array,
      label: Array,
  ) -> Array:
    """Returns what is said of each token, f32[B,N,D].

    Masked tokens are not read. Every slot is computed whatever the mask, so
    that shapes are static; keys of masked ones are invisible to the encoder.

    Args:
      params: see above. tokens: f32[B,N,C]. is_masked: bool[B,N].
      label: int32[B], classes, `num_classes` for any.
    """
    kind = jnp.dtype(self.dtype)
    rows, size = is_masked.shape
    tokens = jnp.where(is_masked[..., None], 0.0, tokens)
    x = _linear(params, 'z_proj', tokens.astype(kind))
    front = jnp.broadcast_to(
        self.classes(params, label).astype(kind)[:, None],
        (rows, self.buffer, self.width))
    x = jnp.concatenate([front, x], axis=1)
    x = _norm(params, 'z_proj_ln', x + params[
        'encoder_pos_embed_learned'].astype(kind))
    seen = jnp.concatenate(
        [jnp.ones((rows, self.buffer), bool), ~is_masked], axis=1)
    for i in range(self.num_encoder):
      x = self._block(params, f'encoder_blocks.{i}', x, seen)
    x = _linear(params, 'decoder_embed', _norm(params, 'encoder_norm', x))
    x = jnp.where(seen[..., None], x, params['mask_token'].astype(kind))
    x = x + params['decoder_pos_embed_learned'].astype(kind)
    for i in range(self.num_decoder):
      x = self._block(params, f'decoder_blocks.{i}', x, None)
    x = _norm(params, 'decoder_norm', x)[:, -size:].astype(jnp.float32)
    return x + params['diffusion_pos_embed_learned']

  def _block(self, params: Any, name: str, x: Array, seen: Array | None):
    """Returns x after attention and an MLP; keys `seen bool[B,T]` alone."""
    heads, dim = self.num_heads, self.width // self.num_heads
    h = _linear(params, f'{name}.attn.qkv', _norm(params, f'{name}.norm1', x))
    q, k, v = jnp.moveaxis(h.reshape(*h.shape[:2], 3, heads, dim), 2, 0)
    mask = None if seen is None else seen[:, None, None, :]
    h = jax.nn.dot_product_attention(q, k, v, mask=mask)
    x = x + _linear(params, f'{name}.attn.proj', h.reshape(x.shape))
    h = _linear(params, f'{name}.mlp.fc1', _norm(params, f'{name}.norm2', x))
    h = jax.nn.gelu(h, approximate=False)
    return x + _linear(params, f'{name}.mlp.fc2', h)


def num_masked(num_tokens: int, num_iterations: int) -> np.ndarray:
  """Returns int[S + 1], tokens that are masked before each of S iterations.

  The cosine schedule: N in front, 0 at the end; each iteration makes one
  token at least.

  Raises:
    ValueError: more iterations than tokens, or none.
  """
  if not 1 <= num_iterations <= num_tokens:
    raise ValueError(f'num_iterations={num_iterations}: must be in [1, '
                     f'num_tokens={num_tokens}]')
  left = [num_tokens]
  for step in range(1, num_iterations):
    want = math.floor(num_tokens * math.cos(
        math.pi / 2 * step / num_iterations))
    left.append(max(1, min(left[-1] - 1, want)))
  return np.asarray([*left, 0])


def iteration_starts(
    num_tokens: int, num_iterations: int | None, schedule: str = 'cosine'
) -> np.ndarray:
  """Returns int[S + 1], tokens that are there before each iteration, and N.

  Args:
    num_tokens: N. num_iterations: S; None is N.
    schedule: 'cosine' (`num_masked`), or 'even': equal ones.

  Raises:
    ValueError: an unknown schedule, more iterations than tokens, or none.
  """
  if schedule not in ('cosine', 'even'):
    raise ValueError(f"schedule={schedule!r}: 'cosine' or 'even'")
  left = num_masked(num_tokens, num_tokens if num_iterations is None
                    else num_iterations)
  if schedule == 'cosine':
    return num_tokens - left
  return np.arange(len(left)) * num_tokens // (len(left) - 1)


def _linear(params: Any, name: str, x: Array) -> Array:
  # float32 means float32, also where the hardware prefers TF32.
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  out = jnp.matmul(
      x, params[f'{name}.weight'].astype(x.dtype), precision=precision)
  return out + params[f'{name}.bias'].astype(x.dtype)


def _norm(params: Any, name: str, x: Array) -> Array:
  wide = x.astype(jnp.float32)
  wide = wide - wide.mean(axis=-1, keepdims=True)
  wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + _EPS)
  return (wide * params[f'{name}.weight']
          + params[f'{name}.bias']).astype(x.dtype)
