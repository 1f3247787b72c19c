"""Traversal verification: a tree of drawn drafts, leaves first."""

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
  POINT,
  WITHOUT_REPLACEMENT,
  Context,
  Draft,
  Models,
  Scores,
  Verdict,
)
from specjax.verify import base, rejection

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Traversal(base.Rule):
  """Visits the tree depth first; a node is given up only after its subtree.

  Lossless for children drawn with or without replacement. A node is kept
  with the weight of its whole path, as in block verification, which it is on
  a chain; it accepts more than recursive rejection where branches are longer
  than one token, and the same where they are not.

  What a node would decide when it is reached does not depend on other
  branches' noise, so all nodes of a level are worked on together and the
  visiting order only picks the first that stops.

  References: Weng et al. 2025, arXiv:2505.12398.
  """

  name = 'traversal'
  modes = (IID, WITHOUT_REPLACEMENT, POINT)
  advice = ("draft with draft_sample_method 'iid' or 'without_replacement', "
            "or use 'greedy_multi_draft' or 'match'")

  def check(self, topology, modes, vocab_size: int, params: Any) -> None:
    """Also: the tree is static."""
    super().check(topology, modes, vocab_size, params)
    if topology.parents is None:
      raise ValueError("verify='traversal' needs a static tree; use 'match' "
                       'or \'speculative\' for trees that are grown')

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Picks the first node, leaves first, that stops."""
    del params
    law, topology = scores.target_law, draft.topology
    batch, num = draft.tokens.shape
    key = keys.row(context, keys.Purpose.RESIDUAL)
    if num == 0:
      row = jnp.zeros((batch,), jnp.int32)
      return base.finish(draft, row, law.at(row).sample(key))
    if draft.sibling is not None:
      raise ValueError('traversal visits siblings in the order of slots')
    kin = rejection.family(draft)
    begin, end = _weights(draft, law, kin)
    u = keys.uniform(keys.row(context, keys.Purpose.ACCEPT), num)
    reached = base.reached(draft)
    stops = (u < end[:, 1:]) & reached
    stops = jnp.pad(stops, ((0, 0), (1, 0)), constant_values=True)  # the root
    order = jnp.asarray(_leaves_first(topology))
    stop = order[jnp.argmax(stops[:, order], axis=1)]
    weight = _left_at(draft, law, kin, begin, stop)
    token = law_lib.from_weights(weight).sample(key)
    return base.finish(draft, stop, token)


def _leaves_first(topology: tree.Topology) -> np.ndarray:
  """Returns all rows in depth-first order, each after its descendants."""
  order: list[int] = []

  def visit(row: int) -> None:
    for slot in topology.children[row]:
      visit(slot + 1)
    order.append(row)

  visit(0)
  return np.asarray(order, np.int32)


def _weights(draft: Draft, law, kin) -> tuple[Array, Array]:
  """Returns each row's path weight when entered and when left, f32[B,N+1].

  w(child) = min(1, W(x) / Q(x)), where W is w p of the parent less what its
  earlier children used up, and Q the child's law. Level by level.
  """
  topology, batch = draft.topology, draft.tokens.shape[0]
  depth = np.concatenate([[0], topology.depth])
  internal = np.asarray(topology.internal)
  begin = end = jnp.ones((batch, topology.num_nodes + 1))
  q_all = rejection.draft_probs(draft, kin)
  for level in range(topology.max_depth):
    here = np.nonzero(depth[internal] == level)[0]
    rows = internal[here]
    part = jax.tree.map(lambda x, i=here: x[:, i], kin._replace(
        rows=kin.rows[None], place=kin.place[None, :len(internal)]))
    q = None if q_all is None else q_all[:, here]
    p = law.at(jnp.broadcast_to(rows, (batch, len(rows)))).probs
    w = begin[:, rows]
    most = max(len(topology.children[r]) for r in rows)
    left = _weighted(w, p)
    for j in range(most):
      left, w, q, child = _use_up(draft, part, left, w, q, j)
      slots = np.array([(topology.children[r] + (-1,) * most)[j]
                        for r in rows])
      real = np.nonzero(slots >= 0)[0]
      begin = begin.at[:, slots[real] + 1].set(child[:, real])
    end = end.at[:, rows].set(w)
    leaves = np.setdiff1d(np.nonzero(depth == level + 1)[0], internal)
    end = end.at[:, leaves].set(begin[:, leaves])
  return begin, end


def _weighted(w: Array, p: Array) -> Array:
  """Returns w p, f32[B,M,V]; 0 behind a forbidden draft, where p may be NaN.

  Compilers are free to lose a NaN in a maximum or a minimum, so none is let
  in.
  """
  return jnp.where(w[..., None] > 0, w[..., None] * p, 0.0)


def _use_up(draft: Draft, kin, left: Array, w: Array, q, j: int):
  """Takes child j's share: `(left, w, q, weight of the child)`.

  left f32[B,M,V] is w times the law; after the child is given up it is
  relu(left - Q) / (s + 1 - w), with s the sum of that relu.
  """
  slot = kin.slots[..., j]
  live = kin.exists[..., j] & rejection.take(draft.valid, slot)
  token = rejection.take(draft.tokens, slot)
  law_j = rejection.sibling_law(draft, kin, q, j, left.shape[-1])
  at = lambda x: jnp.take_along_axis(  # noqa: E731
      x, token[..., None], axis=-1)[..., 0]
  # The token was drawn, so Q(x) > 0; guarded for rows that were not drafted.
  child = jnp.minimum(1.0, at(left) / jnp.maximum(at(law_j), 1e-30))
  rest = jnp.maximum(left - law_j, 0.0)
  s = rest.sum(axis=-1)
  share = s + 1.0 - w
  # share = 0: w = 1 and p = Q, so the child was kept for sure.
  safe = jnp.where(share > 0, share, 1.0)
  new_w = jnp.where(share > 0, s / safe, 1.0)
  new_left = jnp.where(
      (share > 0)[..., None], rest / safe[..., None], left)
  left = jnp.where(live[..., None], new_left, left)
  return (left, jnp.where(live, new_w, w),
          rejection.remove(draft, kin, q, j), child)


def _left_at(draft: Draft, law, kin, begin: Array, stop: Array) -> Array:
  """Returns weights f32[B,V] of the token after `stop int32[B]`.

  Repeats the children's shares for that one row: nothing of size [N, V] is
  kept.
  """
  place = kin.place[stop]
  inside = place < kin.rows.shape[0]
  one = jnp.minimum(place, kin.rows.shape[0] - 1)[:, None]
  pick = lambda x: tree.take_row(x, one)  # noqa: E731
  part = rejection.Family(
      kin.rows, kin.place, pick(kin.slots),
      pick(kin.exists) & inside[:, None, None], pick(kin.drawn),
      pick(kin.removed))
  q = rejection.draft_probs(draft, part)
  w = tree.take_row(begin, stop)[:, None]
  p = law.at(stop[:, None]).probs
  left = _weighted(w, p)
  for j in range(draft.topology.max_children):
    left, w, q, _ = _use_up(draft, part, left, w, q, j)
  mass = left.sum(axis=-1, keepdims=True)
  fine = (mass > 0) & jnp.isfinite(mass)
  return jnp.where(fine, left, p)[:, 0]
