"""`python -m train.images` as a user types it."""

import numpy as np
import picture_files
import pytest

from specjax.data import emoji, image_store
from train import images as program


def run(*arguments) -> int:
  return program.main([str(a) for a in arguments])


def test_cifar10(tmp_path, capsys):
  np.savez(tmp_path / 'x.npz', **picture_files.cifar_arrays())
  assert run('--source', 'cifar10', '--path', tmp_path / 'x.npz', '--out',
             tmp_path / 'set') == 0
  stdout = capsys.readouterr().out.splitlines()
  assert stdout[0] == 'train: 9 images, 32x32'
  assert stdout[1].split() == ['3', 'cat']
  assert 'test: 3 images, 32x32' in stdout
  assert len(image_store.source(tmp_path / 'set')) == 9
  facts = image_store.facts(tmp_path / 'set')
  assert (facts['source'], facts['file']) == ('cifar10', 'x.npz')
  assert image_store.read(tmp_path / 'set', 'test').labels.tolist() == [
      0, 1, 2]


def test_a_folder_says_what_was_dropped(tmp_path, capsys):
  picture_files.folder(tmp_path / 'pets')
  assert run('--source', 'folder', '--path', tmp_path / 'pets', '--size', 16,
             '--out', tmp_path / 'set', '--quiet') == 0
  stdout, stderr = capsys.readouterr()
  assert stdout.startswith('train: 5 images, 16x16\n')
  assert 'test:' not in stdout
  assert '1 damaged (b_dogs/cut.jpg)' in stdout and not stderr
  found = image_store.read(tmp_path / 'set')
  assert found.size == (16, 16) and found.classes == ('a_cats', 'b_dogs')
  assert image_store.facts(tmp_path / 'set')['dropped']['train'] == {
      'damaged': 1, 'not an image': 1, 'not in the folder of a class': 1}


def test_emoji(tmp_path, capsys):
  pytest.importorskip('resvg_py', reason='resvg_py is not installed')
  names = [f'sign-{i}' for i in range(60)]
  path = picture_files.tarball(tmp_path / 'x.tgz', {
      'noto': picture_files.icon_set('red', names)})
  assert run('--source', 'emoji', '--path', path, '--size', 8, '--sets',
             'noto', '--out', tmp_path / 'set') == 0
  held_out = sum(emoji.is_test(f'sign {i}') for i in range(60))
  assert f'test: {held_out} images, 8x8' in capsys.readouterr().out
  captions = image_store.read(tmp_path / 'set').captions
  assert len(captions) == 60 - held_out and captions[0] == 'sign 0'


@pytest.mark.parametrize('arguments, message', [
    (('--source', 'cifar10', '--size', 64), '--size=64: cifar10 is 32'),
    (('--source', 'folder', '--size', 0), '--size=0: must be >= 1'),
    (('--source', 'folder'), 'nowhere: no such folder'),
    (('--source', 'cifar10'), 'nowhere: no such file')])
def test_errors_are_one_line(tmp_path, capsys, arguments, message):
  assert run(*arguments, '--path', tmp_path / 'nowhere', '--out',
             tmp_path / 'set') == 1
  stderr = capsys.readouterr().err
  assert message in stderr and stderr.startswith('error: ')
  assert stderr.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_before_reading(tmp_path, capsys):
  (tmp_path / 'set').mkdir()
  (tmp_path / 'set' / 'mine').write_text('x')
  assert run('--source', 'folder', '--path', tmp_path / 'nowhere', '--out',
             tmp_path / 'set') == 1
  assert 'set exists: give a new folder' in capsys.readouterr().err
