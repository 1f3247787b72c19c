"""How long to draft: controllers, and the cost model behind them.

A controller is a frozen dataclass with pure methods over a small per-row
state, driven by the `Adaptive` combinator. It acts through `Draft.valid`
only: `limit` is fixed before anything is drawn, and `keep` may end a draft
*after* a token that stays. Both leave the law exact (a drawn token that is
dropped because of its own probability would bias it).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from specjax.core.types import Context, Draft, Verdict

Array = jax.Array


def expected_length(acceptance: Array, num_draft: Array | int) -> Array:
  """Returns tokens a round, (1 - a^(K+1)) / (1 - a), for i.i.d. acceptance.

  Source: Leviathan et al. 2023, equation 1.
  """
  a = jnp.minimum(acceptance, 1.0 - 1e-6)
  # Not 1 - a^n: near a = 1 float32 would leave two digits of it.
  return -jnp.expm1((num_draft + 1) * jnp.log(a)) / (1.0 - a)


def expected_speedup(
    acceptance: Array, num_draft: Array | int, draft_cost: float,
    verify_cost: float = 1.0,
) -> Array:
  """Returns expected tokens per unit of a plain target step.

  Args:
    acceptance: in [0, 1]. num_draft: K >= 0.
    draft_cost: one drafter step over one target step, in time.
    verify_cost: a target step of K + 1 tokens over one of a single token.
  """
  cost = jnp.where(jnp.asarray(num_draft) > 0, verify_cost, 1.0)
  return expected_length(acceptance, num_draft) / (
      num_draft * draft_cost + cost)


@dataclasses.dataclass(frozen=True)
class Fixed:
  """Always drafts `num_draft` tokens (None: the drafter's width)."""

  num_draft: int | None = None

  def empty(self, batch: int, width: int) -> Any:
    del batch, width
    return {}

  def limit(self, state: Any, context: Context, width: int) -> Array:
    num = width if self.num_draft is None else min(self.num_draft, width)
    return jnp.full(context.length.shape, num, jnp.int32)

  def keep(self, state: Any, draft: Draft) -> Array:
    return jnp.ones_like(draft.valid)

  def update(
      self, state: Any, draft: Draft, verdict: Verdict, active: Array
  ) -> Any:
    return state


@dataclasses.dataclass(frozen=True)
class Heuristic(Fixed):
  """Hugging Face's schedule: two more after full acceptance, else one less.

  Attributes:
    num_draft: first length; None starts at the drafter's width.
  """

  def empty(self, batch: int, width: int) -> Any:
    first = width if self.num_draft is None else min(self.num_draft, width)
    # A round may run at a narrower block, so the bound is kept here.
    return {'length': jnp.full((batch,), first, jnp.int32),
            'most': jnp.full((batch,), max(width, 1), jnp.int32)}

  def limit(self, state: Any, context: Context, width: int) -> Array:
    return jnp.clip(state['length'], 1, width)

  def update(
      self, state: Any, draft: Draft, verdict: Verdict, active: Array
  ) -> Any:
    num = jnp.sum(draft.valid, axis=1)
    all_kept = (verdict.num_accepted == num) & (num > 0)
    grown = jnp.where(all_kept, state['length'] + 2, state['length'] - 1)
    # A round that could not draft (no match) says nothing about length.
    grown = jnp.where(num > 0, grown, state['length'])
    new = jnp.clip(grown, 1, state['most'])
    return {**state, 'length': jnp.where(active, new, state['length'])}


@dataclasses.dataclass(frozen=True)
class Confidence(Fixed):
  """Stops after a draft of low drafter probability, with a learned threshold.

  The threshold minimises `FPR + 3 FNR` of "accepted" against the drafter's
  probability, over a decaying histogram per row (Hugging Face keeps a list
  and calls a ROC routine; this is its static form). Needs drafts that carry
  `aux['confidence']`.

  Attributes:
    threshold: first value, in [0, 1]. bins: of the histogram.
    decay: per round.
  """

  threshold: float = 0.4
  bins: int = 64
  decay: float = 0.99

  def empty(self, batch: int, width: int) -> Any:
    zeros = jnp.zeros((batch, self.bins), jnp.float32)
    return {'kept': zeros, 'lost': zeros + 0.0,
            'threshold': jnp.full((batch,), self.threshold, jnp.float32)}

  def keep(self, state: Any, draft: Draft) -> Array:
    sure = self._confidence(draft) >= state['threshold'][:, None]
    before = jnp.cumprod(sure.astype(jnp.int32), axis=1)[:, :-1] > 0
    return jnp.pad(before, ((0, 0), (1, 0)), constant_values=True)

  def update(
      self, state: Any, draft: Draft, verdict: Verdict, active: Array
  ) -> Any:
    if draft.topology.num_nodes == 0:  # a plain round tests nothing
      return state
    slot = jnp.arange(draft.topology.num_nodes)
    count = verdict.num_accepted[:, None]
    is_kept = draft.valid & (slot < count)
    is_lost = draft.valid & (slot == count)  # only the first rejection
    bin_of = (self._confidence(draft) * self.bins).astype(jnp.int32)
    hit = jax.nn.one_hot(jnp.clip(bin_of, 0, self.bins - 1), self.bins)
    kept = state['kept'] * self.decay + (hit * is_kept[..., None]).sum(1)
    lost = state['lost'] * self.decay + (hit * is_lost[..., None]).sum(1)
    new = {'kept': kept, 'lost': lost,
           'threshold': self._best(kept, lost, state['threshold'])}
    return jax.tree.map(
        lambda n, o: jnp.where(active.reshape((-1,) + (1,) * (n.ndim - 1)),
                               n, o), new, state)

  def _best(self, kept: Array, lost: Array, old: Array) -> Array:
    """Returns the bin edge of least cost; `old` while data is missing."""
    num_kept = kept.sum(axis=1, keepdims=True)
    num_lost = lost.sum(axis=1, keepdims=True)
    above = lambda x: jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1]  # noqa: E731
    fpr = above(lost) / jnp.maximum(num_lost, 1e-9)
    fnr = 1.0 - above(kept) / jnp.maximum(num_kept, 1e-9)
    edge = jnp.argmin(fpr + 3.0 * fnr, axis=1) / self.bins
    enough = (num_kept + num_lost > 5) & (num_kept > 0) & (num_lost > 0)
    return jnp.where(enough[:, 0], edge, old).astype(jnp.float32)

  def _confidence(self, draft: Draft) -> Array:
    if draft.aux is None or 'confidence' not in draft.aux:
      raise ValueError(
          "draft_len_schedule='confidence' needs a drafter that reports its "
          "probabilities; lookup does not: use 'heuristic' or 'tracking'")
    return draft.aux['confidence']


@struct.dataclass
class _Track:
  """State of `Tracking`, per row."""

  acceptance: Array  # f32[B], decayed estimate
  weight: Array  # f32[B], decayed number of tests behind it
  idle: Array  # int32[B], rounds since the row last drafted


@dataclasses.dataclass(frozen=True)
class Tracking(Fixed):
  """Tracks a row's acceptance; drafts the length of largest expected gain.

  Where no length beats plain decoding the row's limit is 0 (the off switch),
  and every `probe_every` rounds it drafts again to see whether that changed.

  Attributes:
    draft_cost: one drafter step over one target step, in time.
    verify_cost: a K + 1 token target step over a single-token one.
    prior: acceptance assumed at first. decay: per tested draft.
    margin: expected speed-up below which drafting is off.
    probe_every: rounds between probes while off.
  """

  draft_cost: float = 0.0
  verify_cost: float = 1.1
  prior: float = 0.6
  decay: float = 0.9
  margin: float = 1.0
  probe_every: int = 16

  def empty(self, batch: int, width: int) -> Any:
    del width
    return _Track(
        acceptance=jnp.full((batch,), self.prior, jnp.float32),
        weight=jnp.full((batch,), 2.0, jnp.float32),
        idle=jnp.zeros((batch,), jnp.int32))

  def limit(self, state: Any, context: Context, width: int) -> Array:
    lengths = jnp.arange(1, width + 1)
    gain = expected_speedup(
        state.acceptance[:, None], lengths, self.draft_cost,
        self.verify_cost)
    best = jnp.argmax(gain, axis=1).astype(jnp.int32) + 1
    off = jnp.max(gain, axis=1) <= self.margin
    probing = state.idle >= self.probe_every - 1
    return jnp.where(off & ~probing, 0, best)

  def update(
      self, state: Any, draft: Draft, verdict: Verdict, active: Array
  ) -> Any:
    num = jnp.sum(draft.valid, axis=1)
    tests = jnp.minimum(verdict.num_accepted + 1, num)
    fade = self.decay ** tests
    weight = state.weight * fade + tests
    mean = (state.acceptance * state.weight * fade
            + jnp.minimum(verdict.num_accepted, num)) / weight
    new = _Track(
        acceptance=jnp.where(tests > 0, mean, state.acceptance),
        weight=jnp.where(tests > 0, weight, state.weight),
        idle=jnp.where(num > 0, 0, state.idle + 1).astype(jnp.int32))
    return jax.tree.map(lambda n, o: jnp.where(active, n, o), new, state)


@dataclasses.dataclass(frozen=True)
class Shared(Tracking):
  """`Tracking` with one length for all rows: they share the target's step.

  A row cannot be drafted for without widening everybody's block, so the
  length is the one that brings most tokens of all rows a unit of time. It is
  fixed before anything is drawn: the law stays exact.

  Attributes:
    costs: `((width, cost), ...)`: time of a round at a block width > 0, over
      a plain step of the same batch. Only these widths are chosen. Empty: all
      widths, with the costs of `Tracking`.
  """

  costs: tuple[tuple[int, float], ...] = ()

  def limit(self, state: Any, context: Context, width: int) -> Array:
    costs = self.costs or tuple(
        (w, self.verify_cost + w * self.draft_cost)
        for w in range(1, width + 1))
    active = ~context.done
    gains = []
    for num, cost in costs:
      expected = expected_length(state.acceptance, min(num, width))
      gains.append(jnp.sum(jnp.where(active, expected, 0.0)) / cost)
    gain = jnp.stack(gains) / jnp.maximum(jnp.sum(active), 1)
    best = jnp.asarray([min(num, width) for num, _ in costs])[
        jnp.argmax(gain)]
    idle = jnp.max(jnp.where(active, state.idle, 0))
    off = (jnp.max(gain) <= self.margin) & (idle < self.probe_every - 1)
    return jnp.broadcast_to(
        jnp.where(off, 0, best), active.shape).astype(jnp.int32)
