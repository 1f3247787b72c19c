"""LlamaGen: a decoder over the cells of an image, given a class or a caption.

The class is the first token of a prompt: id V + class, never generated; the
last of these ids is the class that says nothing. Captions are feature vectors
of a text encoder in `context.condition`: `'caption' f32[B,P,caption_dim]`,
padded on the left, and `'caption_length' int32[B]`; the prompt's P tokens are
then placeholders, id V each.

Reference: Sun et al. 2024, arXiv:2406.06525.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core.types import Context
from specjax.io.errors import FormatError
from specjax.models import weight_table
from specjax.models.attention import Block
from specjax.models.causal import CausalLM
from specjax.models.transformer import Transformer, TransformerConfig
from specjax.models.weight_table import Part

Array = jax.Array

# Layers, heads, width. The MLP has 8/3 of the width, in steps of 256.
SIZES = {
    'B': (12, 12, 768), 'L': (24, 16, 1024), 'XL': (36, 20, 1280),
    'XXL': (48, 24, 1536), 'XXXL': (48, 40, 2560), '1B': (22, 32, 2048),
    '3B': (24, 32, 3200)}
_CLASSES = 1000
_CAPTION = (120, 2048)  # vectors, of FLAN-T5-XL


@dataclasses.dataclass(frozen=True)
class ImageLM(CausalLM):
  """A `CausalLM` whose prompt may be a caption's features."""

  def inputs(
      self, params: Any, context: Context, tokens: Array, position: Array
  ) -> Array:
    """Returns states [B,T,D]; tokens without captions."""
    c = self.config
    if c.caption_dim is None:
      return tokens
    condition = context.condition or {}
    if 'caption' not in condition:
      raise ValueError("context.condition['caption'] is missing: this model "
                       'is conditioned on captions')
    model: Any = Transformer(c)
    is_null = condition.get(
        'is_null', jnp.zeros(tokens.shape[:1], bool))
    x = model.apply({'params': params}, tokens, method='embed')
    prefix = model.apply(
        {'params': params}, condition['caption'], is_null, method='caption')
    place = jnp.clip(position, 0, c.grid_prefix - 1)
    prefix = jnp.take_along_axis(prefix, place[..., None], axis=1)
    return jnp.where((position < c.grid_prefix)[..., None], prefix, x)

  def first(self, context: Context) -> Array | None:
    """Returns where each caption begins: it is padded on its left."""
    if self.config.caption_dim is None:
      return None
    condition = context.condition or {}
    return self.config.grid_prefix - condition['caption_length']

  def whole(
      self, params: Any, codes: Array, label: Array,
      dropout: Array | None = None,
  ) -> Array:
    """Returns logits f32[B,T,V] of whole images, one teacher-forced pass.

    Args:
      params: of the decoder. codes: int32[B,T].
      label: int32[B], in [0, num_conditions); the last says nothing.
      dropout: key of `config.dropout`, in training.
    """
    tokens = jnp.concatenate(
        [self.config.vocab_size + label[:, None], codes[:, :-1]], axis=1)
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    block = Block(base=jnp.zeros(tokens.shape[:1], jnp.int32),
                  position=place, whole=True)
    # A whole text leaves the cache alone: any will do.
    logits, _, _ = self.forward(
        params, self.empty(1, 1)['cache'], tokens, block,
        rngs={} if dropout is None else {'dropout': dropout})
    assert logits is not None
    return logits


def config_of(
    size: str, *, grid_width: int = 16, vocab_size: int = 16_384,
    num_classes: int | None = _CLASSES, dtype: str = 'float32',
) -> TransformerConfig:
  """Returns the shape of a published size.

  Args:
    size: a key of `SIZES`.
    grid_width: cells a row of the image.
    vocab_size: V, codes of the tokenizer.
    num_classes: of a class-conditional model; None is a caption model.
    dtype: of matrices, activations and cache.

  Raises:
    ValueError: an unknown size.
  """
  if size not in SIZES:
    raise ValueError(f'size={size!r}: known are {", ".join(SIZES)}')
  layers, heads, width = SIZES[size]
  return shape(
      layers, heads, width, grid_width=grid_width, vocab_size=vocab_size,
      num_classes=num_classes, dtype=dtype)


def shape(
    num_layers: int, num_heads: int, embed_dim: int, *, grid_width: int,
    vocab_size: int, num_classes: int | None, dtype: str = 'float32',
    caption: tuple[int, int] = _CAPTION, dropout: float = 0.0,
) -> TransformerConfig:
  """Returns the shape of any size; see `config_of`.

  Args:
    num_layers, num_heads, embed_dim: the last a multiple of the second.
    grid_width, vocab_size, num_classes, dtype: as of `config_of`.
    caption: vectors of a caption, and their size.
    dropout: in training.
  """
  if embed_dim % num_heads:
    raise ValueError(f'embed_dim={embed_dim} is not a multiple of '
                     f'num_heads={num_heads}')
  hidden = int(8 * embed_dim / 3)
  options: dict[str, Any] = dict(
      num_conditions=1, grid_prefix=caption[0], caption_dim=caption[1])
  if num_classes is not None:
    options = dict(num_conditions=num_classes + 1, grid_prefix=1)
  return TransformerConfig(
      vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim,
      mlp_dim=-(-hidden // 256) * 256, num_heads=num_heads,
      num_kv_heads=num_heads, head_dim=embed_dim // num_heads, norm_eps=1e-5,
      tied=False, grid_width=grid_width, dropout=dropout, dtype=dtype,
      **options)


def from_llamagen(
    tensors: Mapping[str, np.ndarray], *, grid_width: int = 16,
    dtype: str = 'float32',
) -> TransformerConfig:
  """Reads the shape off a published checkpoint.

  Args:
    tensors: by name. grid_width: cells a row, which it does not tell.
    dtype: of matrices, activations and cache.

  Heads are those of the published size of that width, else of 64 channels.

  Raises:
    FormatError: not such a checkpoint.
  """
  try:
    vocab, width = tensors['output.weight'].shape
    layers = 1 + max(int(n.split('.')[1]) for n in tensors
                     if n.startswith('layers.'))
  except (KeyError, ValueError) as error:
    raise FormatError('not a LlamaGen decoder: no output.weight or '
                      'layers.*') from error
  heads = next((h for _, h, w in SIZES.values() if w == width),
               max(width // 64, 1))
  table = tensors.get('cls_embedding.embedding_table.weight')
  none = tensors.get('cls_embedding.uncond_embedding')
  if table is None and none is None:
    raise FormatError('not a LlamaGen decoder: no cls_embedding.*')
  config = shape(
      layers, heads, width, grid_width=grid_width, vocab_size=vocab,
      dtype=dtype,
      num_classes=None if table is None else table.shape[0] - 1,
      caption=_CAPTION if none is None else none.shape)
  mlp = tensors.get('layers.0.feed_forward.w1.weight')
  if mlp is not None:
    config = dataclasses.replace(config, mlp_dim=mlp.shape[0])
  return config


def parts(config: TransformerConfig) -> Iterator[Part]:
  """Yields how LlamaGen stores each parameter."""
  c = config
  table = ('tok_embeddings.weight', (c.vocab_size, c.embed_dim))
  if c.caption_dim is None:
    rows = ('cls_embedding.embedding_table.weight',
            (c.num_conditions, c.embed_dim))
    yield Part(('embedding',), (table, rows),
               lambda a, b: np.concatenate([a, b]),
               lambda w: (w[:c.vocab_size], w[c.vocab_size:]))
  else:
    # The id of a placeholder is never looked up.
    yield Part(('embedding',), (table,),
               lambda a: np.concatenate([a, np.zeros_like(a[:1])]),
               lambda w: (w[:c.vocab_size],))
    for ours, theirs, size in (
        ('caption_in', 'fc1', (c.embed_dim, c.caption_dim)),
        ('caption_out', 'fc2', (c.embed_dim, c.embed_dim))):
      yield Part((ours,), ((f'cls_embedding.cap_proj.{theirs}.weight', size),),
                 lambda w: w.T, lambda w: (w.T,))
    yield Part(('no_caption',), ((
        'cls_embedding.uncond_embedding', (c.grid_prefix, c.caption_dim)),),
               lambda w: w, lambda w: (w,))
  for i in range(c.num_layers):
    at, path = f'layers.{i}.', f'layer_{i}'
    yield weight_table.norm((path, 'attention_norm'), f'{at}attention_norm',
                            c.embed_dim, 0.0)
    yield weight_table.norm((path, 'mlp_norm'), f'{at}ffn_norm', c.embed_dim,
                            0.0)
    yield from _layer(c, path, at)
  yield weight_table.norm(('final_norm',), 'norm', c.embed_dim, 0.0)
  yield Part(('head',), (('output.weight', (c.vocab_size, c.embed_dim)),),
             lambda w: w, lambda w: (w,))


def _layer(c: TransformerConfig, path: str, at: str) -> Iterator[Part]:
  """Yields the matrices of a layer; rotated pairs lie side by side there."""
  width = c.num_heads * c.head_dim

  def join(w: np.ndarray) -> np.ndarray:  # [3W,D] -> [D,G,3,H]
    q, k, v = w.reshape(3, c.num_heads, c.head_dim, c.embed_dim)
    return np.moveaxis(np.stack([_halves(q), _halves(k), v], 1), -1, 0)

  def split(w: np.ndarray) -> tuple[np.ndarray, ...]:
    q, k, v = np.moveaxis(np.moveaxis(w, 0, -1), 1, 0)
    return (np.concatenate([
        x.reshape(width, c.embed_dim)
        for x in (_pairs(q), _pairs(k), v)]),)

  yield Part((path, 'attention', 'qkv'),
             ((f'{at}attention.wqkv.weight', (3 * width, c.embed_dim)),),
             join, split)
  yield Part((path, 'attention', 'out'),
             ((f'{at}attention.wo.weight', (c.embed_dim, width)),),
             lambda w: w.T.reshape(c.num_heads, 1, c.head_dim, c.embed_dim),
             lambda w: (w.reshape(width, c.embed_dim).T,))
  shape = (c.mlp_dim, c.embed_dim)
  yield Part(
      (path, 'mlp', 'gate_up'),
      ((f'{at}feed_forward.w1.weight', shape),
       (f'{at}feed_forward.w3.weight', shape)),
      lambda g, u: np.stack([g.T, u.T], axis=1),
      lambda w: (w[:, 0].T, w[:, 1].T))
  yield Part((path, 'mlp', 'down'),
             ((f'{at}feed_forward.w2.weight', shape[::-1]),),
             lambda w: w.T, lambda w: (w.T,))


def _halves(w: np.ndarray) -> np.ndarray:
  """Reorders [heads,H,D] from pairs (2j, 2j + 1) to pairs (j, j + H/2)."""
  heads, size = w.shape[:2]
  return w.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def _pairs(w: np.ndarray) -> np.ndarray:
  """The inverse of `_halves`."""
  heads, size = w.shape[:2]
  return w.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(w.shape)
