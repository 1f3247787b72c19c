"""The benchmark of a denoising head, on a random one."""

import json

import numpy as np
import pytest

from benchmarks import head
from specjax.host import mar


def test_head_alone_and_drafted(tmp_path):
  out = tmp_path / 'head.json'
  head.main(['--target', 'random', '--out', str(out), '--batches', '3',
             '--widths', '2', '--variances', 'lower', '--repeats', '2'])
  row, = json.loads(out.read_text())['sections'].values()
  assert row['steps'] == mar.tiny().lm.process.num_steps
  assert 1 <= row['calls']['min'] <= row['calls']['max'] <= row['steps']
  assert row['calls']['n'] == 2
  for way in ('drafted', 'ahead'):
    assert row[f'{way}_speedup']['n'] == 2
    assert row[f'{way}_speedup']['min'] > 0


def test_conditions_are_those_of_images():
  told = np.asarray(head.told(mar.tiny(), 20, 0))
  assert told.shape == (20, 8) and np.isfinite(told).all()
  assert len(np.unique(told, axis=0)) > 10


def test_at_least_one_repeat(tmp_path):
  with pytest.raises(SystemExit):
    head.main(['--target', 'random', '--out', str(tmp_path / 'x.json'),
               '--repeats', '0'])
