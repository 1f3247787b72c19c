"""The sweep of continuous drafts, on random models."""

import json

import numpy as np
import pytest

from sample import latents_points, latents_sweep

FLAGS = ['--target', 'random', '--features', 'none', '--samples', '6',
         '--batch_size', '3', '--batches', '3', '--num_draft', '2',
         '--repeats', '1', '--iterations', '4', '--prefill', '0.25',
         '--rules', 'path_exact;cspd, 42', '--ahead', '0']


def test_a_sweep_and_its_table(tmp_path, capsys):
  assert latents_sweep.main([*FLAGS, '--out', str(tmp_path)]) == 0
  data = json.loads((tmp_path / 'sweep.json').read_text())
  rows = data['points']
  assert list(rows) == [
      'plain; guidance=1', 'plain, 4 iterations; guidance=1',
      *(f'self; {rule}; K=2; prefill=0.25; guidance=1'
        for rule in ('path_exact', 'cspd, 42'))]
  one, few, exact, lossy = rows.values()
  # The drafter is the target: all its drafts are kept.
  assert one['tokens_per_round'] == 1 and few['tokens_per_round'] == 4
  assert exact['tokens_per_round'] == pytest.approx(16 / (4 + 4))
  assert exact['kept'] == 1.0
  assert (exact['lossy'], lossy['lossy']) == (False, True)
  assert '4 iterations' in few['scoring']
  for row in (few, exact):
    assert set(row['speed']) == {'3'}
    assert all(s['speedup'] > 0 for s in row['speed'].values())
  assert one['speed'] == {} and 0 < one['ks'] < 0.5
  table = (tmp_path / 'table.md').read_text().splitlines()
  assert len(table) == 2 + len(rows) and '(lossy)' in table[-1]
  # Again: what is there is left alone, and more is added.
  capsys.readouterr()
  latents_sweep.main([
      *FLAGS, '--ahead', '0,3', '--only', 'plain', '--steps',
      'last_noise=False', '--out', str(tmp_path)])
  assert [line.split(';')[0] for line in
          capsys.readouterr().out.splitlines()] == [
              *2 * ('plain, last_noise=False', 'plain, 3 steps ahead')]
  with pytest.raises(ValueError, match='another setting'):
    latents_sweep.main([*FLAGS, '--seed', '1', '--out', str(tmp_path)])


def test_which_points_are_judged(tmp_path):
  args = latents_points.parse([
      *FLAGS, '--out', str(tmp_path), '--num_draft', '2,4', '--prefill',
      '0.05,0', '--judged', 'path_exact', '--few', '2'])
  assert [latents_points.is_judged(latents_points.Point(*p), args) for p in (
      (), ('a', 'path_exact', 4, 0.05), ('a', 'path_exact', 2, 0.05),
      ('a', 'path_exact', 4, 0.0), ('a', 'cspd', 4, 0.05))] == [
          True, True, False, False, False]


def test_distance_of_samples():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 4000, 3))
  assert latents_sweep.distance(a, b) < 0.05
  b[:, 1] += 1
  assert latents_sweep.distance(a, b) == pytest.approx(0.383, abs=0.03)


@pytest.mark.parametrize(('flags', 'message'), [
    (['--judged', 'x'], "--judged: 'x' is unknown"),
    (['--rules', 'exact'], "'exact' is unknown; known are path_exact"),
    (['--prefill', ''], '--prefill: give at least one'),
    (['--num_draft', '0'], 'num_speculative_tokens=0'),
    (['--drafters', 'a=/nowhere'], 'nowhere')])
def test_what_is_refused(flags, message, tmp_path):
  with pytest.raises((ValueError, OSError), match=message):
    latents_sweep.main([*FLAGS, *flags, '--out', str(tmp_path)])
