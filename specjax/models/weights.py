"""Parameters by name: checkpoints to our tree and back, and random ones.

`weight_table` says what each parameter is stored as. The tree itself (names,
shapes, dtypes, logical axes) is asked of the model, so that the table cannot
drift from it unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import re
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from specjax.io.errors import FormatError
from specjax.models import image_lm, transformer, weight_table
from specjax.models.transformer_config import TransformerConfig
from specjax.models.weight_table import Part, Path

Array = jax.Array

# Buffers, other modalities: not weights of the decoder.
_IGNORED = re.compile(
    r'rotary_emb\.inv_freq$|^rope_freqs\.weight$|attn_rot_embd\.weight$'
    r'|(^|\.)vision_tower\.|(^|\.)multi_modal_projector\.')


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
    scheme: 'hf', 'gguf' or 'llamagen', whose names and conventions apply.
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
  parts = _parts(config, scheme, names)
  _check_names(config, parts, names)
  expected = traverse_util.flatten_dict(abstract(config))
  placed = None
  if shardings is not None:
    placed = traverse_util.flatten_dict(shardings)
  params: dict[Path, Array] = {}
  for done, part in enumerate(parts, 1):
    like = expected[part.path]
    value = weight_table.assemble(part, read)
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


def export(
    config: TransformerConfig, params: Any, scheme: str = 'hf'
) -> dict[str, np.ndarray]:
  """Returns the tensors of a published checkpoint of these parameters.

  The inverse of `load`; a tied head is not repeated.

  Args:
    config: the decoder's shape.
    params: nested dict, fully addressable by this process.
    scheme: 'hf' or 'llamagen'.

  Returns:
    Name to array in the parameter's dtype, matrices as (out, in).
  """
  flat = traverse_util.flatten_dict(params)
  tensors: dict[str, np.ndarray] = {}
  for part in _parts(config, scheme, frozenset()):
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


def trainable(boxed: Any) -> Any:
  """Returns plain float32 arrays of what a drafter's `init` returned.

  Weights are trained in float32, whatever a drafter computes in.
  """
  return jax.tree.map(lambda x: x.astype(jnp.float32), nn.unbox(boxed))


def _boxed(config: TransformerConfig) -> Any:
  return jax.eval_shape(
      lambda key: transformer.init(config, key), jax.random.key(0))


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.LogicallyPartitioned)


def _unbox(boxed: Any) -> Any:
  # Not `nn.unbox`: under a mesh it would apply axis rules of its own.
  return jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box)


def _parts(
    config: TransformerConfig, scheme: str, names: frozenset[str]
) -> list[Part]:
  if scheme == 'llamagen':
    return list(image_lm.parts(config))
  return list(weight_table.parts(config, scheme, names))


def _check_names(
    config: TransformerConfig, parts: list[Part], names: frozenset[str]
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
    # A second copy of the tied matrix; see `weight_table.parts`.
    spare = {name for name in spare if name != 'token_embd.weight'
             and not re.search(r'(^|\.)lm_head\.weight$', name)}
  if spare:
    raise FormatError(
        f'{len(spare)} tensors have no place in this configuration: '
        f'{_shown(sorted(spare))}')


def _shown(names: list[str], most: int = 20) -> str:
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more
