"""Rollouts on disk: tokens only, no hidden state.

Three forms: a tfds dataset directory with array_record shards (random access,
metadata beside it), one `.npz` file (no tfds needed), and the numbered parts
of a run that is still going on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple
import zipfile

import numpy as np
import numpy.typing as npt

from specjax.data import shards
from specjax.io import output
from specjax.io.errors import OutputError

_LAYOUT = shards.Layout('rollouts', '1.0.0', 'rollout.json')


class Record(NamedTuple):
  """One text: a prompt and what the target answered.

  Attributes:
    tokens: int32[n], prompt and answer, the end token included if there is
      one.
    prompt_length: tokens of the prompt, in [1, n).
    temperature: of the answer; 0 is greedy.
    finished: whether the answer ended by itself (an end token), not by the
      limit.
    prompt_index: of the prompt in its list; -1 when unknown.
  """

  tokens: npt.NDArray[np.int32]
  prompt_length: int
  temperature: float = 0.0
  finished: bool = False
  prompt_index: int = -1

  @property
  def answer(self) -> npt.NDArray[np.int32]:
    """What the target generated."""
    return self.tokens[self.prompt_length:]


def to_arrays(records: Sequence[Record]) -> dict[str, np.ndarray]:
  """Returns the records as flat arrays: tokens one after another, offsets."""
  lengths = [len(r.tokens) for r in records]
  tokens = [r.tokens for r in records] or [np.zeros(0, np.int32)]
  return {
      'tokens': np.concatenate(tokens).astype(np.int32),
      'offsets': np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
      'prompt_length': np.asarray(
          [r.prompt_length for r in records], np.int32),
      'temperature': np.asarray([r.temperature for r in records], np.float32),
      'finished': np.asarray([r.finished for r in records], bool),
      'prompt_index': np.asarray(
          [r.prompt_index for r in records], np.int64)}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> list[Record]:
  """Inverts `to_arrays`; tokens are views of one array."""
  tokens, offsets = arrays['tokens'], arrays['offsets']
  rest = zip(offsets[:-1].tolist(), offsets[1:].tolist(),
             arrays['prompt_length'].tolist(),
             arrays['temperature'].tolist(), arrays['finished'].tolist(),
             arrays['prompt_index'].tolist(), strict=True)
  return [Record(tokens[a:b], n, t, done, i)
          for a, b, n, t, done, i in rest]


def save_npz(
    path: str | Path, records: Sequence[Record],
    facts: Mapping[str, Any] | None = None,
) -> Path:
  """Writes records and facts to one file, whole or not at all.

  Args:
    path: ends in `.npz`.
    records: in this order.
    facts: JSON values to keep with them.

  Raises:
    OutputError: it cannot be written (disk full); what was there stays.
  """
  path = Path(path)
  partial = path.with_name(path.name + '.partial')
  text = json.dumps(dict(facts or {}), ensure_ascii=False)
  try:
    with open(partial, 'wb') as file:
      arrays: Any = to_arrays(records)
      np.savez(file, facts=np.asarray(text), **arrays)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise OutputError(f'{path}: {error.strerror or error}') from error
  return path


def load_npz(path: str | Path) -> tuple[list[Record], dict[str, Any]]:
  """Reads what `save_npz` wrote: `(records, facts)`.

  Raises:
    ValueError: the file is missing, truncated or another kind of file.
  """
  if Path(path).is_file() and not zipfile.is_zipfile(path):
    # Of which numpy would say that it may be a pickle.
    raise ValueError(f'{path}: not a file of rollouts (.npz), or cut off')
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    return from_arrays(arrays), json.loads(str(arrays['facts']))
  except Exception as error:  # zip, header and key errors are of many types
    raise ValueError(
        f'{path}: not a file of rollouts ({type(error).__name__}: {error})'
    ) from error


class Parts:
  """The records of a run so far, in numbered files; survives interruption.

  A part is complete once it is named in `state.json`; one that is not (the
  process ended between the two) is written again.

  Attributes:
    done: indices of the prompts that are on disk.
  """

  def __init__(
      self, folder: str | Path, settings: Mapping[str, Any],
      part_size: int = 8192,
  ):
    """Opens the folder; continues what an equal run has begun.

    Args:
      folder: made if need be.
      settings: JSON values that decide what is generated (target, seed,
        hash of the prompts ...).
      part_size: records a file; more are lost at most when interrupted.

    Raises:
      ValueError: the folder holds a run with other settings. OutputError: it
        cannot be written to.
    """
    self._folder = output.prepare(folder)
    self._settings = json.loads(json.dumps(dict(settings)))
    self._part_size = part_size
    self._names: list[str] = []
    self._pending: list[Record] = []
    self.done: set[int] = set()
    state = self._folder / 'state.json'
    if state.exists():
      self._continue(state)

  def _continue(self, state: Path) -> None:
    """Takes over the parts of an earlier run."""
    found = json.loads(state.read_text(encoding='utf-8'))
    old = found['settings']
    if old != self._settings:
      names = sorted(k for k in {*old, *self._settings}
                     if old.get(k) != self._settings.get(k))
      raise ValueError(
          f'{self._folder} holds a run with other settings '
          f'({", ".join(names)}): give another folder, or remove it')
    self._names = found['parts']
    for record in self:
      self.done.add(record.prompt_index)

  def add(self, record: Record) -> None:
    """Takes a record; a full part goes to disk."""
    self._pending.append(record)
    if len(self._pending) >= self._part_size:
      self.flush()

  def flush(self) -> None:
    """Writes what is pending as a part."""
    if not self._pending:
      return
    name = f'part-{len(self._names):05d}.npz'
    save_npz(self._folder / name, self._pending)
    output.write_json(
        self._folder / 'state.json',
        {'settings': self._settings, 'parts': [*self._names, name]})
    self._names.append(name)
    self.done.update(r.prompt_index for r in self._pending)
    self._pending = []

  def __iter__(self) -> Iterator[Record]:
    """Yields the records on disk."""
    for name in self._names:
      yield from load_npz(self._folder / name)[0]


def write(
    folder: str | Path, splits: Mapping[str, Iterable[Record]],
    facts: Mapping[str, Any],
) -> Path:
  """Writes a tfds dataset directory with array_record shards.

  `tfds.builder_from_directory(folder).as_data_source()` reads it; rows have
  'tokens' int32[n], 'prompt_length', 'temperature', 'finished',
  'prompt_index'.
  Whole or not there (`io.output.folder`).

  Args:
    folder: must not exist, or be empty.
    splits: records by name of the split ('train', 'held_out').
    facts: JSON values about their origin: name, revision and template hash
      of the target, seed, sampling, counts of what was dropped.

  Raises:
    ValueError: a split without records.
    OutputError: the folder is in use, or cannot be written (disk full).
  """
  kept = {name: list(records) for name, records in splits.items()}
  empty = [name for name, records in kept.items() if not records]
  if empty or not kept:
    raise ValueError(f'{folder}: no records for {empty or "any split"}')
  return shards.write(
      folder, _LAYOUT, _features,
      {name: functools.partial(_rows, records)
       for name, records in kept.items()}, facts)


def _features(features: Any) -> dict[str, Any]:
  return {
      'tokens': features.Tensor(shape=(None,), dtype=np.int32),
      'prompt_length': np.int32, 'temperature': np.float32,
      'finished': np.bool_, 'prompt_index': np.int64}


def _rows(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
  for record in records:
    yield {**record._asdict(), 'tokens': np.asarray(record.tokens, np.int32)}


def source(folder: str | Path, split: str = 'train') -> Any:
  """Returns the random-access source of a split that `write` wrote."""
  return shards.source(folder, split)


def read(folder: str | Path, split: str = 'train') -> Iterator[Record]:
  """Yields the records of a split that `write` wrote."""
  for row in source(folder, split):
    yield to_record(row)


def to_record(row: Mapping[str, Any]) -> Record:
  """Returns a row of a source as a record."""
  return Record(
      np.asarray(row['tokens'], np.int32), int(row['prompt_length']),
      float(row['temperature']), bool(row['finished']),
      int(row['prompt_index']))


def facts(folder: str | Path) -> dict[str, Any]:
  """Returns the facts that `write` was given."""
  return _LAYOUT.read_facts(folder)
