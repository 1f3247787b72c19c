"""`python -m specjax.sample` as a user types it."""

import json

import pytest

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


@pytest.mark.parametrize('text, said', [
    ('{"method": "ngram", "depth": 2}', "['depth'] are unknown for method"),
    ('{"num_speculative_tokens": -3}', 'num_speculative_tokens=-3'),
    ('{"num_speculative_tokens": 100}', 'takes at most 63'),
    ('{method}', 'not JSON')])
def test_speculative_config_that_cannot_be(command, tmp_path, text, said):
  code, out, err = run(command, tmp_path, '--speculative_config', text)
  assert code == 1 and said in err and 'Traceback' not in err
  assert not list(tmp_path.glob('s*.json*'))
