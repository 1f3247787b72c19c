"""Optimal transport with membership cost, for small vocabularies."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core import keys, tree
from specjax.core import law as law_lib
from specjax.core.types import (
  IID,
  WITHOUT_REPLACEMENT,
  Context,
  Draft,
  Models,
  Scores,
  Verdict,
)
from specjax.verify import base, rejection, transport_plan

Array = jax.Array

_KINDS = {'iid': IID, 'without_replacement': WITHOUT_REPLACEMENT}


@dataclasses.dataclass(frozen=True)
class OptimalTransport(base.Rule):
  """Accepts one of n drawn candidates as often as any rule can.

  Couples the law of the n candidates with the target's so that the token is
  among them as often as possible; lossless for any plan, near-optimal for
  the plan found (`transport_plan.allocate` states how near). The work is
  V^n a node: for vocabularies of tens of tokens, to see what other rules
  leave.

  Attributes:
    drafts: 'iid' or 'without_replacement', how candidates are drawn.

  References: Sun et al. 2023 (SpecTr), arXiv:2310.15141, section 4.
  """

  drafts: str = 'iid'

  name = 'optimal_transport'
  modes = (IID, WITHOUT_REPLACEMENT)

  def __post_init__(self):
    if self.drafts not in _KINDS:
      raise ValueError(
          f'drafts={self.drafts!r}: known are {", ".join(_KINDS)}')

  def check(self, topology, modes, vocab_size: int, params: Any) -> None:
    """Also: static tree, drafts as declared, V^n within the limit."""
    super().check(topology, modes, vocab_size, params)
    if set(modes) - {_KINDS[self.drafts]} and topology.max_children > 1:
      raise ValueError(f'verify={self.name!r} was told drafts='
                       f'{self.drafts!r}, and the drafter draws otherwise')
    if topology.parents is None:
      raise ValueError(f'verify={self.name!r} needs a static tree')
    size = vocab_size**max(topology.max_children, 1)
    if size > transport_plan.MAX_TUPLES:
      raise ValueError(
          f'verify={self.name!r} looks at {vocab_size}^'
          f'{topology.max_children} = {size} tuples a node, more than '
          f'{transport_plan.MAX_TUPLES}: use '
          "'greedy_multi_draft', 'speculative' or 'k_seq'")

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Tests the children of every row against the plan."""
    del params
    law, topology = scores.target_law, draft.topology
    key = keys.row(context, keys.Purpose.RESIDUAL)
    batch, num = draft.tokens.shape
    if num == 0:
      row = jnp.zeros((batch,), jnp.int32)
      return base.finish(draft, row, law.at(row).sample(key))
    kin = rejection.family(draft)
    p = law.at(jnp.broadcast_to(kin.rows, (batch,) + kin.rows.shape)).probs
    q = rejection.draft_probs(draft, kin)
    share, load = self._plans(draft, kin, p, q)
    # One uniform a candidate: given that the earlier ones were not taken.
    before = jnp.cumsum(share, axis=-1) - share
    u = keys.uniform(keys.row(context, keys.Purpose.ACCEPT), num)
    accept = rejection.take(u, kin.slots) * (1 - before) < share
    earlier = jnp.cumsum(accept, axis=-1) - accept > 0
    alive = rejection.alive_slots(draft, kin, accept & ~earlier)
    stop = tree.deepest(topology, draft.parents, alive)
    left = jnp.maximum(p - load, 0.0)
    some = left.sum(axis=-1, keepdims=True) > 1e-7
    weight = rejection.at_stop(law, kin, jnp.where(some, left, p), stop)
    return base.finish(
        draft, stop, law_lib.from_weights(weight).sample(key))

  def _plans(self, draft: Draft, kin, p: Array, q) -> tuple[Array, Array]:
    """Returns `(share f32[B,M,C], load f32[B,M,V])` of all internal rows.

    A row that lacks some of its children has no plan: nothing is accepted.
    (Whether a child is drafted depends on q alone.)
    """
    children = draft.topology.children
    counts = np.array([len(children[r]) for r in draft.topology.internal])
    share = jnp.zeros(kin.slots.shape)
    load = jnp.zeros(p.shape)
    tokens = rejection.take(draft.tokens, kin.slots)
    there = kin.exists & rejection.take(draft.valid, kin.slots)
    for count in sorted(set(counts.tolist())):
      here = np.nonzero(counts == count)[0]
      plan = transport_plan.allocate(
          p[:, here], q[:, here], count, self.drafts)
      whole = there[:, here, :count]
      full = jnp.all(whole, axis=-1, keepdims=True)
      part = transport_plan.share(plan, tokens[:, here, :count], whole)
      share = share.at[:, here, :count].set(jnp.where(full, part, 0.0))
      load = load.at[:, here].set(jnp.where(full, plan.load, 0.0))
    return share, load
