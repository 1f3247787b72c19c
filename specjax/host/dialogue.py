"""What a prompt asks for: its samples, and its turns one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import operator
from typing import Any

import numpy as np

from specjax.host.requests import Request, Result, Start
from specjax.io.options import Sampling
from specjax.io.prompts import Prompt


class Dialogue:
  """A prompt's requests: samples, and the turns that follow an answer."""

  def __init__(self, target: Any, prompt: Any, sampling: Sampling,
               index: int, seed: int):
    """Parses prompt number `index` of a run with `seed`.

    Raises:
      ValueError: it is none of the forms that `generate` takes, or its
        `source` is not part of its text.
    """
    self.target, self.sampling, self.index = target, sampling, index
    # A request's key must not depend on which other prompts are in the run.
    derived = (seed * 0x9E3779B97F4A7C15 + index) % 2**63
    self.seed = derived if sampling.seed is None else sampling.seed
    self.id, self.turns, self.head = self._parse(prompt, index)
    self.source = getattr(prompt, 'source', None)
    self.condition = {
        name: np.asarray(x)
        for name, x in (getattr(prompt, 'condition', None) or {}).items()}
    self.said: dict[int, list[dict[str, str]]] = {}

  def _parse(self, prompt, index):
    """Returns `(id, user turns, messages or tokens before the first)`."""
    if isinstance(prompt, Prompt):
      if prompt.turns is not None:
        return prompt.id, list(prompt.turns), []
      if prompt.messages is not None:
        return prompt.id, [], list(prompt.messages)
      return prompt.id, [], prompt.text
    if isinstance(prompt, str):
      return str(index), [], prompt
    if isinstance(prompt, Start):
      name = str(index) if prompt.id is None else prompt.id
      return name, [], _given(name, prompt.tokens)
    try:
      prompt = list(prompt)
      if prompt and isinstance(prompt[0], Mapping):
        return str(index), [], prompt
      return str(index), [], tuple(operator.index(t) for t in prompt)
    except TypeError as error:
      raise ValueError(
          f'prompt {index}: must be a string, a list of messages, a list of '
          f'token ids or a Prompt, found {prompt!r:.60}') from error

  def first(self) -> list[Request]:
    """Returns the requests of the first turn, one per sample."""
    head = self.head
    if self.turns:
      head = [{'role': 'user', 'content': self.turns[0]}]
    out = []
    for stream in range(self.sampling.n):
      if isinstance(head, list):
        self.said[stream] = list(head)
      out.append(self._request(head, stream, turn=0))
    return out

  def next(self, result: Result) -> Request | None:
    """Returns the request of the next turn, or None."""
    turn = result.request.turn + 1
    if turn >= len(self.turns):
      return None
    stream = result.request.stream
    self.said[stream] += [
        {'role': 'assistant', 'content': result.text},
        {'role': 'user', 'content': self.turns[turn]}]
    return self._request(self.said[stream], stream, turn)

  def longest(self) -> int:
    """Returns an upper bound of the tokens that a slot must hold."""
    new = self.sampling.max_new_tokens
    total = max(len(r.tokens) for r in self.first()) + new
    for text in self.turns[1:]:
      turn = self._tokens([{'role': 'user', 'content': text}])
      # A decoded answer may be encoded into a few more tokens than it had.
      total += len(turn) + new + new // 4 + 8
    return total

  def _request(self, head, stream: int, turn: int) -> Request:
    return Request(
        id=self.id if turn == 0 else f'{self.id}.{turn}',
        tokens=tuple(self._tokens(head)), sampling=self.sampling,
        seed=self.seed, stream=stream, prompt_index=self.index, turn=turn,
        condition=self.condition or None,
        source=None if self.source is None else self._span(head, self.source))

  def _span(self, head, source: str) -> tuple[int, int]:
    """Returns which tokens of a prompt its `source` is.

    Tokens at the borders may also hold a neighbouring character.
    """
    text = self._text(head)
    at = text.find(source)
    if not source or at < 0:
      raise ValueError(f'prompt {self.id}: its source is not part of its '
                       f'text: {source!r:.60}')
    start = len(self._encode(head, text[:at]))
    end = len(self._encode(head, text[:at + len(source)]))
    return start, max(end, start + 1)

  def _tokens(self, head) -> Sequence[int]:
    if isinstance(head, tuple):
      return head
    return self._encode(head, self._text(head))

  def _text(self, head) -> str:
    tokenizer = self.target.tokenizer
    if tokenizer is None or isinstance(head, tuple):
      raise ValueError('this model has no tokenizer: give token ids')
    if isinstance(head, list):
      return tokenizer.apply_chat_template(head, add_generation_prompt=True)
    return head

  def _encode(self, head, text: str) -> Sequence[int]:
    # A chat template writes the beginning-of-text token itself.
    if isinstance(head, list):
      return self.target.tokenizer.encode(text, add_bos=False)
    return self.target.tokenizer.encode(text)


def _given(name: str, tokens: Any) -> tuple[Any, ...]:
  """Returns ids int[T] as they are, f32[T,C] as tuples of numbers."""
  found = np.asarray(tokens)
  if found.ndim == 1 and np.issubdtype(found.dtype, np.integer):
    return tuple(found.tolist())
  if found.ndim == 2 and np.issubdtype(found.dtype, np.floating):
    return tuple(map(tuple, found.astype(np.float32).tolist()))
  raise ValueError(f'prompt {name}: tokens are {found.dtype}'
                   f'{list(found.shape)}: must be ids int[T] or float[T,C]')
