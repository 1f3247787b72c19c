"""Counts kept inside the loop, and the figures made of them outside.

Definitions (peers disagree, so they are written down):

* mean acceptance length (tau, AL) = emitted tokens / target calls. It counts
  the corrected or bonus token, so plain decoding is exactly 1.
* draft acceptance rate = accepted drafts / drafted tokens.
* per-position acceptance = P(the first i drafts were all accepted): joint.
* conditional acceptance = P(draft i accepted | it was drafted and the ones
  before it were accepted).
  None where drafts behind a rejected one are kept (`Scores.sets`); shares by
  position are then not joint.
* acceptance histogram: rounds by number of accepted drafts; sums to rounds.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core import tree
from specjax.core.types import Draft, Metrics, Scores, SpecState, Verdict

Array = jax.Array


def update(
    state: SpecState, draft: Draft, scores: Scores, verdict: Verdict,
    num_new: Array,
) -> Metrics:
  """Returns the counters after a round that emitted `num_new int32[B]`.

  Drafts cut off by EOS or a limit are not counted as accepted. Finished rows
  do not count.
  """
  metrics, context = state.metrics, state.context
  active = ~context.done
  here = active[:, None]
  depth = jnp.arange(draft.topology.max_depth)
  accepted_now = accepted(draft, verdict) & (depth < num_new[:, None])
  kept = jnp.sum(accepted_now, axis=1)
  # A narrow variant of a drafter counts into the wide drafter's bins.
  bins = jnp.arange(metrics.histogram.shape[1])
  drafted = drafted_at(draft)
  missing = metrics.drafted.shape[1] - drafted.shape[1]
  drafted = jnp.pad(drafted, ((0, 0), (0, missing)))
  accepted_now = here & jnp.pad(accepted_now, ((0, 0), (0, missing)))
  ranks = jnp.pad(rank_on_path(draft, verdict), ((0, 0), (0, missing)))
  rank_axis = jnp.arange(metrics.ranks.shape[2])
  bad = active & bad_rows(draft, scores, verdict)
  first_bad = (metrics.bad_round < 0) & bad
  return Metrics(
      histogram=metrics.histogram + (here & (bins == kept[:, None])),
      drafted=metrics.drafted + (here & drafted),
      accepted=metrics.accepted + accepted_now,
      ranks=metrics.ranks + (
          accepted_now[..., None] & (ranks[..., None] == rank_axis)),
      excess=metrics.excess + jnp.where(active, verdict.excess, 0.0),
      gave_up=metrics.gave_up + (active & verdict.gave_up),
      bad_round=jnp.where(first_bad, context.rounds, metrics.bad_round))


def accepted(draft: Draft, verdict: Verdict) -> Array:
  """Returns bool[B,D]: the token emitted at depth d + 1 is its draft."""
  depth = jnp.arange(draft.topology.max_depth)
  if verdict.kept is None:
    return depth < verdict.num_accepted[:, None]
  # The last token of a set that is accepted to its end is a draft too.
  return verdict.kept & (depth <= verdict.num_accepted[:, None])


def bad_rows(draft: Draft, scores: Scores, verdict: Verdict) -> Array:
  """Returns bool[B]: a law on the accepted path had NaN or infinite logits.

  Rows behind a rejected draft do not count: nothing came of them. Tokens of
  real numbers have to be finite themselves, and drafts likewise: no rule
  would keep them, and a broken drafter would only be slow.
  """
  bad = jnp.zeros_like(verdict.num_accepted, bool)
  on_path = jnp.arange(verdict.path.shape[1]) <= verdict.num_accepted[:, None]
  if scores.finite is not None:
    seen = tree.take_row(scores.finite, verdict.path)
    bad |= jnp.any(on_path & ~seen, axis=1)
  if draft.tokens.ndim == 3:
    fine = lambda x: jnp.all(jnp.isfinite(x), axis=-1)  # noqa: E731
    bad |= ~fine(verdict.next_token)
    bad |= jnp.any(draft.valid & ~fine(draft.tokens), axis=1)
    if verdict.tokens is not None:
      bad |= jnp.any(on_path[:, 1:] & ~fine(verdict.tokens), axis=1)
  return bad


def drafted_at(draft: Draft) -> Array:
  """Returns bool[B,D]: some slot at depth d + 1 was drafted."""
  if draft.topology.is_chain:
    return draft.valid
  depth = tree.node_depth(draft.topology, draft.parents)
  depth = jnp.broadcast_to(depth, draft.valid.shape)
  at = depth[..., None] == 1 + jnp.arange(draft.topology.max_depth)
  return jnp.any(at & draft.valid[..., None], axis=1)


def rank_on_path(draft: Draft, verdict: Verdict) -> Array:
  """Returns int32[B,D]: which sibling, in draw order, the path takes.

  Meaningless at depths that were not accepted.
  """
  topology = draft.topology
  if topology.is_chain:
    return jnp.zeros(draft.tokens.shape[:2], jnp.int32)
  slot = verdict.path[:, 1:] - 1
  rows = jnp.broadcast_to(
      tree.parent_rows(topology, draft.parents), draft.valid.shape)
  order = jnp.arange(topology.num_nodes)
  if draft.sibling is not None:
    order = draft.sibling
  order = jnp.broadcast_to(order, draft.valid.shape)
  parent = tree.take_row(rows, slot)
  mine = tree.take_row(order, slot)
  older = (rows[:, None] == parent[..., None]) & (
      order[:, None] < mine[..., None])
  return jnp.sum(older, axis=-1, dtype=jnp.int32)


def summarise(
    histogram: np.ndarray, drafted: np.ndarray, accepted: np.ndarray,
    new_tokens: int, rounds: int,
) -> dict[str, Any]:
  """Returns the figures of the module docstring from summed counters.

  Args:
    histogram: int[D+1], drafted: int[D], accepted: int[D], summed over rows.
    new_tokens: emitted tokens. rounds: target calls, both over the same rows.

  Returns:
    A dict of plain floats, ints and lists; rates are None without data.
  """
  def ratio(a, b):
    return float(a) / float(b) if b else None

  num_drafted, num_accepted = int(drafted.sum()), int(accepted.sum())
  before = np.concatenate([[rounds], accepted])[:len(accepted)]
  reached = np.minimum(before, drafted)
  return {
      'num_rounds': int(rounds),
      'new_tokens': int(new_tokens),
      'mean_acceptance_length': ratio(new_tokens, rounds),
      'draft_acceptance_rate': ratio(num_accepted, num_drafted),
      'num_draft_tokens': num_drafted,
      'num_accepted_draft_tokens': num_accepted,
      'acceptance_histogram': [int(x) for x in histogram],
      'per_position_acceptance': [ratio(a, rounds) for a in accepted],
      'conditional_acceptance': [
          ratio(a, r) for a, r in zip(accepted, reached, strict=True)],
  }
