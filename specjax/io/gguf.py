"""Reads GGUF files: metadata as plain Python, tensors on demand.

Parsing and dequantisation are the `gguf` library's; this module says in one
sentence what is wrong with a file that the library stumbles over.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from specjax.io.errors import FormatError
from specjax.io.lazy import LazyTensor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)


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
  _check_preamble(path)
  try:
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
  except Exception as error:  # the library says nothing of damaged files
    raise FormatError(_diagnosis(path, error)) from error
  if metadata.get("split.count", 1) > 1:
    raise FormatError(
        f"{path}: piece {metadata.get('split.no', 0) + 1} of "
        f"{metadata['split.count']} of a split model; merge the pieces first, "
        "for example with `llama-gguf-split --merge`")
  tensors = {t.name: _open_tensor(path, t) for t in reader.tensors}
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


def _check_preamble(path: Path) -> None:
  """Refuses what is no GGUF file at all."""
  try:
    with open(path, "rb") as file:
      head = file.read(24)
  except OSError as error:
    raise FormatError(f"{path}: {error.strerror or error}") from error
  if not head:
    raise FormatError(f"{path}: empty file; fetch it again")
  if not head.startswith(_MAGIC):
    hint = ""
    if head.startswith(b"version https://"):
      hint = " (a Git LFS pointer: fetch the file itself)"
    raise FormatError(
        f"{path}: not a GGUF file: starts with {head[:8]!r}, "
        f"not {_MAGIC!r}{hint}")
  if len(head) < 24:
    raise FormatError(f"{path}: truncated: {len(head)} bytes; fetch it again")
  version = int.from_bytes(head[4:8], "little")
  if version not in _VERSIONS:
    swapped = int.from_bytes(head[4:8], "big")
    why = " (big-endian file)" if swapped in _VERSIONS else ""
    raise FormatError(
        f"{path}: GGUF version {version}{why}, known are "
        f"{', '.join(map(str, _VERSIONS))}, little-endian")


def _diagnosis(path: Path, error: Exception) -> str:
  """Returns what is wrong with a file that the library cannot parse."""
  text = str(error)
  if "GGMLQuantizationType" in text:
    return f"{path}: unknown quantisation type: {text}; {_known()}"
  return (f"{path}: truncated or damaged ({type(error).__name__}: {text}); "
          "fetch it again")


@functools.cache
def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
  """Asks the library, by dequantising one block of zeros."""
  _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  try:
    gguf.dequantize(_raw(kind, np.zeros((1, block_bytes), np.uint8)), kind)
  except NotImplementedError:
    return _plain(kind) is not None
  return True


def _plain(kind: gguf.GGMLQuantizationType) -> type | None:
  """Returns the numpy type of tensors that are numbers as they stand."""
  return {"F32": np.float32, "F16": np.float16, "F64": np.float64,
          "I8": np.int8, "I16": np.int16, "I32": np.int32,
          "I64": np.int64}.get(kind.name)


def _raw(kind: gguf.GGMLQuantizationType, data: npt.NDArray) -> npt.NDArray:
  """Returns the bytes as the library's dequantisation wants them."""
  plain = _plain(kind)
  return data if plain is None else data.view(plain)


def _known() -> str:
  names = sorted(t.name for t in gguf.GGMLQuantizationType
                 if _can_dequantise(t))
  return (f"known are {', '.join(names)}. A newer `gguf` package may know "
          "it, or convert the file")


def _open_tensor(path: Path, tensor: Any) -> LazyTensor:
  """Checks the type of one tensor and returns its reader."""
  kind = tensor.tensor_type
  if not _can_dequantise(kind):
    raise FormatError(
        f"{path}: tensor {tensor.name!r} has quantisation type {kind.name}, "
        f"which cannot be read; {_known()}")
  # The file lists the contiguous axis first.
  shape = tuple(int(n) for n in tensor.shape)[::-1]

  def load() -> npt.NDArray:
    if _plain(kind) is not None:
      return np.asarray(tensor.data)
    return gguf.dequantize(tensor.data, kind)

  return LazyTensor(tensor.name, shape, kind.name, load)
