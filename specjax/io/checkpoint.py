"""Parameter trees on disk, with orbax: written once, loaded to any mesh."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import json
import logging
import os
from pathlib import Path
import shutil
from typing import Any

from absl import logging as absl_logging
import jax
from orbax.checkpoint import v1 as ocp

from specjax.io.errors import FormatError
from specjax.io.output import write_json

_PARAMS, _FACTS = 'params', 'specjax.json'
# What orbax writes beside the arrays takes about as much.
_LEAST_FREE = 1 << 17


def save(folder: str | Path, params: Any, facts: dict[str, Any]) -> Path:
  """Writes `params` (orbax) and `facts` (JSON) to a new folder.

  Every process of a distributed run calls this; shards are written by those
  who hold them. The facts are written last: a folder that has them is whole.
  A failure is raised, and not logged besides.

  Raises:
    FormatError: the folder holds a checkpoint already.
    Exception: it cannot be written; file systems fail in many types.
  """
  folder = Path(folder).expanduser().resolve()
  if is_checkpoint(folder):
    raise FormatError(f'{folder}: holds a checkpoint already')
  folder.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(folder)
  if free.total and free.free < _LEAST_FREE:
    # On a disk without any space its callbacks print tracebacks of their own.
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  with _not_logged():
    ocp.save(folder / _PARAMS, params, overwrite=True)
  if jax.process_index() == 0:
    write_json(folder / _FACTS, facts)
  return folder


@contextlib.contextmanager
def _not_logged() -> Iterator[None]:
  """Drops what orbax logs of a failure within.

  Each of its threads that meets one logs it with a traceback, and then it is
  raised: who called has the whole story.
  """
  logger = absl_logging.get_absl_logger()
  logger.addFilter(_is_kept)
  yield
  # Not after a failure: some threads meet it later.
  logger.removeFilter(_is_kept)


def _is_kept(record: logging.LogRecord) -> bool:
  return record.levelno < logging.ERROR or 'orbax' not in record.pathname


def is_checkpoint(folder: str | Path) -> bool:
  """Whether `save` has written this folder, to the end."""
  return (Path(folder) / _FACTS).is_file()


def read_facts(folder: str | Path) -> dict[str, Any]:
  """Returns the facts of a checkpoint.

  Raises:
    FormatError: there are none, or they are not JSON.
  """
  path = Path(folder) / _FACTS
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise FormatError(f'{path}: {error}') from error


def load(folder: str | Path, abstract: Any, shardings: Any = None) -> Any:
  """Returns the parameters, each created with its sharding.

  Args:
    folder: written by `save`, on any mesh.
    abstract: tree of `ShapeDtypeStruct`: what is expected.
    shardings: tree like it, or None for the default device.

  Raises:
    FormatError: the checkpoint is of another shape, or damaged.
  """
  if shardings is None:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: one, abstract)
  wanted = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      abstract, shardings)
  path = Path(folder).expanduser().resolve() / _PARAMS
  try:
    return ocp.load(path, wanted)
  except (ValueError, KeyError, OSError) as error:
    raise FormatError(
        f'{folder}: not the parameters that its {_FACTS} describes: '
        f'{error}') from error
