"""Where drafts come from: next-token logits along the paths of a draft.

A drafter is a shape (`ChainLM`, `TreeLM`, `GrownLM`) over a source. The shape
decides which nodes are drafted and how their tokens are chosen; the source
says what may follow each node: a language model with a cache of its own, or a
network that reads the target's hidden states.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

from flax import struct
import jax
import jax.numpy as jnp

from specjax.core import tree
from specjax.core.types import (
  Context,
  Draft,
  Models,
  Scores,
  SpecState,
  Verdict,
)
from specjax.drafters import base, cached

Array = jax.Array

# Tokens fed at a time when a cache is far behind.
_REFILL_BLOCK = 16


class Level(struct.PyTreeNode, kw_only=True):
  """Drafted tokens of one depth, whose successors are asked for.

  In a chain one token a level: `base = length + depth - 1`, `start = 0` and
  no masks, so that `depth` may be traced. In a tree the nodes fed so far are
  entries 0, 1, ... of a scratch region at slot `base = length`.

  Attributes:
    tokens: int32[B,T]. depth: their depth >= 1 (the root's is 0).
    base: int32[B], slot of entry 0 (see above).
    parent: int32[T] or [B,T], place of each token's parent in the level
      above (zeros at depth 1).
    position: int32[B,T], position in the text.
    ancestors: bool[(B,)T,start+T], entries that each token sees; None in a
      chain.
    entry_position: int32[B,start+T] of all entries so far; None in a chain.
    start: static; entries of earlier levels.
  """

  tokens: Array
  depth: Any
  base: Array
  parent: Array
  position: Array
  ancestors: Array | None = None
  entry_position: Array | None = None
  start: int = struct.field(pytree_node=False, default=0)


@runtime_checkable
class Source(Protocol):
  """Gives logits along paths. A frozen, hashable dataclass.

  `memory` is the drafter's state. Its structure and shapes may change while
  a tree grows, not along a chain, and `begin` accepts what `empty`, `init`
  and `sync` return.
  """

  @property
  def taps(self) -> tuple[str, ...]:
    """Names of the target's hidden states that it reads."""
    ...

  @property
  def follows(self) -> bool:
    """Whether `sync` must be called in rounds that it did not draft, too."""
    ...

  def empty(self, batch: int, capacity: int) -> Any:
    """Returns an empty memory."""
    ...

  def init(
      self, params: Models, state: SpecState, position: Array, fed: Array,
      taps: dict[str, Array],
  ) -> Any:
    """Takes in a chunk of the prompt; returns the new memory."""
    ...

  def begin(
      self, params: Models, state: SpecState, *, behind: int, refill: bool
  ) -> tuple[Array, Any]:
    """Returns raw logits f32[B,V] of what follows the text, and the memory.

    The memory may lack the last `behind` committed tokens at most, or any
    number with `refill`.
    """
    ...

  def grow(
      self, params: Models, context: Context, memory: Any, level: Level
  ) -> tuple[Array, Any]:
    """Returns raw logits f32[B,T,V] of what follows each token, memory."""
    ...

  def confidence(self, memory: Any) -> Array | None:
    """Chance f32[B,T] that what follows each node is accepted, or None.

    Of the nodes that `begin` or `grow` was last asked about; a function of
    these nodes and the past alone, so that cutting by it is lossless.
    """
    ...

  def sync(
      self, params: Models, state: SpecState, draft: Draft, scores: Scores,
      verdict: Verdict, *, own: bool,
  ) -> Any:
    """Learns the verdict; returns the new memory.

    `own` says that the draft is a chain of this source's tokens.
    """
    ...


class Sourced:
  """What all shapes over a source share; a mixin."""

  model: Any  # a source, or a language model

  @property
  def source(self) -> Any:
    """Where the tokens come from."""
    return of(self.model)

  @property
  def taps(self) -> tuple[str, ...]:
    """What the source reads."""
    return self.source.taps

  def empty(self, batch: int, capacity: int) -> Any:
    """Returns the source's memory."""
    return self.source.empty(batch, capacity)

  def init(self, params, state, position, fed, taps) -> SpecState:
    """Takes in a chunk of the prompt."""
    return state.replace(
        drafter=self.source.init(params, state, position, fed, taps))

  def sync(self, params, state, draft, scores, verdict) -> SpecState:
    """Hands the verdict on."""
    return state.replace(drafter=self.source.sync(
        params, state, draft, scores, verdict, own=False))

  def idle(self) -> Any:
    """Returns what takes this drafter's place while it is off, or None."""
    return Idle(self.source) if self.source.follows else None


@dataclasses.dataclass(frozen=True)
class Idle(Sourced, base.Drafter):
  """Drafts nothing, and keeps a source up to date with the text."""

  source: Any = None

  @property
  def topology(self) -> tree.Topology:
    return tree.chain(0)

  def propose(self, params, state) -> tuple[Draft, SpecState]:
    del params
    return base.no_draft(self.topology, state.context), state


def of(model: Any) -> Source:
  """Returns `model` itself if it is a source, else the one made of it.

  Args:
    model: a `Source`, or a language model (`cached.CachedModel`).
  """
  return model if isinstance(model, Source) else LanguageModel(model)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A causal language model of the target's vocabulary, with its own cache.

  It never sees its own last draft, so its cache is short after acceptance:
  each round looks at the last committed tokens and stores the missing ones.

  Attributes:
    model: a `cached.CachedModel`; its parameters are `params.drafter`.
  """

  model: Any

  taps = ()
  follows = False

  def empty(self, batch: int, capacity: int) -> Any:
    return cached.empty(self.model, batch, capacity)

  def init(self, params, state, position, fed, taps) -> Any:
    del taps
    return cached.init(self.model, params, state, position, fed).drafter

  def begin(self, params, state, *, behind, refill) -> tuple[Array, Any]:
    cache = state.drafter['model']
    if refill:
      cache = self._refill(params, state, cache, behind)
    logits, cache = cached.catch_up(self.model, params, state, cache, behind)
    return logits, {'model': cache, 'held': state.context.length}

  def grow(self, params, context, memory, level) -> tuple[Array, Any]:
    del context
    cache = memory['model']
    if level.ancestors is None:
      logits, cache = self.model.extend(
          params.drafter, cache, level.tokens, level.base,
          jnp.ones(level.tokens.shape[:2], bool))
      logits = logits[:, None]
    else:
      logits, cache = self.model.grow(
          params.drafter, cache, level.tokens, level.base, level.position,
          level.ancestors, level.entry_position, level.start)
    return logits, {**memory, 'model': cache}

  def confidence(self, memory: Any) -> None:
    del memory

  def sync(self, params, state, draft, scores, verdict, *, own) -> Any:
    """Counts accepted drafts as held; the last one was drawn, never fed."""
    del params, scores
    held = state.context.length
    if own:
      held += jnp.minimum(
          verdict.num_accepted, draft.topology.num_nodes - 1)
    return {**state.drafter, 'held': held}

  def _refill(
      self, params: Models, state: SpecState, cache: Any, behind: int
  ) -> Any:
    """Feeds committed tokens that went by while the drafter was off."""
    context, held = state.context, state.drafter['held']
    goal = context.root - (behind - 1)  # the rest is fed anyway
    goal = jnp.where(context.done, 0, goal)

    def body(carry):
      held, cache = carry
      slot = held[:, None] + jnp.arange(_REFILL_BLOCK)
      tokens = tree.take_row(context.tokens, slot)
      cache = self.model.feed(
          params.drafter, cache, tokens, held, slot < goal[:, None])
      return jnp.minimum(held + _REFILL_BLOCK, jnp.maximum(goal, held)), cache

    return jax.lax.while_loop(
        lambda carry: jnp.any(carry[0] < goal), body, (held, cache))[1]
