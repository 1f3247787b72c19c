"""Folders of a model: `config.json` and `model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specjax.io import forms, output, safetensors
from specjax.io.errors import FormatError

_CONFIG, _ARRAYS = 'config.json', 'model.safetensors'


def save(
    folder: str | Path, kind: str, params: Any, values: Mapping[str, Any],
    form: str = 'float32',
) -> Path:
  """Writes a folder; it appears whole, or stays what it was.

  Args:
    folder: new, empty, or of the same kind.
    kind: of the model, 'specjax-...'. params: nested dicts of arrays.
    values: JSON values for `config.json`. form: of matrices; see `forms`.

  Raises:
    OutputError: the folder holds something else, or cannot be written.
    ValueError: an unknown form, or weights that are not finite.
  """
  folder = Path(folder).expanduser()
  packed = forms.pack(flat(params), form)
  with output.folder(folder, replaces=lambda p: kind_of(p) == kind) as new:
    safetensors.write(new / _ARRAYS, packed, {'format': kind})
    output.write_json(
        new / _CONFIG, {'format': kind, 'form': form, **values})
  return folder


def load(
    folder: str | Path, kind: str
) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.float32]]]:
  """Returns `(values, arrays by flat name)` of what `save` wrote.

  Raises:
    FormatError: no such folder, of another kind, or damaged.
  """
  folder = Path(folder).expanduser()
  config = folder / _CONFIG
  values = safetensors.read_json(config) if config.is_file() else {}
  if values.get('format') != kind:
    found = values.get('format')
    other = '' if found is None else f'; it has {found!r}'
    raise FormatError(f'{folder}: no {_CONFIG} with "format": "{kind}"{other}')
  tensors = safetensors.read(folder / _ARRAYS)
  return values, forms.unpack(tensors, folder / _ARRAYS)


def flat(params: Any) -> dict[str, npt.NDArray[np.float32]]:
  """Returns the arrays of nested dicts, in float32, by names with dots."""
  return traverse_util.flatten_dict(
      jax.tree.map(lambda x: np.asarray(x, np.float32), params), sep='.')


def fitted(
    folder: str | Path, arrays: Mapping[str, npt.NDArray], like: Any) -> Any:
  """Returns the arrays as a tree of the shapes and dtypes of `like`.

  Raises:
    FormatError: a tensor is missing, unknown or of another shape; names it
      and the folder.
  """
  leaves = traverse_util.flatten_dict(like)
  # By path: names of one level may hold dots themselves.
  paths = {'.'.join(path): path for path in leaves}
  wanted = {name: leaves[path] for name, path in paths.items()}
  for name in sorted({*arrays, *wanted}):
    if name not in arrays or name not in wanted or (
        arrays[name].shape != wanted[name].shape):
      have = arrays[name].shape if name in arrays else 'absent'
      need = wanted[name].shape if name in wanted else 'none'
      raise FormatError(f'{folder}: tensor {name!r} is {have}, but the '
                        f'config asks for {need}')
  return traverse_util.unflatten_dict({
      paths[k]: jnp.asarray(v, wanted[k].dtype) for k, v in arrays.items()})


def kind_of(folder: Any) -> str | None:
  """Returns the kind of a folder that `save` wrote; None of any other."""
  config = Path(str(folder)).expanduser() / _CONFIG
  try:
    kind = safetensors.read_json(config).get(
        'format') if config.is_file() else None
  except FormatError:
    return None
  return kind if str(kind).startswith('specjax-') else None
