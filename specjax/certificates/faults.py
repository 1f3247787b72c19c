"""Faults of a decoding loop, planted on purpose: each must be found.

A fault of target or drafter is switched on by `condition['fault']`, so that
the same compiled program without it must pass.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax.numpy as jnp

from specjax.certificates import toys
from specjax.core import keys, tree
from specjax.core import law as law_lib
from specjax.core.keys import Purpose
from specjax.verify import Block, Match, Rule, Speculative, base, block


class Planted(enum.IntEnum):
  """What `condition['fault']` says."""

  NONE = 0
  STALE_SLOT = 1
  SHIFTED_PATH = 2
  LAW_OF_NEIGHBOUR = 3
  LAW_OF_OTHER_NODE = 4


@dataclasses.dataclass(frozen=True)
class FaultyTarget(toys.ToyLM):
  """A target that handles its cache wrongly when told to."""

  def score(self, params, state, draft, taps):
    """STALE_SLOT: the pending token is not stored, what was there is read."""
    context = state.context
    root = context.root[:, None]
    held = jnp.maximum(tree.take_row(state.target['cache'], root), 0)
    column = jnp.arange(context.tokens.shape[1])
    is_stale = (context.condition['fault'] == Planted.STALE_SLOT) & (
        column == root)
    stale = context.replace(tokens=jnp.where(is_stale, held, context.tokens))
    scores, new = super().score(
        params, state.replace(context=stale), draft, taps)
    return scores, new.replace(context=context)

  def commit(self, state, draft, verdict):
    """SHIFTED_PATH: entries go to the slot before their own."""
    is_shifted = state.context.condition['fault'] == Planted.SHIFTED_PATH
    path = jnp.where(
        is_shifted, jnp.roll(verdict.path, -1, axis=1), verdict.path)
    return super().commit(state, draft, verdict.replace(path=path))


@dataclasses.dataclass(frozen=True)
class FaultyDrafter:
  """A drafter that hands over the wrong law when told to.

  Attributes:
    drafter: draws its drafts and states their laws.
  """

  drafter: Any

  def __getattr__(self, name: str) -> Any:
    if name == 'drafter' or name.startswith('__'):
      raise AttributeError(name)
    return getattr(self.drafter, name)

  def propose(self, params, state):
    """LAW_OF_NEIGHBOUR: of the next row; LAW_OF_OTHER_NODE: of this one."""
    draft, state = self.drafter.propose(params, state)
    logits = draft.draft_law.logits
    fault = state.context.condition['fault']
    for which, axis in ((Planted.LAW_OF_NEIGHBOUR, 0),
                        (Planted.LAW_OF_OTHER_NODE, 1)):
      logits = jnp.where(
          fault == which, jnp.roll(logits, 1, axis=axis), logits)
    return draft.replace(draft_law=law_lib.Categorical(logits)), state


@dataclasses.dataclass(frozen=True)
class DraftNoiseAgain(Speculative):
  """Draws the correction with the noise that drew the rejected draft."""

  name = 'draft noise drawn again'

  def verify(self, params, context, draft, scores):
    """Chains of a `ChainLM` only: the noise is keyed by its step."""
    count = super().verify(params, context, draft, scores).num_accepted
    law, valid = scores.target_law, jnp.pad(draft.valid, ((0, 0), (0, 1)))
    token, _ = law.at(count).residual(
        law_lib.at_slot(draft, count, law.vocab_size),
        keys.row(context, Purpose.DRAFT, count),
        tree.take_row(valid, count))
    return base.finish(draft, count, token)


@dataclasses.dataclass(frozen=True)
class BlockByPosition(Block):
  """Keys its tests by position: a rejected tail's noise is used again."""

  name = 'block noise by position'

  def verify(self, params, context, draft, scores):
    """As `Block`, with other keys."""
    law, num = scores.target_law, draft.topology.num_nodes
    log_w = block._log_weights(draft, scores)
    last = jnp.sum(draft.valid, axis=1)
    hazards = block._hazards(draft, law, log_w, last)
    position = context.length[:, None] + jnp.arange(num)
    key = keys.position(context, position, Purpose.ACCEPT)
    u = keys.uniform(key.reshape(-1), 1).reshape(hazards.shape)
    count = jnp.max(jnp.where(u < hazards, jnp.arange(1, num + 1), 0), axis=1)
    scale = jnp.exp(tree.take_row(
        jnp.pad(log_w, ((0, 0), (1, 0))), count))
    token, _ = law.at(count).residual(
        law_lib.at_slot(draft, count, law.vocab_size),
        keys.row(context, Purpose.RESIDUAL), count < last, scale)
    return base.finish(draft, count, token)


@dataclasses.dataclass(frozen=True)
class WrongPosition(Match):
  """Draws at the wrong position: the same noise for two tokens."""

  name = 'noise of another position'

  def verify(self, params, context, draft, scores):
    """As `Match`, half as far in the text."""
    stuck = context.replace(length=context.length // 2)
    return super().verify(params, stuck, draft, scores)


@dataclasses.dataclass(frozen=True)
class KeyOfNeighbour(Speculative):
  """Two rows side by side draw with one key."""

  name = 'key shared with the neighbour'

  def verify(self, params, context, draft, scores):
    """As `Speculative`; every second row has the key of the row before."""
    row = jnp.arange(context.keys.shape[0])
    shared = context.replace(keys=context.keys[row - row % 2])
    return super().verify(params, shared, draft, scores)


# On chains drawn by a small model.
RULES: tuple[Rule, ...] = (
    DraftNoiseAgain(), BlockByPosition(), WrongPosition(), KeyOfNeighbour())
