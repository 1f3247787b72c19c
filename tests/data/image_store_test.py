"""Images on disk: the same come back, or a clear error."""

import dataclasses
import errno

import numpy as np
import pytest

from specjax.data import image_store
from specjax.data.images import Images
from specjax.io.errors import OutputError

tfds = pytest.importorskip('tensorflow_datasets')


def make(num: int, seed: int = 0, **kwargs) -> Images:
  rng = np.random.default_rng(seed)
  options = dict(
      labels=rng.integers(0, 2, num).astype(np.int32),
      captions=tuple(f'é {seed} {i}' for i in range(num)),
      classes=('cat', 'a dog'), name='toy')
  return Images(
      rng.integers(0, 256, (num, 4, 6, 3), np.uint8), **{**options, **kwargs})


def assert_same(one: Images, other: Images) -> None:
  np.testing.assert_array_equal(one.images, other.images)
  assert one.images.dtype == other.images.dtype == np.uint8
  if one.labels is None:
    assert other.labels is None
  else:
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.labels.dtype == other.labels.dtype == np.int32
  assert (one.captions, one.classes, one.name) == (
      other.captions, other.classes, other.name)


def test_round_trip(tmp_path, monkeypatch):
  monkeypatch.setattr(image_store, '_CHUNK', 3)
  splits = {
      'train': make(7, dropped={'damaged': ('a', 'b')}), 'test': make(2, 1)}
  folder = image_store.write(splits, tmp_path / 'new' / 'set', {'size': [1],
                                                               'file': 'x'})
  for split, images in splits.items():
    assert_same(image_store.read(folder, split), images)
  assert image_store.facts(folder) == {
      'name': 'toy', 'size': [4, 6], 'classes': ['cat', 'a dog'],
      'num_images': {'train': 7, 'test': 2}, 'file': 'x',
      'counts': {s: x.counts() for s, x in splits.items()},
      'dropped': {'train': {'damaged': 2}, 'test': {}}}
  assert any('array_record' in p.name for p in folder.iterdir())
  assert [p.name for p in folder.parent.iterdir()] == ['set']


def test_tools_of_tfds_read_it(tmp_path):
  images = make(5)
  folder = image_store.write({'train': images}, tmp_path / 'set')
  builder = tfds.builder_from_directory(str(folder))
  assert builder.info.features['label'].names == ['cat', 'a dog']
  assert builder.info.splits['train'].num_examples == 5
  row = image_store.source(folder)[3]
  np.testing.assert_array_equal(row['image'], images.images[3])
  assert row['label'] == images.labels[3]
  assert row['caption'].decode() == 'é 0 3'
  grain = pytest.importorskip('grain')
  pairs = grain.MapDataset.source(image_store.source(folder)).batch(2)
  np.testing.assert_array_equal(pairs[1]['image'], images.images[2:4])


@pytest.mark.parametrize('changes', [
    dict(labels=None, classes=()), dict(captions=None),
    dict(labels=None, classes=(), captions=None)])
def test_what_a_set_lacks_stays_away(tmp_path, changes):
  images = make(3, **changes)
  folder = image_store.write({'train': images}, tmp_path / 'set')
  assert_same(image_store.read(folder), images)
  kept = {'label': images.labels, 'caption': images.captions}
  assert set(image_store.source(folder)[0]) == {
      'image', *(k for k, v in kept.items() if v is not None)}


def test_refuses(tmp_path):
  with pytest.raises(ValueError, match='no split to write'):
    image_store.write({}, tmp_path / 'set')
  one = make(3)
  for other in (make(3, classes=('dog', 'a cat')), make(3, name='other'),
                make(3, captions=None),
                dataclasses.replace(one, images=one.images[:, :, :4])):
    with pytest.raises(ValueError, match='train, test must have the same'):
      image_store.write({'train': one, 'test': other}, tmp_path / 'set')
  assert not list(tmp_path.iterdir())
  folder = image_store.write({'train': one}, tmp_path / 'set')
  with pytest.raises(OutputError, match='set exists: give a new folder'):
    image_store.write({'train': one}, folder)
  with pytest.raises(ValueError, match="no split 'test'; has train"):
    image_store.source(folder, 'test')
  with pytest.raises(ValueError, match='not a dataset of images .images.jso'):
    image_store.read(tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
  def full_disk(*args):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(image_store.shards, 'build', full_disk)
  with pytest.raises(OutputError, match='set: No space left'):
    image_store.write({'train': make(2)}, tmp_path / 'set')
  assert not list(tmp_path.iterdir())
