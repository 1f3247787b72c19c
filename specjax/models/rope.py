"""Rotary position embeddings, with the scalings that checkpoints use."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How a family stretches its rotary frequencies.

  Attributes:
    kind: 'linear' (position interpolation), 'llama3' or 'yarn'.
    factor: context extension, >= 1.
    original_length: context length of pre-training, tokens.
    low_freq_factor, high_freq_factor: llama3's band.
    beta_fast, beta_slow: yarn's band, in rotations.
    attention_factor: yarn's scale of cos and sin; None computes it.
    truncate: yarn rounds its band to whole dimensions.
  """

  kind: str
  factor: float
  original_length: int = 8192
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True

  def __post_init__(self):
    if self.kind not in ('linear', 'llama3', 'yarn'):
      raise ValueError(
          f'rope scaling {self.kind!r}: known are linear, llama3, yarn')


def frequencies(
    head_dim: int, base: float, scaling: RopeScaling | None
) -> tuple[np.ndarray, float]:
  """Returns `(inverse frequencies f64[H/2], scale of cos and sin)`."""
  inv = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling is None:
    return inv, 1.0
  if scaling.kind == 'linear':
    return inv / scaling.factor, 1.0
  if scaling.kind == 'llama3':
    return _llama3(inv, scaling), 1.0
  return _yarn(inv, head_dim, base, scaling)


def _llama3(inv: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  """Keeps high frequencies, divides low ones, blends in between."""
  length = scaling.original_length
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns = length * inv / (2 * math.pi)  # rotations over the context
  blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return (1 - blend) * inv / scaling.factor + blend * inv


def _yarn(
    inv: np.ndarray, head_dim: int, base: float, scaling: RopeScaling
) -> tuple[np.ndarray, float]:
  """NTK-by-parts interpolation (Peng et al. 2023, arXiv:2309.00071)."""
  def dim_of(rotations: float) -> float:
    span = scaling.original_length / (rotations * 2 * math.pi)
    return head_dim * math.log(span) / (2 * math.log(base))

  low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  ramp = (np.arange(head_dim // 2) - low) / max(high - low, 1e-3)
  keep = 1 - np.clip(ramp, 0.0, 1.0)
  mixed = inv / scaling.factor * (1 - keep) + inv * keep
  scale = scaling.attention_factor
  if scale is None:
    scale = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
  return mixed, scale


def tables(
    position: Array, head_dim: int, base: float,
    scaling: RopeScaling | None = None,
) -> tuple[Array, Array]:
  """Returns `(cos, sin) f32[B,T,H/2]` for `position int32[B,T]`."""
  inv, scale = frequencies(head_dim, base, scaling)
  angle = position[..., None].astype(jnp.float32) * jnp.asarray(
      inv, jnp.float32)
  return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def grid_tables(
    cell: Array, head_dim: int, base: float, width: int
) -> tuple[Array, Array]:
  """Returns `(cos, sin) f32[B,T,H/2]` of cells of an image.

  The first half of the pairs turns with the row, the other with the column.
  Cells below 0 stand before the image: their cosine *and* sine are 0, so
  their keys and queries are zero vectors and the prefix is attended to
  uniformly (as published; Sun et al. 2024, arXiv:2406.06525).

  Args:
    cell: int32[B,T], in raster order. head_dim: H, a multiple of 4.
    base: of the frequencies `base ** (-2 i / (H / 2))`.
    width: cells a row.
  """
  inv, _ = frequencies(head_dim // 2, base, None)
  place = jnp.stack([cell // width, cell % width], axis=-1)
  angle = place[..., None].astype(jnp.float32) * jnp.asarray(inv, jnp.float32)
  angle = angle.reshape(cell.shape + (head_dim // 2,))
  inside = (cell >= 0)[..., None]
  return (jnp.where(inside, jnp.cos(angle), 0.0),
          jnp.where(inside, jnp.sin(angle), 0.0))


def rotate(x: Array, table: tuple[Array, Array]) -> Array:
  """Rotates `x [B,T,...,H]` (halves convention) in float32, keeps dtype.

  The halves are swapped by reversing an axis of two: a concatenation would
  be a kernel of its own on GPUs.
  """
  cos, sin = table
  half = x.shape[-1] // 2
  shape = cos.shape[:2] + (1,) * (x.ndim - 3) + (1, half)
  pair = x.astype(jnp.float32).reshape(x.shape[:-1] + (2, half))
  sign = jnp.asarray([[-1.0], [1.0]], jnp.float32)
  turned = pair * cos.reshape(shape) + jnp.flip(pair, axis=-2) * (
      sin.reshape(shape) * sign)
  return turned.reshape(x.shape).astype(x.dtype)
