"""Parameters by published name: dicts of arrays, matrices [in,out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def load(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]],
    *, prefix: str = '', tables: tuple[str, ...] = (), of: str = 'model',
) -> dict[str, np.ndarray]:
  """Returns the parameters with these shapes out of a published checkpoint.

  Args:
    tensors: by published name, matrices of layers [out,in].
    shapes: what is expected, by name without the prefix, matrices [in,out].
    prefix: of the names; tensors without it are not looked at.
    tables: matrices that are looked up, not multiplied: kept as they are.
    of: what this is, for messages.

  Raises:
    ValueError: a tensor is missing, unknown, or of another shape.
  """
  found = {name[len(prefix):]: value for name, value in tensors.items()
           if name.startswith(prefix)}
  out = {}
  for name in sorted(set(found) | set(shapes)):
    if name not in shapes or name not in found:
      what = 'missing' if name in shapes else 'unknown'
      raise ValueError(f'{prefix}{name}: {what}; expected {of}')
    value = _turned(name, np.asarray(found[name]), tables)
    if value.shape != shapes[name]:
      raise ValueError(
          f'{prefix}{name}: shape {np.shape(found[name])}; expected {of}, '
          f'where it turns into {shapes[name]}')
    out[name] = value
  return out


def save(
    params: Mapping[str, Any], *, prefix: str = '',
    tables: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
  """Returns parameters by published name, the inverse of `load`."""
  return {prefix + name: _turned(name, np.asarray(value), tables)
          for name, value in params.items()}


def _turned(
    name: str, value: np.ndarray, tables: tuple[str, ...]
) -> np.ndarray:
  """Returns a layer's matrix the other way round, all else as it is."""
  is_layer = name.endswith('.weight') and value.ndim == 2
  return value.T if is_layer and name not in tables else value
