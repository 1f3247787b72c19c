"""Reads what people train on: conversations in the four usual formats.

Training files are large and never clean. A bad row is dropped and counted
with its reason; only a file of which nothing is left is an error. (For files
of prompts to decode, where every row matters, see `io.prompts`.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specjax.io.errors import PromptError

Message = dict[str, str]
Encode = Callable[[Sequence[Message] | str], Sequence[int]]

# Names of roles in the wild, to those of chat templates.
_ROLES = {
    'human': 'user', 'user': 'user', 'prompter': 'user',
    'gpt': 'assistant', 'chatgpt': 'assistant', 'bing': 'assistant',
    'bard': 'assistant', 'assistant': 'assistant', 'model': 'assistant',
    'system': 'system', 'developer': 'system', 'tool': 'tool',
    'function': 'tool', 'observation': 'tool'}
_TURNS = ('first', 'last', 'all')
_SPACE = ' \t\r\n'


class _Bad(Exception):
  """A row that is dropped; its text is the reason."""


@dataclasses.dataclass(frozen=True)
class Conversation:
  """One row; exactly one of `messages`, `text` and `tokens` is set.

  Attributes:
    id: of the row, else file and number.
    messages: `{'role', 'content'}` each, oldest first; roles are 'system',
      'user', 'assistant' and 'tool', at least one 'user'.
    text: a prompt without a chat template.
    tokens: int32[n], tokenised with the template by somebody else.
    loss_mask: bool[n], what the answers are; comes with `tokens`.
    later: user turns after `messages` whose answers the file lacks.
  """

  id: str
  messages: tuple[Message, ...] | None = None
  text: str | None = None
  tokens: npt.NDArray[np.int32] | None = None
  loss_mask: npt.NDArray[np.bool_] | None = None
  later: tuple[str, ...] = ()

  @property
  def said_by_users(self) -> tuple[str, ...]:
    """All user turns, or the prompt; empty for a tokenised row."""
    said: tuple[str, ...] = () if self.text is None else (self.text,)
    said += tuple(m['content'] for m in self.messages or ()
                  if m['role'] == 'user')
    return said + self.later


def read(
    paths: str | Path | Iterable[str | Path],
) -> tuple[list[Conversation], Counter[str]]:
  """Reads files of conversations.

  A row is `{"conversations": [{"from", "value"} or {"role", "content"}]}`,
  `{"messages": [...]}`, `{"input_ids", "loss_mask"}`, `{"turns": [...]}`
  (user turns without answers: the first is the message) or `{"prompt"}`;
  every row may be of another kind. A file is one JSON list, JSON lines, or
  `.txt` with a prompt a line.

  Returns:
    `(rows, dropped)`: rows in order; counts of what was dropped, by reason.

  Raises:
    PromptError: a file cannot be read, or no row is left; the message says
      what was wrong with them.
  """
  paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
  rows: list[Conversation] = []
  dropped: Counter[str] = Counter()
  for path in map(Path, paths):
    for number, load in enumerate(_items(path), 1):
      try:
        rows.append(_conversation(load(), f'{path.name}:{number}'))
      except _Bad as reason:
        dropped[str(reason)] += 1
  if not rows:
    why = describe(dropped) or 'nothing in it'
    raise PromptError(
        f'{", ".join(map(str, paths))}: no conversation is left: {why}')
  return rows, dropped


def describe(dropped: Mapping[str, int]) -> str:
  """Returns counts by reason as a line of text, the most frequent first."""
  ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
  return ', '.join(f'{count} {reason}' for reason, count in ordered)


def prompts(
    rows: Iterable[Conversation], encode: Encode, *, max_length: int,
    turns: str = 'all',
) -> tuple[list[npt.NDArray[np.int32]], Counter[str]]:
  """Returns the prompts that a target is to answer.

  Args:
    rows: from `read`.
    encode: messages that end with what is to be answered, or a plain text, to
      token ids (the chat template with its generation prompt).
    max_length: tokens; longer prompts are dropped.
    turns: which turns of a conversation become prompts: 'first', 'last' or
      'all' (the answers before a turn are those of the file).

  Returns:
    `(prompts, dropped)`: int32 arrays, no two equal; counts by reason.

  Raises:
    ValueError: `turns` is none of the three, or no prompt is left.
  """
  if turns not in _TURNS:
    raise ValueError(f'turns={turns!r}: one of {", ".join(_TURNS)}')
  kept: dict[bytes, npt.NDArray[np.int32]] = {}
  dropped: Counter[str] = Counter()
  for row in rows:
    for tokens in _prompts_of(row, encode, turns):
      key = tokens.tobytes()
      if not len(tokens):
        dropped['empty prompt'] += 1
      elif len(tokens) > max_length:
        dropped['too long'] += 1
      elif key in kept:
        dropped['duplicate prompt'] += 1
      else:
        kept[key] = tokens
  if not kept:
    raise ValueError(
        f'no prompt is left: {describe(dropped) or "no conversations"}')
  return list(kept.values()), dropped


def _prompts_of(
    row: Conversation, encode: Encode, turns: str
) -> Iterator[npt.NDArray[np.int32]]:
  """Yields the prompts of a row."""
  if row.tokens is not None:
    assert row.loss_mask is not None
    # An answer begins where the mask does.
    begins = np.flatnonzero(np.diff(row.loss_mask, prepend=False)
                            & row.loss_mask)
    for at in _chosen(begins.tolist(), turns):
      yield row.tokens[:at]
  elif row.text is not None:
    yield np.asarray(encode(row.text), np.int32)
  else:
    assert row.messages is not None
    ends = [i + 1 for i, m in enumerate(row.messages) if m['role'] == 'user']
    for end in _chosen(ends, turns):
      yield np.asarray(encode(row.messages[:end]), np.int32)


def _chosen(places: list[int], turns: str) -> list[int]:
  return {'first': places[:1], 'last': places[-1:], 'all': places}[turns]


def _items(path: Path) -> Iterator[Callable[[], Any]]:
  """Yields a loader of each row; loaders raise `_Bad`."""
  try:
    data = path.read_bytes()
  except OSError as error:
    raise PromptError(f'cannot read {path}: {error.strerror}') from error
  data = data.removeprefix(b'\xef\xbb\xbf')  # byte order mark
  is_text = path.suffix == '.txt'
  if data.lstrip()[:1] == b'[' and not is_text:
    # Bad bytes become bad characters: one row's, not the file's.
    yield from _list_items(data.decode('utf-8', errors='surrogateescape'))
    return
  for line in data.split(b'\n'):
    if line.strip():
      yield functools.partial(_line, line, is_text)


def _line(line: bytes, is_text: bool) -> Any:
  try:
    text = line.decode('utf-8').strip(_SPACE)
    return {'prompt': text} if is_text else json.loads(text)
  except UnicodeDecodeError:
    raise _Bad('not UTF-8') from None
  except (json.JSONDecodeError, RecursionError):
    raise _Bad('malformed JSON') from None


def _list_items(text: str) -> Iterator[Callable[[], Any]]:
  """Yields the items of a JSON list, as far as it can be read."""
  decoder, at = json.JSONDecoder(), text.index('[') + 1
  while True:
    while at < len(text) and text[at] in _SPACE + ',':
      at += 1
    if at < len(text) and text[at] == ']':
      return
    try:
      item, at = decoder.raw_decode(text, at)
    except (json.JSONDecodeError, RecursionError):
      yield _malformed  # a truncated file: what comes after is lost
      return
    yield functools.partial(_same, item)


def _same(item: Any) -> Any:
  return item


def _malformed() -> Any:
  raise _Bad('malformed JSON')


def _conversation(row: Any, name: str) -> Conversation:
  """Converts one row; raises `_Bad` with the reason to drop it."""
  if not isinstance(row, dict):
    raise _Bad('not an object')
  name = str(row.get('id', row.get('question_id', name)))
  for key in ('messages', 'conversations'):
    if key in row:
      return Conversation(name, messages=_messages(row[key]))
  if 'input_ids' in row:
    tokens, mask = _tokens(row)
    return Conversation(name, tokens=tokens, loss_mask=mask)
  if 'turns' in row:
    turns = row['turns']
    if not isinstance(turns, list) or not turns:
      turns = [turns]
    first, *later = map(_content, turns)
    return Conversation(
        name, messages=({'role': 'user', 'content': first},),
        later=tuple(later))
  if 'prompt' in row:
    return Conversation(name, text=_content(row['prompt']))
  raise _Bad('unknown format')


def _messages(value: Any) -> tuple[Message, ...]:
  if not isinstance(value, list):
    raise _Bad('malformed messages')
  if not value:
    raise _Bad('empty')
  found = []
  for message in value:
    if not isinstance(message, dict):
      raise _Bad('malformed messages')
    role = message.get('role', message.get('from'))
    if not isinstance(role, str) or role.lower() not in _ROLES:
      raise _Bad('unknown role')
    content = message.get('content', message.get('value'))
    found.append({'role': _ROLES[role.lower()], 'content': _content(content)})
  if not any(m['role'] == 'user' for m in found):
    raise _Bad('no user turn')
  return tuple(found)


def _content(value: Any) -> str:
  """Returns the text of a message; parts of type 'text' are joined."""
  if isinstance(value, list) and value and all(
      isinstance(p, dict) and isinstance(p.get('text'), str) for p in value):
    value = ''.join(p['text'] for p in value)
  if not isinstance(value, str):
    raise _Bad('content is not text')
  if not value.strip():
    raise _Bad('empty')
  try:
    value.encode('utf-8')
  except UnicodeEncodeError:  # lone surrogates: no tokenizer takes them
    raise _Bad('not UTF-8') from None
  return value


def _tokens(
    row: Mapping[str, Any],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
  """Returns a tokenised row; both arrays are [n] and the mask not empty."""
  try:
    tokens = np.asarray(row['input_ids'])
    mask = np.asarray(row.get('loss_mask'))
  except ValueError:  # ragged
    raise _Bad('malformed tokens') from None
  if not tokens.size:
    raise _Bad('empty')
  if (tokens.ndim != 1 or mask.shape != tokens.shape
      or tokens.dtype.kind not in 'iu' or mask.dtype.kind not in 'biuf'
      or tokens.min() < 0 or tokens.max() >= 1 << 31):
    raise _Bad('malformed tokens')
  mask = mask.astype(bool)
  if not mask.any() or mask[0]:
    raise _Bad('no prompt before an answer')
  return tokens.astype(np.int32), mask
