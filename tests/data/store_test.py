"""Rollouts on disk: the same records come back, or a clear error."""

import errno
import json

import numpy as np
import pytest

from specjax.data import packing, store
from specjax.data.store import Parts, Record
from specjax.io.errors import OutputError


def records(num: int = 7) -> list[Record]:
  rng = np.random.default_rng(0)
  return [
      Record(rng.integers(0, 50000, 3 + i).astype(np.int32), 1 + i % 2,
             0.5 * (i % 3), bool(i % 2), 10 * i)
      for i in range(num)]


def assert_same(one, other) -> None:
  one, other = list(one), list(other)
  assert len(one) == len(other)
  for a, b in zip(one, other):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert a.tokens.dtype == b.tokens.dtype == np.int32
    assert a[1:] == b[1:]


def test_npz_round_trip(tmp_path):
  path = store.save_npz(tmp_path / 'x.npz', records(), {'seed': 3})
  found, facts = store.load_npz(path)
  assert_same(found, records())
  assert facts == {'seed': 3}
  assert found[3].answer.tolist() == records()[3].tokens[2:].tolist()
  store.save_npz(path, [])
  assert store.load_npz(path) == ([], {})
  assert [p.name for p in tmp_path.iterdir()] == ['x.npz']


def test_npz_refuses(tmp_path):
  with pytest.raises(ValueError, match='nowhere.npz: not a file of roll'):
    store.load_npz(tmp_path / 'nowhere.npz')
  path = store.save_npz(tmp_path / 'x.npz', records())
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match='not a file of rollouts'):
    store.load_npz(path)
  np.savez(path, other=np.ones(3))
  with pytest.raises(ValueError, match='not a file of rollouts .KeyError'):
    store.load_npz(path)
  path.write_text('{"prompt": "a"}\n')  # numpy would advise to unpickle it
  with pytest.raises(ValueError, match=r'rollouts \(.npz\), or cut off$'):
    store.load_npz(path)


def full_disk(*args, **kwargs):
  raise OSError(errno.ENOSPC, 'No space left on device')


def test_npz_on_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
  path = store.save_npz(tmp_path / 'x.npz', records(2))
  monkeypatch.setattr(store.np, 'savez', full_disk)
  with pytest.raises(OutputError, match='x.npz: No space left'):
    store.save_npz(path, records())
  assert_same(store.load_npz(path)[0], records(2))
  assert [p.name for p in tmp_path.iterdir()] == ['x.npz']


def test_parts_go_on_after_an_interruption(tmp_path):
  parts = Parts(tmp_path, {'seed': 0, 'eos': (1, 2)}, part_size=3)
  for record in records():
    parts.add(record)
  assert parts.done == {0, 10, 20, 30, 40, 50}  # one is still pending
  again = Parts(tmp_path, {'seed': 0, 'eos': (1, 2)}, part_size=3)
  assert again.done == parts.done
  assert_same(again, records()[:6])
  again.add(records()[6])
  again.flush()
  again.flush()  # nothing is pending
  assert_same(Parts(tmp_path, {'seed': 0, 'eos': (1, 2)}), records())
  with pytest.raises(ValueError, match='other settings .eos, seed.'):
    Parts(tmp_path, {'seed': 1})


def test_a_part_without_its_entry_is_written_again(tmp_path):
  parts = Parts(tmp_path, {}, part_size=2)
  for record in records(4):
    parts.add(record)
  state = json.loads((tmp_path / 'state.json').read_text())
  state['parts'].pop()
  (tmp_path / 'state.json').write_text(json.dumps(state))
  again = Parts(tmp_path, {}, part_size=2)
  assert again.done == {0, 10}
  for record in records(6)[4:]:
    again.add(record)
  assert_same(again, records(6)[:2] + records(6)[4:])


def test_tfds_round_trip(tmp_path):
  tfds = pytest.importorskip('tensorflow_datasets')
  facts = {'target': 'toy', 'revision': 'abc', 'dropped': {'loop': 2}}
  folder = store.write(
      tmp_path / 'new' / 'set',
      {'train': records(), 'held_out': records(2)}, facts)
  assert_same(store.read(folder), records())
  assert_same(store.read(folder, 'held_out'), records(2))
  assert store.facts(folder) == facts
  source = tfds.builder_from_directory(str(folder)).as_data_source()
  assert len(source['train']) == 7
  assert_same([store.to_record(source['train'][4])], records()[4:5])
  assert any('array_record' in p.name for p in folder.iterdir())
  assert [p.name for p in folder.parent.iterdir()] == ['set']
  (batch,) = list(packing.stream(
      store.source(folder), 64, 1, epochs=1))
  assert batch['document'].max() == 7
  with pytest.raises(ValueError, match='set exists: give a new folder'):
    store.write(folder, {'train': records()}, {})
  with pytest.raises(ValueError, match="no records for ..held_out"):
    store.write(tmp_path / 'x', {'train': records(), 'held_out': []}, {})


def test_tfds_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
  pytest.importorskip('tensorflow_datasets')
  monkeypatch.setattr(store.shards, 'build', full_disk)
  with pytest.raises(OutputError, match='set: No space left'):
    store.write(tmp_path / 'set', {'train': records()}, {})
  assert not list(tmp_path.iterdir())
