"""Conversations that go on from the target's own answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from specjax.data.conversations import Conversation, Encode, Message


class Dialogue(NamedTuple):
  """A conversation up to a user turn that is to be answered.

  Attributes:
    messages: the last one is that turn.
    later: what the user says after the answer, then after the next one, ...
  """

  messages: tuple[Message, ...]
  later: tuple[str, ...] = ()

  def following(self, answer: str) -> Dialogue:
    """Returns the conversation up to the next user turn.

    Args:
      answer: to the turn that the conversation ends with.

    Raises:
      ValueError: there is no next turn.
    """
    if not self.later:
      raise ValueError('the user says no more')
    return Dialogue((
        *self.messages, {'role': 'assistant', 'content': answer},
        {'role': 'user', 'content': self.later[0]}), self.later[1:])


def begun(row: Conversation) -> Dialogue | None:
  """Returns a row up to its first user turn; None if it has no messages.

  Answers of the file are left out. Messages of a system or a tool in the
  middle belong to these answers: what comes after them is left out, too.
  """
  if row.messages is None:
    return None
  first = [m['role'] for m in row.messages].index('user') + 1
  later = []
  for message in row.messages[first:]:
    if message['role'] == 'user':
      later.append(message['content'])
    elif message['role'] != 'assistant':
      break
  return Dialogue(row.messages[:first], (*later, *row.later))


def by_prompt(
    rows: Iterable[Conversation], encode: Encode
) -> dict[bytes, Dialogue]:
  """Returns the conversations of several turns by their first prompt.

  Args:
    rows: from `conversations.read`.
    encode: as for `conversations.prompts`, whose result for `turns='first'`
      holds the prompts. Of rows with equal first prompts the first counts,
      there and here.

  Returns:
    Dialogues by the bytes of the int32 token ids of their first prompt.
  """
  found: dict[bytes, Dialogue] = {}
  for row in rows:
    dialogue = begun(row)
    if dialogue is not None:
      tokens = np.asarray(encode(dialogue.messages), np.int32)
      found.setdefault(tokens.tobytes(), dialogue)
  return {key: d for key, d in found.items() if d.later}
