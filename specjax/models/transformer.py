"""One decoder, configured into Llama, Qwen2, Qwen3 and Gemma 3.

Linen modules, stateless: the cache is an argument and a result. Parameters
are a plain nested dict. Query, key and value projections are one matrix, and
so are gate and up: at batch 1 a small model is bound by the number of
kernels. `apply` runs a range of layers, so that early-exit drafters and
resumed verification use the same code as a full forward pass.
"""

from __future__ import annotations

import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from specjax.models import attention, rope, whole_attention
from specjax.models.attention import Block, Sight
from specjax.models.transformer_config import TransformerConfig

Array = jax.Array


def declare(module: nn.Module, name: str, shape, axes, dtype, init=None):
  """Declares a parameter with logical axis names (`parallel.rules`)."""
  def normal(key: Array, shape, dtype) -> Array:
    # Drawn in two axes: on CPUs a 4-D draw compiles for seconds.
    flat = jax.random.normal(key, (shape[0], math.prod(shape[1:])), dtype)
    return 0.02 * flat.reshape(shape)

  return module.param(
      name, nn.with_logical_partitioning(init or normal, axes), shape, dtype)


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last axis, in float32."""

  config: TransformerConfig
  size: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = declare(self, 'scale', (self.size,), (None,), jnp.float32,
                   nn.initializers.ones_init())
    wide = x.astype(jnp.float32)
    power = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(power + self.config.norm_eps)
    return (normed * scale).astype(x.dtype)


def drop(module: nn.Module, rate: float, x: Array) -> Array:
  """Returns x with a share of zeros, where there is a key for it."""
  if not rate or not module.has_rng('dropout'):
    return x
  # A byte an element: whole floats would cost more than the layer.
  least = round(256 * rate)
  kept = least <= jax.random.bits(
      module.make_rng('dropout'), x.shape, jnp.uint8)
  return jnp.where(kept, x * (256 / (256 - least)), 0).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query attention over a cache."""

  config: TransformerConfig
  is_local: bool

  @nn.compact
  def __call__(self, x: Array, cache, block: Block, sight: Sight, table):
    c = self.config
    group = c.num_heads // c.num_kv_heads
    shape = (c.embed_dim, c.num_kv_heads, group + 2, c.head_dim)
    qkv_axes = ('embed', 'kv_heads', None, None)
    kernel = declare(self, 'qkv', shape, qkv_axes, c.dtype)
    mixed = jnp.einsum('btd,dgqh->btgqh', x, kernel, precision=c.precision)
    if c.qkv_bias:
      mixed += declare(self, 'qkv_bias', shape[1:], qkv_axes[1:], c.dtype,
                      nn.initializers.zeros_init())
    q, k, v = mixed[:, :, :, :group], mixed[..., group, :], mixed[..., -1, :]
    if c.qk_norm:
      q = RMSNorm(c, c.head_dim, name='q_norm')(q)
      k = RMSNorm(c, c.head_dim, name='k_norm')(k)
    q, k = rope.rotate(q, table), rope.rotate(k, table)
    kwargs: dict[str, Any] = dict(
        scale=c.score_scale, softcap=c.attention_softcap,
        precision=c.precision)
    if block.whole:
      out = whole_attention.attend_whole(q, k, v, sight.seen, **kwargs)
    else:
      cache = attention.write(cache, block, k, v)
      out = attention.attend(q, cache['k'], cache['v'], sight, **kwargs)
    kernel = declare(
        self, 'out', (c.num_kv_heads, group, c.head_dim, c.embed_dim),
        ('kv_heads', None, None, 'embed'), c.dtype)
    # Flattened by hand: as an einsum, XLA on CPUs copies the weight.
    width = c.num_heads * c.head_dim
    out = jnp.dot(out.reshape(x.shape[:2] + (width,)),
                  kernel.reshape(width, c.embed_dim), precision=c.precision)
    return out, cache


class MLP(nn.Module):
  """Gated MLP; one function, so that a fused kernel can take its place."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    up = declare(self, 'gate_up', (c.embed_dim, 2, c.mlp_dim),
                ('embed', None, 'mlp'), c.dtype)
    down = declare(self, 'down', (c.mlp_dim, c.embed_dim),
                  ('mlp', 'embed'), c.dtype)
    both = jnp.einsum('btd,dkf->btkf', x, up, precision=c.precision)
    gate, value = both[:, :, 0], both[:, :, 1]
    if c.activation == 'silu':
      gate = jax.nn.silu(gate)
    else:
      gate = jax.nn.gelu(gate, approximate=True)
    return jnp.einsum('btf,fd->btd', gate * value, down,
                      precision=c.precision)


class Layer(nn.Module):
  """Attention and MLP around the residual stream."""

  config: TransformerConfig
  is_local: bool

  @nn.compact
  def __call__(self, x: Array, cache, block: Block, sight: Sight, table):
    c = self.config
    h = RMSNorm(c, c.embed_dim, name='attention_norm')(x)
    h, cache = Attention(c, self.is_local, name='attention')(
        h, cache, block, sight, table)
    if c.post_norms:
      h = RMSNorm(c, c.embed_dim, name='post_attention_norm')(h)
    x = x + drop(self, c.dropout, h)
    h = MLP(c, name='mlp')(RMSNorm(c, c.embed_dim, name='mlp_norm')(x))
    if c.post_norms:
      h = RMSNorm(c, c.embed_dim, name='post_mlp_norm')(h)
    return x + drop(self, c.dropout, h), cache


class Transformer(nn.Module):
  """The decoder; see the module docstring.

  Taps are hidden states [B,T,D] by name: `'resid_i'` is the residual stream
  entering layer i (so `'resid_0'` is the embedding and `'resid_L'` leaves the
  last layer), `'final'` is the stream after the final norm.
  """

  config: TransformerConfig

  def setup(self):
    c = self.config
    self.embedding = declare(
        self, 'embedding', (c.vocab_size + c.num_conditions, c.embed_dim),
        ('vocab', 'embed'), c.dtype)
    self.layers = [Layer(c, c.is_local(i), name=f'layer_{i}')
                   for i in range(c.num_layers)]
    self.final_norm = RMSNorm(c, c.embed_dim, name='final_norm')
    if not c.tied:
      self.head_kernel = declare(self, 'head', (c.vocab_size, c.embed_dim),
                                ('vocab', 'embed'), c.dtype)
    if c.caption_dim is not None:
      self.caption_in = declare(
          self, 'caption_in', (c.caption_dim, c.embed_dim), (None, 'embed'),
          c.dtype)
      self.caption_out = declare(
          self, 'caption_out', (c.embed_dim, c.embed_dim), (None, 'embed'),
          c.dtype)
      self.no_caption = declare(
          self, 'no_caption', (c.grid_prefix, c.caption_dim), (None, None),
          c.dtype)

  def embed(self, tokens: Array) -> Array:
    """Returns [B,T,D]; ids out of range are clipped."""
    x = jnp.take(self.embedding, tokens, axis=0, mode='clip')
    if self.config.embed_scale is not None:
      x = x * jnp.asarray(self.config.embed_scale, x.dtype)
    return x

  def head(self, x: Array) -> Array:
    """Returns float32 logits [B,T,V] of normed hidden states."""
    c = self.config
    kernel = self.head_kernel if not c.tied else (
        self.embedding[:c.vocab_size] if c.num_conditions
        else self.embedding)
    logits = jnp.einsum('btd,vd->btv', x, kernel, precision=c.precision,
                        preferred_element_type=jnp.float32)
    if c.final_softcap is not None:
      logits = jnp.tanh(logits / c.final_softcap) * c.final_softcap
    return logits

  def __call__(
      self, x: Array, cache: tuple, block: Block, *, start: int = 0,
      stop: int | None = None, taps: tuple[str, ...] = (),
      with_head: bool = True,
  ) -> tuple[Array | None, dict[str, Array], tuple]:
    """Runs layers `start` to `stop` on hidden states or token ids.

    Args:
      x: int32[B,T] tokens (start == 0) or [B,T,D] entering layer `start`.
      cache: one dict a layer, all layers, whatever the range.
      block: where the T tokens stand.
      start, stop: layer range; `stop=None` runs to the end.
      taps: names of hidden states to return.
      with_head: whether to return logits (only with `stop=None`).

    Returns:
      `(logits f32[B,T,V] or None, taps, cache)`. With a `stop` the residual
      stream is found under `'resid_<stop>'` in the taps.
    """
    c = self.config
    if jnp.issubdtype(x.dtype, jnp.integer):
      x = drop(self, c.dropout, self.embed(x))
    end = c.num_layers if stop is None else stop
    wanted = set(taps) | ({f'resid_{stop}'} if stop is not None else set())
    found: dict[str, Array] = {}
    tables: dict[bool, Any] = {}
    sights: dict[bool, Sight] = {}
    new = list(cache)
    for i in range(start, end):
      if f'resid_{i}' in wanted:
        found[f'resid_{i}'] = x
      local = c.is_local(i)
      if local not in tables:
        tables[local] = self._rotary(block.position, local)
        sights[local] = attention.sight(
            new[i], block, c.window if local else None)
      x, new[i] = self.layers[i](x, new[i], block, sights[local],
                                 tables[local])
    if f'resid_{end}' in wanted:
      found[f'resid_{end}'] = x
    if stop is not None or not (with_head or 'final' in wanted):
      return None, found, tuple(new)
    x = self.final_norm(x)
    if 'final' in wanted:
      found['final'] = x
    return (self.head(x) if with_head else None), found, tuple(new)

  def caption(self, features: Array, is_null: Array) -> Array:
    """Returns a caption's prefix [B,P,D].

    Args:
      features: [B,P,caption_dim]. is_null: bool[B], rows that get the learnt
        features of no caption instead.
    """
    c = self.config
    x = jnp.where(is_null[:, None, None], self.no_caption,
                  features.astype(c.dtype))
    x = jnp.dot(x, self.caption_in, precision=c.precision)
    x = jax.nn.gelu(x, approximate=True)
    return jnp.dot(x, self.caption_out, precision=c.precision)

  def _rotary(self, position: Array, local: bool) -> tuple[Array, Array]:
    c = self.config
    if c.grid_width is not None:
      return rope.grid_tables(position - c.grid_prefix, c.head_dim,
                              c.rope_base, c.grid_width)
    base = c.local_rope_base if local else None
    return rope.tables(position, c.head_dim, base or c.rope_base,
                       None if local and base else c.rope_scaling)


def init(config: TransformerConfig, key: Array) -> Any:
  """Returns random parameters, boxed with their logical axes.

  Use under `jax.jit(..., out_shardings=...)` for sharded creation, and
  `flax.linen.unbox` for plain arrays.
  """
  model = Transformer(config)
  cache = empty_cache(config, 1, 2)
  block = Block(base=jnp.zeros((1,), jnp.int32),
                position=jnp.zeros((1, 1), jnp.int32))
  tokens = jnp.zeros((1, 1), jnp.int32)
  return model.init(key, tokens, cache, block)['params']


def empty_cache(
    config: TransformerConfig, batch: int, capacity: int, *,
    chunk: int = 1,
) -> tuple[dict[str, Array], ...]:
  """Returns one empty cache a layer.

  Sliding-window layers keep a ring of `window + chunk` slots, where `chunk`
  is the most tokens fed in one call (prefill chunk or drafts + 1) or one by
  one as a tree: later or rejected entries must not overwrite keys that a
  query still sees.
  """
  def one(layer: int):
    ring = None
    if config.is_local(layer) and config.window is not None:
      ring = config.window + chunk
    return attention.empty_cache(
        batch, capacity, config.num_kv_heads, config.head_dim, config.dtype,
        ring=ring)
  return tuple(one(i) for i in range(config.num_layers))
