"""Files and folders that are whole or not there: write, then rename."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import json
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any

from specjax.io.errors import OutputError


def prepare(folder: str | Path) -> Path:
  """Creates an output folder and proves that it can be written to.

  Raises:
    OutputError: it cannot; said before any work is done.
  """
  path = Path(folder).expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise OutputError(
        f'--out={folder}: cannot write there ({error.strerror or error}); '
        'give a folder that you may write to') from error
  return path


def write_text(path: Path, text: str) -> None:
  """Writes a whole file under a temporary name, then renames it."""
  partial = path.with_name(path.name + '.partial')
  try:
    partial.write_text(text, encoding='utf-8')
    os.replace(partial, path)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise OutputError(f'{path}: {error.strerror or error}') from error


def write_json(path: Path, value: Any) -> None:
  """Writes indented JSON; see `write_text`."""
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


@contextlib.contextmanager
def folder(
    path: str | Path, *, replaces: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
  """Lends an empty folder that gets the name `path` once it is filled.

      with output.folder('out/drafter') as new:
        write_json(new / 'config.json', {})

  It is filled beside `path`. If the block, or anything else, fails, nothing
  is left of it, and what was at `path` stays.

  Args:
    path: must not exist, be an empty folder, or be one that is replaced.
    replaces: says whether a folder that is not empty may be replaced.

  Raises:
    OutputError: `path` is in use, before anything is written; or it cannot
      be written (any OSError of the block: disk full, no permission).
  """
  path = Path(path).expanduser()
  aside = None
  try:
    if path.exists() and not (
        path.is_dir() and (not any(path.iterdir())
                           or (replaces is not None and replaces(path)))):
      other = '' if replaces is None else ' and holds something else'
      raise OutputError(f'{path} exists{other}: give a new folder')
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(
        prefix=f'{path.name}.partial-', dir=path.parent))
    new = aside / 'new'
    new.mkdir()  # `mkdtemp` lets nobody else read
    yield new
    _exchange(new, path, aside / 'old')
  except OSError as error:
    raise OutputError(f'{path}: {error.strerror or error}') from error
  finally:
    if aside is not None:
      shutil.rmtree(aside, ignore_errors=True)


def _exchange(new: Path, path: Path, old: Path) -> None:
  """Gives `new` the name `path`, and what had it the name `old`."""
  if not path.exists():
    os.replace(new, path)
    return
  os.replace(path, old)  # a folder with files in it cannot be replaced
  try:
    os.replace(new, path)
  except OSError:
    os.replace(old, path)
    raise


class JsonLines:
  """Collects rows; each is on disk at once, the file appears at `close`.

  A run that is interrupted still closes, so finished rows are kept; one that
  fails before its first row leaves everything as it was. Without a path
  nothing is kept: one process of a distributed run writes.
  """

  def __init__(self, path: Path | None, outdated: Sequence[Path] = ()):
    """Begins a file at `path`, whose appearance makes others `outdated`."""
    self._path, self._outdated = path, outdated
    self._any = False
    partial = Path(os.devnull)
    if path is not None:
      partial = path.with_name(path.name + '.partial')
    self._file = open(partial, 'w', encoding='utf-8')

  def write(self, row: dict[str, Any]) -> None:
    """Appends a row."""
    self._any = True
    self._file.write(json.dumps(row, ensure_ascii=False) + '\n')
    self._file.flush()

  def close(self) -> None:
    """Gives the file its name."""
    if not self._file.closed:
      self._file.close()
      if self._path is not None:
        for path in self._outdated:
          path.unlink(missing_ok=True)
        os.replace(self._file.name, self._path)

  def discard(self) -> None:
    """Leaves no trace."""
    self._file.close()
    if self._path is not None:
      os.unlink(self._file.name)

  def __enter__(self):
    return self

  def __exit__(self, kind, *unused):
    if kind is not None and not self._any:
      self.discard()
    else:
      self.close()
