"""`python -m specjax.sample` as a user types it."""

import json

import jax
import numpy as np
import pytest

import specjax
from specjax.distill import kinds
from specjax.host import drafter as drafter_lib
from specjax.host import tiny

TINY = ('specjax.sample', '--config', 'configs/quickstart.py:tiny', '--out')
KEYS = {
    'num_requests', 'new_tokens', 'num_rounds', 'wall_s', 'compile_s',
    'tokens_per_s', 'mean_acceptance_length', 'draft_acceptance_rate',
    'acceptance_histogram', 'per_position_acceptance', 'device', 'versions',
    'config', 'useful_row_share', 'ttft_s', 'tpot_s', 'one_step_tv'}


def run(command, *arguments):
  process = command(*TINY, *arguments)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def strict(text: str):
  """Parses JSON that holds no NaN or Infinity."""
  def refuse(word):
    raise AssertionError(word)
  return json.loads(text, parse_constant=refuse)


def test_quickstart(command, tmp_path):
  code, out, err = run(command, tmp_path)
  assert code == 0, err
  assert 'speed-up' in out and '--- summary ---' in out
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      'samples.jsonl', 'summary.json']
  summary = strict((tmp_path / 'summary.json').read_text())
  assert set(summary) > KEYS and set(summary['plain']) > KEYS - {'config'}
  assert summary['drafter'] == 'Lookup(K=7)' and not summary['lossy']
  assert summary['plain']['mean_acceptance_length'] == 1
  assert sum(summary['acceptance_histogram']) == summary['num_rounds']
  rows = [strict(line) for line in
          (tmp_path / 'samples.jsonl').read_text().splitlines()]
  assert {r['id'] for r in rows} == {'summary', 'code', 'extract', 'chat'}
  assert sum(r['num_new_tokens'] for r in rows) == summary['new_tokens']
  for r in rows:
    assert len(r['tokens']) == r['num_new_tokens'] <= 16
    assert r['finish_reason'] in ('eos', 'length')


def test_quiet_with_bad_lines_and_another_drafter(command, tmp_path):
  lines = tmp_path / 'lines.jsonl'
  lines.write_bytes(
      b'{"prompt": "good"}\n{"prompt": "\xff"}\n{oops\n'
      b'{"turns": ["hi", "and?"]}\n[1]\n{"prompt": ""}\n')
  (tmp_path / 'summary.json').write_text('of another run')
  speculative = {'method': 'input_guided', 'num_speculative_tokens': 3}
  arguments = [
      tmp_path, f'--config.prompts={lines}', '--config.compare_plain=False',
      '--config.sampling.temperature=0.7', '--config.sampling.log_probs=True',
      '--speculative_config', json.dumps(speculative)]
  code, out, err = run(command, *arguments)
  assert code == 1 and not out
  assert f'{lines}:2: not valid UTF-8: byte 0xff at' in err
  code, out, err = run(command, *arguments, '--keep_going')
  assert code == 0, err
  for number in (2, 3, 5, 6):
    assert f'skipped: {lines}:{number}: ' in err
  code, out, err = run(command, *arguments, '--keep_going', '--quiet')
  assert code == 0 and not out and not err
  summary = strict((tmp_path / 'summary.json').read_text())
  assert summary['drafter'] == 'InputGuided(K=3)'
  assert summary['verify'] == 'match' and 'plain' not in summary
  rows = [strict(line) for line in
          (tmp_path / 'samples.jsonl').read_text().splitlines()]
  assert sorted((r['id'], r['turn']) for r in rows) == [
      ('1', 0), ('4', 0), ('4.1', 1)]
  for r in rows:
    assert len(r['log_probs']['raw']) == len(r['tokens'])


def test_a_drafter_learns_online_and_texts_stay(command, tmp_path):
  target, ids = tiny.model(), np.arange(0, 257, 2)
  task = kinds.build(
      'dspark', target.lm.config, len(ids),
      model={'num_layers': 1, 'num_taps': 2, 'num_slots': 3,
             'markov_rank': 4})
  net = jax.jit(task.init)(jax.random.key(0), target.params)
  drafter_lib.save_drafter(tmp_path / 'drafter', task.model, net, ids, target,
                           kind='dspark', num_draft=3, form='float32')
  speculative = json.dumps({'model': str(tmp_path / 'drafter')})
  asked = ['one', 'and two'] * 3
  (tmp_path / 'asked.txt').write_text('\n'.join(asked))
  code, out, err = run(
      command, tmp_path, f'--config.prompts={tmp_path}/asked.txt',
      '--config.compare_plain=False', '--config.online.enabled',
      '--config.online.every=2', '--config.online.learning_rate=0.01',
      '--config.online.length=64',
      '--speculative_config', speculative)
  assert code == 0, err
  summary = strict((tmp_path / 'summary.json').read_text())
  online = summary['online']
  assert online['updates'] == 3 and online['skipped'] == 0
  # The same two prompts each time.
  assert online['last_loss'] < online['first_loss']
  assert 0 < online['seconds'] < summary['wall_s']
  assert 'online adaptation: 3 updates' in out
  plain = specjax.generate(
      target, {'method': 'null', 'num_speculative_tokens': 3},
      asked, specjax.Sampling(max_new_tokens=16))
  rows = [strict(line) for line in
          (tmp_path / 'samples.jsonl').read_text().splitlines()]
  assert [r['text'] for r in rows] == plain.texts


@pytest.mark.parametrize('argument, said', [
    ('--config.online.enabled', 'Lookup(K=7) cannot be trained'),
    ('--config.online.every=2', 'needs config.online.enabled=True'),
    ('--config.online.rate=2', 'rate')])
def test_online_that_cannot_be(command, tmp_path, argument, said):
  code, _, err = run(command, tmp_path, argument)
  assert code == 1 and said in err and 'Traceback' not in err
  assert not list(tmp_path.glob('s*.json*'))


@pytest.mark.parametrize('text, said', [
    ('{"method": "ngram", "depth": 2}', "['depth'] are unknown for method"),
    ('{"num_speculative_tokens": -3}', 'num_speculative_tokens=-3'),
    ('{"num_speculative_tokens": 100}', 'takes at most 63'),
    ('{method}', 'not JSON')])
def test_speculative_config_that_cannot_be(command, tmp_path, text, said):
  code, out, err = run(command, tmp_path, '--speculative_config', text)
  assert code == 1 and said in err and 'Traceback' not in err
  assert not list(tmp_path.glob('s*.json*'))
