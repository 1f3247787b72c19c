"""Combinators: drafters made of drafters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import tree
from specjax.core.types import Draft, Models, SpecState
from specjax.drafters.null import Null

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Adaptive:
  """Lets a controller decide how much of a drafter's chain is used.

  The law stays exact: lengths act through `valid`, from a limit fixed before
  anything is drawn, or by ending a draft after a token that is kept.

  Attributes:
    drafter: proposes chains of up to K tokens.
    controller: from `core.control`.
    exact_shape: keep the block at K + 1 tokens whatever the controller says,
      so that greedy and matched output is bitwise that of the null drafter.
      False also compiles the narrower `widths` and runs the narrowest that
      holds every row's limit, down to plain decoding: faster where drafting
      does not pay; the law holds, bits do not.
    widths: draft lengths compiled when `exact_shape` is False; K is added.
  """

  drafter: Any
  controller: Any
  exact_shape: bool = True
  widths: tuple[int, ...] = (0,)

  def __post_init__(self):
    if not self.drafter.topology.is_chain:
      raise ValueError('adaptive draft lengths are for chains')
    bad = [w for w in self.widths if not 0 <= w <= self.num_draft]
    if bad:
      raise ValueError(f'widths {bad}: must be in [0, {self.num_draft}]')

  @property
  def num_draft(self) -> int:
    """K of the inner drafter."""
    return self.drafter.topology.num_nodes

  @property
  def topology(self) -> tree.Topology:
    return self.drafter.topology

  @property
  def taps(self) -> tuple[str, ...]:
    return self.drafter.taps

  @property
  def modes(self) -> tuple[int, ...]:
    return self.drafter.modes

  @property
  def variants(self) -> tuple[Any, ...]:
    """Narrower forms of this drafter over the same state, widest last."""
    if self.exact_shape:
      return ()
    widths = sorted(set(self.widths) | {self.num_draft})
    return tuple(_Narrow(self, w) for w in widths)

  def choose(self, state: SpecState) -> Array:
    """Returns the index of the variant that this round needs, int32[]."""
    need = jnp.where(state.context.done, 0, self.limit(state))
    widths = jnp.asarray(sorted(set(self.widths) | {self.num_draft}))
    return jnp.sum(widths < jnp.max(need)).astype(jnp.int32)

  def limit(self, state: SpecState) -> Array:
    """Returns the controller's limit for this round, int32[B]."""
    return self.controller.limit(
        state.drafter['control'], state.context, self.num_draft)

  def empty(self, batch: int, capacity: int) -> Any:
    return {'inner': self.drafter.empty(batch, capacity),
            'control': self.controller.empty(batch, self.num_draft)}

  def init(self, params, state, position, fed, taps) -> SpecState:
    inner = self.drafter.init(
        params, self._enter(state), position, fed, taps)
    return self._leave(state, inner)

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Drafts, then cuts to the limit and to what the controller keeps."""
    return self._propose(self.drafter, params, state)

  def _propose(self, drafter, params, state):
    limit = self.limit(state)
    draft, inner = drafter.propose(params, self._enter(state))
    slot = jnp.arange(draft.topology.num_nodes)
    valid = draft.valid & (slot < limit[:, None])
    if draft.topology.num_nodes:
      control = state.drafter['control']
      valid &= self.controller.keep(control, draft)
    return draft.replace(valid=valid), self._leave(state, inner)

  def sync(self, params, state, draft, scores, verdict) -> SpecState:
    return self._sync(
        self.drafter, params, state, draft, scores, verdict)

  def _sync(self, drafter, params, state, draft, scores, verdict):
    inner = drafter.sync(
        params, self._enter(state), draft, scores, verdict)
    control = self.controller.update(
        state.drafter['control'], draft, verdict, ~state.context.done)
    state = self._leave(state, inner)
    return state.replace(drafter={**state.drafter, 'control': control})

  def _enter(self, state: SpecState) -> SpecState:
    return state.replace(drafter=state.drafter['inner'])

  def _leave(self, state: SpecState, inner: SpecState) -> SpecState:
    return inner.replace(drafter={**state.drafter, 'inner': inner.drafter})


@dataclasses.dataclass(frozen=True)
class _Narrow:
  """`Adaptive` at one block width; shares its state."""

  parent: Adaptive
  width: int

  @property
  def inner(self) -> Any:
    """The inner drafter at this width."""
    drafter = self.parent.drafter
    if self.width == 0:
      idle = getattr(drafter, 'idle', lambda: None)()
      return Null(0) if idle is None else idle
    if 0 in self.parent.widths and hasattr(drafter, 'resyncing'):
      drafter = drafter.resyncing()  # rounds go by without it
    return drafter.narrow(self.width)

  @property
  def topology(self) -> tree.Topology:
    return self.inner.topology

  @property
  def taps(self) -> tuple[str, ...]:
    return self.parent.taps

  def propose(self, params, state):
    return self.parent._propose(self.inner, params, state)

  def sync(self, params, state, draft, scores, verdict) -> SpecState:
    return self.parent._sync(
        self.inner, params, state, draft, scores, verdict)
