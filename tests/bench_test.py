"""The benchmark program, end to end on a random model, and its arithmetic."""

import json
import pathlib
import re
import sys
import types

from absl import flags
from matplotlib import image
import pytest

from specjax import bench
from specjax.data import questions
from specjax.eval import speed
from specjax.host import status as status_lib
from specjax.io.errors import OutputError, PromptError

_TINY = '--config=configs/bench_spec_bench.py:tiny'
_RUNS = ("--config.runs=({'name': 'lookup', 'speculative': {'method': "
         "'ngram', 'num_speculative_tokens': 3}},)")
_ROWS = (
    {'question_id': 81, 'category': 'writing',
     'turns': ['abcabcabcabc', 'Again, please.']},
    {'question_id': 161, 'category': 'translation', 'turns': ['xyxyxyxyxy']},
    {'question_id': 241, 'category': 'qa', 'turns': []},  # malformed
    {'question_id': 242, 'category': 'qa', 'turns': ['Why, why, why?']})
_ANSWER_KEYS = ['question_id', 'category', 'answer_id', 'model_id',
                'choices', 'tstamp']
_CHOICE_KEYS = ['index', 'turns', 'decoding_steps', 'new_tokens',
                'wall_time', 'accept_lengths']


def parse(monkeypatch, *args):
  """Parses a command line the way absl does for the program."""
  monkeypatch.chdir(pathlib.Path(__file__).parent.parent)  # for configs/
  # config_flags looks for overrides in sys.argv, whatever it is given.
  monkeypatch.setattr(sys, 'argv', ['bench', *args])
  values = flags.FLAGS
  for name in [n for n in values if n.startswith('config.')]:
    delattr(values, name)
  values.unparse_flags()
  values['quiet'].value = values['keep_going'].value = False
  values(sys.argv)


def run(monkeypatch, *args):
  parse(monkeypatch, *args)
  return bench.main()


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp('prompts') / 'question.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in _ROWS))
  return path


@pytest.fixture(scope='module')
def out(tmp_path_factory, prompts):
  folder = tmp_path_factory.mktemp('bench') / 'new'
  with pytest.MonkeyPatch.context() as monkeypatch:
    assert run(monkeypatch, _TINY, _RUNS, f'--config.prompts={prompts}',
               '--keep_going', f'--out={folder}', '--quiet') == 0
  return folder


@pytest.fixture(scope='module')
def result(out):
  return json.loads((out / 'bench.json').read_text())


def test_every_run_batch_and_category_has_a_row(result):
  got = [(r['batch_size'], r['run'], r['category']) for r in result['rows']]
  assert got == [
      (batch, name, category) for batch in (1, 2)
      for name in ('plain', 'lookup')
      for category in ('overall', 'writing', 'translation', 'qa')]
  for row in result['rows']:
    assert row['speedup_min'] <= row['speedup'] <= row['speedup_max']
    assert 1 <= row['mean_acceptance_length'] <= 4
    assert sum(row['acceptance_histogram']) == row['num_rounds']
    assert row['num_repeats'] == 2 and row['num_prompts'] >= 1
    assert row['ttft_s'] > 0


def test_plain_is_the_unit(result):
  for row in result['rows']:
    if row['run'] == 'plain':
      assert row['speedup'] == row['speedup_mean_of_ratios'] == 1
      assert row['mean_acceptance_length'] == row['same_as_plain'] == 1


def test_drafts_change_the_speed_and_not_the_text(result):
  row = next(r for r in result['rows'] if r['run'] == 'lookup')
  assert row['num_draft_tokens'] > 0
  assert len(row['per_position_acceptance']) == 3
  assert row['same_as_plain'] == 1


def test_the_setting_is_written_down(result):
  assert result['num_skipped_prompts'] == 1
  assert result['num_prompts'] == 3
  assert result['sampling'] == {'temperature': 0.0, 'max_new_tokens': 12}
  assert result['config']['batch_sizes'] == [1, 2]
  assert 'bench_spec_bench.py:tiny' in result['command']
  assert 'cpu' in result['device'] and 'jax' in result['versions']
  assert not result['interrupted']


@pytest.mark.parametrize('name', [
    'plain', 'lookup', 'plain.batch2', 'lookup.batch2'])
def test_answers_are_in_spec_bench_form(out, result, name):
  lines = (out / 'answers' / f'{name}.jsonl').read_text().splitlines()
  answers = [json.loads(line) for line in lines]
  assert [a['question_id'] for a in answers] == [81, 161, 242]
  steps, tokens = [], 0
  for answer in answers:
    assert list(answer) == _ANSWER_KEYS
    (choice,) = answer['choices']
    assert list(choice) == _CHOICE_KEYS
    lists = ('turns', 'decoding_steps', 'new_tokens', 'wall_time')
    assert {len(choice[k]) for k in lists} == {
        2 if answer['question_id'] == 81 else 1}
    assert len(choice['accept_lengths']) == sum(choice['decoding_steps'])
    steps += choice['accept_lengths']
    tokens += sum(choice['new_tokens'])
  assert sum(steps) == tokens
  batch = 2 if name.endswith('2') else 1
  row = next(r for r in result['rows'] if r['category'] == 'overall'
             and r['run'] == name.split('.')[0] and r['batch_size'] == batch)
  assert sum(steps) / len(steps) == pytest.approx(
      row['mean_acceptance_length'])


def test_markdown_has_the_tables(out):
  text = (out / 'bench.md').read_text()
  for line in ('## Overall', '## By category, batch size 2',
               '## Acceptance by position'):
    assert line in text
  assert re.search(r'\| lookup \| 2 \| \d+\.\d\d \(\d', text)
  tables = [line for line in text.splitlines() if line.startswith('|')]
  for first, second in zip(tables, tables[1:], strict=False):
    if second.startswith('| ---'):
      assert first.count('|') == second.count('|')
  for name in re.findall(r'\]\((.*\.png)\)', text):
    assert (out / name).exists()


@pytest.mark.parametrize('name', [
    'speedup_by_category', 'acceptance_by_position', 'speed_by_batch'])
def test_plots_open_and_show_something(out, name):
  pixels = image.imread(out / f'{name}.png')
  assert pixels.shape[0] > 500 and pixels.shape[1] > 800
  # Coloured: not text on an empty frame.
  assert (pixels[..., :3].max(-1) - pixels[..., :3].min(-1)).max() > 0.3


def test_nothing_is_left_half_written(out):
  assert not list(out.rglob('*.partial'))


def test_an_interrupted_run_keeps_whole_repeats(
    monkeypatch, tmp_path, prompts):
  real, calls = bench.specjax.generate, []

  def generate(*args, **kwargs):
    calls.append(kwargs['batch_size'])
    if len(calls) == 6:  # 2 warm-ups, 2 of the first repeat, 1 of the next
      raise KeyboardInterrupt
    return real(*args, **kwargs)

  monkeypatch.setattr(bench.specjax, 'generate', generate)
  code = run(monkeypatch, _TINY, _RUNS, f'--config.prompts={prompts}',
             '--keep_going', f'--out={tmp_path}', '--quiet')
  assert code == 130
  kept = json.loads((tmp_path / 'bench.json').read_text())
  assert kept['interrupted']
  assert {r['num_repeats'] for r in kept['rows']} == {1}
  assert 'Interrupted' in (tmp_path / 'bench.md').read_text()


def test_unwritable_out_is_said_before_any_work(monkeypatch, tmp_path):
  monkeypatch.setattr(bench.cli, 'load_target', pytest.fail)
  (tmp_path / 'file').write_text('')
  with pytest.raises(OutputError, match='--out=.*cannot write'):
    run(monkeypatch, _TINY, f'--out={tmp_path}/file/sub')


def test_unknown_config_key_is_refused(monkeypatch, tmp_path):
  with pytest.raises(AttributeError, match='batch_size'):
    parse(monkeypatch, _TINY, '--config.batch_size=3', f'--out={tmp_path}')


@pytest.mark.parametrize('args, message', [
    (('--config.repeats=0',), 'config.repeats=0'),
    (('--config.batch_sizes=(1, 99)',), 'cannot fill 99 slots'),
    (('--config.batch_sizes=(2, 2)',), 'different integers'),
    (('--config.categories=("cooking",)',), "category 'cooking'.*chat"),
    (('--config.max_prompts=0',), 'max_prompts=0'),
    (('--config.runs=()',), 'at least one run'),
    (('--config.runs=({"name": "plain"},)',), "'plain' is taken"),
    (('--config.runs=({"name": "../x"},)',), 'file name'),
    (('--config.runs=({"name": "x", "k": 3},)',), 'must be a dict of'),
    (('--config.runs=({"name": "x", "speculative": {"method": "magic"}},)',),
     "config.runs, x: speculative method 'magic'"),
    (('--config.sampling.top_p=2.0',), 'top_p=2.0'),
    (('--config.prompts=absent.jsonl',), 'cannot read absent.jsonl'),
])
def test_bad_configs_are_refused(monkeypatch, tmp_path, args, message):
  monkeypatch.setattr(bench.specjax, 'generate', pytest.fail)
  with pytest.raises(ValueError, match=message):
    run(monkeypatch, _TINY, f'--out={tmp_path}', '--quiet', *args)


def test_bad_prompts_file_names_the_line(monkeypatch, tmp_path, prompts):
  with pytest.raises(PromptError, match=r'question\.jsonl:3: turns must be'):
    run(monkeypatch, _TINY, f'--config.prompts={prompts}',
        f'--out={tmp_path}', '--quiet')


def test_max_prompts_takes_from_every_category(monkeypatch, tmp_path):
  parse(monkeypatch, _TINY, '--config.max_prompts=9', f'--out={tmp_path}')
  kept, skipped = bench.read_prompts(bench._FLAGS.config.value, False, True)
  assert skipped == 0 and len(kept) == 9
  assert len({p.category for p in kept}) == 8
  order = [p.id for p in questions.QUESTIONS]
  assert [p.id for p in kept] == [i for i in order if i in {
      p.id for p in kept}]


def test_mt_bench_is_one_group_when_it_is_complete():
  names = sorted(speed.MT_BENCH)
  assert speed.groups([*names, 'qa']) == ['mt_bench'] * 8 + ['qa']
  assert speed.groups(['coding', 'qa']) == ['coding', 'qa']


def measured(run_name, repeat, times):
  """Returns a measurement of two prompts of ten tokens."""
  answers = [
      {'prompt': i, 'stream': 0, 'turn': 0, 'group': 'qa',
       'tokens': tuple(range(10)), 'wall_s': t} for i, t in enumerate(times)]
  figures = {'ttft_s': 0.1, 'tpot_s': None, 'mean_acceptance_length': 2.0}
  return {'run': run_name, 'batch_size': 1, 'repeat': repeat,
          'wall_s': sum(times), 'compile_s': 1.0, 'answers': answers,
          'figures': {'overall': figures, 'qa': figures}}


def test_speed_ups_compare_within_a_repeat():
  # The machine is twice as slow in the second repeat: the ratio is the same.
  rows = speed.rows([
      measured('plain', 0, [1.0, 2.0]), measured('new', 0, [0.5, 2.0]),
      measured('plain', 1, [2.0, 4.0]), measured('new', 1, [1.0, 4.0]),
      measured('plain', 2, [1.0, 2.0]), measured('new', 2, [0.25, 1.0])],
      'plain')
  row = next(r for r in rows if r['run'] == 'new')
  # Tokens/s of the prompts: 20 and 5 against 10 and 5.
  assert row['speedup'] == pytest.approx(12.5 / 7.5)
  assert row['speedup_mean_of_ratios'] == pytest.approx((2 + 1) / 2)
  assert row['speedup_wall'] == pytest.approx(3 / 2.5)
  assert row['speedup_min'] == pytest.approx(row['speedup'])
  assert row['speedup_max'] == pytest.approx(25 / 7.5)
  assert row['tpot_s'] is None


def test_what_is_decoded_is_counted(monkeypatch, capsys):
  """Turns are told from prompts, and compilation from decoding."""
  clock = [0.0]
  fake = types.SimpleNamespace(monotonic=lambda: clock[0])
  monkeypatch.setattr(status_lib, 'time', fake)
  status = status_lib.BenchStatus(
      False, num_turns=3, num_runs=4, num_programs=2)

  def decode(seconds, prompts):
    status.begin('x', 1)
    for index in prompts:
      clock[0] += seconds / len(prompts)
      status(types.SimpleNamespace(
          request=types.SimpleNamespace(prompt_index=index, stream=0),
          tokens=(1,) * 6, rounds=3, wall_s=seconds / len(prompts)))
    status.end(seconds)
    return capsys.readouterr().err
  clock[0] = 100.0
  status.compiled('x', 99.0)
  assert capsys.readouterr().err == (
      'x: ready to run after 99.0 s of compilation\n')
  # Three runs of 12 s and another program of 100 s are left.
  assert decode(12.0, (0, 0, 1)) == (
      'x: 3 answers to 2 prompts, 1.5 tokens/s, 2.00 tokens/round; 25%, '
      '2:16 left\n')
  # A dialogue that ends early makes a run no less complete.
  assert decode(4.0, (0, 1)).endswith(
      'x: 2 answers, 3.0 tokens/s, 2.00 tokens/round; 50%, 1:56 left\n')
  clock[0] += 50.0
  status.compiled('y', 49.0)
  capsys.readouterr()
  assert '75%, 0:08 left' in decode(8.0, (0, 0, 1))
  assert '100%, 0:00 left' in decode(8.0, (0, 0, 1))
