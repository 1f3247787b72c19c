"""Texts of all lengths in rows of one length, for training.

A row holds several texts (documents) one after another; a token may attend
to its own document only, which `document` says. Batches are a pure function
of `(seed, step)`, so a run that is interrupted goes on exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import dataclasses
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from specjax.data import store
from specjax.data.store import Record

Row = dict[str, np.ndarray]
_FIELDS = ('tokens', 'document', 'position', 'supervised')


class _Open:
  """A row that still has room."""

  def __init__(self, length: int):
    self.row: Row = {
        'tokens': np.zeros(length, np.int32),
        'document': np.zeros(length, np.int32),
        'position': np.zeros(length, np.int32),
        'supervised': np.zeros(length, bool)}
    self.used = self.documents = 0

  def add(self, tokens: npt.NDArray[np.int32], prompt_length: int) -> None:
    """Appends a text that fits."""
    self.documents += 1
    start, end = self.used, self.used + len(tokens)
    self.row['tokens'][start:end] = tokens
    self.row['document'][start:end] = self.documents
    self.row['position'][start:end] = np.arange(len(tokens))
    self.row['supervised'][start + prompt_length:end] = True
    self.used = end


def pack(
    records: Iterable[Record], length: int, *, window: int = 64,
    all_supervised: bool = False,
) -> Iterator[Row]:
  """Packs texts into rows, first fit within a small window of open rows.

  Args:
    records: each goes into the first open row that has room for it. A text
      longer than a row is cut; one whose cut holds no supervised token is
      left out.
    length: S >= 1, tokens a row.
    window: rows that are open at a time, >= 1; the fullest is closed first.
    all_supervised: supervise prompts too (all but a text's first token).

  Yields:
    `tokens int32[S]`; `document int32[S]`, 0 for padding, else 1, 2, ... by
    text; `position int32[S]` within the document; `supervised bool[S]`: the
    target generated this token, given those before it.
  """
  if length < 1 or window < 1:
    raise ValueError(f'length={length}, window={window}: must be >= 1')
  open_rows: list[_Open] = []
  for record in records:
    tokens = np.asarray(record.tokens[:length], np.int32)
    begin = 1 if all_supervised else record.prompt_length
    if len(tokens) <= begin:
      continue
    for one in open_rows:
      if one.used + len(tokens) <= length:
        break
    else:
      if len(open_rows) == window:
        fullest = max(range(window), key=lambda i: open_rows[i].used)
        yield open_rows.pop(fullest).row
      one = _Open(length)
      open_rows.append(one)
    one.add(tokens, begin)
  for one in open_rows:
    yield one.row


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
  """Packed rows in memory: 9 bytes a token, or 7 (see `tokens`).

  Attributes:
    tokens: [R,S], uint16 when all ids fit, else int32.
    document, position: uint16[R,S]. supervised: bool[R,S].
  """

  tokens: np.ndarray
  document: np.ndarray
  position: np.ndarray
  supervised: np.ndarray

  @classmethod
  def from_records(
      cls, records: Iterable[Record], length: int, **options: Any
  ) -> Packed:
    """Packs records; see `pack` for `length` and the options.

    Raises:
      ValueError: nothing is left to learn from, or `length` is 2**16 or more.
    """
    if length >= 1 << 16:
      raise ValueError(f'length={length}: must be less than {1 << 16}')
    kept: dict[str, list[np.ndarray]] = {name: [] for name in _FIELDS}
    for row in pack(records, length, **options):
      small = row['tokens'].max() < 1 << 16
      kept['tokens'].append(
          row['tokens'].astype(np.uint16 if small else np.int32))
      kept['document'].append(row['document'].astype(np.uint16))
      kept['position'].append(row['position'].astype(np.uint16))
      kept['supervised'].append(row['supervised'])
    if not kept['tokens']:
      raise ValueError('no text to learn from: every record is empty or its '
                       f'prompt fills the row of {length}')
    return cls(**{name: np.stack(rows) for name, rows in kept.items()})

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def density(self) -> float:
    """Share of the slots that hold a token, in (0, 1]."""
    return float(np.mean(self.document > 0))

  def rows(self, index: npt.NDArray[np.integer]) -> Row:
    """Returns these rows, int32 (and bool) as `pack` makes them."""
    return {
        name: getattr(self, name)[index].astype(
            bool if name == 'supervised' else np.int32)
        for name in _FIELDS}

  def batch(self, step: int, size: int, seed: int = 0) -> Row:
    """Returns batch number `step >= 0`: arrays [size,S].

    Every pass over the rows is a shuffle of its own; a batch may span two.
    A pure function of the arguments.
    """
    return self.rows(order(len(self), step, size, seed))


def order(
    num_rows: int, step: int, size: int, seed: int = 0
) -> npt.NDArray[np.int64]:
  """Returns int64[size]: the rows of batch `step` of a shuffled stream."""
  if num_rows < 1 or step < 0 or size < 1 or seed < 0:
    raise ValueError(f'num_rows={num_rows}, step={step}, size={size}, '
                     f'seed={seed}: out of range')
  at = step * size + np.arange(size, dtype=np.int64)
  epoch, place = np.divmod(at, num_rows)
  out = np.zeros(size, np.int64)
  for number in np.unique(epoch).tolist():
    here = epoch == number
    out[here] = _shuffle(num_rows, seed, number)[place[here]]
  return out


@functools.lru_cache(maxsize=4)
def _shuffle(num_rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
  return np.random.default_rng([seed, epoch]).permutation(num_rows)


def batches(
    packed: Packed, size: int, *, seed: int = 0, epochs: float = 1.0,
    start: int = 0,
) -> Iterator[Row]:
  """Yields the batches of `epochs` passes, from step `start` on."""
  for step in range(start, int(epochs * len(packed)) // size):
    yield packed.batch(step, size, seed)


def stream(
    source: Any, length: int, size: int, *, seed: int = 0,
    window: int = 64, epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Any:
  """Returns a grain dataset of packed batches, for data beyond memory.

  Shuffles the texts, packs them as they come, and batches the rows. Its
  iterator's `get_state` and `set_state` resume exactly.

  Args:
    source: random access to rows (`store.source(folder)`), or records.
    length, window: as for `pack`. size: rows a batch.
    epochs: passes over the texts; None is endless.
    shard: `(index, count)` of this process.

  Returns:
    A `grain.IterDataset` of dicts [size,S], as `Packed.batch`.
  """
  import grain

  index, count = shard
  texts = grain.MapDataset.source(source).seed(seed).shuffle()
  texts = texts[index::count].repeat(epochs)
  # Cut as `pack` does; grain refuses what is longer than a row.
  texts = texts.map(functools.partial(_example, length=length))
  texts = texts.filter(lambda x: bool(x['supervised'].any()))
  packed = grain.experimental.FirstFitPackIterDataset(
      texts.to_iter_dataset(), num_packing_bins=window,
      length_struct={'tokens': length, 'supervised': length},
      shuffle_bins=False)
  return packed.map(_row).batch(size, drop_remainder=True)


def _example(row: Any, length: int) -> Row:
  record = row if isinstance(row, Record) else store.to_record(row)
  tokens = np.asarray(record.tokens[:length], np.int32)
  return {'tokens': tokens,
          'supervised': np.arange(len(tokens)) >= record.prompt_length}


def _row(packed: dict[str, np.ndarray]) -> Row:
  """Renames what grain's packing returns."""
  return {
      'tokens': packed['tokens'].astype(np.int32),
      'document': packed['tokens_segment_ids'].astype(np.int32),
      'position': packed['tokens_positions'].astype(np.int32),
      'supervised': packed['supervised'].astype(bool)}
