"""PyTorch's files: values, views, damage, and pickles that want more."""

import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from specjax.io import pth
from specjax.io.errors import FormatError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
_X = np.arange(12, dtype=np.float32)


def _part(value):
  """Returns the opcodes of a plain value."""
  return pickle.dumps(value, 2)[2:-1]


def _tensor(key, count, shape, strides, offset=0, kind="FloatStorage",
            view=None):
  storage = (
      b"(" + _part("storage") + f"ctorch\n{kind}\n".encode() + _part(key)
      + _part("cpu") + _part(count) + _part(view) + b"tQ")
  return (
      _TENSOR + b"(" + storage + _part(offset) + _part(shape)
      + _part(strides) + _part(False) + b"ccollections\nOrderedDict\n)RtR")


def _dict(**entries):
  body = b"".join(_part(k) + v for k, v in entries.items())
  return b"\x80\x02}(" + body + b"u."


def _file(path, state, storages=(), *, magic=_MAGIC, little=True):
  """Writes a file of a pickled state and (key, array) storages."""
  system = {"protocol_version": _PROTOCOL, "little_endian": little}
  head = b"".join(
      pickle.dumps(v, 2) for v in (magic, _PROTOCOL, system))
  keys = pickle.dumps([k for k, _ in storages], 2)
  body = b"".join(
      len(a).to_bytes(8, "little") + a.tobytes() for _, a in storages)
  path.write_bytes(head + state + keys + body)
  return path


def test_tensors_and_views_of_one_storage(tmp_path):
  half = np.arange(4).astype(ml_dtypes.bfloat16)
  state = _dict(
      whole=_tensor("0", 12, (3, 4), (4, 1)),
      turned=_tensor("0", 12, (4, 3), (1, 4)),
      part=_tensor("0", 12, (2,), (4,), offset=5),
      one=_tensor("0", 12, (), (), offset=7),
      none=_tensor("0", 12, (0, 3), (3, 1)),
      half=_tensor("1", 4, (4,), (1,), kind="BFloat16Storage"))
  found = pth.read(
      _file(tmp_path / "x.pth", state, [("1", half), ("0", _X)]))
  matrix = _X.reshape(3, 4)
  for name, wanted in dict(
      whole=matrix, turned=matrix.T, part=_X[[5, 9]], one=_X[7],
      none=np.zeros((0, 3), np.float32), half=half).items():
    np.testing.assert_array_equal(found[name], wanted)
    assert found[name].dtype == wanted.dtype
    assert found[name].shape == wanted.shape
  assert list(found)[:2] == ["whole", "turned"]
  found["whole"][:] = 0  # a copy, and writable
  assert found["turned"].any()


@pytest.mark.parametrize("what", [
    b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n",
    b"cbuiltins\ngetattr\n", b"ctorch\nload\n", b"ctorch\nTensor\n",
    b"ccollections\nCounter\n", b"cspecjax.io.pth\nread\n"])
def test_other_globals_are_refused(tmp_path, monkeypatch, what):
  ran = []
  monkeypatch.setattr(os, "system", ran.append)
  call = what + b"(" + _part("touch x") + b"tR"
  for state in (b"\x80\x02" + call + b".", _dict(a=call),
                _dict(a=what)):
    with pytest.raises(FormatError, match="is refused"):
      pth.read(_file(tmp_path / "x.pth", state))
  # Not only the state: every pickle of the file.
  (tmp_path / "x.pth").write_bytes(b"\x80\x02" + call + b".")
  with pytest.raises(FormatError, match="is refused"):
    pth.read(tmp_path / "x.pth")
  assert not ran


def test_a_pickle_cannot_change_what_it_is_given(tmp_path):
  # BUILD with (None, {name: value}) sets attributes.
  change = b"(N" + _part({"__call__": 1, "__doc__": "changed"}) + b"tb"
  for thing in (_TENSOR, b"ccollections\nOrderedDict\n"):
    state = _dict(a=thing + change)
    with pytest.raises(FormatError, match="damaged"):
      pth.read(_file(tmp_path / "x.pth", state))
  state = _dict(a=_tensor("0", 12, (12,), (1,)))
  found = pth.read(_file(tmp_path / "x.pth", state, [("0", _X)]))
  np.testing.assert_array_equal(found["a"], _X)


@pytest.mark.parametrize("entry, storages, text", [
    (_tensor("0", 12, (13,), (1,)), [("0", _X)], "exceeds its storage"),
    (_tensor("0", 12, (3, 4), (5, 1)), [("0", _X)], "exceeds its storage"),
    (_tensor("0", 12, (12,), (1,), offset=1), [("0", _X)], "exceeds"),
    (_tensor("0", 12, (2**40,), (0,)), [("0", _X)], "exceeds its storage"),
    (_tensor("0", 12, (3,), (-1,), offset=5), [("0", _X)], "malformed"),
    (_tensor("0", 12, (3,), (1,), offset=-1), [("0", _X)], "malformed"),
    (_tensor("0", 12, (3,), (1, 1)), [("0", _X)], "malformed"),
    (_tensor("0", 12, ("a",), (1,)), [("0", _X)], "malformed"),
    (_tensor("0", 11, (3,), (1,)), [("0", _X)], "12 items, expected 11"),
    (_tensor("0", 12, (3,), (1,)), [("1", _X)], "not those"),
    (_tensor("0", 12, (3,), (1,)), [], "not those"),
    (_tensor("0", -1, (3,), (1,)), [("0", _X)], "malformed storage"),
    (_tensor("0", 12, (3,), (1,), view=("1", 0, 2)), [("0", _X)], "a view"),
    (_part(3), [], "'a' is a int"),
    (_part(7) + b"Q", [], "unknown reference 7"),
])
def test_refuses(tmp_path, entry, storages, text):
  path = _file(tmp_path / "x.pth", _dict(a=entry), storages)
  with pytest.raises(FormatError, match=text) as error:
    pth.read(path)
  assert str(path) in str(error.value)


def test_other_files(tmp_path):
  path = tmp_path / "x.pth"
  good = _file(path, _dict(a=_tensor("0", 12, (12,), (1,))), [("0", _X)])
  data = good.read_bytes()
  for cut in (0, 5, 40, 200, len(data) - 1):
    path.write_bytes(data[:cut])
    with pytest.raises(FormatError, match="damaged|truncated|magic"):
      pth.read(path)
  for options in ({"magic": 7}, {"little": False}):
    with pytest.raises(FormatError, match="magic|big-endian"):
      pth.read(_file(path, _dict(), **options))
  with pytest.raises(FormatError, match="holds a list"):
    pth.read(_file(path, pickle.dumps([1], 2)))
  path.write_bytes(b"PK\x03\x04 and so on")
  with pytest.raises(FormatError, match="damaged"):
    pth.read(path)
  with pytest.raises(FormatError, match="cannot read"):
    pth.read(tmp_path / "absent.pth")


def _archive(path, state, storages, byteorder=b"little"):
  """Writes a zip of a pickled state and storages, as torch lays it out."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/data.pkl", state)
    archive.writestr("x/byteorder", byteorder)
    for key, array in storages:
      archive.writestr(f"x/data/{key}", np.asarray(array).tobytes())
  return path


def _zipped(key, count, shape, strides, offset=0):
  storage = (
      b"(" + _part("storage") + b"ctorch\nFloatStorage\n" + _part(key)
      + _part("cpu") + _part(count) + b"tQ")
  return (
      _TENSOR + b"(" + storage + _part(offset) + _part(shape)
      + _part(strides) + _part(False) + b"ccollections\nOrderedDict\n)RtR")


def test_zip_archives(tmp_path):
  path = tmp_path / "x.pt"
  one = {"w": _zipped("0", 12, (3, 2), (1, 3), 2)}
  found = pth.read(_archive(path, _dict(**one), [("0", _X)]))
  np.testing.assert_array_equal(
      found["w"], [[2, 5], [3, 6], [4, 7]])
  # Under a trainer's name, beside what is not read.
  inner = _dict(**one)[2:-1]
  whole = _dict(model=inner, steps=_part(7), optimizer=_dict(
      m=_zipped("1", 99, (3,), (1,)))[2:-1],
      args=b"cargparse\nNamespace\n)\x81}(" + _part("lr") + _part(0.1)
      + b"ub")
  again = pth.read(_archive(path, whole, [("0", _X)]))
  np.testing.assert_array_equal(again["w"], found["w"])
  for state, storages, kwargs, said in (
      (_dict(**one), [("0", _X[:5])], {}, "truncated in storage '0'"),
      (_dict(**one), [("1", _X)], {}, "damaged"),
      (_dict(**one), [("0", _X)], {"byteorder": b"big"}, "big-endian"),
      (_dict(steps=_part(3)), [], {}, "'steps' is a int"),
      (b"\x80\x02cposix\nsystem\n(" + _part("true") + b"tR.", [], {},
       "posix.system, which is refused")):
    with pytest.raises(FormatError, match=said):
      pth.read(_archive(path, state, storages, **kwargs))


@pytest.mark.reference
@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("section", ["", "model"])
def test_what_torch_writes(tmp_path, as_zip, section):
  torch = pytest.importorskip("torch")
  net = torch.nn.Sequential(
      torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).double()
  state = net.state_dict()
  state["turned"] = torch.arange(6.0).reshape(2, 3).T
  state["own"] = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
  path = tmp_path / "net.pth"
  whole = {section: state, "steps": 3} if section else state
  torch.save(whole, path, _use_new_zipfile_serialization=as_zip)
  found = pth.read(path)
  assert list(found) == list(state)
  for name, tensor in state.items():
    np.testing.assert_array_equal(found[name], tensor.detach().numpy())
    assert found[name].dtype == tensor.detach().numpy().dtype
