"""Layers of drafters that go on from the target's hidden states.

The block drafters and EAGLE differ in what a row sees, not in the arithmetic
of a layer. A layer projects, hands queries, keys and values to `attend(q, k,
v) -> [B,T,G,Q,H]`, and goes on with what that returns: attention over a cache
(`over_cache`) or over whole texts (`whole_attention`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from specjax.models import attention, rope
from specjax.models.attention import Block, Cache, Sight
from specjax.models.transformer import MLP, RMSNorm, TransformerConfig, declare

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]


class DraftAttention(nn.Module):
  """Projections of attention; inputs may be wider than the output."""

  config: TransformerConfig
  inputs: int

  def setup(self):
    c = self.config
    self.per = c.num_heads // c.num_kv_heads
    shape = (self.inputs, c.num_kv_heads, self.per + 2, c.head_dim)
    axes = ('embed', 'kv_heads', None, None)
    self.qkv = declare(self, 'qkv', shape, axes, c.dtype)
    if c.qkv_bias:
      self.qkv_bias = declare(self, 'qkv_bias', shape[1:], axes[1:], c.dtype,
                              nn.initializers.zeros_init())
    self.out = declare(
        self, 'out', (c.num_kv_heads, self.per, c.head_dim, c.embed_dim),
        ('kv_heads', None, None, 'embed'), c.dtype)
    if c.qk_norm:
      self.q_norm = RMSNorm(c, c.head_dim)
      self.k_norm = RMSNorm(c, c.head_dim)

  def project(self, x: Array, table: Any) -> tuple[Array, Array, Array]:
    """Returns q [B,T,G,Q,H], k and v [B,T,G,H] of `x [B,T,inputs]`."""
    mixed = self._mix(x, 0)
    q = mixed[:, :, :, :self.per]
    if self.config.qk_norm:
      q = self.q_norm(q)
    return (rope.rotate(q, table), *self._keys(mixed, table))

  def keys(self, x: Array, table: Any) -> tuple[Array, Array]:
    """Returns k and v [B,T,G,H] of `x [B,T,inputs]`, rows without queries."""
    return self._keys(self._mix(x, self.per), table)

  def finish(self, mixed: Array) -> Array:
    """Returns [B,T,D] of attention's output [B,T,G,Q,H]."""
    c = self.config
    # Flattened by hand: as an einsum, XLA on CPUs copies the weight.
    width = c.num_heads * c.head_dim
    return jnp.dot(mixed.reshape(mixed.shape[:2] + (width,)),
                   self.out.reshape(width, c.embed_dim),
                   precision=c.precision)

  def _mix(self, x: Array, first: int) -> Array:
    """Returns the projections from `first` on, of Q + 2 a key-value head."""
    c = self.config
    mixed = jnp.einsum('btd,dgqh->btgqh', x, self.qkv[:, :, first:],
                       precision=c.precision)
    return mixed + self.qkv_bias[:, first:] if c.qkv_bias else mixed

  def _keys(self, mixed: Array, table: Any) -> tuple[Array, Array]:
    k, v = mixed[..., -2, :], mixed[..., -1, :]
    if self.config.qk_norm:
      k = self.k_norm(k)
    return rope.rotate(k, table), v


class DraftLayer(nn.Module):
  """Attention and MLP around the residual stream of rows.

  Attributes:
    config: widths, heads and norms.
    is_normed: whether the stream is normed before attention.
    with_embedding: whether attention reads `[norm(embedding); stream]`, 2D
      wide (EAGLE-3), in the place of the stream alone.
  """

  config: TransformerConfig
  is_normed: bool = True
  with_embedding: bool = False

  def setup(self):
    c = self.config
    if self.with_embedding:
      self.embedding_norm = RMSNorm(c, c.embed_dim)
    if self.is_normed:
      self.attention_norm = RMSNorm(c, c.embed_dim)
    self.attention = DraftAttention(
        c, c.embed_dim * (2 if self.with_embedding else 1))
    self.mlp_norm = RMSNorm(c, c.embed_dim)
    self.mlp = MLP(c)

  def __call__(
      self, x: Array, table: Any, attend: Attend,
      embedding: Array | None = None,
  ) -> Array:
    """Returns the stream [B,T,D] behind the layer.

    Args:
      x: [B,T,D]. table: rotary tables of the rows (`tables`).
      attend: see the module.
      embedding: [B,T,D], read if the layer is `with_embedding`.
    """
    u = self.attention_norm(x) if self.is_normed else x
    if self.with_embedding:
      assert embedding is not None
      u = jnp.concatenate([self.embedding_norm(embedding), u], axis=-1)
    q, k, v = self.attention.project(u, table)
    x = x + self.attention.finish(attend(q, k, v))
    return x + self.mlp(self.mlp_norm(x))


def over_cache(
    config: TransformerConfig, entry: Cache, block: Block, sight: Sight,
    new: list[Cache],
) -> Attend:
  """Returns attention over one layer's cache.

  Args:
    entry: the layer's cache before the rows. block: where they stand.
    sight: what they see once they are written.
    new: the cache with the rows' keys and values is appended to it.
  """
  def attend(q: Array, k: Array, v: Array) -> Array:
    new.append(attention.write(entry, block, k, v))
    return attention.attend(
        q, new[-1]['k'], new[-1]['v'], sight, scale=config.score_scale,
        softcap=None, precision=config.precision)
  return attend


def tables(config: TransformerConfig, position: Array) -> Any:
  """Returns the rotary tables of rows at `position int32[B,T]`."""
  return rope.tables(
      position, config.head_dim, config.rope_base, config.rope_scaling)


def check(config: TransformerConfig) -> None:
  """Raises ValueError for options that these layers do not have."""
  c = config
  for name, has in (('local_layers', any(c.local_layers)),
                    ('post_norms', c.post_norms),
                    ('attention_softcap', c.attention_softcap is not None)):
    if has:
      raise ValueError(f'decoder.{name}={getattr(c, name)}: layers of '
                       'drafters do not have this')
