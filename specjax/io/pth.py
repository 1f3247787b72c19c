"""Reads state dicts that PyTorch saved, without PyTorch and without risk.

Since version 1.6 such a file is a zip archive: a pickle of the dict, and a
member a storage. Before, it was a row of pickles (magic number, protocol,
facts of the machine, the dict, the keys of its storages) and then the
storages, each a count and raw items. A pickle names the functions that it
wants to have called; here only the few in `_DTYPES` and `_CALLED` exist, and
none of them is PyTorch's.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
import io
import math
from pathlib import Path
import pickle
from typing import Any, BinaryIO, NamedTuple
import zipfile

import ml_dtypes
import numpy as np
import numpy.typing as npt

from specjax.io.errors import FormatError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ZIP = b"PK\x03\x04"
_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype) for name, dtype in (
        ("DoubleStorage", np.float64), ("FloatStorage", np.float32),
        ("HalfStorage", np.float16), ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64), ("IntStorage", np.int32),
        ("ShortStorage", np.int16), ("CharStorage", np.int8),
        ("ByteStorage", np.uint8), ("BoolStorage", np.bool_))
}
# What a damaged or hostile pickle can raise.
_ERRORS = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError,
    IndexError, AttributeError, ImportError, OverflowError, MemoryError,
    RecursionError, zipfile.BadZipFile)
# Where trainers keep the weights beside their own state; their moving average
# where there is one.
SECTIONS = ("model_ema", "model", "module", "state_dict")


def read(path: str | Path) -> dict[str, npt.NDArray]:
  """Reads all tensors of a state dict.

  Nothing of the file is executed: a global that is not on the closed list
  ends the reading.

  Args:
    path: a file of `torch.save(module.state_dict(), path)`, or of a dict that
      has such a dict under one of the names in `SECTIONS` (the first found).

  Returns:
    Name to array, in the file's order; contiguous copies, of the dtype of the
    tensor (bfloat16 is that of ml_dtypes).

  Raises:
    FormatError: unreadable, of another format, truncated, without a flat dict
      of tensors, or asking for any other global.
  """
  try:
    data = Path(path).read_bytes()
  except OSError as error:
    raise FormatError(f"cannot read {path}: {error.strerror}") from error
  try:
    file = io.BytesIO(data)
    return _read_zip(file) if data.startswith(_ZIP) else _read(file)
  except _Refused as error:
    raise FormatError(f"{path}: {error}") from error
  except _ERRORS as error:
    raise FormatError(
        f"{path}: damaged, or not a state dict saved by PyTorch "
        f"({type(error).__name__}: {error})") from error


class _Refused(Exception):
  """Well formed, and not what is read here."""


class _Key(NamedTuple):
  """A storage that a tensor refers to; `dtype` is a name of `_DTYPES`."""

  key: str
  dtype: str
  num_items: int


class _Tensor(NamedTuple):
  """A tensor before its storage is read; offset and strides in items."""

  storage: _Key
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Called:
  """Stands for a function of PyTorch.

  An object without attributes, since a pickle may set those of whatever it
  has been given.
  """

  __slots__ = ()


class _RebuildTensor(_Called):

  __slots__ = ()

  def __call__(self, storage: _Key, offset: int, shape: Any, strides: Any,
               *rest: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter(_Called):

  __slots__ = ()

  def __call__(self, tensor: _Tensor, *rest: Any) -> _Tensor:
    return tensor


class _Settings:
  """Stands for a trainer's options, which are not read."""

  def __setstate__(self, state: Any) -> None:
    del state


_CALLED: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): _Settings,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
}


class _Unpickler(pickle.Unpickler):
  """Knows the globals of the closed list, and no other."""

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in _DTYPES:
      return name
    try:
      return _CALLED[module, name]
    except KeyError:
      raise _Refused(
          f"asks for {module}.{name}, which is refused: only tensors in a "
          "dict are read") from None

  def persistent_load(self, pid: Any) -> _Key:
    if isinstance(pid, tuple) and len(pid) == 5:  # of the zip format
      pid = (*pid, None)
    if not (isinstance(pid, tuple) and len(pid) == 6 and pid[0] == "storage"):
      raise _Refused(f"unknown reference {pid!r}")
    _, dtype, key, _, count, view = pid
    if view is not None:
      raise _Refused(f"storage {key!r} is a view of another, not supported")
    if not (isinstance(key, str) and dtype in _DTYPES and _natural(count)):
      raise _Refused(f"malformed storage {pid!r}")
    return _Key(key, dtype, count)


def _read(file: BinaryIO) -> dict[str, npt.NDArray]:
  if (_load(file), _load(file)) != (_MAGIC, _PROTOCOL):
    raise _Refused("no magic number of PyTorch's old format")
  system = _load(file)
  if not isinstance(system, Mapping) or not system.get("little_endian"):
    raise _Refused("saved on a big-endian machine, or damaged")
  whole = _load(file)
  state = _tensors(whole)
  storages = _storages(file, {t.storage.key: t.storage
                              for t in _all_tensors(whole)})
  return {name: _array(name, tensor, storages[tensor.storage.key])
          for name, tensor in state.items()}


def _read_zip(file: BinaryIO) -> dict[str, npt.NDArray]:
  with zipfile.ZipFile(file) as archive:
    names = archive.namelist()
    found = [n for n in names if n.endswith("/data.pkl")]
    if len(found) != 1:
      raise _Refused("no data.pkl: not an archive of torch.save")
    base = found[0][:-len("data.pkl")]
    if f"{base}byteorder" in names and (
        archive.read(f"{base}byteorder") != b"little"):
      raise _Refused("saved on a big-endian machine")
    state = _tensors(_load(io.BytesIO(archive.read(found[0]))))
    out, read = {}, {}
    for name, tensor in state.items():
      key, dtype, count = tensor.storage
      if key not in read:
        raw = archive.read(f"{base}data/{key}")
        kind = _DTYPES[dtype]
        if len(raw) != count * kind.itemsize:
          raise _Refused(f"truncated in storage {key!r}")
        read[key] = np.frombuffer(raw, kind.newbyteorder("<"))
      out[name] = _array(name, tensor, read[key])
    return out


def _tensors(whole: Any) -> dict[str, _Tensor]:
  """Returns the flat dict of tensors, or that of a section."""
  if not isinstance(whole, Mapping):
    raise _Refused(f"holds a {type(whole).__name__}, expected a dict")
  inner = next((whole[name] for name in SECTIONS
                if isinstance(whole.get(name), Mapping)), whole)
  for name, tensor in inner.items():
    if not isinstance(name, str) or not isinstance(tensor, _Tensor):
      raise _Refused(
          f"entry {name!r} is a {type(tensor).__name__}; expected tensors")
  return dict(inner)


def _all_tensors(value: Any) -> Iterator[_Tensor]:
  """Yields every tensor, also those that are not wanted."""
  if isinstance(value, _Tensor):
    yield value
  elif isinstance(value, Mapping):
    for one in value.values():
      yield from _all_tensors(one)
  elif isinstance(value, (list, tuple)):
    for one in value:
      yield from _all_tensors(one)


def _load(file: BinaryIO) -> Any:
  return _Unpickler(file).load()


def _storages(
    file: BinaryIO, wanted: Mapping[str, _Key]) -> dict[str, npt.NDArray]:
  """Reads the storages, which stand in the order of a list of their keys."""
  keys = _load(file)
  if not isinstance(keys, list) or set(keys) != set(wanted):
    raise _Refused("the storages are not those that the tensors refer to")
  found = {}
  for key in keys:
    storage = wanted[key]
    dtype = _DTYPES[storage.dtype]
    count = int.from_bytes(file.read(8), "little")
    if count != storage.num_items:
      raise _Refused(
          f"storage {key!r} has {count} items, expected "
          f"{storage.num_items}")
    raw = file.read(count * dtype.itemsize)
    if len(raw) != count * dtype.itemsize:
      raise _Refused(f"truncated in storage {key!r}")
    found[key] = np.frombuffer(raw, dtype.newbyteorder("<"))
  return found


def _array(
    name: str, tensor: _Tensor, storage: npt.NDArray) -> npt.NDArray:
  """Returns a tensor's own copy of its part of a storage."""
  shape, strides = tensor.shape, tensor.strides
  if len(shape) != len(strides) or not all(
      map(_natural, (tensor.offset, *shape, *strides))):
    raise _Refused(f"tensor {name!r}: malformed shape {shape}, {strides}")
  # A stride of 0 repeats items, so a small file could ask for any size.
  if math.prod(shape) > storage.size:
    raise _Refused(f"tensor {name!r} of shape {shape} exceeds its storage")
  if not math.prod(shape):
    return np.zeros(shape, storage.dtype)
  last = tensor.offset + sum(
      (n - 1) * s for n, s in zip(shape, strides, strict=True))
  if last >= storage.size:
    raise _Refused(f"tensor {name!r} of shape {shape} exceeds its storage")
  item = storage.dtype.itemsize
  return np.lib.stride_tricks.as_strided(
      storage[tensor.offset:], shape, [s * item for s in strides]).copy("C")


def _natural(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0
