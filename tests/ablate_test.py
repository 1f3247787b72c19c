"""The ablations of drafters: their variants, and a dry run."""

from __future__ import annotations

import json
import os
import sys

from matplotlib import image
import numpy as np
import pytest

from sample import ablate_drafter, ablate_plots, ablate_variants
from sample.ablate_variants import Variant
from specjax.data.packing import Packed
from specjax.distill import kinds
from specjax.host import drafter as drafter_lib
from specjax.host import tiny

AXES = ablate_variants.axes()


@pytest.mark.parametrize('axis', AXES)
def test_every_variant_is_a_task(axis):
  """Its values are known, and are those of the task that is trained."""
  target = tiny.config(
      49152, num_layers=30, embed_dim=576, num_heads=9, num_kv_heads=3,
      head_dim=64)
  labels = [v.label for v in AXES[axis]]
  assert len({*labels}) == len(labels) > 1
  made = []
  for variant in AXES[axis]:
    config = ablate_variants.config(variant, {}, False)
    made.append((kinds.build(
        config.kind, target, config.draft_vocab_size, **{
            name: config[name].to_dict()
            for name in ('model', 'task', 'loss')}), config.data.share,
                 str(config.optimizer)))
  assert len({*made}) == len(made)  # they differ


def test_a_drafter_on_several_axes_is_one():
  config = ablate_variants.config(Variant('', ''), {}, False)
  keys = {axis: [ablate_variants.trimmed(v, config) for v in AXES[axis]
                 if v.kind == 'dspark'] for axis in AXES}
  own = Variant('', '').key
  assert {axis for axis in keys if own in keys[axis]} == {*AXES} - {'ttt'}
  assert len({*keys['slots']}) == len(AXES['slots'])


def test_unknown_values_and_axes_are_refused():
  config = ablate_variants.config(Variant('', '', 'eagle3'), {}, False)
  with pytest.raises(ValueError, match='task.num_anchors'):
    ablate_variants.put(config, 'task.num_anchors', 3)
  with pytest.raises(ValueError, match='--only=depth: known are loss'):
    ablate_drafter.chosen('loss,depth', False)


def test_every_axis_is_planned(tmp_path, monkeypatch):
  """Each drafter once, whatever its changes are made of."""
  planned = []
  monkeypatch.setattr(
      ablate_drafter, 'work', lambda results, jobs, *_: planned.extend(jobs))
  assert ablate_drafter.main(
      ['--target', 'tiny', '--out', str(tmp_path)]) == 1  # none is trained
  keys = [key for _, key, _ in planned]
  axes = ablate_variants.axes(tiny=True)
  assert len({*keys}) == len(keys) < sum(map(len, axes.values()))
  data = json.loads((tmp_path / 'ablations.json').read_text())['axes']
  assert {*data} == {*axes}
  assert {k for row in data.values() for k in row.values()} == {*keys}


def test_smaller_shares_are_in_larger_ones():
  rows = np.arange(40)[:, None]
  packed = Packed(rows, rows, rows, rows)
  parts = [{*ablate_drafter.subset(packed, share, 0).tokens[:, 0].tolist()}
           for share in (0.001, 0.1, 0.5, 1.0)]
  assert [len(p) for p in parts] == [1, 4, 20, 40]
  assert all(a < b for a, b in zip(parts, parts[1:], strict=False))


def test_a_dry_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capfd):
  monkeypatch.setenv('SPECJAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(sys.path))
  arguments = ['--target', 'tiny', '--only', 'layers', '--workers', '2',
               '--save', '--seconds', '0.05', '--out', str(tmp_path)]
  real, trained = ablate_drafter.Job.train, []

  def train(job, seed, seconds, folder):
    trained.append(job.variant.label)
    if trained == ['1', '2']:
      raise MemoryError('for once')
    return real(job, seed, seconds, folder)

  monkeypatch.setattr(ablate_drafter.Job, 'train', train)
  assert ablate_drafter.main(arguments) == 1
  said = capfd.readouterr()
  assert said.out.count(': compiled') == 2 and 'failed' not in said.err
  path = tmp_path / 'ablations.json'
  first = json.loads(path.read_text())['runs']
  assert ['for once' in str(r.get('failed')) for r in first.values()] == [
      False, True]
  assert ablate_drafter.main(arguments) == 0
  assert trained == ['1', '2', '2']  # what was trained is kept
  data = json.loads(path.read_text())
  for row, layers in zip(data['runs'].values(), (1, 2), strict=True):
    assert row['changes'] == {'model.num_layers': layers}
    assert 1 <= row['tau'] <= 4 and len(row['conditional']) == 3
    assert row['step'] >= 1 and row['tokens'] > 0
  saved = tmp_path / 'drafters'
  assert [drafter_lib.load_drafter(
      saved / f'layers-{n}', tiny.model()).facts['kind'] for n in (1, 2)] == [
          'dspark'] * 2
  sizes = [r['parameters'] for r in data['runs'].values()]
  assert sizes[0] < sizes[1]
  ablate_plots.main(['--results', str(path)])
  pixels = image.imread(tmp_path / 'ablation_layers.png')
  assert (pixels[..., :3].max(-1) - pixels[..., :3].min(-1)).max() > 0.3
  assert '| 2 | ' in (tmp_path / 'ablations.md').read_text()
  assert not (tmp_path / 'ablation_length.png').exists()  # of kinds
  with pytest.raises(ValueError, match='of another setting'):
    ablate_drafter.main([*arguments[:-4], '--seconds', '9', *arguments[-2:]])
  # Equal seconds are not equal on another device.
  path.write_text(json.dumps({**data, 'device': '8 x abacus'}))
  with pytest.raises(ValueError, match='of another device'):
    ablate_drafter.main(arguments)


def test_a_figure_of_lengths_for_kinds(tmp_path):
  row = {'tau': 1.75, 'step': 3, 'parameters': 1e6, 'held_out_coverage': 1.0,
         'conditional': [0.5, 0.5], 'per_position': [0.5, 0.25]}
  data = {'setting': {'target': 'x', 'seconds': 1.0}, 'device': 'y',
          'axes': {'kind': {'dspark': '["dspark"]', 'hass': '["hass"]'}},
          'runs': {'["dspark"] 0': row, '["hass"] 0': {'failed': 'no'}}}
  path = tmp_path / 'ablations.json'
  path.write_text(json.dumps(data))
  ablate_plots.main(['--results', str(path)])
  pixels = image.imread(tmp_path / 'ablation_length.png')
  assert (pixels[..., :3].max(-1) - pixels[..., :3].min(-1)).max() > 0.3
  assert sorted(p.suffix for p in tmp_path.iterdir()) == [
      '.json', '.md', '.png', '.png']
