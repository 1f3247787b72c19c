"""Heads on the target's last state as a source: Medusa, Hydra."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import tree
from specjax.drafters.source import Level

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class HeadsSource:
  """Drafts depth d + 1 by head d, from the state before the pending token.

  That state is the whole memory between rounds: the target's, at the node
  whose law the pending token was drawn from. While it drafts, Hydra also
  keeps the path to each node of the last level, int32[B,T,M].

  Beyond M tokens nothing is known: the last head is used again. A text of
  one token has no state yet; it counts as zeros.

  Attributes:
    model: a `models.HeadsModel`; its parameters are `params.drafter`.

  References: Medusa, arXiv:2401.10774; Hydra, arXiv:2402.05109.
  """

  model: Any

  follows = True

  @property
  def taps(self) -> tuple[str, ...]:
    return self.model.taps

  def empty(self, batch: int, capacity: int) -> Any:
    del capacity
    return {'state': self.model.empty(batch)}

  def init(self, params, state, position, fed, taps) -> Any:
    """Keeps the state of the last position of a chunk that was fed."""
    del params, position
    last = jnp.max(jnp.where(fed, jnp.arange(fed.shape[1]), -1), axis=1)
    return self._keep(state, taps, last, last >= 0)

  def begin(self, params, state, *, behind, refill) -> tuple[Array, Any]:
    """Returns the first head's logits; the state is never behind."""
    del behind, refill
    context, memory = state.context, state.drafter
    pending = tree.take_row(context.tokens, context.root)[:, None]
    if self.model.reads_path:
      # Nodes have as many places in a chain as in a tree.
      memory = {**memory, 'path': jnp.zeros(
          pending.shape + (self.model.num_heads,), jnp.int32)}
    logits, memory = self.grow(params, context, memory, Level(
        tokens=pending, depth=0, base=context.root,
        parent=jnp.zeros((1,), jnp.int32), position=context.root[:, None]))
    return logits[:, 0], memory

  def grow(self, params, context, memory, level) -> tuple[Array, Any]:
    """Returns the logits of the head at `level.depth` after each token."""
    del context
    index, last = level.depth, self.model.num_heads - 1
    index = min(index, last) if isinstance(index, int) else (
        jnp.minimum(index, last))
    state, path = memory['state'][:, None], None
    shape = level.tokens.shape
    if self.model.reads_path:
      parent = jnp.broadcast_to(level.parent, shape)
      path = tree.take_row(memory['path'], parent)
      path = path.at[:, :, level.depth].set(level.tokens, mode='drop')
      memory = {**memory, 'path': path}
      state = jnp.broadcast_to(state, shape + state.shape[2:])
    hidden = self.model.hidden(params.drafter, params.target, state, path,
                               index)
    logits = self.model.logits(params.drafter, hidden, index)
    logits = self.model.spread(params.drafter, logits)
    return jnp.broadcast_to(logits, shape + logits.shape[2:]), memory

  def confidence(self, memory: Any) -> None:
    del memory

  def sync(self, params, state, draft, scores, verdict, *, own) -> Any:
    """Keeps the state that the next pending token is drawn from."""
    del params, own
    last = jnp.take_along_axis(
        verdict.path, verdict.num_accepted[:, None], axis=1)[:, 0]
    last = jnp.minimum(last, draft.topology.num_nodes)
    return self._keep(state, scores.taps, last, ~state.context.done)

  def _keep(self, state, taps: dict[str, Array], row: Array, rows: Array):
    """Returns the memory: `row int32[B]` of the taps where `rows` is set."""
    [name] = self.taps
    old = state.drafter['state']
    new = tree.take_row(taps[name], row).astype(old.dtype)
    return {'state': jnp.where(rows[:, None], new, old)}
