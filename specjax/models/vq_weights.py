"""LlamaGen's tokenizers: their tensors to our parameters and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import re
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import numpy as np

from specjax.io.errors import FormatError
from specjax.models import vq
from specjax.models.vq import VQConfig

# Buffers of published checkpoints that are not weights.
_IGNORED = re.compile(r'codebook_used$')
_DIGITS = re.compile(r'_(\d+)(?=/|$)')


def to_llamagen(params: Any) -> dict[str, np.ndarray]:
  """Returns tensors as LlamaGen names and lays them out."""
  return {_official(path): x for path, x in laid_out(params).items()}


def from_llamagen(
    config: VQConfig, tensors: Mapping[str, np.ndarray]
) -> Any:
  """Returns the parameters of a published checkpoint.

  Args:
    config: the shape that is expected.
    tensors: by published name, convolutions as (out, in, height, width).

  Raises:
    FormatError: tensors that are missing, left over, or of another shape; the
      message names them.
  """
  return placed(
      vq.abstract(config), _official,
      {n: x for n, x in tensors.items() if not _IGNORED.search(n)},
      f'a tokenizer with {config}')


def laid_out(params: Any) -> dict[str, np.ndarray]:
  """Returns arrays by path, convolutions as (out, in, height, width)."""
  found = {}
  for path, value in traverse_util.flatten_dict(params, sep='/').items():
    x = np.asarray(value)
    found[path] = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x
  return found


def placed(
    shapes: Any, official: Callable[[str], str],
    tensors: Mapping[str, np.ndarray], of: str,
) -> Any:
  """Returns parameters like `shapes` out of tensors of other names.

  Args:
    shapes: the tree that is expected. official: a path's published name.
    tensors: see `from_llamagen`. of: what this is, for messages.

  Raises:
    FormatError: see `from_llamagen`.
  """
  like = traverse_util.flatten_dict(shapes, sep='/')
  names = {official(path): path for path in like}
  spare = [n for n in tensors if n not in names]
  missing = [n for n in names if n not in tensors]
  if spare or missing:
    raise FormatError(
        f'missing tensors: {", ".join(sorted(missing)[:5]) or "none"}; '
        f'without a place: {", ".join(sorted(spare)[:5]) or "none"}')
  flat = {}
  for name, path in names.items():
    x = np.asarray(tensors[name], np.float32)
    x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x
    if x.shape != like[path].shape:
      raise FormatError(
          f'tensor {name!r} has shape {tensors[name].shape}: not of {of}')
    flat[path] = jnp.asarray(x)
  return traverse_util.unflatten_dict(flat, sep='/')


def _official(path: str) -> str:
  """Returns the published name of one of our parameters."""
  if path == 'codebook':
    return 'quantize.embedding.weight'
  name = _DIGITS.sub(r'.\1', path).replace('/', '.')
  return re.sub(r'\.(kernel|scale)$', '.weight', name)
