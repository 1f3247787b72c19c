"""Hugging Face folders: values, shards, damage, configuration."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as reference

from specjax.io import safetensors
from specjax.io.errors import FormatError

_RNG = np.random.default_rng(0)


def _values(dtype=np.float32):
  return _RNG.normal(size=(3, 5)).astype(dtype)


@pytest.mark.parametrize("dtype", [
    np.float32, np.float16, np.float64, ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn, np.int8, np.int64, np.bool_])
def test_write_then_read(tmp_path, dtype):
  path = tmp_path / "model.safetensors"
  tensors = {"a": _values(dtype), "b": np.ones(7, np.uint8), "c": np.ones(())}
  safetensors.write(path, tensors, {"format": "pt"})
  found = safetensors.read(tmp_path)
  assert set(found) == set(tensors)
  for name, array in tensors.items():
    values = found[name].read()
    assert values.dtype == np.float32 and values.shape == array.shape
    np.testing.assert_array_equal(values, array.astype(np.float32))
  assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_agrees_with_the_reference_library(tmp_path):
  tensors = {"a": _values(), "b": _values(np.float16).T, "ü": np.arange(3)}
  safetensors.write(tmp_path / "m.safetensors", tensors, {"k": "v"})
  for name, array in reference.load_file(tmp_path / "m.safetensors").items():
    np.testing.assert_array_equal(array, tensors[name])
    assert array.dtype == tensors[name].dtype
  with reference.safe_open(tmp_path / "m.safetensors", "np") as file:
    assert file.metadata() == {"k": "v"}
  reference.save_file({"z": tensors["a"]}, tmp_path / "m.safetensors")
  np.testing.assert_array_equal(
      safetensors.read(tmp_path)["z"].read(), tensors["a"])


@pytest.mark.parametrize("tensors, metadata, text", [
    ({"x": np.zeros(2, np.complex64)}, None, "'x' has dtype complex64"),
    ({}, {"k": 1}, "must be a string"),
])
def test_write_refuses(tmp_path, tensors, metadata, text):
  with pytest.raises(FormatError, match=text):
    safetensors.write(tmp_path / "m", tensors, metadata)
  assert not list(tmp_path.iterdir())


@pytest.fixture
def sharded(tmp_path):
  names = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
  for i, (name, shard) in enumerate(names.items()):
    safetensors.write(tmp_path / shard, {name: np.full(2, i, np.float32)})
  (tmp_path / "model.safetensors.index.json").write_text(
      json.dumps({"metadata": {}, "weight_map": names}))
  return tmp_path


def test_shards(sharded):
  tensors = safetensors.read(sharded)
  assert {n: t.read().tolist() for n, t in tensors.items()} == {
      "a": [0, 0], "b": [1, 1]}


def test_missing_shard_is_named(sharded):
  (sharded / "model-2-of-2.safetensors").unlink()
  with pytest.raises(FormatError, match="shard model-2-of-2.safetensors is mi"):
    safetensors.read(sharded)


@pytest.mark.parametrize("index, text", [
    ({"weight_map": {"c": "model-1-of-2.safetensors"}}, "no tensor 'c'"),
    ({"weight_map": {"c": "../x.safetensors"}}, "is not a file name"),
    ({}, "weight_map"),
])
def test_bad_index(sharded, index, text):
  (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(FormatError, match=text):
    safetensors.read(sharded)


def test_every_cut_is_reported(tmp_path):
  path = tmp_path / "model.safetensors"
  safetensors.write(path, {"a": _values(), "b": _values()})
  data = path.read_bytes()
  for length in [*range(1, len(data), 11), len(data) - 1]:
    path.write_bytes(data[:length])
    with pytest.raises(FormatError, match="truncated"):
      safetensors.read(tmp_path)


@pytest.mark.parametrize("header, text", [
    (b"{not json", "damaged"),
    (b'{"a":{"dtype":"F32"}}', "damaged"),
    (b'{"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,4]}}', "dtype Q7"),
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "not fill"),
    (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', "not fill"),
    (b"[]", "damaged"),
])
def test_bad_header(tmp_path, header, text):
  path = tmp_path / "model.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
  with pytest.raises(FormatError, match=text):
    safetensors.read(path)


def test_empty_and_ambiguous_folders(tmp_path):
  with pytest.raises(FormatError, match="found no .safetensors file"):
    safetensors.read(tmp_path)
  for name in ("a", "b"):
    (tmp_path / f"{name}.safetensors").touch()
  with pytest.raises(FormatError, match="found a.safetensors, b.safetensors"):
    safetensors.read(tmp_path)
  with pytest.raises(FormatError, match="empty file"):
    safetensors.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("first, second, expected", [
    ({"eos_token_id": 2}, {"eos_token_id": [7, 2]}, [2, 7]),
    ({"eos_token_id": [3, 4]}, None, [3, 4]),
    ({"eos_token_id": None}, {"eos_token_id": 0}, [0]),
    ({}, {}, []),
])
def test_config(tmp_path, first, second, expected):
  (tmp_path / "config.json").write_text(json.dumps({**first, "hidden": 8}))
  if second is not None:
    (tmp_path / "generation_config.json").write_text(json.dumps(second))
  config = safetensors.read_config(tmp_path)
  assert config == {"hidden": 8, "eos_token_id": expected}


@pytest.mark.parametrize("text, message", [
    (None, "no config.json"), ("[1]", "object was expected"),
    ("{", "not valid JSON")])
def test_bad_config(tmp_path, text, message):
  if text is not None:
    (tmp_path / "config.json").write_text(text)
  with pytest.raises(FormatError, match=message):
    safetensors.read_config(tmp_path)
