"""Speculative Jacobi decoding: the target's own forward passes draft."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import keys, tree
from specjax.core import law as law_lib
from specjax.core.types import (
  IID,
  MATCH,
  POINT,
  Context,
  Draft,
  Models,
  Scores,
  SpecState,
  Verdict,
)
from specjax.drafters import base
from specjax.drafters.null import Null

Array = jax.Array

GUESSES = ('uniform', 'repeat', 'raster')
REDRAFTS = ('fresh', 'coupled')
# Entries of the stored laws beyond which a window is refused: 2 GiB.
MOST_ENTRIES = 2**29
# Streams of `Purpose.DRAFT` in a round.
_GUESS, _DRAW, _KEEP = range(3)


@dataclasses.dataclass(frozen=True)
class Jacobi(base.ChainDrafter):
  """Drafts a window of tokens from the laws that the last round scored.

  No model and no training: the forward pass that verifies the window also
  says what the target's law is at each of its positions, given the tokens
  before. What lies behind the round's last token is drawn again from these
  laws and is the next draft (`IID`, with its law); where there is no law yet
  a token is guessed (a point).

  * 'fresh' draws x_i ~ p_i, and p_i becomes q_i.
  * 'coupled' keeps x_i with probability min(1, p_i(x_i) / q_i(x_i)), else
    draws from norm(relu(p_i - q_i)): the law is p_i again, and the window
    changes as little as it can (maximal coupling). This takes x_i ~ q_i
    *given the verdict*, which holds for rules that do not look at drafts
    behind the one that they reject. 'block' and 'traversal' do; they refuse
    these drafts, whose guesses are of kind `MATCH`.

  The position behind the window has a law as well, that of the bonus token:
  unless everything was accepted its token is drawn, too.

  Attributes:
    num_speculative_tokens: W >= 1, tokens in the window.
    vocab_size: V of the target, >= 2.
    guess: 'uniform': any token; 'repeat': the token before; 'raster': the
      one `width` positions earlier, which is above it in an image that
      begins behind the prompt, and the token before in the first row.
    width: tokens in a row of the image, >= 1; for 'raster' only.
    redraft: 'fresh' or 'coupled'.

  References: Teng et al. 2025, arXiv:2410.01699, section 4 (W = 16); the
  coupling: arXiv:2510.24211.
  """

  num_speculative_tokens: int = 16
  vocab_size: int = 0
  guess: str = 'uniform'
  width: int | None = None
  redraft: str = 'fresh'

  def __post_init__(self):
    super().__post_init__()
    if self.vocab_size < 2:
      raise ValueError(f'vocab_size={self.vocab_size}: must be that of the '
                       'target, >= 2')
    for name, value, known in (('init', self.guess, GUESSES),
                               ('redraft', self.redraft, REDRAFTS)):
      if value not in known:
        raise ValueError(f'{name}={value!r}: known are {", ".join(known)}')
    if (self.guess == 'raster') != (self.width is not None):
      raise ValueError(f'init={self.guess!r}, width={self.width}: a width '
                       "goes with init='raster', and it needs one")
    if self.width is not None and self.width < 1:
      raise ValueError(f'width={self.width}: must be >= 1')

  @property
  def modes(self) -> tuple[int, ...]:
    """Drawn and guessed tokens; see the class on 'coupled'."""
    return IID, self._guessed

  @property
  def _guessed(self) -> int:
    return MATCH if self.redraft == 'coupled' else POINT

  def idle(self) -> Any:
    """Returns what moves the window on while nothing is drafted."""
    return _Idle(jacobi=self)

  def empty(self, batch: int, capacity: int) -> Any:
    """Returns an empty window: all of it will be guessed.

    `tokens int32[B,W]` and `logits f32[B,W,V]`, the laws that they were drawn
    from (not kept when all rows are greedy), of which the first `held
    int32[B]` count.

    Raises:
      ValueError: the laws would take more than 2 GiB.
    """
    del capacity
    window = self.num_speculative_tokens
    entries = batch * window * self.vocab_size
    if entries > MOST_ENTRIES:
      raise ValueError(
          f'jacobi: the laws of {batch} rows x {window} tokens x '
          f'{self.vocab_size} take {4 * entries / 2**30:.1f} GiB, more than '
          f'{4 * MOST_ENTRIES / 2**30:.0f}: use fewer rows or a smaller '
          'num_speculative_tokens')
    return {'tokens': jnp.zeros((batch, window), jnp.int32),
            'logits': jnp.zeros((batch, window, self.vocab_size)),
            'held': jnp.zeros((batch,), jnp.int32)}

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Hands over the window; guesses what it lacks. Changes no state."""
    del params
    context, memory = state.context, state.drafter
    num = self.num_speculative_tokens
    tokens = self._filled(context, memory)[:, :num]
    is_held = jnp.arange(num) < memory['held'][:, None]
    sampled = context.options.temperature is not None
    valid = jnp.broadcast_to(~context.done[:, None], tokens.shape)
    if context.options.eos is not None:  # nothing behind it is emitted
      ends = jnp.any(
          tokens[..., None] == context.options.eos[:, None], axis=-1)
      valid &= jnp.cumsum(ends, axis=1) - ends == 0
    return Draft(
        topology=self.topology, tokens=tokens, valid=valid,
        mode=jnp.where(is_held & sampled, IID, self._guessed),
        draft_law=law_lib.Categorical(memory['logits'][:, :num])
        if sampled else None), state

  def sync(
      self, params: Models, state: SpecState, draft: Draft, scores: Scores,
      verdict: Verdict,
  ) -> SpecState:
    """Moves the window behind the round's last token, and draws it again."""
    del params
    context, memory, law = state.context, state.drafter, scores.target_law
    num, window = draft.topology.num_nodes, memory['tokens'].shape[1]
    if law.vocab_size != self.vocab_size:
      raise ValueError(f'vocab_size={self.vocab_size}: the target scores '
                       f'{law.vocab_size} tokens')
    # Where each place of the new window was in the old one.
    old = jnp.arange(window) + verdict.num_accepted[:, None] + 1
    tokens, logits, last = memory['tokens'], memory['logits'], 0
    sampled = isinstance(law, law_lib.Categorical)
    if num < window:  # behind a narrower block it stays what it was
      tokens = tree.take_row(tokens, old)
      logits = tree.take_row(logits, old) if sampled else logits
    if num:  # row i of the scores follows what is before slot i
      last, is_new, new = num + 1, old <= num, law.at(old)
      drawn = self._draw(context, draft, new, old)
      if num == window:  # the rest is guessed
        tokens, logits = drawn, new.logits if sampled else logits
      else:
        tokens = jnp.where(is_new, drawn, tokens)
        if sampled:
          logits = jnp.where(is_new[..., None], new.logits, logits)
    held = jnp.maximum(memory['held'], last) - verdict.num_accepted - 1
    return state.replace(drafter={
        'tokens': tokens, 'logits': logits,
        'held': jnp.clip(held, 0, window)})

  def _draw(
      self, context: Context, draft: Draft, new: Any, old: Array
  ) -> Array:
    """Draws int32[B,W] from `new`, which were at slots `old int32[B,W]`."""
    noise = _each(keys.row(context, keys.Purpose.DRAFT, _DRAW), old.shape[1])
    if self.redraft == 'fresh' or isinstance(new, law_lib.Point):
      return new.sample(noise)
    assert draft.draft_law is not None
    token = tree.take_row(draft.tokens, old)
    mode = tree.take_row(jnp.broadcast_to(draft.mode, draft.tokens.shape), old)
    point = law_lib.one_hot_logits(token, self.vocab_size)
    stated = draft.draft_law.at(old)
    law = law_lib.Categorical(
        jnp.where((mode == IID)[..., None], stated.logits, point))
    u = keys.uniform(
        keys.row(context, keys.Purpose.DRAFT, _KEEP), old.shape[1])
    had = old < draft.topology.num_nodes
    keep = u * jnp.exp(law.log_prob(token)) < jnp.exp(new.log_prob(token))
    other, _ = new.residual(law, noise, had)
    return jnp.where(had & keep, token, other)

  def _filled(self, context: Context, memory: Any) -> Array:
    """Returns the window int32[B,W], its end guessed."""
    tokens, held = memory['tokens'], memory['held'][:, None]
    slot = jnp.arange(tokens.shape[1])
    if self.guess == 'uniform':
      u = keys.uniform(
          keys.row(context, keys.Purpose.DRAFT, _GUESS), tokens.shape[1])
      guess = (u * self.vocab_size).astype(jnp.int32)
    else:
      guess = jnp.where(held > 0, tree.take_row(tokens, held - 1),
                        tree.take_row(context.tokens, context.root[:, None]))
    if self.width is not None:
      above = jnp.broadcast_to(slot, tokens.shape)
      for _ in range(-(-tokens.shape[1] // self.width)):
        above = jnp.where(above >= held, above - self.width, above)
      place = context.length[:, None] + above
      found = jnp.where(above >= 0, tree.take_row(tokens, above),
                        tree.take_row(context.tokens, place))
      guess = jnp.where(
          place >= context.prompt_length[:, None], found, guess)
    # A reserved first token may be no entry of the vocabulary.
    guess = jnp.clip(guess, 0, self.vocab_size - 1)
    return jnp.where(slot < held, tokens, guess)


@dataclasses.dataclass(frozen=True)
class _Idle(Null):
  """Drafts nothing, and keeps a window in step with the text.

  Attributes:
    jacobi: whose window it is.
  """

  jacobi: Any = None

  def sync(self, params, state, draft, scores, verdict) -> SpecState:
    """Moves the window on."""
    return self.jacobi.sync(params, state, draft, scores, verdict)


def _each(key: Array, num: int) -> Array:
  """Returns key[B,num] from key[B], told apart by slot."""
  index = jnp.arange(num, dtype=jnp.uint32)
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  return fold(key, index)
