"""How checkpoints store parameters: names, shapes, conventions.

One table (`parts`) says for every parameter of a decoder which stored tensors
it is made of and how, in both directions. Drafters' formats (`interchange`)
are put together from the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses

import numpy as np

from specjax.io.errors import FormatError
from specjax.models.transformer_config import TransformerConfig

Path = tuple[str, ...]

# Prefixes of the decoder's tensors: plain, bare decoder, multimodal Gemma 3
# as published, and as transformers 5 saves it.
_HF_PREFIXES = (
    'model.', '', 'language_model.model.', 'model.language_model.')

# Our name -> (Hugging Face, GGUF). The second norm's Hugging Face name means
# another place in Gemma 3, hence two tables.
_NORMS = {
    'attention_norm': ('input_layernorm', 'attn_norm'),
    'mlp_norm': ('post_attention_layernorm', 'ffn_norm'),
}
_GEMMA_NORMS = {
    'attention_norm': ('input_layernorm', 'attn_norm'),
    'post_attention_norm': (
        'post_attention_layernorm', 'post_attention_norm'),
    'mlp_norm': ('pre_feedforward_layernorm', 'ffn_norm'),
    'post_mlp_norm': ('post_feedforward_layernorm', 'post_ffw_norm'),
}


@dataclasses.dataclass(frozen=True)
class Part:
  """How one parameter is stored.

  Attributes:
    path: keys of the parameter in our tree.
    stored: name and shape of each tensor that it is made of.
    join: stored arrays -> parameter. split: its inverse.
  """

  path: Path
  stored: tuple[tuple[str, tuple[int, ...]], ...]
  join: Callable[..., np.ndarray]
  split: Callable[[np.ndarray], tuple[np.ndarray, ...]]


def assemble(part: Part, read: Callable[[str], np.ndarray]) -> np.ndarray:
  """Returns one parameter: reads, checks and joins its tensors.

  Raises:
    FormatError: a tensor's shape is not the table's.
  """
  arrays = [np.asarray(read(name)) for name, _ in part.stored]
  for array, (name, shape) in zip(arrays, part.stored, strict=True):
    if array.shape != shape:
      raise FormatError(
          f'tensor {name!r} has shape {array.shape}, but the configuration '
          f'asks for {shape}')
  return part.join(*arrays)


def parts(
    config: TransformerConfig, scheme: str, names: frozenset[str]
) -> Iterator[Part]:
  """Yields the table: every parameter once.

  Args:
    config: the decoder's shape.
    scheme: 'hf' or 'gguf', whose names and conventions apply.
    names: of the tensors there are, which tell variants of a scheme apart.

  Raises:
    ValueError: an unknown scheme.
  """
  if scheme not in ('hf', 'gguf'):
    raise ValueError(f"scheme={scheme!r}: known are 'hf', 'gguf'")
  c, is_hf = config, scheme == 'hf'
  prefix = next((p for p in _HF_PREFIXES
                 if f'{p}embed_tokens.weight' in names), 'model.')
  # Gemma multiplies by 1 + weight; GGUF files have the sum.
  offset = 1.0 if is_hf and c.post_norms else 0.0
  embedding = f'{prefix}embed_tokens.weight' if is_hf else 'token_embd.weight'
  if not is_hf and c.tied and 'output.weight' in names:
    # Quantisers write a tied matrix twice and give the head more bits.
    embedding = 'output.weight'
  yield _table('embedding', embedding, c)
  for i in range(c.num_layers):
    at = f'{prefix}layers.{i}.' if is_hf else f'blk.{i}.'
    layer = f'layer_{i}'
    norms = _GEMMA_NORMS if c.post_norms else _NORMS
    for ours, theirs in norms.items():
      name = at + theirs[0 if is_hf else 1]
      yield norm((layer, ours), name, c.embed_dim, offset)
    yield from attention(c, (layer, 'attention'), at, scheme, offset)
    yield from mlp(c, (layer, 'mlp'), at + ('mlp.' if is_hf else ''), is_hf)
  yield norm(('final_norm',), f'{prefix}norm' if is_hf else 'output_norm',
             c.embed_dim, offset)
  if not c.tied:
    head = 'output.weight'
    if is_hf:  # the head stands beside the decoder
      outer = 'language_model.' if prefix.startswith('language') else ''
      head = f'{outer}lm_head.weight'
    yield _table('head', head, c)


def _table(ours: str, stored: str, c: TransformerConfig) -> Part:
  return Part((ours,), ((stored, (c.vocab_size, c.embed_dim)),),
               lambda w: w, lambda w: (w,))


def norm(path: Path, name: str, size: int, offset: float) -> Part:
  """Returns a norm's scale, stored less `offset`."""
  return Part(
      (*path, 'scale'), ((f'{name}.weight', (size,)),),
      lambda w: w.astype(np.float32) + np.float32(offset),
      lambda w: (w - np.float32(offset),))


def attention(
    c: TransformerConfig, path: Path, at: str, scheme: str, offset: float
) -> Iterator[Part]:
  """Yields projections, biases and norms of one attention."""
  is_hf = scheme == 'hf'
  group = c.num_heads // c.num_kv_heads
  head, wide = c.head_dim, c.num_heads * c.head_dim
  rows = (wide, c.num_kv_heads * head, c.num_kv_heads * head)
  names = [f'{at}self_attn.{x}_proj' if is_hf else f'{at}attn_{x}'
           for x in 'qkv']
  # Only files of the llama architecture have rows in interleaved order, and
  # only that family has neither biases nor norms here (`config_gguf`).
  is_llama = not (c.qkv_bias or c.qk_norm or c.post_norms)
  order = (c.num_heads, c.num_kv_heads) if is_llama and not is_hf else ()

  def join(*qkv: np.ndarray) -> np.ndarray:  # -> [G,Q+2,H,...]
    turned = []
    if order:
      from specjax.io import gguf  # with its library, which others do without
      turned = [gguf.unpermute(w, n)
                for w, n in zip(qkv, order, strict=False)]
    return np.concatenate([
        w.reshape(c.num_kv_heads, -1, head, *w.shape[1:])
        for w in (*turned, *qkv[len(turned):])], axis=1)

  def split(w: np.ndarray) -> tuple[np.ndarray, ...]:
    return w[:, :group], w[:, group], w[:, group + 1]

  yield Part(
      (*path, 'qkv'),
      tuple((f'{n}.weight', (r, c.embed_dim))
            for n, r in zip(names, rows, strict=True)),
      lambda *qkv: np.moveaxis(join(*qkv), -1, 0),
      lambda w: split(np.moveaxis(w, 0, -1)))
  if c.qkv_bias:
    yield Part(
        (*path, 'qkv_bias'),
        tuple((f'{n}.bias', (r,)) for n, r in zip(names, rows, strict=True)),
        join, split)
  if c.qk_norm:
    for x in 'qk':
      name = f'{at}self_attn.{x}_norm' if is_hf else f'{at}attn_{x}_norm'
      yield norm((*path, f'{x}_norm'), name, head, offset)
  out = f'{at}self_attn.o_proj' if is_hf else f'{at}attn_output'
  yield Part(
      (*path, 'out'), ((f'{out}.weight', (c.embed_dim, wide)),),
      lambda w: w.T.reshape(c.num_kv_heads, group, head, c.embed_dim),
      lambda w: (w.reshape(wide, c.embed_dim).T,))


def mlp(
    c: TransformerConfig, path: Path, at: str, is_hf: bool
) -> Iterator[Part]:
  """Yields the two kernels of one MLP."""
  gate, up, down = (
      f'{at}{x}_proj.weight' if is_hf else f'{at}ffn_{x}.weight'
      for x in ('gate', 'up', 'down'))
  shape = (c.mlp_dim, c.embed_dim)
  yield Part(
      (*path, 'gate_up'), ((gate, shape), (up, shape)),
      lambda g, u: np.stack([g.T, u.T], axis=1),
      lambda w: (w[:, 0].T, w[:, 1].T))
  yield Part((*path, 'down'), ((down, shape[::-1]),),
              lambda w: w.T, lambda w: (w.T,))
