"""`python -m train.classifier`, its images and its augmentation."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from configs import classifier_cifar10
from specjax.eval import diversity
from specjax.eval.classifier import load
from specjax.models.classifier import Classifier
from train import classifier as program

TINY = ('train.classifier', '--config', 'configs/classifier_cifar10.py:tiny')


def options(path, **changes):
  found = classifier_cifar10.get_config().data
  found.update(dict(path=str(path), **changes))
  return found


def test_a_run_learns_what_it_saves(command, tmp_path):
  x = program.synthetic(200, 0)
  np.savez(tmp_path / 'x.npz', images=x.images, labels=x.labels,
           classes=np.array(['red, across', 'red, along', 'blue, across',
                             'blue, along']))
  process = command(*TINY, '--out', tmp_path / 'out',
                    f'--config.data.path={tmp_path / "x.npz"}')
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 0, stderr
  assert '150 images to learn from, 50 to test on, 4 classes' in stderr
  judge = load(tmp_path / 'out' / 'classifier', Classifier.of)
  assert judge.classes[3] == 'blue, along'
  fresh = program.synthetic(80, 7)
  found = diversity.per_class_accuracy(
      judge.logits(fresh.images), fresh.labels)
  assert found.mean > 0.9 and judge.facts['accuracy'] > 0.9
  rows = [json.loads(line) for line in (
      tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()]
  losses = [r['loss'] for r in rows if r['kind'] == 'train']
  assert len(losses) == 20 and losses[-1] < losses[0] / 2
  tests = [r for r in rows if r['kind'] == 'eval']
  assert [r['epoch'] for r in tests] == [10, 20]
  assert tests[-1]['accuracy'] == judge.facts['accuracy']


def test_augmentation():
  x = np.arange(1, 2 * 6 * 5 * 3 + 1).reshape(2, 6, 5, 3).astype(np.uint8)
  key = jax.random.key(0)
  same = program.augment(key, x, flip=False, padding=0)
  np.testing.assert_array_equal(same, x)
  many = np.concatenate([np.repeat(x[:1], 64, 0)])
  flipped = np.asarray(program.augment(key, many, flip=True, padding=0))
  mirrored = [np.array_equal(y, x[0, :, ::-1]) for y in flipped]
  plain = [np.array_equal(y, x[0]) for y in flipped]
  assert all(a != b for a, b in zip(mirrored, plain, strict=True))
  assert 16 < sum(mirrored) < 48
  padded = np.pad(x[0], ((2, 2), (2, 2), (0, 0)))
  crops = {padded[i:i + 6, j:j + 5].tobytes(): (i, j)
           for i in range(5) for j in range(5)}
  found = np.asarray(program.augment(key, many, flip=False, padding=2))
  assert found.dtype == np.uint8 and found.shape == many.shape
  places = {crops[y.tobytes()] for y in found}  # each is a crop
  assert {i for i, _ in places} == {j for _, j in places} == set(range(5))


def test_files(tmp_path):
  x = program.synthetic(40, 0)
  path, test = tmp_path / 'x.npz', tmp_path / 'test.npz'
  np.savez(path, images=x.images, labels=x.labels.astype(np.int64))
  data = program.read(options(path, held_out=0.25), 0)
  assert (len(data.train.images), len(data.test.images)) == (30, 10)
  assert data.classes == ('0', '1', '2', '3')
  # A part each, and no image in both.
  both = np.concatenate([data.train.images, data.test.images])
  assert {y.tobytes() for y in both} == {y.tobytes() for y in x.images}
  np.savez(test, images=x.images[:6], labels=x.labels[:6])
  data = program.read(options(path, test=str(test)), 0)
  assert (len(data.train.images), len(data.test.images)) == (40, 6)

  def expect(text, **changes):
    with pytest.raises(ValueError, match=text):
      program.read(options(**{'path': path, **changes}), 0)
  expect('give an .npz', path='')
  expect('held_out=1.5', held_out=1.5)
  expect('cannot be read', path=tmp_path / 'absent.npz')
  for arrays, text in (
      (dict(images=x.images), "no array 'labels'"),
      (dict(images=x.images / 255, labels=x.labels), 'must be uint8'),
      (dict(images=x.images, labels=x.labels[1:]), 'labels'),
      (dict(images=x.images, labels=x.labels - 1), 'not in .0, '),
      (dict(images=x.images, labels=x.labels, classes=['a']), 'not in .0, 1')):
    np.savez(test, **arrays)
    expect(text, path=test)
  np.savez(test, images=x.images[:, :8], labels=x.labels)
  expect('differ in size', test=str(test))
  np.save(tmp_path / 'x.npy', x.labels)
  expect('a single array', path=tmp_path / 'x.npy')


def test_packed_cifar10(tmp_path):
  from io import BytesIO

  from PIL import Image
  blobs = []
  for i in range(8):
    file = BytesIO()
    Image.new('RGB', (32, 32), (30 * i, 0, 0)).save(file, 'JPEG')
    blobs.append(file.getvalue())
  np.savez(
      tmp_path / 'packed.npz', blob=np.frombuffer(b''.join(blobs), np.uint8),
      offsets=np.cumsum([0, *map(len, blobs)]), labels=np.arange(8) % 2,
      is_test=np.arange(8) > 4, classes=np.array(['dark', 'light']))
  data = program.read(options(tmp_path / 'packed.npz'), 0)
  assert data.classes == ('dark', 'light')
  assert data.train.images.shape == (5, 32, 32, 3)
  np.testing.assert_array_equal(data.test.labels, [1, 0, 1])


@pytest.mark.parametrize('change', [
    {'epochs': 0}, {'batch_size': 0}, {'eval_every': 0}, {'padding': -1},
    {'label_smoothing': 1.0}, {'label_smoothing': -0.1}])
def test_values_that_cannot_be_run(change):
  config = classifier_cifar10.get_config('tiny')
  program.check(config)
  config.update(change)
  with pytest.raises(ValueError, match=f'config.{list(change)[0]}='):
    program.check(config)


def test_too_few_images(tmp_path):
  config = classifier_cifar10.get_config('tiny')
  x = program.synthetic(20, 0)
  data = program.data_of(x, x)
  with pytest.raises(ValueError, match='batch_size=32: more than the 20'):
    program.fit(Classifier(), data, config, None, None)
