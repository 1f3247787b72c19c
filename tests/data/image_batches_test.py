"""Batches of images and codes: a function of seed and step."""

import itertools

import numpy as np
import pytest

from specjax.data.image_batches import Batches, Codes
from specjax.data.images import Images

NUM = 10


def pictures(num: int = NUM, labels: bool = True) -> Images:
  """Returns images that know their row (channel 0) and column (channel 1)."""
  images = np.zeros((num, 4, 6, 3), np.uint8)
  images[..., 0] = np.arange(num)[:, None, None]
  images[..., 1] = np.arange(6)
  if not labels:
    return Images(images)
  return Images(images, np.arange(num, dtype=np.int32) % 3,
                classes=('a', 'b', 'c'))


def codes(num: int = NUM, flipped: bool = True) -> Codes:
  rows = np.arange(num, dtype=np.int32)[:, None] * 10 + np.arange(
      5, dtype=np.int32)
  return Codes(rows, np.arange(num, dtype=np.int32) % 3,
               rows + 1000 if flipped else None)


def same(one, other) -> bool:
  return all(np.array_equal(one[k], other[k]) for k in (*one, *other))


def test_shapes_and_what_belongs_together():
  batches = Batches(pictures(), 8, 3)
  for step in range(5):
    batch = batches.batch(step)
    assert batch['image'].shape == (8, 4, 6, 3)
    assert batch['image'].dtype == np.uint8
    assert batch['label'].dtype == np.int32
    row = batch['image'][:, 0, 0, 0]
    np.testing.assert_array_equal(batch['image'][..., 0].T, np.broadcast_to(
        row, (6, 4, 8)))
    np.testing.assert_array_equal(batch['label'], row % 3)


def test_every_pass_shows_every_image_once():
  found = [Batches(pictures(), 4, 1).batch(s)['image'][:, 0, 0, 0]
           for s in range(10)]
  passes = np.concatenate(found).reshape(4, NUM)
  np.testing.assert_array_equal(
      np.sort(passes), np.broadcast_to(np.arange(NUM), (4, NUM)))
  assert len({tuple(p) for p in passes.tolist()}) == 4
  # A batch may be larger than the set.
  large = Batches(pictures(), 25, 1).batch(0)['image'][:, 0, 0, 0]
  np.testing.assert_array_equal(large, passes.ravel()[:25])


@pytest.mark.parametrize('data', [pictures(), codes()])
def test_a_pure_function_of_seed_and_step(data):
  def stream(seed):
    return Batches(data, 4, seed, class_dropout=.5, num_classes=3)
  in_order = list(itertools.islice(stream(5).stream(), 6))
  again = stream(5)
  for step in (5, 0, 3):  # in any order
    assert same(again.batch(step), in_order[step])
  resumed = list(itertools.islice(stream(5).stream(start=4), 2))
  assert same(resumed[0], in_order[4]) and same(resumed[1], in_order[5])
  assert not same(stream(6).batch(0), in_order[0])
  coins = [Batches(data, 64, 5, num_classes=3).batch(step) for step in (0, 5)]
  assert not same(*coins)


def test_half_are_mirrored():
  whole = [Batches(pictures(), 100, 2).batch(s)['image'] for s in range(10)]
  images = np.concatenate(whole)
  mirrored = images[:, 0, 0, 1] == 5
  assert 430 < mirrored.sum() < 570  # 4.4 standard deviations
  np.testing.assert_array_equal(
      images[mirrored][:, 0, :, 1],
      np.broadcast_to(np.arange(6)[::-1], (mirrored.sum(), 6)))
  np.testing.assert_array_equal(
      images[~mirrored][:, 0, :, 1],
      np.broadcast_to(np.arange(6), ((~mirrored).sum(), 6)))
  off = Batches(pictures(), 100, 2, flip=False).batch(0)
  assert (off['image'][:, 0, 0, 1] == 0).all()
  # The images themselves are as they were.
  data = pictures()
  for step in range(3):
    Batches(data, 100, 2).batch(step)['image'][:] = 9
  np.testing.assert_array_equal(data.images, pictures().images)


def test_codes_are_mirrored_where_the_images_are():
  of_images = Batches(pictures(), 64, 7).batch(3)
  of_codes = Batches(codes(), 64, 7, num_classes=3).batch(3)
  assert of_codes['codes'].shape == (64, 5)
  assert of_codes['codes'].dtype == np.int32
  row = of_images['image'][:, 0, 0, 0].astype(np.int32)
  mirrored = of_images['image'][:, 0, 0, 1] == 5
  np.testing.assert_array_equal(
      of_codes['codes'][:, 0], 10 * row + 1000 * mirrored)
  np.testing.assert_array_equal(of_codes['label'], of_images['label'])
  for stream in (Batches(codes(flipped=False), 64, 7, num_classes=3),
                 Batches(codes(), 64, 7, flip=False, num_classes=3)):
    np.testing.assert_array_equal(stream.batch(3)['codes'][:, 0], 10 * row)


def test_labels_are_dropped_as_often_as_asked():
  def labels(rate, **kwargs):
    stream = Batches(pictures(), 1000, 4, class_dropout=rate, **kwargs)
    return stream.batch(1)['label']
  whole = labels(0.0)
  assert whole.max() == 2
  some = labels(0.1)
  assert 58 < (some == 3).sum() < 142  # 4.4 standard deviations
  np.testing.assert_array_equal(some[some != 3], whole[some != 3])
  assert (labels(1.0) == 3).all()
  assert (labels(1.0, num_classes=7) == 7).all()
  # Mirroring does not depend on it.
  assert np.array_equal(
      *(Batches(pictures(), 64, 4, class_dropout=r).batch(0)['image']
        for r in (0.0, 0.7)))


def test_without_labels_all_are_of_the_null_class():
  assert (Batches(pictures(labels=False), 5, 0).batch(0)['label'] == 0).all()
  bare = Codes(codes().codes)
  assert (Batches(bare, 5, 0, num_classes=4).batch(0)['label'] == 4).all()


@pytest.mark.parametrize('data, changes, message', [
    (pictures(), dict(batch_size=0), 'batch_size=0: must be >= 1'),
    (pictures(), dict(seed=-1), 'seed=-1: must be in .0, 2..32.'),
    (pictures(), dict(seed=1 << 32), 'seed=4294967296: must be in'),
    (pictures(), dict(class_dropout=1.5), 'class_dropout=1.5: must be in .0'),
    (pictures(), dict(num_classes=2), r'labels in .0, 2., must be in .0, 2.'),
    (pictures(labels=False), dict(num_classes=-1), 'num_classes=-1: must be'),
    (codes(), {}, 'num_classes: must be given for codes')])
def test_batches_refuse(data, changes, message):
  options = {'batch_size': 4, 'seed': 0, **changes}
  with pytest.raises(ValueError, match=message):
    Batches(data, **options)


def test_a_step_is_not_negative():
  with pytest.raises(ValueError, match='step=-1'):
    Batches(pictures(), 4, 0).batch(-1)


@pytest.mark.parametrize('fields, message', [
    (dict(codes=np.zeros((2, 3), np.int64)), r'codes are int64.2, 3., must'),
    (dict(codes=np.zeros((2, 0), np.int32)), 'none of them 0'),
    (dict(codes=np.full((2, 3), -1, np.int32)), 'codes: the least is -1'),
    (dict(codes=np.zeros((2, 3), np.int32),
          flipped=np.zeros((2, 4), np.int32)), r'flipped are .2, 4., codes')])
def test_codes_refuse(fields, message):
  with pytest.raises(ValueError, match=message):
    Codes(**fields)
