"""The sweep of image decoding: its points, a dry run, its judge."""

from __future__ import annotations

import json

from matplotlib import image
import pytest

from sample import lantern_sweep
from sample.lantern_points import parse, points

TINY = ['--target', 'random', '--features', 'none', '--samples', '2',
        '--batch_size', '1', '--repeats', '2', '--neighbours', '3',
        '--delta', '0.2', '--lam', '2', '--group', '4', '--window', '3',
        '--num_draft', '2', '--tree', 'branching:2,1']


def test_points_are_the_product_and_begin_with_plain():
  args = parse([
      '--target', 'random', '--out', 'x', '--drafter', 'y', '--neighbours',
      '2,3', '--delta', '0.1,0.2', '--lam', '2', '--temperatures', '0,1',
      '--guidance', '1,2'])
  found = points(args, 16)
  # Plain, 2 exact, 4 LANTERN, 2 LANTERN++, 2 SJD, 1 GSD, 4 with Jacobi.
  assert len(found) == 4 * 16 == len({p.key for p in found})
  assert [p.family for p in found[::16]] == ['plain'] * 4
  assert [(p.temperature, p.guidance) for p in found[::16]] == [
      (0, 1), (1, 1), (0, 2), (1, 2)]
  args.drafter = ''
  assert not [p for p in points(args, 16) if 'model' in (p.drafting or {})]
  with pytest.raises(ValueError, match='--neighbours=3: .* allows 1 to 2'):
    points(args, 3)


def test_a_dry_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
  arguments = [*TINY, '--drafter', 'random', '--guidance', '2', '--out',
               str(tmp_path)]
  real, calls = lantern_sweep.quality, []

  def quality(scene, way, *rest):
    calls.append(way.point.family)
    if calls.count('SJD') == 1 and way.point.family == 'SJD':
      raise KeyboardInterrupt
    return real(scene, way, *rest)

  monkeypatch.setattr(lantern_sweep, 'quality', quality)
  with pytest.raises(KeyboardInterrupt):
    lantern_sweep.main(arguments)
  assert lantern_sweep.main(arguments) == 0
  assert calls == ['plain', 'exact', 'exact', 'LANTERN', 'LANTERN++', 'SJD',
                   'SJD', 'SJD', 'GSD', 'SJD, LANTERN']
  data = json.loads((tmp_path / 'sweep.json').read_text())
  found = {p['family'] + p['label']: p for p in data['points'].values()}
  assert found['plain']['tau'] == 1
  # The target drafts for itself, guided as it is: every draft is kept.
  chain = found['exactchain of 2']
  assert chain['tau'] == pytest.approx(16 / 6)  # the last round is cut
  for name, row in found.items():
    assert 1 <= row['tau'] <= 4 and row['samples'] == 2
    assert row['speed']['1']['repeats'] == 2
    assert row['speed']['1']['seconds'] > 0
    if not name.startswith(('LANTERN', 'GSD', 'SJD, ')):
      assert row['one_step_tv'] == 0
  assert found['GSDG=4']['one_step_tv'] > 0.01
  pixels = image.imread(tmp_path / 'sweep_T1_guidance2.png')
  assert (pixels[..., :3].max(-1) - pixels[..., :3].min(-1)).max() > 0.3
  table = (tmp_path / 'sweep.md').read_text()
  assert '| LANTERN++ k=3, lambda=2 | 1 | 2 |' in table
  assert 'GSD; G=4; T=1; guidance=2: tau' in capsys.readouterr().out
  with pytest.raises(ValueError, match='of another setting'):
    lantern_sweep.main([*arguments, '--seed', '5'])


@pytest.mark.parametrize('more, said', [
    (['--repeats', '0'], '--repeats=0: must be >= 1'),
    (['--batches', ','], '--batches: give at least one'),
    (['--batches', '0'], 'must be >= 1'),
    (['--features', 'lite0'], '--data: give the test images'),
    (['--drafter', 'random', '--tree', 'nonsense'], "token_tree='nonsense'"),
    (['--group', '3'], 'group=3')])
def test_options_are_checked_before_anything_is_decoded(
    tmp_path, monkeypatch, more, said):
  monkeypatch.setattr(lantern_sweep, 'quality', pytest.fail)
  with pytest.raises(ValueError, match=said):
    lantern_sweep.main([*TINY, '--out', str(tmp_path), *more])


def test_results_that_are_none(tmp_path):
  (tmp_path / 'sweep.json').write_text('{}')
  with pytest.raises(ValueError, match='no results of a sweep'):
    lantern_sweep.main([*TINY, '--out', str(tmp_path)])


def test_models_that_do_not_go_together(tmp_path):
  with pytest.raises(ValueError, match='--tokenizer: give the folder'):
    lantern_sweep.main([
        '--target', 'out/lm', '--features', 'none', '--out', str(tmp_path)])
