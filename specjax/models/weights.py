"""Parameters by name: checkpoints to our tree and back, and random ones.

One table (`_parts`) says for every parameter which stored tensors it is made
of and how, in both directions. The tree itself (names, shapes, dtypes, logical
axes) is asked of the model, so the table cannot drift from it unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import re
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from specjax.io.errors import FormatError
from specjax.models import transformer
from specjax.models.transformer import TransformerConfig

Array = jax.Array
Path = tuple[str, ...]

# Prefixes of the decoder's tensors: plain, bare decoder, multimodal Gemma 3
# as published, and as transformers 5 saves it.
_HF_PREFIXES = (
    'model.', '', 'language_model.model.', 'model.language_model.')
# Buffers, other modalities: not weights of the decoder.
_IGNORED = re.compile(
    r'rotary_emb\.inv_freq$|^rope_freqs\.weight$|attn_rot_embd\.weight$'
    r'|(^|\.)vision_tower\.|(^|\.)multi_modal_projector\.')

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
class _Part:
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


def load(
    config: TransformerConfig,
    read: Callable[[str], np.ndarray],
    names: Iterable[str],
    *,
    scheme: str,
    shardings: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Any:
  """Builds the parameters from a checkpoint's tensors.

  One parameter at a time is put together on the host and handed to its
  devices, so host memory holds the largest one (a few copies), not the model.
  Every process of a distributed run reads all tensors and keeps its shards.

  Args:
    config: the decoder's shape (`config.from_hf`, `config.from_gguf`).
    read: returns a tensor by name, matrices as (out, in); called once each.
    names: names of all tensors there are.
    scheme: 'hf' or 'gguf', whose names and conventions apply.
    shardings: tree like the parameters, of `jax.sharding.Sharding`, or None
      for the default device.
    progress: called as `(parameters done, of how many, name)` after each.

  Returns:
    Nested dict: norm scales float32, all else in `config.dtype`.

  Raises:
    FormatError: if tensors are missing, have an unexpected shape, or are left
      over (all missing or left over ones are named).
    ValueError: if the scheme is unknown.
  """
  names = frozenset(names)
  parts = list(_parts(config, scheme, names))
  _check_names(config, parts, names)
  expected = traverse_util.flatten_dict(abstract(config))
  placed = None
  if shardings is not None:
    placed = traverse_util.flatten_dict(shardings)
  params: dict[Path, Array] = {}
  for done, part in enumerate(parts, 1):
    like = expected[part.path]
    value = _assemble(part, read)
    assert value.shape == like.shape, part.path  # or the table is at fault
    value = value.astype(like.dtype, order='C')  # a copy that we own
    if placed is None:
      params[part.path] = jnp.asarray(value)
    else:
      # Works across processes: each device asks for its own slice.
      params[part.path] = jax.make_array_from_callback(
          value.shape, placed[part.path], value.__getitem__)
    if progress is not None:
      progress(done, len(parts), '/'.join(part.path))
  return traverse_util.unflatten_dict(params)


def export_hf(config: TransformerConfig, params: Any) -> dict[str, np.ndarray]:
  """Returns the tensors of a Hugging Face checkpoint of these parameters.

  The inverse of `load(scheme='hf')`; a tied head is not repeated.

  Args:
    config: the decoder's shape.
    params: nested dict, fully addressable by this process.

  Returns:
    Name to array in the parameter's dtype, matrices as (out, in).
  """
  flat = traverse_util.flatten_dict(params)
  tensors: dict[str, np.ndarray] = {}
  for part in _parts(config, 'hf', frozenset()):
    value = np.asarray(flat[part.path])
    for (name, shape), x in zip(part.stored, part.split(value), strict=True):
      tensors[name] = np.ascontiguousarray(x.reshape(shape))
  return tensors


def abstract(config: TransformerConfig) -> Any:
  """Returns the parameter tree with `jax.ShapeDtypeStruct` leaves."""
  return _unbox(_boxed(config))


def logical_axes(config: TransformerConfig) -> Any:
  """Returns the parameter tree with logical axis names as leaves.

  A leaf is a tuple with 'embed', 'vocab', 'kv_heads', 'mlp' or None per axis.
  """
  return jax.tree.map(
      lambda box: tuple(box.names), _boxed(config), is_leaf=_is_box)


def random_params(
    config: TransformerConfig, key: Array, shardings: Any = None
) -> Any:
  """Returns random parameters, created where they live.

  Args:
    config: the decoder's shape.
    key: consumed.
    shardings: tree like the parameters, of `jax.sharding.Sharding`, or None.

  Returns:
    Nested dict of plain arrays, equal up to rounding for any sharding.
  """
  # One layer is compiled, and called for each: all in one compile for long.
  single = dataclasses.replace(
      config, num_layers=1, local_layers=config.local_layers[:1])
  placed = shardings or {}

  def stem(k: Array) -> Any:
    return _unbox(transformer.init(single, k))

  def layer(k: Array) -> Any:
    return stem(k)['layer_0']

  first = {name: placed[name] for name in abstract(single) if placed}
  params = jax.jit(stem, out_shardings=first or None)(key)
  for i in range(1, config.num_layers):
    make = jax.jit(layer, out_shardings=placed.get(f'layer_{i}'))
    params[f'layer_{i}'] = make(jax.random.fold_in(key, i))
  return params


def _boxed(config: TransformerConfig) -> Any:
  return jax.eval_shape(
      lambda key: transformer.init(config, key), jax.random.key(0))


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.LogicallyPartitioned)


def _unbox(boxed: Any) -> Any:
  # Not `nn.unbox`: under a mesh it would apply axis rules of its own.
  return jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box)


def _assemble(part: _Part, read: Callable[[str], np.ndarray]) -> np.ndarray:
  """Reads, checks and joins the tensors of one parameter."""
  arrays = [np.asarray(read(name)) for name, _ in part.stored]
  for array, (name, shape) in zip(arrays, part.stored, strict=True):
    if array.shape != shape:
      raise FormatError(
          f'tensor {name!r} has shape {array.shape}, but the configuration '
          f'asks for {shape}')
  return part.join(*arrays)


def _check_names(
    config: TransformerConfig, parts: list[_Part], names: frozenset[str]
) -> None:
  """Refuses checkpoints with too few or too many tensors."""
  used = {name for part in parts for name, _ in part.stored}
  missing = sorted(used - names)
  if missing:
    raise FormatError(
        f'{len(missing)} tensors are missing: {_shown(missing)}; found are '
        f'{len(names)} others such as {_shown(sorted(names)[:3])}')
  spare = {name for name in names - used if not _IGNORED.search(name)}
  if config.tied:
    # A second copy of the tied matrix; see `_parts`.
    spare = {name for name in spare if name != 'token_embd.weight'
             and not re.search(r'(^|\.)lm_head\.weight$', name)}
  if spare:
    raise FormatError(
        f'{len(spare)} tensors have no place in this configuration: '
        f'{_shown(sorted(spare))}')


def _shown(names: list[str], most: int = 20) -> str:
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more


def _parts(
    config: TransformerConfig, scheme: str, names: frozenset[str]
) -> Iterator[_Part]:
  """Yields the table: every parameter once."""
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
      yield _norm((layer, ours), name, c.embed_dim, offset)
    yield from _attention(c, (layer, 'attention'), at, scheme, offset)
    yield from _mlp(c, (layer, 'mlp'), at + ('mlp.' if is_hf else ''), is_hf)
  yield _norm(('final_norm',), f'{prefix}norm' if is_hf else 'output_norm',
              c.embed_dim, offset)
  if not c.tied:
    head = 'output.weight'
    if is_hf:  # the head stands beside the decoder
      outer = 'language_model.' if prefix.startswith('language') else ''
      head = f'{outer}lm_head.weight'
    yield _table('head', head, c)


def _table(ours: str, stored: str, c: TransformerConfig) -> _Part:
  return _Part((ours,), ((stored, (c.vocab_size, c.embed_dim)),),
               lambda w: w, lambda w: (w,))


def _norm(path: Path, name: str, size: int, offset: float) -> _Part:
  return _Part(
      (*path, 'scale'), ((f'{name}.weight', (size,)),),
      lambda w: w.astype(np.float32) + np.float32(offset),
      lambda w: (w - np.float32(offset),))


def _attention(
    c: TransformerConfig, path: Path, at: str, scheme: str, offset: float
) -> Iterator[_Part]:
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

  yield _Part(
      (*path, 'qkv'),
      tuple((f'{n}.weight', (r, c.embed_dim))
            for n, r in zip(names, rows, strict=True)),
      lambda *qkv: np.moveaxis(join(*qkv), -1, 0),
      lambda w: split(np.moveaxis(w, 0, -1)))
  if c.qkv_bias:
    yield _Part(
        (*path, 'qkv_bias'),
        tuple((f'{n}.bias', (r,)) for n, r in zip(names, rows, strict=True)),
        join, split)
  if c.qk_norm:
    for x in 'qk':
      name = f'{at}self_attn.{x}_norm' if is_hf else f'{at}attn_{x}_norm'
      yield _norm((*path, f'{x}_norm'), name, head, offset)
  out = f'{at}self_attn.o_proj' if is_hf else f'{at}attn_output'
  yield _Part(
      (*path, 'out'), ((f'{out}.weight', (c.embed_dim, wide)),),
      lambda w: w.T.reshape(c.num_kv_heads, group, head, c.embed_dim),
      lambda w: (w.reshape(wide, c.embed_dim).T,))


def _mlp(
    c: TransformerConfig, path: Path, at: str, is_hf: bool
) -> Iterator[_Part]:
  """Yields the two kernels of one MLP."""
  gate, up, down = (
      f'{at}{x}_proj.weight' if is_hf else f'{at}ffn_{x}.weight'
      for x in ('gate', 'up', 'down'))
  shape = (c.mlp_dim, c.embed_dim)
  yield _Part(
      (*path, 'gate_up'), ((gate, shape), (up, shape)),
      lambda g, u: np.stack([g.T, u.T], axis=1),
      lambda w: (w[:, 0].T, w[:, 1].T))
  yield _Part((*path, 'down'), ((down, shape[::-1]),),
              lambda w: w.T, lambda w: (w.T,))
