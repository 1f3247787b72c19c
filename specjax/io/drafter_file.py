"""Folders of trained drafters: `config.json` and `drafter.safetensors`.

Arrays by flat name ('layer_0.attention.qkv'). Matrices are bfloat16, float32,
or int8 with a scale for each output channel ('NAME.int8_scale', in float32);
vectors and biases are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from specjax.io import output, safetensors
from specjax.io.errors import FormatError

FORMS = ('float32', 'bfloat16', 'int8')
_CONFIG, _ARRAYS, _IDS = 'config.json', 'drafter.safetensors', 'ids'
_FORMAT = 'specjax-drafter'
_PICKLES = ('pytorch_model.bin', 'medusa_lm_head.pt')
_SCALE = '.int8_scale'
# Axes of a matrix that are summed over, by the last part of its name; the
# others are its output channels. Tables that are looked up scale by row.
_SUMMED: dict[str, tuple[int, ...]] = {
    'out': (0, 1, 2), 'markov_in': (1,), 'head': (-1,), 'linear': (-2,),
    'residual': (-2,), 'more_linear': (-2,)}


def write(
    folder: str | Path, arrays: Mapping[str, npt.NDArray], ids: Any,
    facts: Mapping[str, Any], *, form: str = 'bfloat16',
) -> Path:
  """Writes a drafter; the folder appears whole, or stays what it was.

  Args:
    folder: replaced if it holds a drafter.
    arrays: trained weights by flat name.
    ids: int[W], the draft vocabulary.
    facts: JSON values for `config.json`.
    form: of matrices, one of FORMS.

  Raises:
    ValueError: an unknown form, or weights that are not finite.
    OutputError: the folder holds something else, or cannot be written (disk
      full).
  """
  if form not in FORMS:
    raise ValueError(f'form={form!r}: known are {", ".join(FORMS)}')
  folder = Path(folder).expanduser()
  stored: dict[str, npt.NDArray] = {_IDS: np.asarray(ids, np.int32)}
  for name, array in arrays.items():
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
      raise ValueError(f'{name}: holds values that are not finite')
    stored.update(_stored(name, array, form))
  with output.folder(folder, replaces=is_own) as new:
    safetensors.write(new / _ARRAYS, stored, {'format': _FORMAT})
    output.write_json(
        new / _CONFIG, {'format': _FORMAT, 'form': form, **facts})
  return folder


def read(
    folder: str | Path,
) -> tuple[dict[str, npt.NDArray], npt.NDArray[np.int32], dict[str, Any]]:
  """Reads what `write` wrote: `(arrays in float32, ids, facts)`.

  Raises:
    FormatError: not such a folder, or damaged.
  """
  folder = Path(folder)
  if not (folder / _CONFIG).is_file():
    raise FormatError(f'{folder}: no {_CONFIG}; is it a drafter?')
  facts = safetensors.read_json(folder / _CONFIG)
  if facts.get('format') != _FORMAT:
    raise FormatError(f'{folder / _CONFIG}: not a drafter that specjax '
                      f'trained (format={facts.get("format")!r})')
  found = safetensors.read(folder / _ARRAYS)

  def take(name: str) -> npt.NDArray[np.float32]:
    if name not in found:
      raise FormatError(f'{folder / _ARRAYS}: tensor {name!r} is missing')
    return found[name].read()
  ids = take(_IDS).astype(np.int32)  # below 2**24: exact in float32
  arrays = {}
  for name, tensor in found.items():
    if name == _IDS or name.endswith(_SCALE):
      continue
    arrays[name] = take(name)
    if tensor.dtype == 'I8':
      arrays[name] *= take(name + _SCALE)
  return arrays, ids, facts


def is_own(folder: str | Path) -> bool:
  """Whether a folder's `config.json` is one that `write` wrote."""
  path = Path(folder) / _CONFIG
  try:
    return path.is_file() and (
        safetensors.read_json(path).get('format') == _FORMAT)
  except FormatError:
    return False


def whose(folder: str | Path) -> str:
  """Returns whose drafter a folder holds: 'own', or of an 'other' project.

  Told by marks that a model of its own has not. Of others: keys of Medusa in
  `config.json`, a matrix `fc.weight` that fuses hidden states (DFlash,
  DSpark, EAGLE), or a pickle without safetensors, from which no model is
  read. Which format it is shows when it is read (`host.interchange`).

  Raises:
    FormatError: neither, or a damaged file; says what was looked for.
  """
  folder = Path(folder)
  if not (folder / _CONFIG).is_file():
    raise FormatError(f'{folder}: no {_CONFIG}; is it a drafter?')
  values = safetensors.read_json(folder / _CONFIG)
  if values.get('format') == _FORMAT:
    return 'own'
  if values.get('model_type') == 'medusa' or 'medusa_num_heads' in values:
    return 'other'
  if any(folder.glob('*.safetensors')):
    found = 'fc.weight' in safetensors.read(folder)
  else:
    found = any((folder / name).is_file() for name in _PICKLES)
  if not found:
    raise FormatError(
        f'{folder}: no drafter: {_CONFIG} has neither "format": "{_FORMAT}" '
        f'(ours, with {_ARRAYS}) nor "medusa_num_heads" or "model_type": '
        '"medusa", and there is no tensor \'fc.weight\' (DFlash, DSpark, '
        f'EAGLE, speculators) in *.safetensors, nor {" or ".join(_PICKLES)}')
  return 'other'


def is_drafter(folder: str | Path) -> bool:
  """Whether a folder holds a drafter, ours or another project's: `whose`."""
  try:
    return bool(whose(folder))
  except FormatError:
    return False


def _stored(
    name: str, array: npt.NDArray, form: str
) -> dict[str, npt.NDArray]:
  """Returns the tensors that stand for one array."""
  last = name.rsplit('.', 1)[-1]
  if array.ndim < 2 or form == 'float32' or last.endswith('bias'):
    return {name: array}
  if form == 'bfloat16':
    return {name: array.astype(ml_dtypes.bfloat16)}
  axes = _SUMMED.get(last, (0,))
  scale = np.max(np.abs(array), axis=axes, keepdims=True) / 127.0
  scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
  whole = np.clip(np.rint(array / scale), -127, 127).astype(np.int8)
  return {name: whole, name + _SCALE: scale}
