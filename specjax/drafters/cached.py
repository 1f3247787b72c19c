"""What drafters with a language model of their own share: its cache."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from specjax.core import tree
from specjax.core.types import Models, SpecState

Array = jax.Array


class CachedModel(Protocol):
  """What these drafters need of a language model (`models.CausalLM`).

  Parameters and cache are the bare model's.
  """

  def empty(self, batch: int, capacity: int) -> Any: ...

  def extend(
      self, params: Any, cache: Any, tokens: Array, base: Array, fed: Array
  ) -> tuple[Array, Any]:
    """Feeds `tokens [B,T]` at slots `base + t`: last row's logits, cache."""
    ...

  def feed(
      self, params: Any, cache: Any, tokens: Array, base: Array, fed: Array
  ) -> Any:
    """The same without logits: returns the cache."""
    ...

  def grow(
      self, params: Any, cache: Any, tokens: Array, base: Array,
      position: Array, ancestors: Array, entry_position: Array, start: int,
  ) -> tuple[Array, Any]:
    """Feeds a level of a tree: logits f32[B,T,V] of every token, cache.

    `tokens [B,T]` become entries `start .. start + T - 1` of a scratch region
    at slot `base`; `ancestors bool[(B,)T,start+T]` says which entries each
    sees, `entry_position int32[B,start+T]` where all of them stand.
    """
    ...


def empty(model: CachedModel, batch: int, capacity: int) -> Any:
  """Returns the model's cache and how many tokens it holds per row."""
  return {'model': model.empty(batch, capacity),
          'held': jnp.zeros((batch,), jnp.int32)}


def init(
    model: CachedModel, params: Models, state: SpecState, position: Array,
    fed: Array,
) -> SpecState:
  """Feeds a chunk of the prompt."""
  tokens = tree.take_row(state.context.tokens, position)
  cache = model.feed(
      params.drafter, state.drafter['model'], tokens, position[:, 0], fed)
  held = jnp.maximum(
      state.drafter['held'],
      jnp.max(jnp.where(fed, position + 1, 0), axis=1))
  return state.replace(drafter={'model': cache, 'held': held})


def catch_up(
    model: CachedModel, params: Models, state: SpecState, cache: Any,
    count: int,
) -> tuple[Array, Any]:
  """Feeds the committed tokens that the cache lacks, the pending one too.

  It may lack `count` at most. Only what is missing is stored again: a
  sliding window's ring has already lost keys that older tokens would see.

  Returns:
    `(raw logits after the pending token f32[B,V], cache)`.
  """
  context = state.context
  base_slot = context.root - (count - 1)
  slot = base_slot[:, None] + jnp.arange(count)
  tokens = tree.take_row(context.tokens, slot)
  missing = slot >= state.drafter['held'][:, None]
  return model.extend(params.drafter, cache, tokens, base_slot, missing)
