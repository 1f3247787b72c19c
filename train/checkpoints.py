"""States of a training run on disk: saved whole, resumed exactly."""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
from pathlib import Path
import re
import shutil
from typing import Any
import warnings

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from specjax.io import checkpoint
from specjax.io.errors import FormatError, OutputError

# Sections of a config that do not change what is learnt.
_FREE = ('eval', 'eval_every', 'save', 'save_every', 'log_every')


class _OtherRun(FormatError):
  """A state that is whole, but of something else."""


class Checkpoints:
  """The last states of a run, in folders named by their step.

  Attributes:
    folder: that holds them.
  """

  def __init__(
      self, folder: Path, config: Mapping[str, Any], digest: str,
      keep: int = 2,
  ):
    """Watches a folder.

    Args:
      folder: made when the first state is saved.
      config: JSON values of the run; a state of another run is refused.
      digest: hash of the text.
      keep: states that are kept, the newest.
    """
    self.folder, self._keep = folder, keep
    self._run = json.loads(json.dumps(
        {'config': {k: v for k, v in config.items() if k not in _FREE},
         'text': digest}))

  @property
  def steps(self) -> list[int]:
    """Steps of the states on disk, ascending."""
    found = [p for p in self.folder.glob('*')
             if p.name.isdigit() and checkpoint.is_checkpoint(p)]
    return sorted(int(p.name) for p in found)

  def save(self, state: Any, step: int, facts: Mapping[str, Any]) -> Path:
    """Writes the state after `step` steps; then drops the oldest.

    Every process of a run calls this, and sees the same folder.

    Raises:
      OutputError: it cannot be written (disk full); older states stay.
    """
    folder = self.folder / f'{step:08d}'
    partial = folder.with_name(f'{folder.name}.partial')
    arrays, is_first = _named(state), jax.process_index() == 0
    try:
      if is_first:
        shutil.rmtree(partial, ignore_errors=True)
      _meet('cleared')
      checkpoint.save(partial, arrays, {
          **facts, **self._run, 'step': step,
          'arrays': {k: _shape(x) for k, x in arrays.items()}})
      _meet('written')
      if is_first:
        if folder.exists():  # saved before: the same state
          shutil.rmtree(folder)
        partial.rename(folder)
    except Exception as error:  # file systems fail in many types
      shutil.rmtree(partial, ignore_errors=True)
      last = f'the state of step {self.steps[-1]} is intact' if (
          self.steps) else 'no state is on disk'
      raise OutputError(
          f'{folder}: cannot save: {_reason(error)}; {last}') from error
    if is_first:
      for old in self.steps[:-self._keep]:
        shutil.rmtree(self.folder / f'{old:08d}')
    return folder

  def restore(
      self, abstract: Any, mesh: jax.sharding.Mesh | None
  ) -> tuple[Any, dict[str, Any]] | None:
    """Returns the newest `(state, facts)`, or None if there is none.

    A state that cannot be read is told of, and the one before it is taken.

    Args:
      abstract: the state's tree of `ShapeDtypeStruct`.
      mesh: where it is replicated, or None.

    Raises:
      FormatError: the state is of another architecture or another run, or
        none of them can be read.
    """
    if not self.steps:
      return None
    wanted, shardings, damage = _named(abstract), None, ''
    if mesh is not None:
      everywhere = NamedSharding(mesh, PartitionSpec())
      shardings = dict.fromkeys(wanted, everywhere)
    for step in reversed(self.steps):
      folder = self.folder / f'{step:08d}'
      facts = {}
      try:
        facts = checkpoint.read_facts(folder)
        self._check(folder, facts, wanted)
        arrays = checkpoint.load(folder, wanted, shardings)
      except _OtherRun:
        raise
      except Exception as error:  # damaged files fail in many types
        damage = f'{folder}: cannot be read: {_reason(error)}'
        warnings.warn(damage, stacklevel=2)
        continue
      tree = jax.tree.structure(abstract)
      return jax.tree.unflatten(tree, [arrays[k] for k in wanted]), facts
    raise FormatError(f'{damage}; nor can those before it: delete '
                      f'{self.folder} to begin anew')

  def _check(
      self, folder: Path, facts: Mapping[str, Any], wanted: Mapping[str, Any]
  ) -> None:
    """Raises _OtherRun for the state of another architecture or run."""
    _same_arrays(folder, facts.get('arrays', {}), wanted)
    self._same_run(folder, facts)

  def _same_run(self, folder: Path, facts: Mapping[str, Any]) -> None:
    before, now = (_flat(x.get('config', {}))
                   for x in (facts, self._run))
    for key in sorted({*before, *now}):
      if before.get(key) != now.get(key):
        raise _OtherRun(
            f'{folder}: of a run with config.{key}={before.get(key)!r}, now '
            f'{now.get(key)!r}: give another --out, or the same config')
    if facts.get('text') != self._run['text']:
      raise _OtherRun(f'{folder}: trained on other text: give another '
                        '--out, or the same rollouts')


def _same_arrays(
    folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  """Raises _OtherRun naming the first array that differs."""
  for name in [*wanted, *found]:
    have, need = found.get(name), None
    if name in wanted:
      need = _shape(wanted[name])
    if have != need:
      raise _OtherRun(
          f'{folder}: another architecture: {name} is '
          f'{_say(have)} there, {_say(need)} here; give another --out')


def _reason(error: Exception) -> str:
  """Returns a line that says what went wrong."""
  text = (error.strerror if isinstance(error, OSError) else '') or str(error)
  # The system's own words, where tensorstore wraps them into its own.
  code = re.search(r"os_error_code='(\d+)'", text)
  if code:
    return os.strerror(int(code[1]))
  return (text.splitlines() or [type(error).__name__])[0]


def _meet(what: str) -> None:
  """Waits for the other processes, if there are any."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'checkpoint {what}')


def _say(shape: Any) -> str:
  return 'absent' if shape is None else f'{shape[1]}{shape[0]}'


def _shape(x: Any) -> list[Any]:
  return [list(x.shape), str(x.dtype)]


def _named(tree: Any) -> dict[str, Any]:
  """Returns the leaves by path, in order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf
          for path, leaf in leaves}


def _flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  out: dict[str, Any] = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      out.update(_flat(value, f'{prefix}{key}.'))
    else:
      out[prefix + key] = value
  return out
