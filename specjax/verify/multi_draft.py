"""Greedy multi-draft: the top tokens for sure, and one that is drawn."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from specjax.core import keys, tree
from specjax.core import law as law_lib
from specjax.core.types import (
  IID,
  MATCH,
  POINT,
  TOP_PLUS_ONE,
  Context,
  Draft,
  Models,
  Scores,
  Verdict,
)
from specjax.verify import base, rejection


@dataclasses.dataclass(frozen=True)
class GreedyMultiDraft(base.Rule):
  """The best possible rule for candidates top_1, ..., top_{n-1}, x ~ q'.

  q' is q without the top tokens, renormalised. x is accepted with
  probability min(1, p(x) / q'(x)); otherwise a token y is drawn from
  norm(relu(p - q')), in which the top tokens keep their whole mass, and when
  y is one of them its child is accepted. Lossless; accepts with probability
  p(Top) + sum over the rest of min(p, q'), the optimum of this way of
  drafting. One residual and one draw a node, whatever n. With n = 2 this is
  SpecHub; a node with one drawn child is plain speculative sampling, one
  whose children are all deterministic is sample-and-match.

  References: Hu et al. 2025, arXiv:2502.18779, section 5; Sun et al. 2024
  (SpecHub), arXiv:2411.05289.
  """

  name = 'greedy_multi_draft'
  modes = (TOP_PLUS_ONE, POINT, MATCH)
  advice = ("draft with draft_sample_method 'top_plus_one', or use "
            "'speculative' or 'traversal'")

  def check(self, topology, modes, vocab_size, params) -> None:
    """Also: a single drawn child may be of kind 'iid'."""
    if topology.max_children <= 1:
      modes = tuple(m for m in modes if m != IID)
    super().check(topology, modes, vocab_size, params)

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Draws at every internal row, then follows the tokens drawn."""
    del params
    law, topology = scores.target_law, draft.topology
    key = keys.row(context, keys.Purpose.RESIDUAL)
    batch = draft.tokens.shape[0]
    if topology.num_nodes == 0:
      row = jnp.zeros((batch,), jnp.int32)
      return base.finish(draft, row, law.at(row).sample(key))
    kin = rejection.family(draft)
    rows = jnp.broadcast_to(kin.rows, (batch,) + kin.rows.shape)
    slot, is_drawn, q = _drawn_child(draft, kin)
    p = law.at(rows)
    x = rejection.take(draft.tokens, slot)
    is_drawn &= rejection.take(draft.valid, slot)
    u = rejection.take(keys.uniform(
        keys.row(context, keys.Purpose.ACCEPT), topology.num_nodes), slot)
    passed = is_drawn
    noise = base.row_keys(key, kin.rows.shape[0] + 1)
    if q is None:
      passed = jnp.zeros_like(is_drawn)
      y = p.sample(noise[:, :-1])
    else:
      px = law.log_prob_at(rows, x)
      # A flat axis of candidates: one of each internal row.
      qx = q.log_prob_at(jnp.arange(rows.shape[1]), x)
      passed &= u * jnp.exp(qx) < jnp.exp(px)
      y, _ = p.residual(q, noise[:, :-1], is_drawn)
    chosen = jnp.where(passed, x, y)
    follows = rejection.take(draft.tokens, kin.slots) == chosen[..., None]
    follows &= kin.exists & rejection.take(draft.valid, kin.slots)
    # x itself when it passed; else a deterministic child.
    own = kin.slots == slot[..., None]
    follows &= jnp.where(passed[..., None], own, ~(own & is_drawn[..., None]))
    stop = tree.deepest(topology, draft.parents,
                        rejection.alive_slots(draft, kin, follows))
    place = kin.place[stop]
    is_leaf = place == kin.rows.shape[0]
    last = law.at(stop).sample(noise[:, -1])
    token = jnp.where(is_leaf, last, tree.take_row(
        y, jnp.minimum(place, kin.rows.shape[0] - 1)))
    return base.finish(draft, stop, token)


def _drawn_child(draft: Draft, kin: rejection.Family):
  """Returns the drawn child of each internal row.

  Returns `(slot int32[B,M], exists bool[B,M], law of it [B,M,V] | None)`;
  its law excludes the siblings before it.
  """
  index = jnp.argmax(kin.drawn & kin.exists, axis=-1)[..., None]
  exists = jnp.any(kin.drawn & kin.exists, axis=-1)
  slot = jnp.take_along_axis(kin.slots, index, axis=-1)[..., 0]
  if draft.draft_law is None:
    return slot, exists, None
  rows = jnp.broadcast_to(base.law_rows(draft), draft.tokens.shape)
  q = draft.draft_law.at(rejection.take(rows, slot))
  if isinstance(q, law_lib.Point):
    return slot, exists, q
  tokens = rejection.take(draft.tokens, kin.slots)
  order = jnp.arange(tokens.shape[-1])
  top = kin.exists & (order < index)
  logits = q.logits
  vocab = jnp.arange(logits.shape[-1])
  for j in range(tokens.shape[-1] - 1):  # a fresh softmax of what is left
    out = top[..., j, None] & (vocab == tokens[..., j, None])
    logits = jnp.where(out, -jnp.inf, logits)
  # All mass on the top tokens: there is no drawn child then (not valid).
  some = jnp.isfinite(jnp.max(logits, axis=-1, keepdims=True))
  return slot, exists, law_lib.Categorical(
      jnp.where(some, logits, q.logits))
