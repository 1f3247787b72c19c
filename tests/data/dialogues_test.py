"""Conversations that go on from other answers than the file's."""

import numpy as np
import pytest

from specjax.data import conversations, dialogues
from specjax.data.conversations import Conversation


def said(*pairs):
  names = {'u': 'user', 'a': 'assistant', 's': 'system', 't': 'tool'}
  return tuple({'role': names[who], 'content': what} for who, what in pairs)


def encode(what):
  return [b for m in what for b in (m['role'][0] + m['content']).encode()]


LONG = Conversation('x', messages=said(
    ('s', 'be'), ('u', 'hi'), ('a', 'old'), ('u', 'why'), ('a', 'older'),
    ('u', 'bye')))
TURNS = Conversation('y', messages=said(('u', 'one')), later=('two', 'three'))


def test_answers_take_the_place_of_those_in_the_file():
  found = dialogues.begun(LONG)
  assert found.messages == LONG.messages[:2] and found.later == ('why', 'bye')
  found = found.following('new').following('newer')
  assert found.messages == said(
      ('s', 'be'), ('u', 'hi'), ('a', 'new'), ('u', 'why'), ('a', 'newer'),
      ('u', 'bye'))
  with pytest.raises(ValueError, match='says no more'):
    found.following('x')
  assert dialogues.begun(TURNS).following('1').messages == said(
      ('u', 'one'), ('a', '1'), ('u', 'two'))


def test_what_depends_on_an_answer_of_the_file_is_left_out():
  row = Conversation('x', messages=said(
      ('u', 'sum'), ('u', '1 2'), ('a', 'call'), ('t', '3'), ('a', '3'),
      ('u', 'thanks')))
  assert dialogues.begun(row).later == ('1 2',)
  assert dialogues.begun(Conversation('x', text='x')) is None


def test_keys_are_the_first_prompts():
  rows = [LONG, TURNS, Conversation('z', messages=said(('u', 'alone'))),
          Conversation('w', messages=said(('u', 'one')), later=('else',)),
          Conversation('v', messages=said(('u', 'alone')), later=('more',)),
          Conversation('t', tokens=np.array([1, 2], np.int32),
                       loss_mask=np.array([False, True]))]
  found = dialogues.by_prompt(rows, encode)
  assert [d.later for d in found.values()] == [
      ('why', 'bye'), ('two', 'three')]
  prompts, _ = conversations.prompts(
      rows, encode, max_length=99, turns='first')
  assert [p.tobytes() in found for p in prompts] == [True, True, False, False]
