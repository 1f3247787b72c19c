"""Images to learn from: plain files, packed ones, datasets, and bad ones."""

import numpy as np
import picture_files
import pytest

from configs import classifier_cifar10, image_ar_cifar10, vq_cifar10
from specjax.data import image_store
from train import image_data


def options(path, **changes):
  found = classifier_cifar10.get_config().data
  found.update(dict(path=str(path), **changes))
  return found


def test_plain_files(tmp_path):
  x = image_data.synthetic(0, 40)
  path, test = tmp_path / 'x.npz', tmp_path / 'test.npz'
  np.savez(path, images=x.images, labels=x.labels.astype(np.int64))
  data = image_data.read(options(path, held_out=0.25), 0, labels=True)
  assert (len(data.train), len(data.test)) == (30, 10)
  assert data.train.classes == data.test.classes == ('0', '1', '2')
  assert data.facts['name'] == 'x' and data.train.labels.dtype == np.int32
  # A part each, and no image in both.
  both = np.concatenate([data.train.images, data.test.images])
  assert len(both) == 40
  assert {y.tobytes() for y in both} == {y.tobytes() for y in x.images}
  again = image_data.read(options(path, held_out=0.25), 0)
  other = image_data.read(options(path, held_out=0.25), 1)
  assert again.digest == data.digest != other.digest
  # A file for the test, with names of the classes or without.
  np.savez(test, images=x.images[:6], labels=x.labels[:6])
  data = image_data.read(options(path, test=str(test)), 0)
  assert (len(data.train), len(data.test)) == (40, 6)
  np.savez(path, images=x.images, labels=x.labels, classes=['r', 'g', 'b'])
  data = image_data.read(options(path, test=str(test)), 0)
  assert data.test.classes == ('r', 'g', 'b')


def test_images_without_labels(tmp_path):
  x = image_data.synthetic(0, 10)
  np.savez(tmp_path / 'x.npz', images=x.images)
  np.savez(tmp_path / 'named.npz', images=x.images, labels=x.labels)
  data = image_data.read(options(tmp_path / 'x.npz'), 0)
  assert data.train.labels is None and data.train.classes == ()
  data = image_data.read(
      options(tmp_path / 'x.npz', test=str(tmp_path / 'named.npz')), 0)
  assert data.test.labels is None
  with pytest.raises(ValueError, match='x.npz: these images have no labels'):
    image_data.read(options(tmp_path / 'x.npz'), 0, labels=True)
  with pytest.raises(ValueError, match='x.npz: .* no labels, but those to'):
    image_data.read(
        options(tmp_path / 'named.npz', test=str(tmp_path / 'x.npz')), 0)


def test_bad_files(tmp_path):
  x = image_data.synthetic(0, 40)
  path, test = tmp_path / 'x.npz', tmp_path / 'test.npz'
  np.savez(path, images=x.images, labels=x.labels)

  def expect(text, **changes):
    with pytest.raises(ValueError, match=text):
      image_data.read(options(**{'path': path, **changes}), 0, labels=True)
  expect('give a dataset', path='')
  expect('held_out=1.5', held_out=1.5)
  expect('not there', path=tmp_path / 'absent.npz')
  expect('absent.npz: cannot be read', test=str(tmp_path / 'absent.npz'))
  (tmp_path / 'text.npz').write_text('images')
  expect('text.npz: cannot be read as .npz', path=tmp_path / 'text.npz')
  np.save(tmp_path / 'x.npy', x.labels)
  expect('a single array', path=tmp_path / 'x.npy')
  for arrays, text in (
      (dict(labels=x.labels), "no array 'images'; found labels"),
      (dict(images=x.images), 'no labels'),
      (dict(images=x.images / 255, labels=x.labels), 'must be uint8'),
      (dict(images=x.images, labels=x.labels[1:]), 'labels are'),
      (dict(images=x.images, labels=x.labels / 2), 'must be int'),
      (dict(images=x.images, labels=x.labels - 1), 'must be in .0, 2'),
      (dict(images=x.images, labels=x.labels, classes=['a']),
       'must be in .0, 1.: 1 classes'),
      (dict(images=x.images, labels=x.labels, classes=['a', 'b', 'a']),
       'names must differ'),
      (dict(images=x.images[:1], labels=x.labels[:1]), 'a single image')):
    np.savez(test, **arrays)
    expect(text, path=test)
  for arrays, text in (
      (dict(images=x.images[:, :8], labels=x.labels), 'differ in size'),
      (dict(images=x.images, labels=x.labels + 1), 'must be in .0, 3'),
      (dict(images=x.images, labels=x.labels, classes=['a', 'b', 'c']),
       'but those to learn from')):
    np.savez(test, **arrays)
    expect(text, test=str(test))
  whole = path.read_bytes()
  (tmp_path / 'cut.npz').write_bytes(whole[:200] + bytes(50) + whole[250:])
  expect('cut.npz: damaged', path=tmp_path / 'cut.npz')


def test_packed_cifar10(tmp_path):
  path = tmp_path / 'packed.npz'
  np.savez(path, **picture_files.cifar_arrays())
  data = image_data.read(options(path), 0, labels=True)
  assert data.train.classes == ('cat', 'dog', 'ship')
  assert data.train.images.shape == (9, 32, 32, 3)
  np.testing.assert_array_equal(data.test.labels, [0, 1, 2])


def test_datasets(tmp_path):
  x = image_data.synthetic(0, 20)
  image_store.write({'train': x}, tmp_path / 'one')
  image_store.write({'train': x, 'test': image_data.synthetic(1, 5)},
                    tmp_path / 'two')
  one = image_data.read(options(tmp_path / 'one'), 0)
  assert (len(one.train), len(one.test)) == (18, 2)
  two = image_data.read(options(tmp_path / 'two'), 0)
  assert (len(two.train), len(two.test)) == (20, 5)


@pytest.mark.parametrize(
    'config', [classifier_cifar10, image_ar_cifar10, vq_cifar10])
def test_configs_name_the_same(config):
  assert image_data.read(config.get_config('tiny').data, 0).train.size == (
      16, 16)
  assert set(config.get_config().data) == {'path', 'test', 'held_out'}


def test_a_stray_label_makes_no_classes(tmp_path):
  np.savez(tmp_path / 'x.npz', images=np.zeros((4, 8, 8, 3), np.uint8),
           labels=np.asarray([0, 1, 255, 1]))
  with pytest.raises(ValueError, match='label 255 of 4 images: more classes'):
    image_data.plain(tmp_path / 'x.npz')
