"""GGUF files: values, damage, types."""

import gguf as gguf_lib
import numpy as np
import pytest

from specjax.io import gguf, hub
from specjax.io.errors import FormatError

_RNG = np.random.default_rng(0)


def _write(path, tensors, metadata=()):
  """Writes name -> (array, quantisation type)."""
  writer = gguf_lib.GGUFWriter(path, "llama")
  writer.add_array("toy.words", ["a", "é", ""])
  writer.add_array("toy.numbers", [1, 2, 3])
  writer.add_uint32("toy.count", 7)
  writer.add_float32("toy.eps", 0.5)
  writer.add_bool("toy.flag", True)
  for key, value in metadata:
    writer.add_uint16(key, value)
  for name, (array, kind) in tensors.items():
    writer.add_tensor(
        name, gguf_lib.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


_KINDS = gguf_lib.GGMLQuantizationType


@pytest.fixture
def matrix():
  return _RNG.normal(size=(6, 64)).astype(np.float32)


def test_metadata_is_plain_python(tmp_path, matrix):
  file = gguf.read(_write(tmp_path / "m", {"w": (matrix, _KINDS.F32)}))
  assert file.metadata["general.architecture"] == "llama"
  assert file.metadata["toy.words"] == ["a", "é", ""]
  assert file.metadata["toy.numbers"] == [1, 2, 3]
  assert file.metadata["toy.count"] == 7
  assert file.metadata["toy.eps"] == 0.5
  assert file.metadata["toy.flag"] is True
  assert type(file.metadata["toy.numbers"][0]) is int


# Half a quantisation step of each format, for values below 4 in magnitude.
@pytest.mark.parametrize("kind, tolerance", [
    (_KINDS.F32, 0), (_KINDS.F16, 2e-3), (_KINDS.BF16, 2e-2),
    (_KINDS.Q8_0, 2e-2), (_KINDS.Q5_0, 0.3), (_KINDS.Q4_0, 0.6),
    (_KINDS.Q4_1, 0.6)])
def test_tensors(tmp_path, matrix, kind, tolerance):
  bias = matrix[0].copy()
  path = _write(
      tmp_path / "m", {"w": (matrix, kind), "b": (bias, _KINDS.F32)})
  tensors = gguf.read(path).tensors
  assert list(tensors) == ["w", "b"]
  assert tensors["w"].shape == (6, 64) and tensors["b"].shape == (64,)
  assert tensors["w"].dtype == kind.name
  for _ in range(2):  # reading is repeatable, and each time a fresh array
    values = tensors["w"].read()
    assert values.dtype == np.float32 and values.shape == (6, 64)
    np.testing.assert_allclose(values, matrix, rtol=0, atol=tolerance)
    values[:] = 0
  np.testing.assert_array_equal(tensors["b"].read(), bias)


def test_every_cut_is_reported(tmp_path, matrix):
  data = _write(
      tmp_path / "m", {"w": (matrix, _KINDS.Q8_0)}).read_bytes()
  cut = tmp_path / "cut"
  # The writer pads after the last tensor, which may go; its data may not.
  need = len(data) - len(data) % 32 if len(data) % 32 else len(data)
  for length in [*range(8, 300, 7), need - 33]:
    cut.write_bytes(data[:length])
    with pytest.raises(FormatError, match="truncated") as caught:
      gguf.read(cut)
    assert str(cut) in str(caught.value)


@pytest.mark.parametrize("data, text", [
    (b"", "empty file"),
    (b"PK\x03\x04 something", "not a GGUF file: starts with b'PK"),
    (b"version https://git-lfs", "Git LFS pointer"),
    (b"GGUF\x01\0\0\0" + b"\0" * 16, "GGUF version 1, known are 2, 3"),
    (b"GGUF\0\0\0\x03" + b"\0" * 16, "big-endian"),
    (b"GGUF\x03\0\0\0" + b"\xff" * 16, "truncated"),
])
def test_foreign_files(tmp_path, data, text):
  (tmp_path / "m").write_bytes(data)
  with pytest.raises(FormatError, match=text):
    gguf.read(tmp_path / "m")


def test_missing_file(tmp_path):
  with pytest.raises(FormatError, match="No such file"):
    gguf.read(tmp_path / "m")


def _with_type(tmp_path, matrix, type_id):
  """A file whose tensor claims another type."""
  path = _write(tmp_path / "m", {"some.weight": (matrix, _KINDS.F32)})
  data = path.read_bytes()
  at = data.index(b"some.weight") + len(b"some.weight") + 4 + 2 * 8
  assert data[at:at + 4] == bytes(4)
  path.write_bytes(
      data[:at] + type_id.to_bytes(4, "little") + data[at + 4:])
  return path


@pytest.mark.parametrize("type_id, label", [
    (9999, "9999"), (_KINDS.Q8_1.value, "'some.weight'")])
def test_unknown_quantisation(tmp_path, matrix, type_id, label):
  path = _with_type(tmp_path, matrix, type_id)
  with pytest.raises(FormatError) as caught:
    gguf.read(path)
  text = str(caught.value)
  assert label in text
  assert all(name in text for name in ("Q4_1", "Q6_K", "BF16", "F16"))
  assert str(path) in text


def test_rows_must_fill_blocks(tmp_path, matrix):
  path = _with_type(tmp_path, matrix[:, :40].copy(), _KINDS.Q8_0.value)
  with pytest.raises(FormatError, match="damaged"):
    gguf.read(path)


def test_split_model(tmp_path, matrix):
  path = _write(
      tmp_path / "m", {"w": (matrix, _KINDS.F32)},
      [("split.count", 3), ("split.no", 1)])
  with pytest.raises(FormatError, match="piece 2 of 3"):
    gguf.read(path)


@pytest.mark.parametrize("trailing", [(), (5,)])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_unpermute(num_heads, trailing):
  head_dim = 8
  # Element i of the first half and i of the second were stored side by side.
  halves = _RNG.normal(size=(num_heads, 2, head_dim // 2, *trailing))
  stored = halves.swapaxes(1, 2).reshape(-1, *trailing)
  np.testing.assert_array_equal(
      gguf.unpermute(stored, num_heads), halves.reshape(stored.shape))


def test_unpermute_needs_even_heads():
  with pytest.raises(FormatError, match="9 rows"):
    gguf.unpermute(np.zeros((9, 2)), 3)


@pytest.mark.weights
def test_real_model():
  try:
    path = hub.resolve("smollm2-135m-instruct", offline=True, quiet=True)
  except hub.HubError as error:
    pytest.skip(f"no weights: {error}")
  file = gguf.read(path)
  assert file.metadata["general.architecture"] == "llama"
  assert len(file.tensors) == 272
  query = file.tensors["blk.0.attn_q.weight"]
  assert (query.shape, query.dtype) == ((576, 576), "Q4_1")
  # Standard deviation published with the description of the file.
  assert query.read().std() == pytest.approx(0.284, abs=5e-4)
