"""Emoji: which are drawn, in which split, and how."""

import sys

import numpy as np
import picture_files
import pytest

from specjax.data import emoji

SETS = ('noto', 'twemoji')


def names() -> list[str]:
  """Returns names of icons, at least one of them in the test split."""
  concepts = ['waving-hand', 'red-heart', 'cat']
  held_out = next(f'sign-{i}' for i in range(999)
                  if emoji.is_test(f'sign {i}'))
  return [*concepts, 'waving-hand-medium-dark-skin-tone', held_out]


@pytest.fixture
def tarball(tmp_path):
  red = picture_files.icon_set('red', names())
  blue = picture_files.icon_set('blue', [*names(), 'white'])
  blue['icons']['white'] = {'body': '<rect width="9" fill="white"/>'}
  blue['icons']['cat'] = {
      'body': '<rect x="4" width="8" height="16" fill="blue"/>', 'left': 4,
      'width': 8}
  # In another order than they are asked for, with one that is not.
  return picture_files.tarball(tmp_path / 'iconify.tgz', {
      'twemoji': blue, 'mdi': {'icons': {}}, 'noto': red})


def test_icons_are_read_in_order_on_a_square_canvas(tarball):
  icons = list(emoji.icons(tarball, SETS))
  assert [i.style for i in icons] == ['noto'] * 5 + ['twemoji'] * 6
  assert icons[3].caption == 'waving hand medium dark skin tone'
  assert 'viewBox="0.0 -8.0 32 32" width="32"' in icons[0].svg
  (cat,) = [i for i in icons if (i.style, i.caption) == ('twemoji', 'cat')]
  assert 'viewBox="0.0 0.0 16 16"' in cat.svg


def test_a_concept_is_in_one_split_whatever_the_tone():
  captions = [f'person {i}' for i in range(2000)]
  share = np.mean([emoji.is_test(c) for c in captions])
  assert 0.035 < share < 0.065
  for caption in captions[:200]:
    for tone in ('light', 'medium light', 'medium', 'medium dark', 'dark'):
      assert emoji.is_test(f'{caption} {tone} skin tone') == (
          emoji.is_test(caption))


def test_icons_refuse(tarball, tmp_path):
  with pytest.raises(ValueError, match='nowhere.tgz: no such file; `npm pack'):
    list(emoji.icons(tmp_path / 'nowhere.tgz'))
  with pytest.raises(ValueError, match='lacks package/json/noto-v1.json, p'):
    list(emoji.icons(tarball))
  with pytest.raises(ValueError, match="sets=.'noto', 'noto'.: one or more"):
    list(emoji.icons(tarball, ('noto', 'noto')))
  with pytest.raises(ValueError, match='other.json is not a set of icons'):
    list(emoji.icons(picture_files.tarball(
        tmp_path / 'other.tgz', {'other': {'prefix': 'x'}}), ('other',)))
  tarball.write_bytes(tarball.read_bytes()[:200])
  with pytest.raises(ValueError, match='not a tarball of icons that can be'):
    list(emoji.icons(tarball, SETS))


def test_without_the_rasteriser_the_error_names_it(tarball, monkeypatch):
  monkeypatch.setitem(sys.modules, 'resvg_py', None)
  with pytest.raises(ImportError, match='pip install resvg-py'):
    emoji.read_emoji(tarball, 8, 'train', sets=SETS)


def test_emoji_are_drawn(tarball):
  pytest.importorskip('resvg_py', reason='resvg_py is not installed')
  train = emoji.read_emoji(tarball, 16, 'train', sets=SETS)
  test = emoji.read_emoji(tarball, 16, 'test', sets=SETS)
  assert train.images.shape == (8, 16, 16, 3)
  assert train.classes == SETS and train.labels.tolist() == [0] * 4 + [1] * 4
  assert train.captions[:4] == (
      'waving hand', 'red heart', 'cat', 'waving hand medium dark skin tone')
  # A wide rectangle: in the middle, white above and below.
  np.testing.assert_array_equal(train.images[0, 8, 8], (255, 0, 0))
  np.testing.assert_array_equal(train.images[4, 8, 0], (0, 0, 255))
  np.testing.assert_array_equal(train.images[4, :3], 255)
  # A narrow one, whose canvas begins at x = 4.
  (cat,) = [i for i in range(4, 8) if train.captions[i] == 'cat']
  np.testing.assert_array_equal(train.images[cat, 8, 5:11, 0], 0)
  np.testing.assert_array_equal(train.images[cat, 8, [0, 2, 14]], 255)
  assert test.captions == (names()[-1].replace('-', ' '),) * 2
  dropped = {**train.dropped, **test.dropped}
  assert dropped == {'blank': ('twemoji/white',)}


def test_nothing_left_is_an_error(tmp_path):
  pytest.importorskip('resvg_py', reason='resvg_py is not installed')
  broken = {'icons': {'cat': {'body': '<rect'}}}
  path = picture_files.tarball(tmp_path / 'x.tgz', {'noto': broken})
  with pytest.raises(ValueError, match='left in the split .train.: 1 cannot '
                     'be drawn .noto/cat.'):
    emoji.read_emoji(path, 8, 'train', sets=('noto',))
