"""`python -m train.calibrate` as a user types it."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from specjax.distill import kinds
from specjax.host import drafter as drafter_lib
from specjax.host import tiny
from specjax.host.generate import generate
from specjax.io.options import Sampling

TARGET, IDS = tiny.model(), np.arange(257)


def a_drafter(folder, kind):
  """Saves a random drafter; its confidence head, if any, is too sure."""
  task = kinds.build(kind, TARGET.lm.config, len(IDS), model={
      'num_layers': 1, 'num_slots': 3, 'markov_rank': 4, 'taps': (1, 2)}
      if kind == 'dspark' else {
          'num_layers': 1, 'num_slots': 3, 'taps': (1, 2)})
  net = task.init(jax.random.key(0), TARGET.params)
  if kind == 'dspark':
    net = {**net, 'confidence_bias': net['confidence_bias'] + 3.0}
  drafter_lib.save_drafter(
      folder, task.model, net, IDS, TARGET, kind=kind, num_draft=3,
      form='int8', facts={'metrics': {'tau': 1.0}})
  (folder / 'MODEL_CARD.md').write_text('card')
  return folder


def run(command, drafter, out, *arguments):
  process = command(
      'train.calibrate', '--config', 'configs/drafter_smollm2.py:tiny',
      '--config.eval.num_prompts=10', '--drafter', drafter, '--out', out,
      *arguments)
  stdout, stderr = process.communicate(timeout=300)
  assert not stdout
  return process.returncode, stderr


def drafted(folder):
  """Returns drafts of decoding that stops where a rejection is likely."""
  results = generate(TARGET, {
      'method': 'dspark', 'model': str(folder), 'lattice': False,
      'draft_acceptance_threshold': 0.7}, ['A rose is', 'Once'], Sampling(
          max_new_tokens=12, ignore_eos=True))
  return int(np.sum([r.drafted for r in results.results])), results.texts


def test_a_drafter_gets_temperatures_and_decodes_with_them(command, tmp_path):
  old = a_drafter(tmp_path / 'old', 'dspark')
  code, stderr = run(command, old, tmp_path / 'out')
  assert code == 0, stderr
  assert 'calibration error of the confidence head: ' in stderr
  new = tmp_path / 'out' / 'drafter'
  assert sorted(p.name for p in new.iterdir()) == sorted(
      p.name for p in old.iterdir())
  for name in ('drafter.safetensors', 'MODEL_CARD.md'):
    assert (new / name).read_bytes() == (old / name).read_bytes()
  before, after = (json.loads((folder / 'config.json').read_text())
                   for folder in (old, new))
  found = after['metrics'].pop('calibration')
  temperatures = after['model']['config'].pop('temperatures')
  assert before['model']['config'].pop('temperatures') == []
  assert before == after
  assert len(temperatures) == 3 and max(temperatures) > 1
  assert np.mean(found['after']) < np.mean(found['before'])
  loaded = drafter_lib.load_drafter(new, TARGET)
  assert loaded.source.model.config.temperatures == tuple(temperatures)
  many, text = drafted(old)
  few, same = drafted(new)
  assert few < many and same == text
  # Again, into a folder that is in use.
  code, stderr = run(command, old, tmp_path / 'out')
  assert code == 1 and 'drafter exists' in stderr


@pytest.mark.parametrize('kind, said', [
    ('dflash', 'this drafter (dflash) has no confidence head'),
    (None, 'no config.json; is it a drafter?')])
def test_what_cannot_be_is_said_in_a_line(kind, said, command, tmp_path):
  folder = tmp_path / 'old'
  if kind:
    a_drafter(folder, kind)
  code, stderr = run(command, folder, tmp_path / 'out')
  assert code == 1 and stderr.startswith(f'error: {folder}: ')
  assert said in stderr and stderr.count('\n') == 1
  assert not (tmp_path / 'out' / 'drafter').exists()
