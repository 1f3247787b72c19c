"""`python -m train.classifier`: what it learns, leaves, and goes on from."""

from __future__ import annotations

import json
import signal

import jax
import numpy as np
import pytest

from configs import classifier_cifar10
from specjax.eval import diversity
from specjax.eval.classifier import load
from specjax.models.classifier import Classifier
from train import classifier as program
from train import image_data, loop

TINY = ('train.classifier', '--config', 'configs/classifier_cifar10.py:tiny')


def rows(folder, kind):
  found = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  return [r for r in found if r['kind'] == kind]


def test_a_run_learns_what_it_saves(command, tmp_path):
  x = image_data.synthetic(0, 200)
  np.savez(tmp_path / 'x.npz', images=x.images, labels=x.labels,
           classes=np.array(['red', 'green', 'blue']))
  process = command(*TINY, '--out', tmp_path / 'out',
                    f'--config.data.path={tmp_path / "x.npz"}',
                    '--config.data.held_out=0.25')
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 0, stderr
  assert '150 images to learn from, 50 to be tested on, 3 classes' in stderr
  judge = load(tmp_path / 'out' / 'classifier', Classifier.of)
  assert judge.classes[2] == 'blue' and judge.name in stderr
  fresh = image_data.synthetic(7, 80)
  found = diversity.per_class_accuracy(
      judge.logits(fresh.images), fresh.labels)
  assert found.mean > 0.9 and judge.facts['metrics']['accuracy'] > 0.9
  losses = [r['loss'] for r in rows(tmp_path / 'out', 'train')]
  assert losses[-1] < losses[0] / 2
  tests = rows(tmp_path / 'out', 'eval')
  # 20 epochs of 150 images by 32.
  assert [r['step'] for r in tests] == [0, 20, 40, 60, 80, 93]
  assert {k: v for k, v in tests[-1].items() if k != 'kind'} == (
      judge.facts['metrics'])


def small():
  """Returns the tiny config with a network that compiles at once."""
  config = classifier_cifar10.get_config('tiny')
  config.model.num_stages = 1
  return config


class Stop:
  """Asks for a stop the `after`-th time that it is looked at."""

  def __init__(self, after=0):
    self.signal, self._left = 0, after

  def look(self, together):
    self._left -= 1
    if not self._left:
      self.signal = int(signal.SIGTERM)
    return self.signal


def test_a_run_goes_on_exactly(tmp_path):
  config = small()
  config.epochs = 3.5  # of 64 images by 32: seven steps
  config.log_every = config.eval_every = config.save_every = 2
  data = image_data.read(config.data, 0, labels=True)

  def complete(folder, stop):
    return loop.complete(
        program.Run(config, data, None), tmp_path / folder, data.digest,
        None, stop, True)
  for folder in ('whole', 'parts'):
    (tmp_path / folder).mkdir()
  whole, metrics, code = complete('whole', Stop())
  assert code == 0 and int(whole.step) == 7
  _, _, code = complete('parts', Stop(after=4))
  assert code == 128 + signal.SIGTERM
  again, others, code = complete('parts', Stop())
  assert code == 0
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole),
               jax.device_get(again))
  assert [r['step'] for r in others.of('train')] == [2, 3, 4, 6, 7]
  tests = [[{k: v for k, v in r.items() if k != 'minutes'} for r in m.of(
      'eval')] for m in (metrics, others)]
  assert tests[0] == tests[1] and [r['step'] for r in tests[0]] == [
      0, 2, 4, 6, 7]


def test_a_batch_may_be_more_than_all_images():
  config = small()
  some = image_data.synthetic(0, 20)
  run = program.Run(config, image_data.Data(some, some), None)
  assert run.plan() == 12  # 20 epochs of 20 images by 32
  config.epochs = 0.5
  assert run.plan() == 1
  run.schedule(1)
  state, report, count = run.step(run.fresh(), 0)
  assert count == 32 and report['bad'] == 0 and int(state.step) == 1


def test_a_class_without_test_images():
  some = image_data.synthetic(0, 20)
  test = image_data.part(some, np.flatnonzero(some.labels != 1))
  run = program.Run(small(), image_data.Data(some, test), None)
  row = run.evaluate(run.fresh(), 0, 0.0)
  assert row['by_class'][1] is None and 0 <= row['accuracy'] <= 1
  assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize('change', [
    {'epochs': 0.0}, {'steps': -1}, {'batch_size': 0}, {'eval_every': 0},
    {'save_every': 0}, {'log_every': 0}])
def test_values_that_cannot_be_run(change):
  config = classifier_cifar10.get_config('tiny')
  loop.check(config)
  config.update(change)
  with pytest.raises(ValueError, match=f'config.{list(change)[0]}='):
    loop.check(config)
