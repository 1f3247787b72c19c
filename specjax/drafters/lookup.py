"""Drafts copied from the text itself: prompt lookup, and IAD's re-alignment.

Both are deterministic (`POINT`), have no model and need no training.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import tree
from specjax.core.round import emitted
from specjax.core.types import Draft, Models, SpecState
from specjax.drafters import base

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Lookup(base.ChainDrafter):
  """Proposes what followed an earlier occurrence of the current suffix.

  Attributes:
    num_speculative_tokens: K >= 1.
    prompt_lookup_max, prompt_lookup_min: longest and shortest suffix that
      may match, tokens; the longest match wins.
    prefer: 'newest' or 'oldest' among equally long matches. Recent text
      predicts better in chats; 'oldest' is what vLLM does.

  References: prompt lookup decoding (Saxena 2023).
  """

  num_speculative_tokens: int = 10
  prompt_lookup_max: int = 3
  prompt_lookup_min: int = 1
  prefer: str = 'newest'

  def __post_init__(self):
    super().__post_init__()
    if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
      raise ValueError(
          f'prompt_lookup_min={self.prompt_lookup_min}, prompt_lookup_max='
          f'{self.prompt_lookup_max}: need 1 <= min <= max')
    if self.prefer not in ('newest', 'oldest'):
      raise ValueError(f"prefer={self.prefer!r}: 'newest' or 'oldest'")

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Drafts the continuation of the best match; nothing without one."""
    del params
    context = state.context
    end, hit = self.find(context.tokens, context.length)
    tokens, valid = copy_text(
        context.tokens, end + 1, jnp.where(hit, context.length, 0),
        self.num_speculative_tokens, context.options.eos)
    return base.point_draft(self.topology, tokens, valid), state

  def find(self, tokens: Array, length: Array) -> tuple[Array, Array]:
    """Finds where the suffix of each row occurred before.

    Args:
      tokens: int32[B,S]. length: int32[B]; later slots are ignored.

    Returns:
      `(end int32[B], hit bool[B])`: index of the last token of the match.
      The suffix never matches itself, but may overlap it.
    """
    end, run = self.match(tokens, length)
    return end, run > 0

  def match(self, tokens: Array, length: Array) -> tuple[Array, Array]:
    """Returns `(end, run) int32[B]` like `find`: how long the match is.

    0 is no match; `prompt_lookup_max` also stands for longer ones.
    """
    score = self.score(tokens, length)
    best = jnp.max(score, axis=1)
    return (jnp.argmax(score, axis=1).astype(jnp.int32),
            jnp.where(best >= 0, best // tokens.shape[1], 0))

  def score(self, tokens: Array, length: Array) -> Array:
    """Returns how good a match ends at each place, int32[B,S]; -1: none.

    Longer suffixes score higher, then newer (or older) ones.
    """
    size = tokens.shape[1]
    pos = jnp.arange(size)
    run = _suffix_run(tokens, length, pos < length[:, None] - 1,
                      tokens, self.prompt_lookup_max)
    tie = pos if self.prefer == 'newest' else size - 1 - pos
    return jnp.where(run >= self.prompt_lookup_min, run * size + tie, -1)


@dataclasses.dataclass(frozen=True)
class InputGuided(base.ChainDrafter):
  """Copies the source on, re-aligning after each disagreement (IAD).

  For outputs that nearly repeat an input span (code edits, corrections). The
  source is the whole prompt, or `condition['source'] int32[B,2]` (start and
  end positions in the prompt). Copying starts at the source's first token;
  after a disagreement it resumes where the last 1, 2 or 3 output tokens occur
  exactly once in the source, and nothing is drafted until they do.

  Attributes:
    num_speculative_tokens: K >= 1; larger than for lookup (16 to 64).
    max_ngram: longest n-gram used to re-align.

  References: Ge et al. 2022 (input-guided aggressive decoding).
  """

  num_speculative_tokens: int = 16
  max_ngram: int = 3

  def __post_init__(self):
    super().__post_init__()
    if self.max_ngram < 1:
      raise ValueError(f'max_ngram={self.max_ngram}: must be >= 1')

  def empty(self, batch: int, capacity: int) -> Any:
    del capacity
    # Where copying goes on; -1 before the first round, -2 when lost.
    return {'pointer': jnp.full((batch,), -1, jnp.int32)}

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Drafts the next K source tokens; nothing while not aligned."""
    del params
    context = state.context
    start, end = _source(context)
    pointer = state.drafter['pointer']
    pointer = jnp.where(pointer == -1, start, pointer)
    stop = jnp.where(pointer >= 0, end, 0)
    tokens, valid = copy_text(
        context.tokens, jnp.maximum(pointer, 0), stop,
        self.num_speculative_tokens, context.options.eos)
    draft = base.point_draft(self.topology, tokens, valid)
    return draft, state.replace(drafter={'pointer': pointer})

  def sync(self, params, state, draft, scores, verdict) -> SpecState:
    """Moves on past what was accepted, or finds the place again."""
    del params, scores
    context, pointer = state.context, state.drafter['pointer']
    start, end = _source(context)
    # The verdict's tokens are not in the context yet: look at both.
    recent, known = _recent(context, draft, verdict, self.max_ngram)
    found = _realign(context.tokens, start, end, recent, known)
    found = jnp.where(found >= 0, found + 1, -2)
    # A fully accepted copy simply goes on, however ambiguous its n-grams.
    here = jnp.where(pointer >= 0, pointer + verdict.num_accepted, end)
    same = tree.take_row(context.tokens, here) == verdict.next_token
    pointer = jnp.where(same & (here < end), here + 1, found)
    pointer = jnp.where(pointer >= end, -2, pointer)
    return state.replace(drafter={'pointer': pointer})


def _suffix_run(
    tokens: Array, length: Array, alive: Array, suffix_of: Array, limit: int
) -> Array:
  """Counts, per end position, the common suffix with row `suffix_of`.

  Returns int32[B,S] in [0, limit]; 0 where `alive bool[B,S]` is unset.
  """
  size = tokens.shape[1]
  pos = jnp.arange(size)
  run = jnp.zeros(tokens.shape, jnp.int32)
  for back in range(limit):  # static and small
    want = tree.take_row(suffix_of, length - 1 - back)[:, None]
    have = jnp.roll(tokens, back, axis=1)
    inside = (pos >= back) & (length[:, None] - 1 >= back)
    alive = alive & inside & (have == want)
    run = run + alive
  return run


def copy_text(
    tokens: Array, start: Array, stop: Array, num: int,
    eos: Array | None,
) -> tuple[Array, Array]:
  """Copies `num` tokens from `start int32[B]`; valid before `stop` and EOS."""
  index = start[:, None] + jnp.arange(num)
  copied = tree.take_row(tokens, index)
  valid = index < stop[:, None]
  if eos is not None:  # what follows an end token is never emitted
    ends = jnp.any(copied[..., None] == eos[:, None], axis=-1)
    valid &= jnp.cumsum(ends, axis=1) - ends == 0
  return copied, valid


def _source(context) -> tuple[Array, Array]:
  """Returns the source span `(start, end) int32[B]`."""
  if context.condition is not None and 'source' in context.condition:
    span = context.condition['source']
    return span[:, 0], span[:, 1]
  return jnp.zeros_like(context.prompt_length), context.prompt_length


def _recent(context, draft: Draft, verdict, num: int) -> tuple[Array, Array]:
  """Returns the last `num` output tokens [B,num], newest last, and a count."""
  new = emitted(draft, verdict)
  index = context.length[:, None] - num + jnp.arange(num)
  old = tree.take_row(context.tokens, index)
  both = jnp.concatenate([old, new], axis=1)
  end = num + verdict.num_accepted + 1
  take = end[:, None] - num + jnp.arange(num)
  made = context.length - context.prompt_length + verdict.num_accepted + 1
  return tree.take_row(both, take), made


def _realign(
    tokens: Array, start: Array, end: Array, recent: Array, known: Array
) -> Array:
  """Finds the one place in the source that ends like `recent`.

  Tries n = 1, 2, ... tokens: no occurrence, or fewer than n output tokens:
  lost; exactly one: found; several: try a longer n-gram. Returns the index
  of the match's last token, int32[B], or -1.
  """
  num = recent.shape[1]
  pos = jnp.arange(tokens.shape[1])
  alive = (pos >= start[:, None]) & (pos < end[:, None])
  found = jnp.full(start.shape, -1, jnp.int32)
  for back in range(num):
    have = jnp.roll(tokens, back, axis=1)
    alive &= (pos - back >= start[:, None]) & (
        have == recent[:, num - 1 - back, None])
    alive &= known[:, None] > back
    unique = jnp.sum(alive, axis=1) == 1
    place = jnp.argmax(alive, axis=1).astype(jnp.int32)
    found = jnp.where((found < 0) & unique, place, found)
  return found
