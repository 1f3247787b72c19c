"""Readers of images: what comes out, what is left out, what is refused."""

import os

import numpy as np
import picture_files
from PIL import Image
import pytest

from specjax.data import images
from specjax.data.images import Images


def make(num: int = 4, **kwargs) -> Images:
  options = dict(labels=np.arange(num, dtype=np.int32) % 2,
                 classes=('cat', 'dog'), name='toy')
  return Images(np.zeros((num, 4, 6, 3), np.uint8), **{**options, **kwargs})


@pytest.fixture
def packed(tmp_path):
  """Returns a function that writes a packed CIFAR-10 with changes."""
  def write(**changes):
    arrays = {**picture_files.cifar_arrays(), **changes}
    path = tmp_path / 'cifar.npz'
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path
  return write


def test_images_count_their_classes():
  one = make(5)
  assert (len(one), one.size, one.num_classes) == (5, (4, 6), 2)
  assert one.counts() == {'cat': 3, 'dog': 2}
  bare = make(labels=None, classes=())
  assert (bare.num_classes, bare.counts()) == (0, {})


@pytest.mark.parametrize('changes, message', [
    (dict(images=np.zeros((2, 4, 4, 3), np.int32)), 'images are int32.2, 4'),
    (dict(images=np.zeros((2, 4, 4, 1), np.uint8)), 'uint8.N,H,W,3'),
    (dict(images=np.zeros((0, 4, 4, 3), np.uint8)), 'none of them 0'),
    (dict(labels=np.zeros(4, np.int64)), r'labels are int64.4., must be int3'),
    (dict(labels=np.zeros(3, np.int32)), r'must be int32.4.'),
    (dict(labels=np.full(4, 2, np.int32)),
     r'toy: labels in .2, 2., must be in .0, 2.'),
    (dict(labels=np.full(4, -1, np.int32)), r'must be in .0, 2.'),
    (dict(labels=None), '2 classes, but no labels'),
    (dict(captions=('a', 'b')), '2 captions for 4 images'),
    (dict(classes=('cat', 'cat')), 'names must differ'),
    (dict(classes=('cat', 'dog ')), 'without spaces around'),
    (dict(classes=('cat', 'a\nb')), 'be one line'),
    (dict(name=''), 'must not be empty')])
def test_images_refuse(changes, message):
  with pytest.raises(ValueError, match=message):
    Images(**{**dict(
        images=np.zeros((4, 4, 6, 3), np.uint8),
        labels=np.zeros(4, np.int32), classes=('cat', 'dog'), name='toy'),
              **changes})


def test_cifar10(packed):
  path = packed()
  train = images.read_cifar10(path, 'train')
  test = images.read_cifar10(str(path), 'test', watch=reversed_twice)
  assert train.images.shape == (9, 32, 32, 3)
  assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
  np.testing.assert_array_equal(
      train.images[:, 0, 0, 0], [20 * i for i in range(12) if i % 4 != 3])
  np.testing.assert_array_equal(test.images[:, 5, 5, 2], [60, 140, 220])
  assert train.labels.tolist() == [0, 1, 2, 1, 2, 0, 2, 0, 1]
  assert test.counts() == {'cat': 1, 'dog': 1, 'ship': 1}
  assert test.name == 'cifar10'


def reversed_twice(items):
  assert len(items) == 3
  return reversed(list(reversed(items)))


@pytest.mark.parametrize('changes, message', [
    (dict(blob=None, classes=None),
     r"lacks .'blob', 'classes'.; expected are blob uint8"),
    (dict(labels=np.arange(12)), r'labels in .0, 11., must be in .0, 3.'),
    (dict(labels=np.zeros(12)), 'labels is float64.12., must be int.N., N'),
    (dict(is_test=np.zeros(11, bool)), r'is_test is bool.11., must be bool.N'),
    (dict(is_test=np.zeros(12, bool)), "no image of the split 'test'"),
    (dict(offsets=np.arange(13)[::-1].copy()), 'offsets must not decrease'),
    (dict(offsets=np.arange(13) * 10_000), 'offsets must not decrease, in .0'),
    (dict(offsets=np.arange(13)), 'cifar.npz: image 3: not an image'),
    ({k: v for k, v in picture_files.cifar_arrays(size=16).items()
      if k in ('blob', 'offsets')}, 'mode RGB, 16x16; must be RGB, 32x32')])
def test_cifar10_refuses(packed, changes, message):
  with pytest.raises(ValueError, match=message):
    images.read_cifar10(packed(**changes), 'test')


def test_cifar10_refuses_other_files(packed, tmp_path):
  with pytest.raises(ValueError, match="split='valid': one of train, test"):
    images.read_cifar10(packed(), 'valid')
  with pytest.raises(ValueError, match='nowhere.npz: no such file'):
    images.read_cifar10(tmp_path / 'nowhere.npz', 'train')
  path = packed()
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match='not an .npz file that can be read'):
    images.read_cifar10(path, 'train')


def test_folder(tmp_path):
  root = picture_files.folder(tmp_path / 'pets')
  assert images.splits_of(root) == ('train',)
  found = images.read_folder(root, 8, 'train')
  assert found.classes == ('a_cats', 'b_dogs') and found.name == 'pets'
  assert found.labels.tolist() == [0, 0, 0, 1, 1]
  assert found.images.shape == (5, 8, 8, 3)
  for image, colour in zip(found.images, (
      (0, 128, 0), (77, 77, 77), None, (255, 255, 255), (128, 128, 128)),
      strict=True):
    assert np.ptp(image, (0, 1)).max() <= 2  # one colour
    if colour is not None:
      np.testing.assert_array_equal(image[0, 0], colour)
  # Cyan and magenta are blue, as far as a JPEG keeps it.
  red, _, blue = found.images[2, 4, 4].astype(int)
  assert blue - red > 60
  assert found.dropped == {
      'damaged': ('b_dogs/cut.jpg',), 'not an image': ('b_dogs/notes.txt',),
      'not in the folder of a class': ('README',)}
  assert images.describe(found.dropped) == (
      '1 not in the folder of a class (README); '
      '1 damaged (b_dogs/cut.jpg); 1 not an image (b_dogs/notes.txt)')


def test_folder_takes_the_middle_and_turns(tmp_path):
  (tmp_path / 'x').mkdir()
  wide = np.zeros((4, 12, 3), np.uint8)
  wide[:, 4:8] = np.arange(48).reshape(4, 4, 3)
  Image.fromarray(wide).save(tmp_path / 'x' / 'a.png')
  turned = Image.fromarray(wide)
  turned.getexif()[0x0112] = 6  # the camera was turned: 90 degrees clockwise
  turned.save(tmp_path / 'x' / 'b.png', exif=turned.getexif())
  found = images.read_folder(tmp_path, 4, 'train').images
  np.testing.assert_array_equal(found[0], wide[:, 4:8])
  np.testing.assert_array_equal(found[1], np.rot90(wide[:, 4:8], -1))


def test_what_is_transparent_is_white(tmp_path):
  (tmp_path / 'x').mkdir()
  Image.new('LA', (4, 4), (0, 0)).save(tmp_path / 'x' / 'a.png')
  Image.new('RGBA', (4, 4), (0, 0, 0, 51)).save(tmp_path / 'x' / 'b.png')
  palette = Image.new('P', (4, 4), 1)
  palette.putpalette([9, 9, 9, 0, 0, 255])
  palette.save(tmp_path / 'x' / 'c.png', transparency=1)
  palette.save(tmp_path / 'x' / 'd.png', transparency=0)
  found = images.read_folder(tmp_path, 4, 'train').images
  np.testing.assert_array_equal(
      found[:, 1, 1], [[255] * 3, [204] * 3, [255] * 3, [0, 0, 255]])


def test_a_folder_leaves_out_what_is_too_large_or_closed(
    tmp_path, monkeypatch):
  (tmp_path / 'x').mkdir()
  for name, side in (('large', 9), ('small', 3), ('secret', 3)):
    Image.new('RGB', (side, side)).save(tmp_path / 'x' / f'{name}.png')
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 20)
  opened = Image.open

  def open_if_allowed(path):
    if path.name == 'secret.png':
      raise PermissionError
    return opened(path)
  monkeypatch.setattr(Image, 'open', open_if_allowed)
  found = images.read_folder(tmp_path, 4, 'train')
  assert len(found) == 1
  assert found.dropped == {'too many pixels': ('x/large.png',),
                           'not readable': ('x/secret.png',)}


def test_folder_with_splits(tmp_path):
  picture_files.folder(tmp_path / 'train')
  (tmp_path / 'test' / 'c_birds').mkdir(parents=True)
  Image.new('F', (4, 4)).save(tmp_path / 'test' / 'c_birds' / 'f.tiff')
  Image.new('RGB', (4, 4)).save(tmp_path / 'test' / 'c_birds' / 'r.tiff')
  (tmp_path / 'test' / 'c_birds' / 'deeper').mkdir()
  (tmp_path / 'valid').mkdir()
  assert images.splits_of(tmp_path) == ('train', 'test')
  test = images.read_folder(tmp_path, 4, 'test')
  assert test.counts() == {'a_cats': 0, 'b_dogs': 0, 'c_birds': 1}
  assert test.dropped == {
      'beside train and test': ('valid',),
      'a folder in the folder of a class': ('test/c_birds/deeper',),
      'pixels of unknown range (mode F)': ('test/c_birds/f.tiff',)}
  train = images.read_folder(tmp_path, 4, 'train')
  assert train.classes == test.classes
  assert train.labels.tolist() == [0, 0, 0, 1, 1]


def test_a_class_may_be_called_train(tmp_path):
  for name in ('train', 'plane'):
    (tmp_path / name).mkdir()
    Image.new('RGB', (4, 4)).save(tmp_path / name / 'a.png')
  assert images.splits_of(tmp_path) == ('train',)
  assert images.read_folder(tmp_path, 4, 'train').classes == (
      'plane', 'train')


def test_folder_refuses(tmp_path):
  with pytest.raises(ValueError, match='nowhere: no such folder'):
    images.read_folder(tmp_path / 'nowhere', 4, 'train')
  with pytest.raises(ValueError, match='no image is left: nothing in it'):
    images.read_folder(tmp_path, 4, 'train')
  (tmp_path / 'cats').mkdir()
  (tmp_path / 'cats' / 'a.png').write_text('x')
  with pytest.raises(ValueError, match='left: 1 not an image .cats/a.png.'):
    images.read_folder(tmp_path, 4, 'train')
  with pytest.raises(ValueError, match="no split 'test'; has train"):
    images.read_folder(tmp_path, 4, 'test')
  with pytest.raises(ValueError, match='size=0: must be >= 1'):
    images.read_folder(tmp_path, 0, 'train')


@pytest.mark.weights
@pytest.mark.parametrize('split, each', [('train', 5000), ('test', 1000)])
def test_the_real_cifar10(split, each):
  path = os.environ.get('SPECJAX_CIFAR10')
  if not path:
    pytest.skip('SPECJAX_CIFAR10 does not name the .npz of CIFAR-10')
  found = images.read_cifar10(path, split)
  assert set(found.counts().values()) == {each} and found.num_classes == 10
  assert found.classes[0] == 'airplane' and found.classes[9] == 'truck'
  np.testing.assert_allclose(
      found.images.mean((0, 1, 2)) / 255, [.491, .482, .447], atol=.005)
