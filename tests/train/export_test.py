"""`python -m train.export`: our drafters out, those of others in."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from specjax.distill import kinds
from specjax.host import drafter as drafter_lib
from specjax.host import interchange, tiny
from specjax.io import safetensors
from train import export

TARGET = tiny.model()
IDS = np.setdiff1d(np.arange(257), [5])


@pytest.fixture
def trained(tmp_path):
  """Returns the folder of a drafter as `train.drafter` saves it."""
  model = {'num_layers': 1, 'num_slots': 3, 'markov_rank': 4, 'taps': (1, 2)}
  task = kinds.build('dspark', TARGET.lm.config, len(IDS), model=model)
  net = task.init(jax.random.key(0), TARGET.params)
  return drafter_lib.save_drafter(
      tmp_path / 'own', task.model, net, IDS, TARGET, kind='dspark',
      num_draft=3, form='float32')


def run(*arguments):
  return export.main([str(a) for a in arguments])


def test_out_and_in_again(trained, tmp_path, capsys):
  there, back = tmp_path / 'there', tmp_path / 'back'
  assert run('--drafter', trained, '--target', 'random', '--format',
             'speculators', '--out', there, '--dtype', 'float32',
             '--name', 'owner/name', '--mask_token', 256) == 0
  assert 'dspark for owner/name, 256 of 257 tokens' in capsys.readouterr().out
  values = json.loads((there / 'config.json').read_text())
  assert values['speculators_config']['verifier']['name_or_path'] == (
      'owner/name')
  assert values['mask_token_id'] == 256
  assert run('--drafter', there, '--target', 'random', '--format', 'specjax',
             '--out', back, '--dtype', 'float32') == 0
  ours = drafter_lib.load_drafter(trained, TARGET)
  again = drafter_lib.load_drafter(back, TARGET)
  assert again.source.model.config == ours.source.model.config
  assert (again.num_draft, again.facts['kind']) == (3, 'dspark')
  jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)


def test_bfloat16_is_the_default(trained, tmp_path):
  assert run('--drafter', trained, '--target', 'random', '--format',
             'speculators', '--out', tmp_path / 'x', '--mask_token', 256) == 0
  found = safetensors.read(tmp_path / 'x')
  assert found['fc.weight'].dtype == 'BF16'


@pytest.mark.parametrize(('arguments', 'message'), [
    (('--format', 'zlab', '--target', 'random'), 'no reduced vocabulary'),
    (('--format', 'eagle', '--target', 'random'), 'known are zlab'),
    (('--format', 'speculators', '--target', 'random', '--dtype', 'int8'),
     "dtype='int8'"),
    (('--format', 'speculators', '--target', 'random'), 'mask_token=None')])
def test_what_cannot_be_is_said_in_a_line(
    trained, tmp_path, capsys, arguments, message):
  out = tmp_path / 'x'
  assert run('--drafter', trained, '--out', out, *arguments) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and message in error
  assert not out.exists()


def test_a_folder_of_others_needs_a_target(tmp_path, capsys):
  assert run('--drafter', tmp_path, '--format', 'specjax', '--out',
             tmp_path / 'x') == 1
  assert '--target' in capsys.readouterr().err


def test_names_of_kinds():
  build = lambda kind: kinds.build(kind, TARGET.lm.config, 257)  # noqa: E731
  for kind in ('dspark', 'dflash', 'eagle1', 'eagle3', 'medusa', 'hydra'):
    assert interchange.kind_of(build(kind).model.config) == kind
