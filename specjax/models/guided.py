"""Classifier-free guidance: a target that is two views of one model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import tree
from specjax.core.types import Draft, Models, Scores, SpecState, Verdict
from specjax.models.causal import CausalLM, scored

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Guided:
  """A conditional model under classifier-free guidance, as a `Target`.

  Every row is fed twice: as it is, and with its condition replaced by the one
  that says nothing. The law is that of the raw logits
  `without + scale (with - without)`, before temperature and filters, so that
  drafts are accepted by the guided law. The cache of row b holds both views,
  so that a pair stays on one device.

  It is also the model of a `ChainLM` or `TreeLM`, whose drafts are then
  guided, too.

  Attributes:
    lm: the model; `config.num_conditions` of it is at least 1.
    scale: of all rows without one of their own; 1 is the conditional law, 0
      the unconditional one.
    steps: tokens after the prompt that are guided, None for all.

  A row's own scale is `context.condition['guidance'] f32[B]`, if there.

  Reference: Ho and Salimans 2022, arXiv:2207.12598.
  """

  lm: CausalLM
  scale: float = 1.0
  steps: int | None = None

  def __post_init__(self):
    if not self.lm.config.num_conditions and (
        self.lm.config.caption_dim is None):
      raise ValueError('guidance needs a conditional model: this one has no '
                       'conditions')
    if self.steps is not None and self.steps < 0:
      raise ValueError(f'steps={self.steps}: must be >= 0, or None')

  @property
  def config(self) -> Any:
    """The decoder's shape."""
    return self.lm.config

  @property
  def chunk(self) -> int:
    """Most tokens fed in one call."""
    return self.lm.chunk

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.lm.vocab_size

  @property
  def num_ids(self) -> int:
    """Ids that a prompt may hold: V, and conditions."""
    return self.lm.num_ids

  def empty(self, batch: int, capacity: int) -> Any:
    """Returns a cache of B rows, two views each."""
    return _split(self.lm.empty(2 * batch, capacity))

  def init(
      self, params: Models, state: SpecState, position: Array, fed: Array,
      taps: tuple[str, ...],
  ) -> tuple[SpecState, dict[str, Array]]:
    """Feeds a chunk of the prompt to both views; taps are the first's."""
    both, found = self.lm.init(
        params, self._pairs(state), _twice(position), _twice(fed), taps)
    return state.replace(target=_split(both.target)), _first(found)

  def raw(
      self, params: Models, state: SpecState, draft: Draft,
      taps: tuple[str, ...],
  ) -> tuple[Array, dict[str, Array], SpecState]:
    """Returns guided logits [B,N+1,V]; taps are the conditional view's."""
    if draft.resume is not None:
      raise ValueError('drafts that run part of the target (early exit) '
                       'cannot be guided')
    batch = state.context.length.shape[0]
    pair = draft.replace(
        tokens=_twice(draft.tokens), valid=_twice(draft.valid),
        parents=None if draft.parents is None else _twice(draft.parents),
        draft_law=None, event=None, aux=None)
    logits, found, both = self.lm.raw(
        params, self._pairs(state), pair, taps)
    # Tokens after the prompt before the one that a row of scores is about.
    depth = jnp.zeros((1, 1), jnp.int32)
    if draft.topology.num_nodes:
      depth = tree.node_depth(draft.topology, draft.parents)
      depth = jnp.pad(jnp.atleast_2d(depth), ((0, 0), (1, 0)))
    step = (state.context.root - self.config.grid_prefix + 1)[:, None] + depth
    guided = self._combined(logits, self._scale(state, batch), step)
    return guided, _first(found), state.replace(target=_split(both.target))

  def score(
      self, params: Models, state: SpecState, draft: Draft,
      taps: tuple[str, ...],
  ) -> tuple[Scores, SpecState]:
    """Scores the root and the drafts in one call of 2B rows."""
    return scored(self.raw, params, state, draft, taps)

  def commit(
      self, state: SpecState, draft: Draft, verdict: Verdict
  ) -> SpecState:
    """Compacts the accepted path in both views."""
    if draft.topology.is_chain:
      return state
    both = self.lm.commit(
        self._pairs(state), draft, verdict.replace(path=_twice(verdict.path)))
    return state.replace(target=_split(both.target))

  def extend(
      self, params: Any, state: Any, tokens: Array, base: Array, fed: Array
  ) -> tuple[Array, Any]:
    """As `CausalLM.extend`, guided; `params` are the bare model's."""
    logits, state = self.lm.extend(
        params, _joined(state), self.views(tokens), _twice(base),
        _twice(fed))
    step = base[:, None] + tokens.shape[1] - self.config.grid_prefix
    guided = self._combined(logits[:, None], self.scale, step)[:, 0]
    return guided, _split(state)

  def feed(
      self, params: Any, state: Any, tokens: Array, base: Array, fed: Array
  ) -> Any:
    """As `CausalLM.feed`."""
    return _split(self.lm.feed(
        params, _joined(state), self.views(tokens), _twice(base),
        _twice(fed)))

  def grow(
      self, params: Any, state: Any, tokens: Array, base: Array,
      position: Array, ancestors: Array, entry_position: Array | None,
      start: int,
  ) -> tuple[Array, Any]:
    """As `CausalLM.grow`, guided."""
    if ancestors.ndim == 3:
      ancestors = _twice(ancestors)
    if entry_position is not None:
      entry_position = _twice(entry_position)
    logits, state = self.lm.grow(
        params, _joined(state), self.views(tokens), _twice(base),
        _twice(position), ancestors, entry_position, start)
    step = position + 1 - self.config.grid_prefix
    return self._combined(logits, self.scale, step), _split(state)

  def views(self, tokens: Array) -> Array:
    """Returns [2B,T]: tokens, and tokens that say nothing as a condition."""
    c = self.config
    null = c.vocab_size + c.num_conditions - 1
    without = jnp.where(tokens >= c.vocab_size, null, tokens)
    return jnp.stack([tokens, without], axis=1).reshape(-1, tokens.shape[1])

  def head(self, params: Any, x: Array) -> Array:
    """As `CausalLM.head`."""
    return self.lm.head(params, x)

  def hidden(self, final: Array, position: Array) -> Array:
    """Returns states [B,T,D] whose logits are the guided ones.

    The head is linear, so that guidance of states is guidance of logits.

    Args:
      final: [2B,T,D], what the head multiplies, of both views.
      position: int32[B,T], within the text.

    Raises:
      ValueError: a head that bounds its logits, which is not linear.
    """
    if self.config.final_softcap is not None:
      raise ValueError('final_softcap: guided states need a linear head')
    step = position + 1 - self.config.grid_prefix
    return self._combined(
        final.astype(jnp.float32), self.scale, step).astype(final.dtype)

  def _pairs(self, state: SpecState) -> SpecState:
    """Returns the state that the model is run on."""
    context = state.context
    condition = context.condition
    if condition is not None:
      condition = jax.tree.map(_twice, condition)
      odd = jnp.arange(2 * context.length.shape[0]) % 2 == 1
      condition = {**condition, 'is_null': odd}
    return state.replace(target=_joined(state.target), context=context.replace(
        tokens=self.views(context.tokens), length=_twice(context.length),
        condition=condition))

  def _scale(self, state: SpecState, batch: int) -> Any:
    condition = state.context.condition or {}
    if 'guidance' not in condition:
      return self.scale
    return jnp.broadcast_to(condition['guidance'], (batch,))[:, None, None]

  def _combined(self, logits: Array, scale: Any, step: Array) -> Array:
    """Returns guided logits [B,T,V] of [2B,T,V]; `step` [B|1,T]."""
    pair = logits.reshape((-1, 2) + logits.shape[1:])
    with_it, without = pair[:, 0], pair[:, 1]
    guided = without + scale * (with_it - without)
    if self.steps is None:
      return guided
    return jnp.where((step < self.steps)[..., None], guided, with_it)


def _twice(x: Array) -> Array:
  """Returns [2B,...]: each row and its copy."""
  return jnp.repeat(x, 2, axis=0)


def _split(state: Any) -> Any:
  """Returns [B,2,...] of [2B,...], whose pairs are neighbours."""
  return jax.tree.map(lambda x: x.reshape((-1, 2) + x.shape[1:]), state)


def _joined(state: Any) -> Any:
  """Returns [2B,...] of [B,2,...]."""
  return jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), state)


def _first(taps: dict[str, Array]) -> dict[str, Array]:
  """Returns the conditional view's rows."""
  return {name: x[::2] for name, x in taps.items()}
