"""`python -m train.rollout` as a user types it."""

import json
import shutil
import sys

import numpy as np
import pytest

from specjax.data import store
from specjax.data.dialogues import Dialogue
from specjax.host import tiny

TINY = ('train.rollout', '--config', 'configs/rollout_smollm2.py:tiny')


def run(command, out, *arguments):
  process = command(*TINY, '--out', out, *arguments)
  stdout, stderr = process.communicate(timeout=300)
  return process.returncode, stdout, stderr


def whole(folder):
  """Returns the texts of both splits."""
  found = {}
  for name in ('rollouts', 'rollouts-held_out'):
    records, _ = store.load_npz(folder / f'{name}.npz')
    found[name] = [(r.tokens.tolist(), *r[1:]) for r in records]
  return found


@pytest.fixture(scope='module')
def written(command, tmp_path_factory):
  """Returns the folder of a tiny run, its stdout and stderr."""
  out = tmp_path_factory.mktemp('rollout') / 'out'
  code, stdout, stderr = run(command, out)
  assert code == 0, stderr
  return out, stdout, stderr


def test_from_nothing_to_a_dataset_and_on_after_an_interruption(
    command, written, tmp_path):
  out, stdout, stderr = written
  assert 'user turn without an end' in stdout
  assert 'user turns: 192/192' in stderr and 'tokens/s' in stderr
  facts = json.loads((out / 'rollout.json').read_text())
  texts = whole(out)
  assert facts['texts'] == {'train': len(texts['rollouts']),
                            'held_out': len(texts['rollouts-held_out'])}
  assert facts['num_prompts'] + sum(facts['prompts_dropped'].values()) == 192
  counts = dict(facts['answers'])
  counts.pop('cut', None)
  assert sum(counts.values()) == facts['num_prompts']
  for tokens, length, temperature, *_ in (
      texts['rollouts'] + texts['rollouts-held_out']):
    text = tiny.tokenizer().decode(tokens[:length], skip_special=False)
    assert text.startswith('<|user|>') and text.endswith('\n<|assistant|>')
    assert temperature in (0.0, 1.0) and length < len(tokens)
  # As if the run had ended after its first parts.
  again = tmp_path / 'again'
  shutil.copytree(out, again)
  for path in [*again.glob('roll*'), again / 'turns.npz']:
    path.unlink()
  for name in ('turns', 'parts'):
    path = again / name / 'state.json'
    state = json.loads(path.read_text())
    assert len(state['parts']) > 1
    state['parts'] = state['parts'][:1]
    path.write_text(json.dumps(state))
  code, _, stderr = run(command, again)
  assert code == 0, stderr
  assert 'answers: 4 are there already' in stderr
  assert whole(again) == texts


def test_a_dataset_is_written_without_a_word_of_tfds(
    command, written, tmp_path):
  pytest.importorskip('tensorflow_datasets')
  code, stdout, stderr = run(
      command, tmp_path, '--config.form=tfds', '--quiet')
  assert (code, stdout, stderr) == (0, '', '')
  texts = whole(written[0])['rollouts']
  assert len([*store.read(tmp_path / 'rollouts')]) == len(texts)


def test_a_tiny_drafter_learns_from_tiny_rollouts(
    command, written, tmp_path):
  """The two ':tiny' configs fit each other; nothing is cut or left out."""
  out, _, _ = written
  process = command(
      'train.drafter', '--config', 'configs/drafter_smollm2.py:tiny',
      f'--config.data.rollouts={out}', '--out', tmp_path)
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 0, stderr
  rows = whole(out)
  length = a_drafter_config().data.length
  assert max(len(r[0]) for name in rows for r in rows[name]) <= length
  facts = json.loads((tmp_path / 'drafter' / 'config.json').read_text())
  assert facts['text']['texts'] == len(rows['rollouts'])
  assert facts['text']['held_out_texts'] == len(rows['rollouts-held_out'])
  assert facts['metrics']['step'] == 12


def test_prompts_from_files_with_bad_rows(monkeypatch, tmp_path):
  program = load(monkeypatch)
  path = tmp_path / 'x.jsonl'
  path.write_text('{"prompt": "abc"}\n{oops\n{"messages": [{"role": "user", '
                  '"content": "hi"}]}\n{"prompt": "abc"}\n')
  config = a_config('tiny')
  config.prompts, config.max_prompt = str(path), 30
  dropped = program.Counter()
  found, dialogues = program.from_files(config, tiny.model(), dropped)
  text = tiny.tokenizer()
  assert [text.decode(t) for t in found] == [
      'abc', '<|user|>hi\n<|assistant|>']
  assert dropped == {'malformed JSON': 1, 'duplicate prompt': 1}
  assert not dialogues
  more = [*found, found[0], np.arange(31)]
  assert len(program.distinct(more, 30, dropped)) == 2
  assert dropped['too long'] == 1 and dropped['duplicate prompt'] == 2
  with pytest.raises(ValueError, match='no prompt is left: 1 too long'):
    program.distinct([np.arange(31)], 30, program.Counter())


def test_prompts_that_leave_no_room_for_an_answer(monkeypatch):
  program = load(monkeypatch)
  target = tiny.model(max_length=40)
  answer = program.Settings(max_new=20, batch=2, temperatures=(0.0,))
  free = program.room(target, answer)
  assert free == 20 and program.room(tiny.model(), answer) is None
  dropped = program.Counter()
  kept = program.distinct(
      [np.arange(20), np.arange(21), np.arange(31)], 30, dropped, free)
  assert [len(p) for p in kept] == [20]
  assert dropped == {'too long': 1, 'too long for the context': 1}
  with pytest.raises(ValueError, match=(
      'answer.max_new=40: the context of random is 40 tokens')):
    program.room(target, program.Settings(max_new=40))
  # So are later turns.
  writer = program.answers.Writer(
      target, answer, {}, None, 9, 30, None, quiet=True)
  going = {i: Dialogue(({'role': 'user', 'content': 'x' * num},), ())
           for i, num in enumerate((0, 4, 16))}
  assert list(writer._prompts(going, 1, dropped)) == []
  assert dropped['turn 2: too long for the context'] == 2
  assert dropped['turn 2: too long'] == 1


def test_later_turns_after_an_interruption(command, tmp_path):
  """Rows of each turn are counted; the second pass goes on where it was."""
  path = tmp_path / 'x.jsonl'
  path.write_text('\n'.join(
      json.dumps({'turns': [f'{what} {i}?' for what in ('who', 'why', 'when')]
                  }) for i in range(20)) + '\n{"prompt": "abc"}\n')
  out = tmp_path / 'out'
  several = (f'--config.prompts={path}', '--config.turns=first',
             '--config.max_turns=2', '--config.max_prompt=85',
             '--config.num_self_prompts=0')
  code, stdout, stderr = run(command, out, *several)
  assert code == 0, stderr
  facts = json.loads((out / 'rollout.json').read_text())
  ended = sum(facts['prompts_dropped'].values())
  assert set(facts['prompts_dropped']) == {
      'turn 2: too long', 'turn 2: after a loop'}
  assert facts['turns'] == [21, 20 - ended] and 20 - ended > 4
  assert facts['num_prompts'] == 41 - ended
  assert f'{41 - ended} (21, {20 - ended} by turn)' in stdout
  counts = dict(facts['answers'])
  counts.pop('cut', None)
  assert sum(counts.values()) == 41 - ended
  texts, again = whole(out), tmp_path / 'again'
  shutil.copytree(out, again)
  for left in again.glob('roll*'):
    left.unlink()
  path = again / 'parts-2' / 'state.json'
  state = json.loads(path.read_text())
  state['parts'] = state['parts'][:1]
  path.write_text(json.dumps(state))
  code, _, stderr = run(command, again, *several)
  assert code == 0, stderr
  assert 'turn 2: answers: 4 are there already' in stderr
  assert whole(again) == texts


def test_turns_that_cannot_be_answered_in_order(monkeypatch):
  program = load(monkeypatch)
  config = a_config()
  program.check_turns(config)
  config.max_turns = 2
  with pytest.raises(ValueError, match="config.turns=first.*not 'all'"):
    program.check_turns(config)
  config.turns = 'first'
  program.check_turns(config)
  config.max_turns = 0
  with pytest.raises(ValueError, match='max_turns=0'):
    program.check_turns(config)


def test_the_template_around_a_user(monkeypatch):
  program = load(monkeypatch)
  text = tiny.tokenizer()
  before, after = program.around_user(text, opening='Say ')
  assert text.decode(before) == '<|user|>Say'
  assert text.decode(after) == '\n<|assistant|>'
  before, _ = program.around_user(text, system='be kind')
  assert text.decode(before) == '<|system|>be kind\n<|user|>'
  text.chat_template = "{{ messages[-1]['content'] }}"
  with pytest.raises(ValueError, match='does not enclose'):
    program.around_user(text)


def test_what_is_there_is_not_written_over(monkeypatch, tmp_path):
  program = load(monkeypatch)
  assert program.place(tmp_path, 'tfds') == tmp_path / 'rollouts'
  (tmp_path / 'rollouts').mkdir()
  with pytest.raises(ValueError, match='rollouts exists: give another'):
    program.place(tmp_path, 'tfds')
  with pytest.raises(ValueError, match="form='csv'"):
    program.place(tmp_path, 'csv')


def test_settings_of_a_config(monkeypatch):
  program = load(monkeypatch)
  config = a_config()
  found = program.settings(config, 'answer')
  assert found.max_new == 512 and found.temperatures == (0, 0, 0.7, 1)
  assert found.buckets == program.Settings().buckets
  with pytest.raises(ValueError, match='refill=2'):
    config.answer.refill = 2.0
    program.settings(config, 'answer')


def a_config(arg: str = ''):
  from configs import rollout_smollm2
  return rollout_smollm2.get_config(arg)


def a_drafter_config():
  from configs import drafter_smollm2
  return drafter_smollm2.get_config('tiny')


def load(monkeypatch):
  """Imports the program; its flags are another process's business."""
  monkeypatch.setattr(sys, 'argv', ['rollout'])
  from train import rollout
  return rollout
