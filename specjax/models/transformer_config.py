"""A decoder's shape."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, Self

import jax

from specjax.models import rope


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A decoder's shape. Hashable; equal configs trace once.

  Attributes:
    vocab_size: V. num_layers. embed_dim: D. mlp_dim: F. num_heads.
    num_kv_heads: G, divides num_heads. head_dim: H.
    norm_eps: of every RMS norm.
    rope_base: of global layers. rope_scaling: likewise.
    local_rope_base: of sliding-window layers; None uses rope_base.
    window: tokens that a local layer sees, itself included.
    local_layers: bool per layer, True for a sliding window; () for none.
    qkv_bias: Qwen2. qk_norm: Qwen3, Gemma 3.
    post_norms: Gemma's norms after attention and MLP.
    embed_scale: multiplies embeddings (Gemma: sqrt(D)).
    activation: 'silu' or 'gelu_tanh'.
    query_scale: of attention scores; None is head_dim ** -0.5.
    attention_softcap, final_softcap: tanh bounds, or None.
    tied: the head is the embedding.
    num_conditions: rows of the embedding after the V tokens: what a prompt may
      say and nobody generates (classes; the last one says nothing, for
      guidance). They are the ids V to V + num_conditions - 1.
    grid_width: None, or tokens are the cells of an image of this width, in
      raster order, and are rotated by row and column (`rope.grid_tables`).
    grid_prefix: positions before the first cell; they are not rotated.
    caption_dim: None, or the prefix is `grid_prefix` feature vectors of this
      size (`models.image_lm`).
    dropout: share of a layer's outputs, and of the embedding's, that training
      sets to zero, in steps of 1/256; acts where a pass is given a key
      `rngs={'dropout': ...}`, so never in decoding.
    dtype: of matrices, activations and cache; norms and logits are float32.
    max_length: tokens of context that the model is made for, rotary scaling
      included; None where nobody says. Layers compute beyond it all the same:
      it is for those who choose texts.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  norm_eps: float = 1e-6
  rope_base: float = 10000.0
  rope_scaling: rope.RopeScaling | None = None
  local_rope_base: float | None = None
  window: int | None = None
  local_layers: tuple[bool, ...] = ()
  qkv_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  embed_scale: float | None = None
  activation: str = 'silu'
  query_scale: float | None = None
  attention_softcap: float | None = None
  final_softcap: float | None = None
  tied: bool = True
  num_conditions: int = 0
  grid_width: int | None = None
  grid_prefix: int = 1
  caption_dim: int | None = None
  dropout: float = 0.0
  dtype: str = 'float32'
  max_length: int | None = None

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
          f'num_heads={self.num_heads} is not a multiple of '
          f'num_kv_heads={self.num_kv_heads}')
    if self.activation not in ('silu', 'gelu_tanh'):
      raise ValueError(f'activation {self.activation!r}: known are silu, '
                       'gelu_tanh')
    if self.local_layers and len(self.local_layers) != self.num_layers:
      raise ValueError(f'{len(self.local_layers)} local_layers for '
                       f'{self.num_layers} layers')
    if self.num_conditions < 0 or self.grid_prefix < 0:
      raise ValueError(f'num_conditions={self.num_conditions}, '
                       f'grid_prefix={self.grid_prefix}: must be >= 0')
    if self.grid_width is not None and (
        self.grid_width < 1 or self.head_dim % 4):
      raise ValueError(
          f'grid_width={self.grid_width}, head_dim={self.head_dim}: a grid '
          'has a width >= 1, and heads a multiple of 4')
    if self.dropout and not 0 < round(256 * self.dropout) < 256:
      raise ValueError(f'dropout={self.dropout}: must be 0 or, in steps of '
                       '1/256, in (0, 1)')
    if self.caption_dim is not None and self.grid_width is None:
      raise ValueError(f'caption_dim={self.caption_dim} needs grid_width')

  @classmethod
  def of(cls, values: Mapping[str, Any]) -> Self:
    """Returns the shape of JSON values, in which tuples are lists.

    Raises:
      ValueError: a name that is unknown or missing, or a value out of range.
    """
    values = dict(values)
    try:
      if values.get('rope_scaling') is not None:
        values['rope_scaling'] = rope.RopeScaling(**values['rope_scaling'])
      values['local_layers'] = tuple(values.get('local_layers', ()))
      return cls(**values)
    except TypeError as error:
      raise ValueError(f'not the shape of a decoder: {error}') from error

  def is_local(self, layer: int) -> bool:
    """Whether a layer attends through a sliding window."""
    return bool(self.local_layers) and self.local_layers[layer]

  @property
  def precision(self) -> jax.lax.Precision:
    """float32 means float32, also where the hardware prefers TF32."""
    if self.dtype == 'float32':
      return jax.lax.Precision.HIGHEST
    return jax.lax.Precision.DEFAULT

  @property
  def score_scale(self) -> float:
    """What multiplies the scores of attention."""
    return self.query_scale or self.head_dim ** -0.5

  @property
  def num_params(self) -> int:
    """Number of parameters."""
    per_head = self.num_heads + 2 * self.num_kv_heads
    layer = self.embed_dim * self.head_dim * (per_head + self.num_heads)
    layer += 3 * self.embed_dim * self.mlp_dim
    layer += self.embed_dim * (4 if self.post_norms else 2)
    layer += per_head * self.head_dim if self.qkv_bias else 0
    layer += 2 * self.head_dim if self.qk_norm else 0
    rows = (1 if self.tied else 2) * self.vocab_size + self.num_conditions
    captions = 0
    if self.caption_dim is not None:
      captions = (self.caption_dim * (self.embed_dim + self.grid_prefix)
                  + self.embed_dim ** 2)
    return (self.num_layers * layer + self.embed_dim + captions
            + rows * self.embed_dim)
