"""Folders of trained drafters: `config.json` and `drafter.safetensors`.

Arrays by flat name ('layer_0.attention.qkv'); see `io.forms` for numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
import shutil
from typing import Any

import numpy as np
import numpy.typing as npt

from specjax.io import forms, output, safetensors
from specjax.io.errors import FormatError

_CONFIG, _ARRAYS, _IDS = 'config.json', 'drafter.safetensors', 'ids'
_FORMAT = 'specjax-drafter'
_PICKLES = ('pytorch_model.bin', 'medusa_lm_head.pt')

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
  folder = Path(folder).expanduser()
  stored: dict[str, npt.NDArray] = {
      _IDS: np.asarray(ids, np.int32), **forms.pack(arrays, form)}
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
  arrays = forms.unpack(found, folder / _ARRAYS)
  if _IDS not in arrays:
    raise FormatError(f'{folder / _ARRAYS}: tensor {_IDS!r} is missing')
  ids = arrays.pop(_IDS).astype(np.int32)  # below 2**24: exact in float32
  return arrays, ids, facts


def copy(
    folder: str | Path, out: str | Path, facts: Mapping[str, Any]
) -> Path:
  """Copies a drafter with other facts; its weights stay byte for byte.

  Everything else that is in the folder (a model card) is copied as well.

  Args:
    folder: that `write` wrote. out: must not exist, or be empty.
    facts: JSON values for `config.json`, in the place of those there.

  Raises:
    FormatError: not such a folder. OutputError: `out` is in use, or cannot
      be written.
  """
  folder, out = Path(folder).expanduser(), Path(out).expanduser()
  _, _, old = read(folder)
  with output.folder(out) as new:
    shutil.copytree(folder, new, dirs_exist_ok=True)
    output.write_json(
        new / _CONFIG, {**facts, **{k: old[k] for k in ('format', 'form')}})
  return out


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
