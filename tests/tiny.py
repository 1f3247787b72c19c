"""Tiny decoders of the four families, with weights that matter."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from specjax.models import transformer, weights
from specjax.models.attention import Block
from specjax.models.transformer_config import TransformerConfig

VOCAB, WINDOW, CHUNK = 31, 5, 9

CAPACITY = 48

_BASE = dict(vocab_size=VOCAB, num_layers=2, embed_dim=16, mlp_dim=24,
             num_heads=4, num_kv_heads=2, head_dim=8)
CONFIGS = {
    'llama': TransformerConfig(**_BASE, tied=False),
    'qwen2': TransformerConfig(**_BASE, qkv_bias=True),
    'qwen3': TransformerConfig(**_BASE, qk_norm=True),
    'gemma3': TransformerConfig(
        **_BASE, window=WINDOW, local_layers=(True, False),
        local_rope_base=100.0,
        qk_norm=True, post_norms=True, embed_scale=4.0, query_scale=0.3,
        activation='gelu_tanh', final_softcap=20.0, attention_softcap=10.0),
}


def noise(shape, seed: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape)


@functools.cache
def params(config: TransformerConfig):
  """Returns parameters large enough that every layer moves the logits."""
  like, tree = jax.tree.flatten(weights.abstract(config))
  leaves = []
  for seed, x in enumerate(like):
    value = 0.3 * noise(x.shape, seed) + (1.0 if x.ndim == 1 else 0.0)
    leaves.append(jnp.asarray(value, x.dtype))
  return jax.tree.unflatten(tree, leaves)


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.integers(0, VOCAB, (batch, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=(
    'start', 'stop', 'taps', 'with_head'))
def run(config, params, x, cache, block, **kwargs):
  """Returns (logits, taps, cache) of one call."""
  return transformer.Transformer(config).apply(
      {'params': params}, x, cache, block, **kwargs)


def empty(config, capacity: int = CAPACITY):
  return transformer.empty_cache(config, 2, capacity, chunk=CHUNK)


def chain(base, length: int, fed=None) -> Block:
  """Returns the block of `length` tokens one after another."""
  base = jnp.asarray(base, jnp.int32)
  return Block(base=base, position=base[:, None] + jnp.arange(length),
               fed=None if fed is None else jnp.asarray(fed))


def full(config, x) -> np.ndarray:
  """Returns logits [B,T,V] of a forward pass from scratch.

  Always of one shape, so that a family is compiled once; what is added comes
  later in the text or in other rows.
  """
  batch, length = x.shape
  padded = np.zeros((18, 40), np.int32)
  padded[:batch, :length] = x
  cache = transformer.empty_cache(config, 18, 40, chunk=40)
  block = chain(np.zeros(18), 40)
  logits, _, _ = run(config, params(config), padded, cache, block)
  return np.asarray(logits)[:batch, :length]


def feed(config, x, cache, base, fed=None):
  """Feeds `x [B,T]`, nine tokens or one at a time: (logits, cache)."""
  batch, length = x.shape
  size = 1 if length == 1 else CHUNK
  total = -(-length // size) * size
  tokens, keep = np.zeros((2, batch, total), np.int32)
  tokens[:, :length] = x
  keep[:, :length] = 1 if fed is None else fed
  out = []
  for i in range(0, total, size):
    part = slice(i, i + size)
    block = chain(np.asarray(base) + i, size, keep[:, part].astype(bool))
    logits, _, cache = run(
        config, params(config), tokens[:, part], cache, block)
    out.append(np.asarray(logits))
  return np.concatenate(out, axis=1)[:, :length], cache
