"""Bad input of every kind: what is said, and what is left behind."""

import dataclasses
import re
import signal
import subprocess
import time

import jax.numpy as jnp
import numpy as np
import pytest
import toy_text

from specjax import Prompt, Sampling, generate
from specjax.core.automaton import Automaton
from specjax.drafters import Lookup, Null
from specjax.host import cli, memory, methods, tiny
from specjax.io import output, prompts
from specjax.io.errors import OutputError, PromptError

MODEL = toy_text.model()
NAMELESS = dataclasses.replace(MODEL, tokenizer=None)
ONE = Sampling(temperature=1.0)
SHORT = tiny.model(num_layers=1, max_length=64)
LONG = tiny.model(num_layers=1, max_length=128)


@pytest.mark.parametrize('field, value, allowed', [
    ('temperature', -0.1, '>= 0 and finite'),
    ('temperature', float('nan'), '>= 0 and finite'),
    ('temperature', 'hot', '>= 0 and finite'),
    ('temperature', True, '>= 0 and finite'),
    ('top_k', -2, 'an integer >= 0'), ('top_k', 1.5, 'an integer >= 0'),
    ('top_k', 2**31, 'an integer >= 0'), ('top_k', None, 'an integer >= 0'),
    ('top_p', 0.0, 'in (0, 1]'), ('top_p', 1.1, 'in (0, 1]'),
    ('min_p', -0.1, 'in [0, 1]'), ('min_p', 1.1, 'in [0, 1]'),
    ('repetition_penalty', 0, '> 0 and finite'),
    ('presence_penalty', float('inf'), 'finite'),
    ('frequency_penalty', float('nan'), 'finite'),
    ('max_new_tokens', 0, 'an integer >= 1'),
    ('max_new_tokens', 2.5, 'an integer >= 1'),
    ('max_new_tokens', 2**31, 'an integer >= 1'),
    ('min_new_tokens', 129, 'in [0, max_new_tokens=128]'),
    ('seed', -1, 'in [0, 9223372036854775807]'),
    ('seed', 2**63, 'in [0, 9223372036854775807]'),
    ('seed', 0.5, 'in [0, 9223372036854775807]'),
    ('n', 0, 'an integer >= 1'), ('n', 1.5, 'an integer >= 1'),
    ('stop', 'end', 'a tuple of non-empty strings'),
    ('stop', ('',), 'a tuple of non-empty strings'),
    ('stop', (3,), 'a tuple of non-empty strings'),
    ('allowed_ids', (), 'a non-empty tuple'),
    ('banned_ids', (1.5,), 'a tuple of token ids'),
    ('banned_ids', 7, 'a tuple of token ids'),
    ('logit_bias', {3: float('inf')}, 'finite numbers, or to -inf'),
    ('logit_bias', {3: float('nan')}, 'finite numbers, or to -inf'),
    ('logit_bias', {'3': 1.0}, 'token ids to finite')])
def test_sampling_options_out_of_range(field, value, allowed):
  with pytest.raises(ValueError, match=f'{field}=.*{re.escape(allowed)}'):
    Sampling(**{field: value})


EVERYTHING = tuple(range(toy_text.VOCAB))


@pytest.mark.parametrize('said, target, drafter, asked, kwargs', [
    ('no prompts', MODEL, None, [], {}),
    ('must be a list', MODEL, None, 'text', {}),
    ('must be a list', MODEL, None, Prompt(id='a', text='a'), {}),
    ('prompt 1: must be a string, a list of mess.*found 3', MODEL, None,
     ['a', 3], {}),
    ('prompt 0: must be.*token ids.*2.5', MODEL, None, [[1, 2.5]], {}),
    ('prompt 0: no tokens', MODEL, None, ['', 'a'], {}),
    (r'prompt 1: token ids \[264, -1\]: must be in \[0, 264\)', MODEL, None,
     ['a', [1, 264, -1]], {}),
    ('prompt 1: 70 tokens, 7 more than the capacity of 64', MODEL, None,
     ['a', 'b' * 70], {'capacity': 64}),
    ('prompt 1: 20 tokens and max_new_tokens=45; the context .* is 64', SHORT,
     None, ['a', 'b' * 20], {'sampling': Sampling(max_new_tokens=45)}),
    ('prompt 0: 64 tokens and max_new_tokens=1; the context .* is 64', SHORT,
     None, ['b' * 64], {'sampling': Sampling(max_new_tokens=1)}),
    ('prompt 0: 64 tokens and max_new_tokens=9; the context .* is 64', SHORT,
     None, ['b' * 64], {'capacity': 32, 'sampling': Sampling(
         max_new_tokens=9)}),
    ('prompt 1: 20 tokens and max_new_tokens=45; .* the draft model is 64',
     LONG, SHORT, ['a', 'b' * 20], {'sampling': Sampling(max_new_tokens=45)}),
    ('prompt 0: 64 tokens and max_new_tokens=1; .* the draft model is 64',
     LONG, {'method': 'draft_model', 'model': SHORT,
            'draft_len_schedule': 'heuristic'},
     ['b' * 64], {'sampling': Sampling(max_new_tokens=1)}),
    ('2 sampling options for 3 prompts', MODEL, None, ['a'] * 3,
     {'sampling': [ONE] * 2}),
    ('batch_size=0: must be an integer >= 1', MODEL, None, ['a'],
     {'batch_size': 0}),
    ('capacity=-5: must be', MODEL, None, ['a'], {'capacity': -5}),
    ('rounds_per_chunk=0: must be', MODEL, None, ['a'],
     {'rounds_per_chunk': 0}),
    ('no tokenizer: give token ids', NAMELESS, None, ['a'], {}),
    ('stop strings need a tokenizer', NAMELESS, None, [[1]],
     {'sampling': Sampling(stop=('x',))}),
    (r'token ids \[264\].*must be in \[0, 264\)', MODEL, None, ['a'],
     {'sampling': Sampling(banned_ids=(1, 264))}),
    ('leave nothing of the vocabulary', MODEL, None, ['a'],
     {'sampling': Sampling(banned_ids=EVERYTHING)}),
    ('min_new_tokens.*leave nothing of allowed_ids', MODEL, None, ['a'],
     {'sampling': Sampling(allowed_ids=(256,), min_new_tokens=1)}),
    ('num_speculative_tokens=-1: Null needs >= 0', MODEL,
     {'method': 'null', 'num_speculative_tokens': -1}, ['a'], {}),
    ('num_speculative_tokens=0: Lookup needs >= 1', MODEL,
     {'num_speculative_tokens': 0}, ['a'], {}),
    ("num_speculative_tokens='7': must be an integer", MODEL,
     {'num_speculative_tokens': '7'}, ['a'], {}),
    (r"keys \['topk'\] are unknown for method 'ngram'; known are.*prefer",
     MODEL, {'topk': 1}, ['a'], {}),
    ("method 'eagle9': known are .*draft_model.*ngram", MODEL,
     {'method': 'eagle9'}, ['a'], {}),
    (r"method \['ngram'\]: known are", MODEL, {'method': ['ngram']}, ['a'],
     {}),
    ("draft_len_schedule='x': known are constant", MODEL,
     {'draft_len_schedule': 'x'}, ['a'], {}),
    ("needs a drafter that reports", MODEL,
     {'draft_len_schedule': 'confidence'}, ['a'], {}),
    ("'round_costs' goes with draft_len_schedule='shared'", MODEL,
     {'draft_len_schedule': 'tracking', 'round_costs': [1.1]}, ['a'], {}),
    ("'round_costs' goes with draft_len_schedule='shared'", MODEL,
     {'round_costs': [1.1]}, ['a'], {}),
    (r"round_costs=\[1.1\]: must be numbers > 0, one .* widths \[2, 7\]",
     MODEL, {'num_speculative_tokens': 7, 'draft_len_schedule': 'shared',
             'widths': [0, 2], 'round_costs': [1.1]}, ['a'], {}),
    (r"keys \['lattice'\] .*\(model='nowhere' is no folder of a drafter\)",
     MODEL, {'model': 'nowhere', 'lattice': False}, ['a'], {}),
    ("drafter='ngram': must be a drafter such as", MODEL, 'ngram', ['a'], {}),
    ('drafter=.*Lookup.*: must be a drafter such', MODEL, Lookup, ['a'], {}),
    ("'block' needs drafts of kind iid", MODEL, Lookup(3), ['a'],
     {'verify': 'block', 'sampling': ONE}),
    ("'greedy' is exact at temperature 0 only", MODEL, Lookup(3), ['a'],
     {'verify': 'greedy', 'sampling': ONE}),
    ("verify='nope': known are block", MODEL, None, ['a'],
     {'verify': 'nope'})])
def test_what_generate_refuses(said, target, drafter, asked, kwargs):
  with pytest.raises(ValueError, match=said):
    generate(target, drafter, asked, **kwargs)


def test_drafts_longer_than_the_target_takes_at_once():
  model = tiny.model(num_layers=1)  # takes 64
  with pytest.raises(ValueError, match=(
      'num_speculative_tokens=64: this target takes at most 63')):
    generate(model, Null(64), ['a'], Sampling(max_new_tokens=2))


def test_texts_that_just_fit_the_context():
  """Also where the limit is a given capacity; what may follow is told."""
  for new, kwargs in ((44, {}), (200, {'capacity': 64})):
    found = generate(SHORT, Lookup(2), ['b' * 20], Sampling(
        max_new_tokens=new, ignore_eos=True), **kwargs)
    assert len(found.results[0].tokens) == 44
    assert found.description['capacity'] == 64
  asked = Prompt(id='a', turns=('b', 'c' * 20))
  with pytest.warns(UserWarning, match=(
      r'prompt a.1 \(turn 2\): .* tokens and max_new_tokens=8; the context '
      'of this model is 64; this dialogue ends here')):
    found = generate(SHORT, None, [asked], Sampling(
        max_new_tokens=8, ignore_eos=True))
  assert [r.request.turn for r in found.results] == [0]


def test_vocabularies_that_differ():
  other = tiny.tokenizer()
  other._backend.add_tokens(['<more>'])
  drafter = toy_text.model(1, name='small', tokenizer=other)
  with pytest.raises(ValueError, match=(
      "toy-0 and small differ: .*from id 257 on .*'<more>'.*use a drafter "
      "of the target's family, or method 'ngram'")):
    generate(MODEL, drafter, ['a'])
  lm = dataclasses.replace(MODEL.lm, vocab_size=300)
  bigger = dataclasses.replace(MODEL, name='big', lm=lm)
  with pytest.raises(ValueError, match='toy-0 scores 264 tokens and big 300'):
    methods.check_vocabularies(MODEL, bigger)


def test_a_run_that_does_not_fit_is_refused_before_it_is_compiled(
    monkeypatch):
  monkeypatch.setattr(memory, 'device_limit', lambda device: 1000)
  with pytest.raises(MemoryError, match=(
      r'needs about .* GiB a device \(parameters .* for 2 rows of 192 tokens'
      '.*lower the batch size')):
    generate(MODEL, None, ['a', 'b'])


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad):
  table = MODEL.params['now']
  spoilt = {**MODEL.params, 'now': table.at[40].set(bad)}
  model = dataclasses.replace(MODEL, params=spoilt)
  # Row 0 says 40 first, and its next round finds the numbers.
  into, away = (Sampling(max_new_tokens=9, logit_bias={i: 99.0})
                for i in (40, 7))
  done = []
  with pytest.raises(FloatingPointError, match=(
      r'request bad \(row 0\): NaN or infinite logits in round 1')):
    generate(model, None, [Prompt(id='bad', text='ab'), 'cd', 'ef'],
             [into, away, away], on_result=done.append)
  # Neighbours that ended in the same chunk of rounds are not lost.
  assert [r.tokens for r in done] == [(7,) * 9] * 2


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_bans_and_constraint_leave_nothing(temperature):
  """Said, instead of a token that the law does not contain."""
  model = tiny.model()
  table = np.full((1, 1, model.vocab_size), -1, np.int32)
  table[0, 0, 10:20] = 0  # the constraint allows what the options ban
  rows = jnp.zeros((1,), jnp.int32)
  options = Sampling(temperature=temperature, max_new_tokens=4,
                     banned_ids=tuple(range(10, 20)))
  with pytest.raises(FloatingPointError, match='leave no token'):
    generate(model, None, ['ab'], options,
             constraint=Automaton(jnp.asarray(table), rows, rows))


def test_prompt_files(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  path.write_bytes(b'')
  with pytest.raises(PromptError, match='prompts.jsonl: no prompts: the file'):
    prompts.read(path)
  path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n{oops}\n')
  with pytest.raises(PromptError, match=r'jsonl:2: not valid UTF-8'):
    prompts.read(path)


def test_speculative_flag_and_sampling_section():
  config = cli.config_dict.ConfigDict({'method': 'ngram', 'model': None})
  assert cli.speculative(config, None) == {'method': 'ngram'}
  assert cli.speculative(config, '{"a": 1}') == {'a': 1}
  for text, said in (('{', 'not JSON'), ('[]', 'a JSON object'),
                     ('null', 'a JSON object')):
    with pytest.raises(ValueError, match=f'--speculative_config.*{said}'):
      cli.speculative(config, text)
  with pytest.raises(ValueError, match='config.sampling.topk: unknown; kno'):
    cli.sampling(cli.config_dict.ConfigDict({'topk': 1}))


def test_a_folder_that_cannot_be(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OutputError, match='--out=.*file/x: cannot write there'):
    output.prepare(tmp_path / 'file' / 'x')


TINY = ('specjax.sample', '--config', 'configs/quickstart.py:tiny', '--out')


@pytest.mark.parametrize('arguments, said', [
    (['{}', '--config.sampling.temprature=1'],
     r'--config.sampling.temprature: the config has.*"temperature"'),
    (['{}', '--config.sampl.top_k=1'],
     "--config.sampl.top_k: the config has no 'sampl'; did you.*sampling"),
    (['{}', '--config.batch_size=1', '--config.sampling.batch_size=2'],
     "--config.batch_size or --config.sampling.batch_size: the config has no "
     "'batch_size'"),
    (['{}', '--config.nonsense=1'],
     "--config.nonsense: the config has no 'nonsense'\n"),
    (['{}', '--config=configs/nope.py'], "--config: .*'configs/nope.py'"),
    (['{}', '--config=configs/quickstart.py:x'], "--config: .*'x'"),
    (['{}', '--nonsense'], "unknown command line flag 'nonsense'"),
    (['{}', '--config.sampling.top_k=many'], 'top_k=many'),
    (['{}', '--config.sampling.top_p=2'], r'top_p=2.0: must be in \(0, 1\]'),
    (['{}/file/out'], 'file/out: cannot write there')])
def test_the_command_line_says_it_in_a_line(
    command, tmp_path, arguments, said):
  (tmp_path / 'file').write_text('')
  process = command(*TINY, *(a.format(tmp_path) for a in arguments))
  out, err = process.communicate(timeout=120)
  assert process.returncode == 1 and not out
  assert re.search(said, err, re.IGNORECASE), err
  assert err.startswith('error: ') and err.count('\n') == 1, err
  assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_ctrl_c_keeps_what_is_finished(command, tmp_path):
  lines = tmp_path / 'prompts.txt'
  lines.write_text('\n'.join(f'prompt {i}' for i in range(3000)))
  out = tmp_path / 'out'
  process = command(
      *TINY, out, f'--config.prompts={lines}', '--config.batch_size=1',
      '--config.sampling.max_new_tokens=64', '--config.stream=False')
  partial = out / 'samples.jsonl.partial'
  until = time.monotonic() + 240
  while time.monotonic() < until and not (
      partial.exists() and partial.read_text().count('\n') > 3):
    assert process.poll() is None, process.communicate()
    time.sleep(0.1)
  process.send_signal(signal.SIGINT)
  try:
    _, err = process.communicate(timeout=20)
  except subprocess.TimeoutExpired:
    # Python drops what is raised within a callback of its garbage collector.
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=180)
    err = err[err.rfind('\n', 0, err.rfind('interrupted')) + 1:]
  assert process.returncode == 130, err
  assert err.strip().endswith('interrupted') and 'Traceback' not in err
  assert [p.name for p in out.iterdir()] == ['samples.jsonl']
  rows = (out / 'samples.jsonl').read_text().splitlines()
  assert 3 < len(rows) < 3000
