"""The text that is learnt from, and the prompts of tests."""

from __future__ import annotations

import json

import numpy as np
import pytest

from specjax.data import store
from specjax.data.store import Record
from specjax.host import tiny
from train import text as text_lib


def a_config(**data):
  from configs import drafter_smollm2
  config = drafter_smollm2.get_config('tiny')
  config.data.update(data)
  return config


def records(num, high=257):
  rng = np.random.default_rng(0)
  return [Record(rng.integers(0, high, 12).astype(np.int32), 4)
          for _ in range(num)]


def test_text_from_files(tmp_path):
  target, facts = tiny.model(), {'target': 'random'}
  store.save_npz(tmp_path / 'rollouts.npz', records(40), facts)
  text = text_lib.read(a_config(rollouts=str(tmp_path)), target, 0)
  # Nothing is held out there, so a share is taken away.
  num = text.facts['held_out_texts']
  assert 0 < num < 40 and text.facts['texts'] == 40 - num
  store.save_npz(tmp_path / 'rollouts-held_out.npz', records(5), facts)
  whole = text_lib.read(a_config(rollouts=str(tmp_path)), target, 0)
  assert whole.facts['texts'] == 40 and whole.facts['held_out_texts'] == 5
  assert whole.digest != text.digest
  assert len(whole.prompts) == 3 and all(len(p) == 4 for p in whole.prompts)
  half = text_lib.read(
      a_config(rollouts=str(tmp_path), share=0.5), target, 0)
  assert half.facts['texts'] == 20
  assert half.facts['supervised_tokens'] == 20 * 8
  ids, vocab = text_lib.vocabulary(whole, target, 100)
  answers = np.concatenate([r.answer for r in records(40)])
  assert len(ids) == 100 and set(target.eos) <= set(ids.tolist())
  assert vocab['coverage'] == np.isin(answers, ids).mean()
  ids, vocab = text_lib.vocabulary(whole, target, None)
  assert len(ids) == 257 and vocab['held_out_coverage'] == 1.0


def test_text_that_will_not_do(tmp_path):
  target = tiny.model()

  def read(rows, **data):
    store.save_npz(tmp_path / 'x.npz', rows, {'target': 'other'})
    config = a_config(rollouts=str(tmp_path / 'x.npz'), **data)
    with pytest.warns(UserWarning, match='other wrote these'):
      return text_lib.read(config, target, 0)
  with pytest.raises(ValueError, match='another model wrote'):
    read(records(20, 300))
  with pytest.raises(ValueError, match='no held-out texts'):
    read(records(20), held_out=0.0)
  with pytest.raises(ValueError, match='no train texts'):
    read([])
  with pytest.raises(ValueError, match='12 are the prompt: no answer'):
    read([r._replace(prompt_length=12) for r in records(20)])
  with pytest.raises(ValueError, match='share=0.0'):
    read(records(40), share=0.0)
  (tmp_path / 'bad.npz').write_bytes(b'PK')
  with pytest.raises(ValueError, match='not a file of rollouts'):
    text_lib.read(a_config(rollouts=str(tmp_path / 'bad.npz')), target, 0)
  (tmp_path / 'x.jsonl').write_text('{"prompt": "abc"}\n')
  with pytest.raises(ValueError, match=(
      'data.rollouts: .*x.jsonl: not a file of rollouts .*; give the folder '
      'that train.rollout wrote$')):
    text_lib.read(a_config(rollouts=str(tmp_path / 'x.jsonl')), target, 0)


def test_prompts_from_a_file_are_counted(tmp_path):
  target, path = tiny.model(), tmp_path / 'x.jsonl'

  def read(target=target, **values):
    config = a_config(rollouts='synthetic')
    config.eval.update(
        {'prompts': str(path), 'max_prompt': 30, 'new_tokens': 8, **values})
    return text_lib.read(config, target, 0)
  rows = [{'prompt': 'abc'}, {'prompt': ''}, {'prompt': 'abc'},
          {'prompt': 'x' * 31}]
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n{oops\n')
  text = read()
  assert [p.tolist() for p in text.prompts] == [target.tokenizer.encode('abc')]
  assert text.facts['eval_prompts_dropped'] == {
      'empty': 1, 'malformed JSON': 1, 'duplicate prompt': 1, 'too long': 1}
  with pytest.raises(ValueError, match='x.jsonl: no prompt is left: 3 too lo'):
    read(max_prompt=2)
  short = tiny.model(max_length=100)  # which decoding has to fit into
  with pytest.raises(ValueError, match='x.jsonl: no prompt is left: 3 too lo'):
    read(short, new_tokens=98)
  with pytest.raises(ValueError, match=(
      'most 0 tokens: .*max_prompt=30, .*new_tokens=100, context 100')):
    read(short, prompts=None, new_tokens=100)
  path.write_text('')
  with pytest.raises(ValueError, match=(
      'x.jsonl: no conversation is left: nothing in it')):
    read()


def test_questions_that_cannot_be_left_out_are_told(tmp_path):
  target, path = tiny.model(), tmp_path / 'x.jsonl'
  said = 'what is shared by both of them'
  path.write_text(json.dumps({'prompt': said}) + '\n{oops\n')
  rows = records(3)
  shared = np.asarray(target.tokenizer.encode(said, add_bos=False), np.int32)
  with pytest.warns(UserWarning, match='exclude nothing: 1 malformed JSON'):
    kept, num = text_lib.without(
        [*rows, Record(shared, 4)], str(path), target)
  assert num == 1 and len(kept) == 3


def test_rows_longer_than_the_context():
  config = a_config()
  length = config.data.length
  with pytest.raises(ValueError, match=(
      f'config.data.length={length}: the context of random is {length - 1} ')):
    text_lib.read(config, tiny.model(max_length=length - 1), 0)
  longest = text_lib.read(config, tiny.model(max_length=length), 0)
  assert longest.facts['rows'] > 0
