"""Rows that hold every text once, batches that a step number decides."""

import numpy as np
import pytest

from specjax.data import packing
from specjax.data.packing import Packed
from specjax.data.store import Record


def records(num: int = 60, longest: int = 40, vocab: int = 1000):
  rng = np.random.default_rng(0)
  found = []
  for i in range(num):
    size = int(rng.integers(2, longest + 1))
    tokens = rng.integers(0, vocab, size).astype(np.int32)
    found.append(Record(tokens, int(rng.integers(1, size)), prompt_index=i))
  return found


def documents(rows):
  """Yields (tokens, supervised) of every text in these rows."""
  for row in rows:
    for number in range(1, row['document'].max() + 1):
      here = row['document'] == number
      np.testing.assert_array_equal(
          row['position'][here], np.arange(here.sum()))
      yield row['tokens'][here].tolist(), row['supervised'][here].tolist()


def expected(texts, length: int):
  found = []
  for r in texts:
    tokens = r.tokens[:length].tolist()
    mask = [i >= r.prompt_length for i in range(len(tokens))]
    if any(mask):
      found.append((tokens, mask))
  return sorted(found)


@pytest.mark.parametrize('length, window', [(64, 8), (64, 1), (25, 4)])
def test_every_text_is_in_one_row_whole(length, window):
  texts = records()
  rows = list(packing.pack(texts, length, window=window))
  for row in rows:
    assert [x.dtype for x in row.values()] == [np.int32] * 3 + [bool]
    assert all(x.shape == (length,) for x in row.values())
    padding = row['document'] == 0
    assert not padding[0] and not np.any(padding[:-1] & ~padding[1:])
    for name in ('tokens', 'position', 'supervised'):
      assert not row[name][padding].any()
    assert np.all(np.diff(row['document'][~padding]) >= 0)
  assert sorted(documents(rows)) == expected(texts, length)


def test_windows_waste_little():
  texts = records(400)
  share = {}
  for window in (1, 16):
    rows = list(packing.pack(texts, 64, window=window))
    share[window] = np.mean([row['document'] > 0 for row in rows])
  assert share[16] > 0.93 and share[16] > share[1] + 0.1


def test_a_text_without_an_answer_in_the_row_is_left_out():
  long = Record(np.arange(30, dtype=np.int32), 20)
  assert not list(packing.pack([long], 20))
  (row,) = packing.pack([long], 21)
  assert np.flatnonzero(row['supervised']).tolist() == [20]
  (row,) = packing.pack([long], 20, all_supervised=True)
  assert np.flatnonzero(row['supervised']).tolist() == list(range(1, 20))
  with pytest.raises(ValueError, match='no text to learn from'):
    Packed.from_records([long], 20)
  for bad in (dict(length=0), dict(length=4, window=0)):
    with pytest.raises(ValueError, match='must be >= 1'):
      next(packing.pack([long], **bad))


def test_in_memory():
  texts = records()
  packed = Packed.from_records(texts, 64, window=8)
  rows = list(packing.pack(texts, 64, window=8))
  assert len(packed) == len(rows)
  assert packed.tokens.dtype == np.uint16
  assert packed.density == pytest.approx(
      np.mean([r['document'] > 0 for r in rows]))
  found = packed.rows(np.arange(len(rows)))
  for name, values in found.items():
    assert values.dtype == rows[0][name].dtype
    np.testing.assert_array_equal(values, [r[name] for r in rows])
  # One id beyond 16 bits, in one row.
  texts[30].tokens[0] = 1 << 16
  wide = Packed.from_records(texts, 64, window=8)
  assert wide.tokens.dtype == np.int32 and wide.tokens.max() == 1 << 16
  with pytest.raises(ValueError, match='length=65536'):
    Packed.from_records(texts, 1 << 16)


def test_order_is_a_function_of_the_step():
  steps = [packing.order(10, step, 4, seed=3) for step in range(10)]
  stream = np.concatenate(steps)
  for epoch in range(4):  # every pass sees every row; batches span two
    part = stream[10 * epoch:10 * epoch + 10]
    assert sorted(part.tolist()) == list(range(10))
  assert len({tuple(stream[i:i + 10].tolist()) for i in (0, 10, 20)}) == 3
  np.testing.assert_array_equal(packing.order(10, 7, 4, seed=3), steps[7])
  assert packing.order(10, 0, 10, 4).tolist() != stream[:10].tolist()
  # More rows asked for than there are: several passes in one batch.
  assert np.bincount(packing.order(3, 1, 9)).tolist() == [3, 3, 3]
  for bad in ((0, 0, 1), (1, -1, 1), (1, 0, 0), (1, 0, 1, -1)):
    with pytest.raises(ValueError, match='out of range'):
      packing.order(*bad)


def test_batches_restart_where_they_stopped():
  packed = Packed.from_records(records(), 64, window=8)
  whole = list(packing.batches(packed, 4, seed=1, epochs=2))
  assert len(whole) == 2 * len(packed) // 4
  rest = list(packing.batches(packed, 4, seed=1, epochs=2, start=5))
  assert len(rest) == len(whole) - 5
  for one, other in zip(whole[5:], rest):
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def test_grain_stream_holds_the_same_texts_and_resumes():
  pytest.importorskip('grain')
  texts = records()
  found = list(packing.stream(texts, 64, 1, window=8, epochs=1))
  rows = [{k: v[0] for k, v in batch.items()} for batch in found]
  assert sorted(documents(rows)) == expected(texts, 64)
  assert {k: str(v.dtype) for k, v in rows[0].items()} == {
      'tokens': 'int32', 'document': 'int32', 'position': 'int32',
      'supervised': 'bool'}
  short = packing.stream(texts, 25, 1, window=8, epochs=1)
  cut = [{k: v[0] for k, v in batch.items()} for batch in short]
  assert sorted(documents(cut)) == expected(texts, 25)
  halves = [packing.stream(texts, 64, 1, epochs=1, shard=(i, 2))
            for i in range(2)]
  parts = [{k: v[0] for k, v in b.items()} for h in halves for b in h]
  assert sorted(documents(parts)) == expected(texts, 64)
  endless = iter(packing.stream(texts, 64, 3, seed=5))
  for _ in range(20):
    next(endless)
  state = endless.get_state()
  ahead = [next(endless)['tokens'] for _ in range(3)]
  endless.set_state(state)
  np.testing.assert_array_equal(
      ahead, [next(endless)['tokens'] for _ in range(3)])
