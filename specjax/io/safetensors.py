"""Reads and writes Hugging Face style folders of safetensors files.

The eight-byte-plus-JSON header is parsed here: the numpy front end of the
`safetensors` package has no bfloat16, and its other front ends import a whole
framework. Values are mapped and converted when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import math
import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from specjax.io.errors import FormatError
from specjax.io.lazy import LazyTensor

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype) for name, dtype in (
        ("F64", np.float64), ("F32", np.float32), ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16), ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2), ("I64", np.int64),
        ("I32", np.int32), ("I16", np.int16), ("I8", np.int8),
        ("U64", np.uint64), ("U32", np.uint32), ("U16", np.uint16),
        ("U8", np.uint8), ("BOOL", np.bool_))
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read(folder: str | Path) -> dict[str, LazyTensor]:
  """Maps every tensor of a folder, sharded or not, or of one file.

  Args:
    folder: holds `model.safetensors.index.json` with its shards, or
      `model.safetensors`, or exactly one other `.safetensors` file; or the
      path of such a file.

  Returns:
    Name to `LazyTensor`; nothing but headers has been read.

  Raises:
    FormatError: if nothing is found, a shard or an indexed tensor is
      missing, or a file is cut, damaged or has an unknown dtype.
  """
  folder = Path(folder)
  if folder.is_file():
    return _read_file(folder)
  if (folder / _INDEX).is_file():
    return _read_sharded(folder)
  files = sorted(folder.glob("*.safetensors"))
  if (folder / _SINGLE).is_file():
    files = [folder / _SINGLE]
  if len(files) != 1:
    found = ", ".join(f.name for f in files) or "no .safetensors file"
    raise FormatError(
        f"{folder}: expected {_SINGLE} or {_INDEX}, found {found}")
  return _read_file(files[0])


def write(
    path: str | Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes one safetensors file; it appears complete or not at all.

  Args:
    path: the file to create or replace; its folder must exist.
    tensors: name to array (numpy, or anything `np.asarray` takes, bfloat16
      and float8 included). Strided views are copied first.
    metadata: strings for the header, for example `{"format": "pt"}`.

  Raises:
    FormatError: if an array has a dtype that the format lacks, or a metadata
      value is not a string.
  """
  path = Path(path)
  header: dict[str, Any] = {}
  for key, value in (metadata or {}).items():
    if not isinstance(value, str):
      raise FormatError(f"metadata {key!r} is {value!r}; it must be a string")
  if metadata:
    header["__metadata__"] = dict(metadata)
  # The widest types first keeps each tensor aligned to its own item size.
  arrays = {name: np.asarray(x) for name, x in tensors.items()}
  order = sorted(arrays, key=lambda n: (-arrays[n].dtype.itemsize, n))
  end = 0
  for name in order:
    array = arrays[name]
    dtype = array.dtype.newbyteorder("=")
    if dtype not in _NAMES:
      raise FormatError(
          f"tensor {name!r} has dtype {array.dtype}; allowed are "
          f"{', '.join(_DTYPES)}")
    begin, end = end, end + array.nbytes
    header[name] = {
        "dtype": _NAMES[dtype], "shape": list(array.shape),
        "data_offsets": [begin, end]}
  blob = json.dumps(header, ensure_ascii=False).encode()
  blob += b" " * (-len(blob) % 8)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  try:
    with open(partial, "wb") as file:
      file.write(len(blob).to_bytes(8, "little") + blob)
      for name in order:
        array = arrays[name]
        file.write(array.astype(array.dtype.newbyteorder("<")).tobytes())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def read_config(folder: str | Path) -> dict[str, Any]:
  """Reads `config.json`, with the stop ids of `generation_config.json`.

  Instruct models often declare their end-of-turn token in the second file
  only; a decoder that reads just the first one runs past the answer.

  Args:
    folder: a Hugging Face style model folder.

  Returns:
    The configuration; `eos_token_id` is always a list of distinct ints (maybe
    empty), those of `config.json` first.

  Raises:
    FormatError: if `config.json` is missing or either file is not a JSON
      object.
  """
  folder = Path(folder)
  if not (folder / "config.json").is_file():
    raise FormatError(f"{folder}: no config.json; is this a model folder?")
  config = read_json(folder / "config.json")
  generation: dict[str, Any] = {}
  if (folder / "generation_config.json").is_file():
    generation = read_json(folder / "generation_config.json")
  ids = [i for c in (config, generation) for i in id_list(c, "eos_token_id")]
  return {**config, "eos_token_id": list(dict.fromkeys(ids))}


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON object; raises FormatError naming the file otherwise."""
  try:
    value = json.loads(path.read_bytes())
  except OSError as error:
    raise FormatError(f"cannot read {path}: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    raise FormatError(f"{path}: not valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise FormatError(f"{path}: a JSON object was expected")
  return value


def id_list(config: Mapping[str, Any], key: str) -> list[int]:
  """Returns `config[key]` as a list of ints: absent, one or several."""
  value = config.get(key)
  ids = value if isinstance(value, list) else [value]
  return [i for i in ids if isinstance(i, int) and not isinstance(i, bool)]


def _read_sharded(folder: Path) -> dict[str, LazyTensor]:
  index = read_json(folder / _INDEX).get("weight_map")
  if not isinstance(index, dict):
    raise FormatError(f"{folder / _INDEX}: no object named weight_map")
  shards: dict[str, dict[str, LazyTensor]] = {}
  for shard in sorted(set(index.values())):
    if Path(shard).name != shard:  # an index must not point elsewhere
      raise FormatError(f"{folder / _INDEX}: {shard!r} is not a file name")
    if not (folder / shard).is_file():
      raise FormatError(
          f"{folder}: shard {shard} is missing, though {_INDEX} names it; "
          "fetch the folder again")
    shards[shard] = _read_file(folder / shard)
  tensors = {}
  for name, shard in index.items():
    if name not in shards[shard]:
      raise FormatError(
          f"{folder / shard}: no tensor {name!r}, though {_INDEX} names it")
    tensors[name] = shards[shard][name]
  return tensors


def _read_file(path: Path) -> dict[str, LazyTensor]:
  try:
    with open(path, "rb") as file:
      data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except OSError as error:
    raise FormatError(f"cannot read {path}: {error.strerror}") from error
  except ValueError as error:  # mmap of zero bytes
    raise FormatError(f"{path}: empty file, not safetensors") from error
  start = 8 + int.from_bytes(data[:8], "little")
  if len(data) < 8 or start > len(data):
    raise FormatError(
        f"{path}: truncated or not safetensors: the header would end at byte "
        f"{start}, the file has {len(data)}")
  try:
    header = json.loads(data[8:start])
    entries = {k: v for k, v in header.items() if k != "__metadata__"}
    return {
        name: _open_tensor(path, data, start, name, entry)
        for name, entry in entries.items()}
  except FormatError:
    raise
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise FormatError(
        f"{path}: the safetensors header is damaged: {error}") from error


def _open_tensor(
    path: Path, data: mmap.mmap, start: int, name: str,
    entry: Mapping[str, Any]) -> LazyTensor:
  """Checks dtype and extent of one tensor and returns its reader."""
  label, shape = entry["dtype"], tuple(entry["shape"])
  begin, end = (start + offset for offset in entry["data_offsets"])
  if label not in _DTYPES:
    raise FormatError(
        f"{path}: tensor {name!r} has dtype {label}, which cannot be read; "
        f"known are {', '.join(_DTYPES)}")
  dtype = _DTYPES[label].newbyteorder("<")
  if end > len(data):
    raise FormatError(
        f"{path}: truncated: tensor {name!r} ends at byte {end}, the file "
        f"has {len(data)}; fetch it again")
  count = math.prod(shape)
  if begin < start or end - begin != count * dtype.itemsize:
    raise FormatError(
        f"{path}: tensor {name!r} of shape {shape} and dtype {label} does not "
        f"fill bytes {begin} to {end}")

  def load() -> npt.NDArray:
    return np.frombuffer(data, dtype, count, begin)

  return LazyTensor(name, shape, label, load)
