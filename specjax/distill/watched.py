"""A chain of drafts that notes how likely each was to be accepted."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import law as law_lib
from specjax.distill import losses

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Watched:
  """A chain whose drafts leave behind how likely their acceptance was.

  Attributes:
    drafter: drafts. Its state is 'inner'; 'chance' f32[B,S] holds, at the
      place of each draft that was reached, sum_x min(p, q) by the loop's own
      laws (greedy: whether it is the target's token), and 'accepted' the
      verdict. -1 where no draft was.
  """

  drafter: Any

  def __getattr__(self, name: str) -> Any:
    if name == 'drafter' or name.startswith('__'):
      raise AttributeError(name)
    return getattr(self.drafter, name)

  def empty(self, batch: int, capacity: int) -> Any:
    none = jnp.full((batch, capacity), -1.0, jnp.float32)
    return {'inner': self.drafter.empty(batch, capacity), 'chance': none,
            'accepted': none + 0.0}

  def init(self, params, state, position, fed, taps):
    return self._leave(state, self.drafter.init(
        params, self._enter(state), position, fed, taps))

  def propose(self, params, state):
    draft, inner = self.drafter.propose(params, self._enter(state))
    return draft, self._leave(state, inner)

  def sync(self, params, state, draft, scores, verdict):
    """Writes down what was reached."""
    slot = jnp.arange(draft.topology.num_nodes)
    reached = draft.valid & (slot <= verdict.num_accepted[:, None])
    reached &= ~state.context.done[:, None]
    size = state.drafter['chance'].shape[1]
    at = jnp.where(reached, state.context.length[:, None] + slot, size)
    put = jax.vmap(lambda row, i, x: row.at[i].set(x, mode='drop'))
    accepted = slot < verdict.num_accepted[:, None]
    mine = {'chance': put(state.drafter['chance'], at, _chance(draft, scores)),
            'accepted': put(state.drafter['accepted'], at,
                            accepted.astype(jnp.float32))}
    state = self._leave(state, self.drafter.sync(
        params, self._enter(state), draft, scores, verdict))
    return state.replace(drafter={**state.drafter, **mine})

  def _enter(self, state):
    return state.replace(drafter=state.drafter['inner'])

  def _leave(self, state, inner):
    return inner.replace(drafter={**state.drafter, 'inner': inner.drafter})


def _chance(draft: Any, scores: Any) -> Array:
  """Returns f32[B,K], the chance that each draft of a chain is accepted."""
  law, num = scores.target_law, draft.topology.num_nodes
  if isinstance(law, law_lib.Point):
    return (law.value[:, :num] == draft.tokens).astype(jnp.float32)
  return losses.acceptance(
      jax.nn.log_softmax(law.logits[:, :num], axis=-1),
      jax.nn.log_softmax(draft.draft_law.logits, axis=-1))
