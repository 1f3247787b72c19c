"""Numbers in files of weights: float32, bfloat16, or int8 with scales.

Matrices are bfloat16, float32, or int8 with a scale for each output channel
('NAME.int8_scale', in float32); vectors and biases are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from specjax.io.errors import FormatError

FORMS = ('float32', 'bfloat16', 'int8')
_SCALE = '.int8_scale'
# Axes of a matrix that are summed over, by the last part of its name; the
# others are its output channels. Tables that are looked up scale by row.
_SUMMED: dict[str, tuple[int, ...]] = {
    'markov_in': (1,), 'head': (-1,), 'linear': (-2,), 'residual': (-2,),
    'more_linear': (-2,), 'embedding': (-1,), 'place_in': (-1,),
    'place_out': (-1,)}
# These have one axis of output, the last, and sum over all others.
_INTO_LAST = ('out', 'kernel')


def pack(
    arrays: Mapping[str, npt.NDArray], form: str
) -> dict[str, npt.NDArray]:
  """Returns the tensors that stand for some arrays.

  Args:
    arrays: by flat name. form: of matrices, one of FORMS.

  Raises:
    ValueError: an unknown form, or values that are not finite.
  """
  if form not in FORMS:
    raise ValueError(f'form={form!r}: known are {", ".join(FORMS)}')
  stored: dict[str, npt.NDArray] = {}
  for name, array in arrays.items():
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
      raise ValueError(f'{name}: holds values that are not finite')
    stored.update(_stored(name, array, form))
  return stored


def unpack(
    found: Mapping[str, Any], path: Path
) -> dict[str, npt.NDArray[np.float32]]:
  """Returns the arrays that `pack` was given, in float32.

  Args:
    found: tensors of `safetensors.read`. path: of the file, for messages.

  Raises:
    FormatError: a scale is missing.
  """
  arrays = {}
  for name, tensor in found.items():
    if name.endswith(_SCALE):
      continue
    arrays[name] = tensor.read()
    if tensor.dtype == 'I8':
      if name + _SCALE not in found:
        raise FormatError(f'{path}: tensor {name + _SCALE!r} is missing')
      arrays[name] *= found[name + _SCALE].read()
  return arrays


def _stored(
    name: str, array: npt.NDArray, form: str
) -> dict[str, npt.NDArray]:
  """Returns the tensors that stand for one array."""
  last = name.rsplit('.', 1)[-1]
  if array.ndim < 2 or form == 'float32' or last.endswith('bias'):
    return {name: array}
  if form == 'bfloat16':
    return {name: array.astype(ml_dtypes.bfloat16)}
  axes = tuple(range(array.ndim - 1)) if last in _INTO_LAST else (
      _SUMMED.get(last, (0,)))
  scale = np.max(np.abs(array), axis=axes, keepdims=True) / 127.0
  scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
  whole = np.clip(np.rint(array / scale), -127, 127).astype(np.int8)
  return {name: whole, name + _SCALE: scale}
