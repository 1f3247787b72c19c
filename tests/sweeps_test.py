"""What sweeps share: options, results that go on, results of several."""

import argparse
import json
import threading

import pytest

from sample import lantern_plots, latents_points, latents_table, sweeps


def args_of(tmp_path, *more):
  parser = argparse.ArgumentParser()
  sweeps.add_flags(
      parser, batch_size=2, repeats=1, batches=[1], guidance=[1.0])
  parser.add_argument('--target', default='x')
  parser.add_argument('--rules', default='a')
  return parser.parse_args(['--out', str(tmp_path), *more])


def test_parts_are_measured_once(tmp_path):
  record = sweeps.Record(args_of(tmp_path), ('rules',))
  assert record.lacks('p', 'quality') and record.lacks('p', 'speed')
  record.put('p', {'samples': 3, 'tau': 2.0})
  # Another program goes on, with other points and parts of the same setting.
  again = sweeps.Record(
      args_of(tmp_path, '--parts', 'speed', '--only', 'p', '--rules', 'b',
              '--guidance', '2'), ('rules',))
  assert not again.lacks('p', 'quality') and again.lacks('p', 'speed')
  again.put('p', {'speed': {}})
  row = json.loads((tmp_path / 'sweep.json').read_text())['points']['p']
  assert row == {'samples': 3, 'tau': 2.0, 'speed': {}}
  assert sweeps.has(row, *sweeps.PARTS)
  assert not sweeps.has({'samples': 3}, 'speed')


def test_results_of_something_else_are_refused(tmp_path):
  sweeps.Record(args_of(tmp_path), (), {'small': 'out/a'}).put('p', {})
  with pytest.raises(ValueError, match='of another setting'):
    sweeps.Record(args_of(tmp_path, '--seed', '5'), ())
  with pytest.raises(ValueError, match='small was out/a, now it is out/b'):
    sweeps.Record(args_of(tmp_path), (), {'small': 'out/b'})
  path = tmp_path / 'sweep.json'
  data = json.loads(path.read_text())
  path.write_text(json.dumps({**data, 'device': '8 x abacus'}))
  with pytest.raises(ValueError, match='another device, 8 x abacus'):
    sweeps.Record(args_of(tmp_path), ())
  path.write_text('{"points": 3}')
  with pytest.raises(ValueError, match='no results of a sweep'):
    sweeps.Record(args_of(tmp_path), ())


def rows_of(tmp_path, name, row, **changes):
  record = sweeps.Record(args_of(tmp_path / name), ())
  record.put('p', row)
  path = tmp_path / name / 'sweep.json'
  data = json.loads(path.read_text())
  path.write_text(json.dumps({**data, **changes}))
  return tmp_path / name


SPEED = {'speed': {'1': dict(speedup=2.0, least=1.5, most=2.5)}}


def test_results_of_several_programs(tmp_path):
  folders = [
      rows_of(tmp_path, 'a', {'samples': 3, 'tau': 2.0},
              reference={'floor': 1}),
      rows_of(tmp_path, 'b', SPEED)]
  data = sweeps.merged(folders)
  assert data['points']['p'] == {'samples': 3, 'tau': 2.0, **SPEED}
  assert data['reference'] == {'floor': 1}
  other = rows_of(tmp_path, 'c', {}, device='8 x abacus')
  with pytest.raises(ValueError, match='another device'):
    sweeps.merged([*folders, other])
  other = rows_of(tmp_path, 'd', {}, setting={'target': 'y'})
  with pytest.raises(ValueError, match='another target'):
    sweeps.merged([*folders, other])


def test_tables_of_parts(tmp_path):
  """Points with a part alone are in tables, and not in figures."""
  what = dict(family='plain', label='', temperature=1.0, guidance=1.0)
  folders = [
      str(rows_of(tmp_path, 'a', {**what, 'samples': 3, 'tau': 1.5,
                                  'one_step_tv': 0.25})),
      str(rows_of(tmp_path, 'b', {**what, **SPEED}))]
  assert lantern_plots.main(
      ['--results', *folders, '--out', str(tmp_path / 'all')]) == 0
  assert '| 1.50 | 0.250 |' in (tmp_path / 'all' / 'sweep.md').read_text()
  assert (tmp_path / 'all' / 'sweep_T1_guidance1.png').exists()
  for folder in folders:
    assert lantern_plots.main(['--results', folder]) == 0
  assert not [*tmp_path.glob('[ab]/*.png')]
  assert '2.00 (1.50 to 2.50)' in (tmp_path / 'b' / 'sweep.md').read_text()
  for folder in folders:  # of which one has the number of rounds
    assert lantern_plots.main(
        ['--results', folder, '--against', 'rounds']) == 0
  assert [p.name for p in tmp_path.glob('[ab]/*.png')] == [
      'rounds_T1_guidance1.png']
  assert latents_table.main(
      ['--results', folders[1], '--out', str(tmp_path / 'table')]) == 0
  assert '| p |  |  | 2.00 |' in (tmp_path / 'table' / 'table.md').read_text()


@pytest.mark.parametrize('more, said', [
    (['--parts', 'quality,taste'], "--parts: 'taste' is unknown"),
    (['--parts', ','], '--parts: give at least one'),
    (['--samples', '0'], '--samples=0'),
    (['--batches', '0'], 'must be >= 1')])
def test_options(tmp_path, more, said):
  with pytest.raises(ValueError, match=said):
    sweeps.check(args_of(tmp_path, *more))


def test_other_denoising_steps():
  assert latents_points.fields('first=None,last_noise=False,variance=lower'
                               ) == {'first': None, 'last_noise': False,
                                     'variance': 'lower'}
  assert latents_points.fields('') == {}
  with pytest.raises(ValueError, match="'first' is not name=value"):
    latents_points.fields('first')
  args = latents_points.parse([
      '--target', 'random', '--out', 'x', '--ahead', '0,4', '--rules',
      'cspd', '--num_draft', '2', '--steps', 'first=4;last_noise=False'])
  found = [*latents_points.points(args, ['d'], 16, True)]
  assert [p.key.split(';')[0] for p in found] == [
      'plain', 'plain, first=4', 'plain, last_noise=False',
      'plain, 4 steps ahead', 'plain, 16 iterations', 'd',
      'd, 4 steps ahead']
  assert found[1].changes == {'ahead': 0, 'first': 4}
  assert [p.is_plain for p in found] == [True] + 6 * [False]
  assert found[-1].changes == {'ahead': 4}


def test_times_are_taken_alone(tmp_path):
  path = str(tmp_path / 'turns')
  order, working, leave = [], threading.Barrier(3), threading.Event()

  def work(name, wait):
    with sweeps.Turns(path).work():
      order.append(f'{name} works')
      if wait:
        working.wait(10)
        assert leave.wait(10)
        order.append(f'{name} ends')

  def alone():
    with sweeps.Turns(path).alone():
      order.append('alone')
      late.join(0.2)
      assert late.is_alive()
      order.append('not alone')

  first = [threading.Thread(target=work, args=(n, True)) for n in 'ab']
  timed, late = (threading.Thread(target=alone),
                 threading.Thread(target=work, args=('c', False)))
  for thread in first:
    thread.start()
  working.wait(10)  # two work at a time
  timed.start()
  timed.join(0.2)
  late.start()  # waits for who waits to be alone
  late.join(0.2)
  assert order[2:] == [] and timed.is_alive() and late.is_alive()
  leave.set()
  for thread in (*first, timed, late):
    thread.join(10)
  assert sorted(order[2:4]) == ['a ends', 'b ends']
  assert order[4:] == ['alone', 'not alone', 'c works']


def test_the_first_times_are_not_read(tmp_path):
  asked = []

  def times(batch, number):
    asked.append((batch, number))
    return (9.0, 1.0) if not number else (float(number), 1.0)

  ways = {'a': times, 'b': lambda *asks: times(*asks)}
  both = dict(sweeps.speeds(ways, (1, 8), 3, sweeps.Turns('')))
  # All compile before any is timed.
  assert asked[:5] == [(1, 0), (8, 0), (1, 0), (8, 0), (1, 1)]
  assert set(both) == {'a', 'b'} and both['a'] == both['b']
  assert not dict(sweeps.speeds({}, (1,), 1, sweeps.Turns('')))
  found = both['a']
  assert set(found) == {'1', '8'}
  assert sweeps.said(found) == '2.00x at 1, 2.00x at 8'
  assert found['8'] == {'seconds': 1, 'plain_seconds': 2, 'speedup': 2,
                        'least': 1, 'most': 3, 'repeats': 3}


def test_work_pauses_for_who_takes_times(tmp_path):
  path, order = str(tmp_path / 'turns'), []

  def alone():
    with sweeps.Turns(path).alone():
      order.append('alone')

  other = threading.Thread(target=alone)
  with sweeps.Turns(path).work() as pause:
    pause()  # nobody waits
    other.start()
    other.join(0.3)
    assert not order
    pause()
    order.append('works')
  other.join(10)
  assert order == ['alone', 'works']
