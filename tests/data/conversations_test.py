"""Training files: four formats, dirty rows, prompts of each turn."""

import json

import numpy as np
import pytest

from specjax.data import conversations
from specjax.io.errors import PromptError

SHAREGPT = {'id': 'a', 'conversations': [
    {'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': 'hello'},
    {'from': 'human', 'value': 'bye'}]}
ROLES = {'id': 'b', 'conversations': [
    {'role': 'system', 'content': 'be brief'},
    {'role': 'user', 'content': 'why?'}]}
MESSAGES = {'messages': [{'role': 'user', 'content': [
    {'type': 'text', 'text': 'two '}, {'type': 'text', 'text': 'parts'}]}]}
TOKENS = {'input_ids': [5, 6, 7, 8, 9, 10], 'loss_mask': [0, 0, 1, 1, 0, 1]}
GOOD = [SHAREGPT, ROLES, MESSAGES, TOKENS]


def lines(path, rows):
  path.write_text('\n'.join(
      r if isinstance(r, str) else json.dumps(r) for r in rows))
  return path


def encode(what):
  """A template of one letter a message."""
  if isinstance(what, str):
    return [1, *what.encode()]
  return [b for m in what for b in (m['role'][0] + m['content']).encode()]


@pytest.mark.parametrize('suffix', ['.json', '.jsonl'])
@pytest.mark.parametrize('as_list', [True, False])
def test_four_formats(tmp_path, suffix, as_list):
  path = tmp_path / f'x{suffix}'
  if as_list:
    path.write_text('\ufeff' + json.dumps(GOOD, indent=1))
  else:
    lines(path, GOOD)
  rows, dropped = conversations.read(path)
  assert not dropped
  assert [r.id for r in rows] == ['a', 'b', f'x{suffix}:3', f'x{suffix}:4']
  assert rows[0].messages == (
      {'role': 'user', 'content': 'hi'},
      {'role': 'assistant', 'content': 'hello'},
      {'role': 'user', 'content': 'bye'})
  assert rows[1].messages[0] == {'role': 'system', 'content': 'be brief'}
  assert rows[2].messages == ({'role': 'user', 'content': 'two parts'},)
  assert rows[3].tokens.tolist() == TOKENS['input_ids']
  assert rows[3].tokens.dtype == np.int32
  assert rows[3].loss_mask.tolist() == [
      False, False, True, True, False, True]


BAD = [
    ('{"id": 1,', 'malformed JSON'),
    ('[' * 5000, 'malformed JSON'),
    ([1], 'not an object'),
    ({'question': 'x'}, 'unknown format'),
    ({'messages': []}, 'empty'),
    ({'messages': 'x'}, 'malformed messages'),
    ({'messages': ['x']}, 'malformed messages'),
    ({'messages': [{'role': 'user', 'content': ' \n'}]}, 'empty'),
    ({'messages': [{'role': 'user', 'content': None}]},
     'content is not text'),
    ({'messages': [{'role': 'judge', 'content': 'x'}]}, 'unknown role'),
    ({'messages': [{'content': 'x'}]}, 'unknown role'),
    ({'messages': [{'role': 'assistant', 'content': 'x'}]}, 'no user turn'),
    ({'prompt': 'a\udc00b'}, 'not UTF-8'),
    ({'turns': []}, 'content is not text'),
    ({'turns': ['x', 3]}, 'content is not text'),
    ({'input_ids': [], 'loss_mask': []}, 'empty'),
    ({'input_ids': [1, 2], 'loss_mask': [1]}, 'malformed tokens'),
    ({'input_ids': [1, [2]], 'loss_mask': [0, 1]}, 'malformed tokens'),
    ({'input_ids': [1, 2]}, 'malformed tokens'),
    ({'input_ids': [1.5, 2], 'loss_mask': [0, 1]}, 'malformed tokens'),
    ({'input_ids': [1, -2], 'loss_mask': [0, 1]}, 'malformed tokens'),
    ({'input_ids': [1, 2], 'loss_mask': [0, 0]},
     'no prompt before an answer'),
]


@pytest.mark.parametrize('bad, reason', BAD, ids=lambda x: str(x)[:20])
def test_a_bad_row_is_counted_and_the_others_are_kept(tmp_path, bad, reason):
  path = lines(tmp_path / 'x.jsonl', [GOOD[0], bad, GOOD[1]])
  rows, dropped = conversations.read(path)
  assert [r.id for r in rows] == ['a', 'b']
  assert dropped == {reason: 1}
  if not isinstance(bad, str):
    (tmp_path / 'y.json').write_text(json.dumps([bad, SHAREGPT]))
    rows, dropped = conversations.read(tmp_path / 'y.json')
    assert [r.id for r in rows] == ['a'] and dropped == {reason: 1}
  lines(path, ['{}', bad])
  with pytest.raises(PromptError, match=f'no conversation .*[12] {reason}'):
    conversations.read(path)


def test_truncated_list_bad_bytes_and_several_files(tmp_path):
  whole = json.dumps(GOOD)
  cut = tmp_path / 'cut.json'
  cut.write_text(whole[:whole.index('"messages"')])
  latin = tmp_path / 'latin.jsonl'
  latin.write_bytes(b'{"prompt": "caf\xe9"}\n{"prompt": "tea"}\n')
  text = tmp_path / 'x.txt'
  text.write_text('one\n\n two \n')
  bench = lines(tmp_path / 'b.jsonl', [
      {'question_id': 81, 'turns': ['first', 'second']}])
  rows, dropped = conversations.read([cut, latin, text, bench])
  assert [r.id for r in rows] == [
      'a', 'b', 'latin.jsonl:2', 'x.txt:1', 'x.txt:2', '81']
  assert [r.text for r in rows[2:5]] == ['tea', 'one', 'two']
  assert rows[-1].messages == ({'role': 'user', 'content': 'first'},)
  assert rows[-1].later == ('second',) and not rows[0].later
  assert dropped == {'malformed JSON': 1, 'not UTF-8': 1}
  assert conversations.describe({'b': 1, 'a': 1, 'c': 2}) == '2 c, 1 a, 1 b'
  with pytest.raises(PromptError, match='cannot read .*nowhere'):
    conversations.read(tmp_path / 'nowhere.json')
  (tmp_path / 'empty.jsonl').write_text('\n')
  with pytest.raises(PromptError, match='nothing in it'):
    conversations.read(tmp_path / 'empty.jsonl')


def test_prompts(tmp_path):
  path = lines(tmp_path / 'x.jsonl', [
      *GOOD, SHAREGPT, {'prompt': 'tell'}, {'prompt': 'x' * 30}])
  rows, _ = conversations.read(path)
  found, dropped = conversations.prompts(rows, encode, max_length=25)
  texts = [bytes(t.astype(np.uint8).tolist()) for t in found]
  assert texts == [
      b'uhi', b'uhiahelloubye', b'sbe briefuwhy?', b'utwo parts',
      bytes([5, 6]), bytes([5, 6, 7, 8, 9]), b'\x01tell']
  assert all(t.dtype == np.int32 for t in found)
  assert dropped == {'duplicate prompt': 2, 'too long': 1}
  for turns, first, tokens in (('first', b'uhi', 2),
                               ('last', b'uhiahelloubye', 5)):
    found, _ = conversations.prompts(
        rows, encode, max_length=25, turns=turns)
    assert bytes(found[0].astype(np.uint8).tolist()) == first
    assert len(found[3]) == tokens
  with pytest.raises(ValueError, match='turns=.some.: one of first, last'):
    conversations.prompts(rows, encode, max_length=25, turns='some')
  with pytest.raises(ValueError, match='no prompt is left: 8 too long'):
    conversations.prompts(rows[:4] + rows[5:], encode, max_length=1,
                          turns='all')


def test_what_users_said(tmp_path):
  path = tmp_path / 'x.jsonl'
  lines(path, [*GOOD, {'turns': ['one', 'two']}, {'prompt': 'plain'}])
  rows, _ = conversations.read(path)
  assert [r.said_by_users for r in rows if r.tokens is None][-2:] == [
      ('one', 'two'), ('plain',)]
  assert rows[0].said_by_users == ('hi', 'bye')
  assert [r.said_by_users for r in rows if r.tokens is not None] == [()]
