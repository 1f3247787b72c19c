"""Reads GGUF files: metadata as plain Python, tensors on demand.

The header is parsed here rather than with `gguf.GGUFReader`, which wraps each
of the several hundred thousand vocabulary strings in numpy arrays (seconds)
and reports a cut file as an indexing error. Dequantisation is the library's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
from pathlib import Path
import struct
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from specjax.io.errors import FormatError
from specjax.io.lazy import LazyTensor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_MAX_NESTING = 4
# GGUF value type -> struct code, all little-endian.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?",
    10: "Q", 11: "q", 12: "d",
}
# Tensor types that are numbers as they stand.
_PLAIN: dict[str, npt.DTypeLike] = {
    "F32": np.float32, "F16": np.float16, "F64": np.float64,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
}


@dataclasses.dataclass(frozen=True)
class GGUFFile:
  """An open GGUF file.

  Attributes:
    path: where it was read from.
    metadata: key to int, float, bool, str or list of those.
    tensors: name to `LazyTensor`, in file order, names as in the file.
  """

  path: Path
  metadata: dict[str, Any] = dataclasses.field(repr=False)
  tensors: dict[str, LazyTensor] = dataclasses.field(repr=False)


def read(path: str | Path) -> GGUFFile:
  """Reads the header of a GGUF file and maps its tensors.

  Every tensor is checked to lie inside the file and to have a type that can
  be dequantised, so a file that opens can be read to its end.

  Args:
    path: a little-endian GGUF file, version 2 or 3, in one piece.

  Returns:
    The file; the mapping stays open as long as a tensor refers to it.

  Raises:
    FormatError: if the file is missing, empty, cut, not GGUF, one piece of a
      split model, or has a tensor of a type that cannot be dequantised.
  """
  path = Path(path)
  cursor = _Cursor(path, _map(path))
  num_tensors, num_keys = _read_preamble(cursor)
  metadata: dict[str, Any] = {}
  for _ in range(num_keys):
    key = cursor.string()
    metadata[key] = cursor.value(cursor.scalar("I"))
  if metadata.get("split.count", 1) > 1:
    raise FormatError(
        f"{path}: piece {metadata.get('split.no', 0) + 1} of "
        f"{metadata['split.count']} of a split model; merge the pieces first, "
        "for example with `llama-gguf-split --merge`")
  headers = [_read_tensor_header(cursor) for _ in range(num_tensors)]
  alignment = metadata.get("general.alignment", 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise FormatError(f"{path}: general.alignment is {alignment!r}, not >= 1")
  start = -(-cursor.offset // alignment) * alignment
  tensors: dict[str, LazyTensor] = {}
  for header in headers:
    if header.name in tensors:
      raise FormatError(f"{path}: tensor {header.name!r} occurs twice")
    tensors[header.name] = _open_tensor(cursor, header, start)
  return GGUFFile(path, metadata, tensors)


def unpermute(w: npt.NDArray, num_heads: int) -> npt.NDArray:
  """Undoes the row order of `llama`-architecture query and key weights.

  llama.cpp stores these rows for interleaved rotary embeddings (pairs
  `2i, 2i+1`); models here rotate halves (pairs `i, i + head_dim/2`). Files
  of other architectures (qwen2, gemma3) are not permuted.

  Args:
    w: `[num_heads * head_dim, ...]`, weight or bias, head_dim even.
    num_heads: query heads for `attn_q`, KV heads for `attn_k`.

  Returns:
    The same values and shape, rows reordered within each head.

  Raises:
    FormatError: if the rows do not split in `num_heads` heads of even size.
  """
  rows = w.shape[0]
  if num_heads < 1 or rows % (2 * num_heads):
    raise FormatError(
        f"{rows} rows do not split into {num_heads} heads of even size")
  pairs = w.reshape(num_heads, rows // num_heads // 2, 2, *w.shape[1:])
  return pairs.swapaxes(1, 2).reshape(w.shape)


@dataclasses.dataclass(frozen=True)
class _TensorHeader:
  name: str
  shape: tuple[int, ...]
  type_id: int
  offset: int


@dataclasses.dataclass
class _Cursor:
  """Sequential reads that never leave the file."""

  path: Path
  data: mmap.mmap
  offset: int = 0

  def take(self, num_bytes: int) -> int:
    """Advances and returns the offset before; refuses to pass the end."""
    begin = self.offset
    if num_bytes > len(self.data) - begin:
      raise FormatError(
          f"{self.path}: truncated: {num_bytes} bytes wanted at offset "
          f"{begin}, the file has {len(self.data)}; fetch it again")
    self.offset += num_bytes
    return begin

  def scalar(self, code: str) -> Any:
    begin = self.take(struct.calcsize("<" + code))
    return struct.unpack_from("<" + code, self.data, begin)[0]

  def string(self) -> str:
    length = self.scalar("Q")
    begin = self.take(length)
    try:
      return self.data[begin:begin + length].decode("utf-8")
    except UnicodeDecodeError as error:
      raise FormatError(
          f"{self.path}: string at offset {begin} is not UTF-8") from error

  def value(self, kind: int, depth: int = 0) -> Any:
    if kind == _STRING:
      return self.string()
    if kind in _SCALARS:
      return self.scalar(_SCALARS[kind])
    if kind != _ARRAY or depth == _MAX_NESTING:
      raise FormatError(
          f"{self.path}: metadata value of type {kind} at offset "
          f"{self.offset} is not understood; the file may be damaged")
    item, count = self.scalar("I"), self.scalar("Q")
    if item in _SCALARS:
      dtype = np.dtype("<" + _SCALARS[item])
      begin = self.take(count * dtype.itemsize)
      return np.frombuffer(self.data, dtype, count, begin).tolist()
    return [self.value(item, depth + 1) for _ in range(count)]


def _map(path: Path) -> mmap.mmap:
  try:
    with open(path, "rb") as file:
      return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except OSError as error:
    raise FormatError(f"cannot read {path}: {error.strerror}") from error
  except ValueError as error:  # mmap of zero bytes
    raise FormatError(f"{path}: empty file, not GGUF") from error


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
  """Checks magic and version; returns (number of tensors, of keys)."""
  head = cursor.data[:32]
  if head[:4] != _MAGIC:
    hint = ""
    if head.startswith(b"version https://git"):
      hint = " (a Git LFS pointer: fetch the file itself)"
    raise FormatError(
        f"{cursor.path}: not a GGUF file: starts with {head[:8]!r}, "
        f"not {_MAGIC!r}{hint}")
  cursor.take(4)
  version = cursor.scalar("I")
  if version not in _VERSIONS:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    why = " (big-endian file)" if swapped in _VERSIONS else ""
    raise FormatError(
        f"{cursor.path}: GGUF version {version}{why}, known are "
        f"{', '.join(map(str, _VERSIONS))}, little-endian")
  return cursor.scalar("Q"), cursor.scalar("Q")


def _read_tensor_header(cursor: _Cursor) -> _TensorHeader:
  name = cursor.string()
  rank = cursor.scalar("I")
  # The file lists the contiguous axis first.
  shape = tuple(cursor.scalar("Q") for _ in range(rank))[::-1]
  return _TensorHeader(name, shape, cursor.scalar("I"), cursor.scalar("Q"))


@functools.cache
def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
  """Asks the library, by dequantising one block of zeros."""
  if kind.name in _PLAIN:
    return True
  _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  try:
    gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
  except NotImplementedError:
    return False
  return True


def _known_type(path: Path, header: _TensorHeader) -> Any:
  try:
    kind = gguf.GGMLQuantizationType(header.type_id)
    label = kind.name
    if _can_dequantise(kind):
      return kind
  except ValueError:
    label = f"number {header.type_id}"
  known = [t.name for t in gguf.GGMLQuantizationType if _can_dequantise(t)]
  raise FormatError(
      f"{path}: tensor {header.name!r} has quantisation type {label}, which "
      f"cannot be read; known are {', '.join(sorted(known))}. A newer `gguf` "
      "package may know it, or convert the file")


def _open_tensor(
    cursor: _Cursor, header: _TensorHeader, start: int) -> LazyTensor:
  """Checks type and extent of one tensor and returns its reader."""
  kind = _known_type(cursor.path, header)
  block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  row = header.shape[-1] if header.shape else 1
  if row % block:
    raise FormatError(
        f"{cursor.path}: tensor {header.name!r}: rows of {row} values do not "
        f"divide into {kind.name} blocks of {block}")
  num_bytes = math.prod(header.shape) // block * block_bytes
  begin = start + header.offset
  data = cursor.data
  if begin + num_bytes > len(data):
    raise FormatError(
        f"{cursor.path}: truncated: tensor {header.name!r} ends at byte "
        f"{begin + num_bytes}, the file has {len(data)}; fetch it again")

  def load() -> npt.NDArray:
    raw = np.frombuffer(data, np.uint8, num_bytes, begin)
    if kind.name in _PLAIN:
      return raw.view(_PLAIN[kind.name])
    return gguf.dequantize(raw.reshape(-1, row // block * block_bytes), kind)

  return LazyTensor(header.name, header.shape, kind.name, load)
