"""States of a run on disk; logs; the text that is learnt from."""

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

from specjax.data import store
from specjax.data.store import Record
from specjax.distill import kinds
from specjax.distill.trainer import TrainState
from specjax.host import tiny
from specjax.io import checkpoint
from specjax.io.errors import FormatError, OutputError
from train import log
from train import text as text_lib
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
from absl import logging
from pathlib import Path
from train.checkpoints import Checkpoints
from specjax.host import cli
saved = Checkpoints(Path(sys.argv[1]), {}, 'x')
state = {'a': np.random.default_rng(0).normal(size=1 << 18)}
def main():
  logging.set_verbosity(logging.WARNING)
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


def a_config(**data):
  from configs import drafter_smollm2
  config = drafter_smollm2.get_config('tiny')
  config.data.update(data)
  return config


def records(num, high=257):
  rng = np.random.default_rng(0)
  return [Record(rng.integers(0, high, 12).astype(np.int32), 4)
          for _ in range(num)]


def test_text_from_files(tmp_path):
  target, facts = tiny.model(), {'target': 'random'}
  store.save_npz(tmp_path / 'rollouts.npz', records(40), facts)
  text = text_lib.read(a_config(rollouts=str(tmp_path)), target, 0)
  # Nothing is held out there, so a share is taken away.
  num = text.facts['held_out_texts']
  assert 0 < num < 40 and text.facts['texts'] == 40 - num
  store.save_npz(tmp_path / 'rollouts-held_out.npz', records(5), facts)
  whole = text_lib.read(a_config(rollouts=str(tmp_path)), target, 0)
  assert whole.facts['texts'] == 40 and whole.facts['held_out_texts'] == 5
  assert whole.digest != text.digest
  assert len(whole.prompts) == 3 and all(len(p) == 4 for p in whole.prompts)
  half = text_lib.read(
      a_config(rollouts=str(tmp_path), share=0.5), target, 0)
  assert half.facts['texts'] == 20
  assert half.facts['supervised_tokens'] == 20 * 8
  ids, vocab = text_lib.vocabulary(whole, target, 100)
  answers = np.concatenate([r.answer for r in records(40)])
  assert len(ids) == 100 and set(target.eos) <= set(ids.tolist())
  assert vocab['coverage'] == np.isin(answers, ids).mean()
  ids, vocab = text_lib.vocabulary(whole, target, None)
  assert len(ids) == 257 and vocab['held_out_coverage'] == 1.0


def test_text_that_will_not_do(tmp_path):
  target = tiny.model()

  def read(rows, **data):
    store.save_npz(tmp_path / 'x.npz', rows, {'target': 'other'})
    config = a_config(rollouts=str(tmp_path / 'x.npz'), **data)
    with pytest.warns(UserWarning, match='other wrote these'):
      return text_lib.read(config, target, 0)
  with pytest.raises(ValueError, match='another model wrote'):
    read(records(20, 300))
  with pytest.raises(ValueError, match='no held-out texts'):
    read(records(20), held_out=0.0)
  with pytest.raises(ValueError, match='no train texts'):
    read([])
  with pytest.raises(ValueError, match='12 are the prompt: no answer'):
    read([r._replace(prompt_length=12) for r in records(20)])
  with pytest.raises(ValueError, match='share=0.0'):
    read(records(40), share=0.0)
  (tmp_path / 'bad.npz').write_bytes(b'PK')
  with pytest.raises(ValueError, match='not a file of rollouts'):
    text_lib.read(a_config(rollouts=str(tmp_path / 'bad.npz')), target, 0)
  (tmp_path / 'x.jsonl').write_text('{"prompt": "abc"}\n')
  with pytest.raises(ValueError, match=(
      'data.rollouts: .*x.jsonl: not a file of rollouts .*; give the folder '
      'that train.rollout wrote$')):
    text_lib.read(a_config(rollouts=str(tmp_path / 'x.jsonl')), target, 0)


def test_prompts_from_a_file_are_counted(tmp_path):
  target, path = tiny.model(), tmp_path / 'x.jsonl'

  def read(target=target, **values):
    config = a_config(rollouts='synthetic')
    config.eval.update(
        {'prompts': str(path), 'max_prompt': 30, 'new_tokens': 8, **values})
    return text_lib.read(config, target, 0)
  rows = [{'prompt': 'abc'}, {'prompt': ''}, {'prompt': 'abc'},
          {'prompt': 'x' * 31}]
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n{oops\n')
  text = read()
  assert [p.tolist() for p in text.prompts] == [target.tokenizer.encode('abc')]
  assert text.facts['eval_prompts_dropped'] == {
      'empty': 1, 'malformed JSON': 1, 'duplicate prompt': 1, 'too long': 1}
  with pytest.raises(ValueError, match='x.jsonl: no prompt is left: 3 too lo'):
    read(max_prompt=2)
  short = tiny.model(max_length=100)  # which decoding has to fit into
  with pytest.raises(ValueError, match='x.jsonl: no prompt is left: 3 too lo'):
    read(short, new_tokens=98)
  with pytest.raises(ValueError, match=(
      'most 0 tokens: .*max_prompt=30, .*new_tokens=100, context 100')):
    read(short, prompts=None, new_tokens=100)
  path.write_text('')
  with pytest.raises(ValueError, match=(
      'x.jsonl: no conversation is left: nothing in it')):
    read()


def test_questions_that_cannot_be_left_out_are_told(tmp_path):
  target, path = tiny.model(), tmp_path / 'x.jsonl'
  said = 'what is shared by both of them'
  path.write_text(json.dumps({'prompt': said}) + '\n{oops\n')
  rows = records(3)
  shared = np.asarray(target.tokenizer.encode(said, add_bos=False), np.int32)
  with pytest.warns(UserWarning, match='exclude nothing: 1 malformed JSON'):
    kept, num = text_lib.without(
        [*rows, Record(shared, 4)], str(path), target)
  assert num == 1 and len(kept) == 3


def test_rows_longer_than_the_context():
  config = a_config()
  length = config.data.length
  with pytest.raises(ValueError, match=(
      f'config.data.length={length}: the context of random is {length - 1} ')):
    text_lib.read(config, tiny.model(max_length=length - 1), 0)
  longest = text_lib.read(config, tiny.model(max_length=length), 0)
  assert longest.facts['rows'] > 0


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
