"""States of a run on disk; logs; kinds that do not exist."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specjax.distill import kinds
from specjax.distill.trainer import TrainState
from specjax.host import tiny
from specjax.io import checkpoint
from specjax.io.errors import FormatError, OutputError
from train import fit_run, log
from train.checkpoints import Checkpoints

CONFIG = {'seed': 0, 'model': {'taps': (1, 2)}, 'log_every': 5}
FACTS = {'num_steps': 9, 'elapsed_s': 1.5}


def a_state(width=3, step=0):
  net = {'a': jnp.arange(width, dtype=jnp.float32), 'b': {'c': jnp.ones(2)}}
  return TrainState(net=net, opt=optax.adamw(1.0).init(net),
                    step=jnp.int32(step), bad=jnp.int32(0))


def shapes(state):
  return jax.eval_shape(lambda: state)


def test_the_newest_state_comes_back(tmp_path):
  saved = Checkpoints(tmp_path / 'c', CONFIG, 'x')
  assert saved.restore(shapes(a_state()), None) is None
  for step in (2, 4, 6):
    saved.save(a_state(step=step), step, FACTS)
  assert saved.steps == [4, 6]
  again = Checkpoints(tmp_path / 'c', {**CONFIG, 'log_every': 7}, 'x')
  state, facts = again.restore(shapes(a_state()), None)
  jax.tree.map(np.testing.assert_array_equal, state, a_state(step=6))
  assert (facts['step'], facts['num_steps']) == (6, 9)


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path):
  saved = Checkpoints(tmp_path / 'c', CONFIG, 'x')
  for step in (2, 4):
    saved.save(a_state(step=step), step, FACTS)

  def damage(folder):
    for path in folder.rglob('*'):
      if path.is_file():
        path.write_bytes(path.read_bytes()[:7])
  damage(tmp_path / 'c' / '00000004')
  with pytest.warns(UserWarning, match='00000004: cannot be read: '):
    state, facts = saved.restore(shapes(a_state()), None)
  jax.tree.map(np.testing.assert_array_equal, state, a_state(step=2))
  assert facts['step'] == 2
  saved.save(a_state(step=4), 4, FACTS)  # in its place
  assert saved.restore(shapes(a_state()), None)[1]['step'] == 4
  damage(tmp_path / 'c')
  with pytest.warns(UserWarning), pytest.raises(
      FormatError, match='00000002: cannot be read: .*; nor can .* delete'):
    saved.restore(shapes(a_state()), None)


def test_states_of_other_runs_are_refused(tmp_path):
  Checkpoints(tmp_path, CONFIG, 'x').save(a_state(), 1, FACTS)

  def restore(config=CONFIG, digest='x', state=None):
    return Checkpoints(tmp_path, config, digest).restore(
        shapes(state or a_state()), None)
  with pytest.raises(FormatError, match=r'config.seed=0, now 1'):
    restore({**CONFIG, 'seed': 1})
  with pytest.raises(FormatError, match=r'config.model.taps=\[1, 2\], now'):
    restore({**CONFIG, 'model': {'taps': (1, 3)}})
  with pytest.raises(FormatError, match='other text'):
    restore(digest='y')
  with pytest.raises(FormatError, match=(
      r'another architecture: net.a is float32\[3\] there, '
      r'float32\[4\] here')):
    restore(state=a_state(4))
  more = a_state()
  more = more.replace(net={**more.net, 'd': jnp.ones(1)})
  with pytest.raises(FormatError, match=r'net.d is absent there'):
    restore(state=more)


def test_a_full_disk_keeps_the_states_before(monkeypatch, tmp_path):
  saved = Checkpoints(tmp_path, CONFIG, 'x')
  saved.save(a_state(), 1, FACTS)
  real = checkpoint.save

  def full(folder, params, facts):
    real(folder, {k: params[k] for k in list(params)[:1]}, facts)
    raise OSError(28, os.strerror(28))
  monkeypatch.setattr(checkpoint, 'save', full)
  with pytest.raises(OutputError, match=(
      'No space left.*the state of step 1 is intact')):
    saved.save(a_state(step=2), 2, FACTS)
  assert saved.steps == [1]
  assert [p.name for p in tmp_path.iterdir()] == ['00000001']
  assert int(saved.restore(shapes(a_state()), None)[0].step) == 0


# Of a file: a disk that is full for all of them needs the rights to mount.
FULL = '''
import resource, sys, numpy as np
from pathlib import Path
from train.checkpoints import Checkpoints
from specjax.host import cli
saved = Checkpoints(Path(sys.argv[1]), {}, 'x')
state = {'a': np.random.default_rng(0).normal(size=1 << 18)}
def main():
  saved.save({'a': np.ones(3)}, 1, {})
  resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
  saved.save(state, 2, {})
sys.argv[1:] = []
cli.run(main)
'''


def test_a_full_disk_is_told_in_a_line(tmp_path):
  """Orbax would log it once a thread, with tracebacks."""
  done = subprocess.run(
      [sys.executable, '-c', FULL, tmp_path], capture_output=True, text=True)
  assert done.returncode == 1 and not done.stdout
  assert done.stderr == (
      f'error: {tmp_path}/00000002: cannot save: File too large; the state of '
      'step 1 is intact\n')
  assert Checkpoints(tmp_path, {}, 'x').steps == [1]


def test_a_disk_without_any_space(monkeypatch, tmp_path):
  saved = Checkpoints(tmp_path, CONFIG, 'x')
  saved.save(a_state(), 1, FACTS)
  usage = shutil.disk_usage(tmp_path)._replace(free=4096)
  monkeypatch.setattr(checkpoint.shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(OutputError, match='save: No space left on device; the'):
    saved.save(a_state(step=2), 2, FACTS)
  assert [p.name for p in tmp_path.iterdir()] == ['00000001']


def test_means_of_reports():
  report = {'weight': np.asarray([4.0, 2]), 'match': np.asarray([2.0, 2]),
            'loss': 1.0, 'bad': 0}
  other = {'weight': np.asarray([4.0, 0]), 'match': np.asarray([4.0, 0]),
           'loss': 2.0, 'bad': 0}
  row = log.summary([report, other, {**other, 'loss': np.nan, 'bad': 1}])
  assert row == {'bad_steps': 1, 'match': [0.75, 1.0], 'loss': 1.5}
  assert log.summary([{**report, 'bad': 2}]) == {'bad_steps': 1}


def test_a_line_says_which_steps_had_no_loss():
  rest = {'step': 6, 'tokens_per_s': 50, 'left_s': 61}
  fine = {'loss': 1.5, 'match': [0.75], 'acceptance': [1.0]}
  scores = 'loss 1.5000, acceptance 100 %, match 75 %, '
  why = 'loss or gradient not finite in {}, '
  for row, said in (
      ({'bad_steps': 0, **fine}, scores),
      ({'bad_steps': 1, **fine}, scores + why.format('1 step')),
      ({'bad_steps': 3}, why.format('3 steps'))):
    assert log.train_line({**row, **rest}, 9) == (
        f'step 6/9, {said}50 tokens/s, 1:01 left')
  run = types.SimpleNamespace(num_steps=9, unit='images')  # nothing is asked
  assert fit_run.Run.train_line(run, {'bad_steps': 3, **rest}) == (
      f'step 6/9, {why.format("3 steps")}50 images/s, 1:01 left')


def test_a_line_of_metrics_that_was_cut_off_is_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"kind": "train", "step": 2}\n{"kind": "tra')
  assert [r['step'] for r in log.Metrics(tmp_path, 4).rows] == [2]
  path.write_text('{"kind": "tra\n{"kind": "train", "step": 2}\n')
  with pytest.raises(ValueError, match='metrics.jsonl: line 1: '):
    log.Metrics(tmp_path, 4)


def test_metrics_go_on_where_the_state_was_saved(tmp_path):
  first = log.Metrics(tmp_path)
  for step in (2, 4, 6):
    first.write('train', {'step': step, 'match': [0.5, 0.25]})
  again = log.Metrics(tmp_path, 4)
  again.write('eval', {'step': 4, 'held_out': {'loss': 1.0}})
  again.close()
  assert [r['step'] for r in again.of('train')] == [2, 4]
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(x)['step'] for x in lines] == [2, 4, 4]
  table = (tmp_path / 'metrics.csv').read_text().splitlines()
  assert table[0] == 'kind,step,match.1,match.2,held_out.loss'
  assert table[3] == 'eval,4,,,1.0'


def test_a_full_disk_is_not_told_in_the_place_of_what_ended_a_run(
    monkeypatch, tmp_path):
  def full(path, text):
    raise OutputError(f'{path}: full')
  metrics = log.Metrics(tmp_path)
  metrics.write('train', {'step': 1})
  monkeypatch.setattr(log.output, 'write_text', full)
  with pytest.raises(FloatingPointError), metrics:
    raise FloatingPointError
  with pytest.raises(OutputError, match='metrics.csv: full'), metrics:
    pass


def test_scalars_go_to_tensorboard_where_it_is(monkeypatch, tmp_path):
  told = []

  class SummaryWriter:
    """Remembers what it is told."""

    def __init__(self, folder):
      told.append(folder)

    def add_scalar(self, *args):
      told.append(args)

    def close(self):
      told.append('closed')
  fake = types.ModuleType('tensorboardX')
  fake.SummaryWriter = SummaryWriter
  monkeypatch.setitem(sys.modules, 'tensorboardX', fake)
  metrics = log.Metrics(tmp_path)
  metrics.write('train', {'step': 3, 'loss': 0.5, 'match': [0.25]})
  metrics.close()
  assert told == [str(tmp_path / 'tensorboard'), ('train/loss', 0.5, 3),
                  ('train/match.1', 0.25, 3), 'closed']


@pytest.mark.parametrize('kind, values, message', [
    ('eagle9', {}, 'known are dspark'),
    ('dspark', {'model': {'taps': (1, 3)}}, 'streams 0 to 2'),
    ('dspark', {'model': {'colour': 1}}, 'model.colour: unknown for Block'),
    ('medusa', {'model': {'taps': (1,)}}, 'model.taps: unknown for Heads'),
    ('eagle3', {'task': {'gamma': 1.0}}, 'task.gamma: unknown for Eagle'),
    ('dspark', {'loss': {'last': {'kl': 1.0}}}, 'loss.first'),
    ('dspark', {'loss': {'first': {'hinge': 1.0}}}, 'hinge')])
def test_kinds_that_do_not_exist(kind, values, message):
  with pytest.raises(ValueError, match=message):
    kinds.build(kind, tiny.config(), 100, **values)
