"""`python -m specjax.certify` as a user types it, and `specjax.certify`."""

import dataclasses
import json
import subprocess
import sys

import pytest

from specjax.certificates import own
from specjax.core import tree
from specjax.drafters import ChainLM
from specjax.verify import Lenient, Speculative

FEW = (r'^no drafts / match|chain 2 iid / (block|lenient)|fault: u q <= p|'
       r'fault: bonus')


def run(process):
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def strict(text: str):
  """Parses JSON that holds no NaN or Infinity."""
  def refuse(word):
    raise AssertionError(word)
  return json.loads(text, parse_constant=refuse)


def test_some_rows(command, tmp_path):
  code, out, err = run(command(
      'specjax.certify', '--out', tmp_path, '--only', FEW, '--seed', '3'))
  assert code == 0, out + err
  assert '4 of 4 rows pass; 2 of 2 planted faults caught' in out
  assert out.count('CAUGHT') == 2 and '[6/6]' in err
  assert 'Traceback' not in err and 'RuntimeWarning' not in err
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      'certificate.json', 'certificate.png', 'certificate.txt']
  found = strict((tmp_path / 'certificate.json').read_text())
  assert found['passed'] and found['seed'] == 3 and found['form'] == 'short'
  assert {'jax', 'specjax'} <= set(found['versions']) and found['device']
  rows = {r['name']: r for r in found['rows']}
  plain = rows['no drafts / match']
  assert plain['p_value'] > 1e-3 and plain['count'] == 32768
  assert 0 < plain['detectable_tv'] < 0.05
  assert rows['no drafts / match / text of plain decoding']['error'] == 0
  assert rows['exact / chain 2 iid / block']['error'] < 1e-6
  lossy = rows['exact / chain 2 iid / lenient(lenience=0.8)']
  assert lossy['error'] > 0.01 and lossy['passed']


def test_list_and_what_is_not_there(command, tmp_path):
  code, out, err = run(command(
      'specjax.certify', '--list', '--only', '^fault',
      '--out', tmp_path / 'no'))
  assert code == 0 and not err
  assert len(out.splitlines()) > 15
  assert all(line.startswith('fault') for line in out.splitlines())
  for only, text in (('[', "only='['"), ('no such row', 'found in no row')):
    code, out, err = run(command('specjax.certify', '--list', '--only', only))
    assert code == 1 and text in err and 'Traceback' not in err
  assert not list(tmp_path.iterdir())


def test_a_missed_fault_is_an_error(tmp_path):
  program = f'''
import dataclasses, runpy, sys
from specjax.certificates import faulty_rules
from specjax.verify import Speculative
first = next(f for f in faulty_rules.FAULTS if f.name == 'correction from p')
faulty_rules.FAULTS = (dataclasses.replace(first, rule=Speculative()),)
sys.argv = ['certify', '--out', {str(tmp_path)!r}, '--only', 'correction']
runpy.run_module('specjax.certify', run_name='__main__')
'''
  done = subprocess.run([sys.executable, '-c', program], text=True,
                        capture_output=True, timeout=300)
  assert done.returncode == 1, done.stdout + done.stderr
  assert 'MISSED' in done.stdout
  assert '0 of 1 planted faults caught' in done.stdout
  assert not strict((tmp_path / 'certificate.json').read_text())['passed']


@dataclasses.dataclass(frozen=True)
class Cautious(Speculative):
  """Right: tests against a part of p, and corrects for what it left out.

  Accepting x with probability min(1, a p / q) leaves p - min(q, a p).
  """

  share: float = 0.8

  name = 'cautious'

  def numerator(self, params, context, draft, scores, test):
    return self.share * test.p

  def left_over(self, params, test, p, q):
    import jax.numpy as jnp
    return p - jnp.minimum(q, self.share * p)


@dataclasses.dataclass(frozen=True)
class Hasty(Cautious):
  """Wrong: corrects as if it had tested against the whole of p."""

  name = 'hasty'

  def left_over(self, params, test, p, q):
    return Speculative.left_over(self, params, test, p, q)


@dataclasses.dataclass(frozen=True)
class Raises(Speculative):
  """Breaks down when it is used."""

  name = 'raises'

  def verify(self, params, context, draft, scores):
    raise RuntimeError('not today')


def certify(rule, **kwargs):
  return own.certify(rule, topology=tree.chain(1), kinds=['iid'],
                     vocab_size=3, **kwargs)


def test_own_rules_right_and_wrong():
  right = certify(Cautious())
  assert right.passed, right.table()
  assert {r.method for r in right.rows} == {'exact', 'sampled'}
  wrong = certify(Hasty())
  assert not wrong.passed and len(wrong.failed) == 2, wrong.table()
  strict(json.dumps(wrong.to_dict()))
  assert 'FAIL' in wrong.table()


def test_own_rule_that_raises():
  found = certify(Raises())
  assert not found.passed
  assert all('not today' in r.note for r in found.rows)


def test_own_drafter_and_lossy_rule():
  model = own.toys.ToyLM(3)
  found = own.certify(Lenient(0.7), ChainLM(1, model), vocab_size=3)
  assert found.passed, found.table()
  [row] = found.rows
  assert 0 < row.tv and 0 < row.excess < 0.5
  assert row.name == 'ChainLM / lenient(lenience=0.7)'
  strict(json.dumps(found.to_dict()))


@pytest.mark.parametrize('kwargs, text', [
    ({'kinds': ['sorted']}, 'kinds='), ({'vocab_size': 2}, 'vocab_size=2'),
    ({'topology': tree.chain(1), 'drafter': ChainLM(1, own.toys.ToyLM(4))},
     'comes with its'),
    ({'kinds': ['point'], 'rule': 'block'}, 'refuses all')])
def test_arguments_that_make_no_sense(kwargs, text):
  with pytest.raises(ValueError, match=text):
    own.certify(kwargs.pop('rule', 'speculative'), **kwargs)
