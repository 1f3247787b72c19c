"""`python -m train.drafter` as a user types it."""

from __future__ import annotations

import functools
import json
import signal
import sys

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np
import pytest

from specjax.distill import kinds, losses
from specjax.distill.trainer import Trainer
from specjax.host import drafter as drafter_lib
from specjax.host import methods, tiny
from specjax.host.generate import generate
from specjax.io.options import Sampling
from specjax.parallel import make_mesh
from train import loop
from train import run as run_lib
from train import text as text_lib

TINY = ('train.drafter', '--config', 'configs/drafter_smollm2.py:tiny')
# Long enough to be interrupted; every state compares in full.
LONG = ('--config.steps=600', '--config.save_every=150',
        '--config.eval_every=300', '--config.save.form=float32')


def run(command, out, *arguments):
  process = command(*TINY, '--out', out, *arguments)
  stdout, stderr = process.communicate(timeout=300)
  return process.returncode, stderr


def rows(folder, kind):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [r for r in map(json.loads, lines) if r['kind'] == kind]


def test_a_run_and_the_same_run_interrupted(command, tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  code, stderr = run(command, whole, *LONG)
  assert code == 0, stderr
  assert 'step 600/600' in stderr and 'wrote' in stderr
  process = command(*TINY, '--out', parts, *LONG)
  for line in process.stderr:
    if line.startswith('step ') and '/600' in line:
      break
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 128 + signal.SIGTERM, stderr
  assert 'the same command goes on' in stderr
  stopped = rows(parts, 'train')[-1]['step']
  assert 0 < stopped < 600 and not (parts / 'drafter').exists()
  code, stderr = run(command, parts, *LONG)
  assert code == 0, stderr
  assert f'going on after step {stopped} of 600' in stderr
  for name in ('drafter.safetensors', 'gap.png'):
    assert (whole / 'drafter' / name).read_bytes() == (
        parts / 'drafter' / name).read_bytes()
  tests = rows(parts, 'eval')
  assert [r['step'] for r in tests] == [0, 300, 600]
  assert tests[-1]['tau'] == rows(whole, 'eval')[-1]['tau']
  assert tests[-1]['held_out']['loss'] < tests[0]['held_out']['loss']
  steps = [r['step'] for r in rows(parts, 'train')]
  assert steps == sorted({*steps}) and steps[-1] == 600
  header = (whole / 'metrics.csv').read_text().splitlines()[0].split(',')
  assert {'kind', 'step', 'tau', 'match.1', 'held_out.loss'} <= {*header}
  kept = sorted(p.name for p in (whole / 'checkpoints').iterdir())
  assert kept == ['00000450', '00000600']
  facts = json.loads((whole / 'drafter' / 'config.json').read_text())
  assert facts['kind'] == 'dspark' and facts['num_draft'] == 3
  # Temperatures are kept if they lower the error where it is tried.
  found = facts['metrics']['calibration']
  lower = np.mean(found['after']) < np.mean(found['before'])
  assert len(facts['model']['config']['temperatures']) == 3 * lower
  assert 'calibration error of the confidence head' in stderr
  card = (whole / 'drafter' / 'MODEL_CARD.md').read_text()
  assert 'drafter_smollm2.py:tiny' in card and 'tau.png' in card
  assert 'calibration error of the confidence head' in card
  # Another run into the same folder is refused.
  code, stderr = run(command, whole, *LONG, '--config.seed=1')
  assert code == 1 and 'config.seed=0, now 1' in stderr
  code, stderr = run(command, whole, *LONG, '--config.model.num_layers=2')
  assert code == 1 and 'another architecture' in stderr
  assert 'layer_1' in stderr and 'absent' in stderr


def test_a_run_that_breaks_says_where(command, tmp_path):
  code, stderr = run(command, tmp_path, '--config.log_every=1',
                     '--config.optimizer.learning_rate=1e38')
  assert code == 1 and 'not finite in 3 steps in a row' in stderr
  # The line before the error: of one step, which has no loss.
  assert 'step 4/12, loss or gradient not finite in 1 step, ' in stderr
  assert 'loss 0.0000' not in stderr
  assert 'rows [' in stderr and 'Traceback' not in stderr
  assert any((tmp_path / 'checkpoints').iterdir())
  assert not (tmp_path / 'drafter').exists()


def test_minutes_become_steps(command, tmp_path):
  code, stderr = run(
      command, tmp_path, '--config.steps=0', '--config.minutes=0.3',
      '--config.eval_every=100000', '--config.save_every=100000')
  assert code == 0, stderr
  [name] = [p.name for p in (tmp_path / 'checkpoints').iterdir()]
  facts = json.loads(
      (tmp_path / 'checkpoints' / name / 'specjax.json').read_text())
  assert facts['num_steps'] == int(name) == rows(tmp_path, 'train')[-1]['step']


# One of each family; the others differ in their losses.
QUICK = ('dspark', 'eagle3', 'hydra')


@pytest.mark.parametrize('kind', [
    pytest.param(k, marks=() if k in QUICK else pytest.mark.slow)
    for k in kinds.KINDS])
def test_every_kind_is_trained_saved_and_decodes(
    kind, monkeypatch, tmp_path):
  _, config, target, text = setting(monkeypatch, kind)
  ids, _ = text_lib.vocabulary(text, target, 128)
  task = kinds.build(kind, target.lm.config, len(ids), **{
      name: config[name].to_dict() for name in ('model', 'task', 'loss')})
  trainer = Trainer(task, target.lm, loop.optimiser(config.optimizer))
  test = run_lib.Run(trainer, target, ids, text, config, None)
  state = test.fresh()
  test.schedule(4)
  found = []
  for step in range(3):
    state, report, num_tokens = test.step(state, step)
    found.append(float(report['loss']))
    assert report['match'].shape == (task.num_draft,) and num_tokens > 0
  assert np.isfinite(found).all() and int(state.step) == 3
  folder = drafter_lib.save_drafter(
      tmp_path / 'x', task.model, state.net, ids, target, kind=kind,
      num_draft=task.num_draft, form='float32')
  loaded = drafter_lib.load_drafter(folder, target)
  jax.tree.map(np.testing.assert_array_equal, loaded.params['net'],
               test._cast(state.net))
  [name] = [n for n, known in methods._TRAINED.items() if kind in known]
  config = {'method': name, 'model': str(folder)}
  drafter, params = methods.build(config, target)
  assert drafter.topology.num_nodes == task.num_draft
  if kind in QUICK:
    asked = [text.prompts[0]], Sampling(max_new_tokens=8, ignore_eos=True)
    results = generate(target, config, *asked)
    plain = generate(target, None, *asked)
    assert results.results[0].tokens == plain.results[0].tokens


def test_eight_devices_train_like_one(monkeypatch):
  _, config, target, text = setting(monkeypatch, 'dspark')
  config.batch_size = 8
  ids, _ = text_lib.vocabulary(text, target, 128)
  found = []
  for mesh in (None, make_mesh((8, 1))):
    here = tiny.model(mesh=mesh)
    task = kinds.build('dspark', target.lm.config, len(ids), **{
        name: config[name].to_dict() for name in ('model', 'task', 'loss')})
    trainer = Trainer(task, here.lm, loop.optimiser(config.optimizer))
    test = run_lib.Run(trainer, here, ids, text, config, mesh)
    state = test.fresh()
    test.schedule(3)
    found.append([])
    for step in range(3):
      state, report, _ = test.step(state, step)
      found[-1].append(float(report['loss']))
    if mesh is not None:
      batch = test._batch(0)[0]
      assert len(batch.tokens.sharding.device_set) == 8
      assert not batch.tokens.is_fully_replicated
      assert all(x.is_fully_replicated for x in jax.tree.leaves(state))
  np.testing.assert_allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize('kind, given, first, last', [
    ('dspark', (), {'kl': 1.0}, {'kl': 0.1, 'l1': 0.9}),
    ('dspark', ('first.kl=0.5', 'last.l1=0', 'last.tvd=2'), {'kl': 0.5},
     {'kl': 0.1, 'l1': 0.0, 'tvd': 2.0}),
    ('hydra', ('first.ce=1', 'hold=0.5'), {'ce': 1.0}, None),
    ('medusa', (), None, None)])
def test_losses_are_set_from_the_command_line(
    kind, given, first, last, monkeypatch):
  arguments = ['drafter', f'--config=configs/drafter_smollm2.py:tiny-{kind}',
               *(f'--config.loss.{x}' for x in given)]
  monkeypatch.setattr(sys, 'argv', arguments)  # where overrides are read
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
      'config', flag_values=values, lock_config=True)
  values(arguments)
  config = values.config
  build = functools.partial(
      kinds.build, kind, tiny.config(), 128, model=config.model.to_dict())
  made = build(loss=config.loss.to_dict()).objective
  if first is None:
    assert made == build().objective
    return
  mixture = made.mixture
  assert dict(mixture.first) == first
  assert mixture.last is None if last is None else dict(mixture.last) == last
  assert mixture.hold == (config.loss.hold or 0.3)


def test_a_config_names_the_losses_that_there_are():
  from configs import drafter_kinds
  assert drafter_kinds.LOSSES == losses.NAMES
  with pytest.raises(ValueError, match='loss.first: must be given'):
    kinds.build('dspark', tiny.config(), 128, loss={
        'first': {'kl': None}, 'last': {'l1': 1.0}})


def test_processes_learn_of_a_signal_together(monkeypatch):
  """One of two was told; the other knows where both look, not before."""
  monkeypatch.setattr(signal, 'signal', lambda number, handler: None)
  told, other = loop.Stop(), loop.Stop()
  told._ask(signal.SIGTERM, None)
  assert told.look(together=False) == signal.SIGTERM  # alone: at once
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(
      loop.multihost_utils, 'process_allgather',
      lambda x: np.stack([x, np.int32(signal.SIGTERM)]))
  assert other.look(together=False) == 0
  assert other.look(together=True) == other.signal == signal.SIGTERM
  other._ask(signal.SIGTERM, None)  # its own comes late
  with pytest.raises(KeyboardInterrupt):
    other._ask(signal.SIGTERM, None)


def test_what_cannot_be_run(monkeypatch):
  program, config, target, _ = setting(monkeypatch, 'dspark')
  config.steps = -1
  with pytest.raises(ValueError, match='steps=-1'):
    loop.check(config)
  config.steps, config.mesh = 0, (3, 1)
  with pytest.raises(ValueError, match='multiple of config.mesh'):
    loop.check(config)
  config.mesh = (1, 1)
  for rate in (0.0, float('nan'), float('inf')):
    config.optimizer.learning_rate = rate
    with pytest.raises(ValueError, match='learning_rate=.*: must be > 0'):
      loop.check(config)
  config.optimizer.learning_rate, config.log_every = 1e-3, 0
  with pytest.raises(ValueError, match='log_every=0'):
    loop.check(config)
  config.log_every = 1
  for section, name, value in (('save', 'form', 'int4'),
                               ('optimizer', 'schedule', 'foo')):
    kept = config[section][name]
    config[section][name] = value
    with pytest.raises(ValueError, match=f"{name}='{value}': known are"):
      loop.check(config)
    config[section][name] = kept
  for rollouts, message in ((None, 'give the folder'),
                            ('/nowhere', 'no rollouts there')):
    config.data.rollouts = rollouts
    with pytest.raises(ValueError, match=message):
      text_lib.read(config, target, 0)


def setting(monkeypatch, kind):
  """Returns the program, its tiny config, a target and its text."""
  monkeypatch.setattr(sys, 'argv', ['drafter'])
  from configs import drafter_smollm2
  from train import drafter
  config = drafter_smollm2.get_config(f'tiny-{kind}')
  target = tiny.model()
  return drafter, config, target, text_lib.read(config, target, 0)
