"""Block verification: one decision for the whole drafted chain."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from specjax.core import keys, tree
from specjax.core import law as law_lib
from specjax.core.types import (
  IID,
  Context,
  Draft,
  Models,
  Scores,
  Verdict,
)
from specjax.verify import base

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Block(base.Rule):
  """Accepts the longest prefix that a joint test allows.

  Lossless, and never accepts less in expectation than `Speculative`. Wants
  the law that drafts were drawn from (a point gains nothing over `Match`).
  Noise is keyed by round: keyed by position it would reuse the noise of a
  rejected tail, which is a bias here.

  References: Sun et al. 2025, arXiv:2403.10444, algorithm 2.
  """

  name = 'block'
  modes = (IID,)
  chains_only = True
  advice = "use 'match' or 'speculative' ('traversal' for drawn trees)"

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Draws the accepted length, then the token after it."""
    del params
    law, num = scores.target_law, draft.topology.num_nodes
    key = keys.row(context, keys.Purpose.RESIDUAL)
    if num == 0:
      count = jnp.zeros(context.length.shape, jnp.int32)
      return base.finish(draft, count, law.at(count).sample(key))
    log_w = _log_weights(draft, scores)
    # The chain's end in this row: nothing after an undrafted slot counts.
    last = jnp.sum(jnp.cumprod(draft.valid.astype(jnp.int32), 1), axis=1)
    h = _hazards(draft, law, log_w, last)
    u = keys.uniform(keys.row(context, keys.Purpose.ACCEPT), num)
    # The last index that passes, not the length of a passing prefix.
    reached = jnp.where(u < h, jnp.arange(1, num + 1), 0)
    count = jnp.max(reached, axis=1).astype(jnp.int32)
    scale = jnp.exp(tree.take_row(
        jnp.pad(log_w, ((0, 0), (1, 0))), count))
    drawn_from = law_lib.at_slot(draft, count, law.vocab_size)
    next_token, gave_up = law.at(count).residual(
        drawn_from, key, count < last, scale)
    return base.finish(draft, count, next_token, gave_up=gave_up)


def _log_weights(draft: Draft, scores: Scores) -> Array:
  """Returns log w_1..w_N, f32[B,N]: w_i = min(1, w_{i-1} p_i / q_i)."""
  log_p = base.target_log_prob(draft, scores)
  log_q = jnp.maximum(base.draft_log_prob(draft), jnp.log(1e-30))
  step = log_p - log_q
  weight, out = jnp.zeros(step.shape[0]), []
  for i in range(step.shape[1]):  # unrolled: a loop costs more than its work
    # Behind a forbidden draft a law may be NaN, which compilers are free to
    # lose in a minimum: it is not looked at.
    weight = jnp.where(weight > -jnp.inf,
                       jnp.minimum(0.0, weight + step[:, i]), -jnp.inf)
    out.append(weight)
  return jnp.stack(out, axis=1)


def _hazards(draft: Draft, law, log_w: Array, last: Array) -> Array:
  """Returns h_1..h_N, f32[B,N]; 0 after the row's last drafted slot."""
  num = draft.topology.num_nodes
  w = jnp.exp(log_w)
  slot = jnp.arange(1, num + 1)
  h = jnp.where(slot == last[:, None], w, 0.0)
  if num == 1:
    return h
  # S_i = sum_x relu(w_i p_{i+1}(x) - q_{i+1}(x)); p_{i+1} is row i, q_{i+1}
  # the law of slot i (0-based).
  p = law.probs[:, 1:num]
  q = _draft_probs(draft, law.vocab_size)[:, 1:]
  left = w[:, :-1, None]
  left = jnp.where(left > 0, left * p, 0.0)  # p may be NaN where w = 0
  s = jnp.maximum(left - q, 0.0).sum(axis=-1)
  den = s + 1.0 - w[:, :-1]
  # den = 0: w_i = 1 and p = q next.
  inner = jnp.where(den == 0, 1.0, s / jnp.where(den == 0, 1.0, den))
  inner = jnp.pad(inner, ((0, 0), (0, 1)))
  return jnp.where(slot < last[:, None], inner, h)


def _draft_probs(draft: Draft, vocab_size: int) -> Array:
  """Returns q of every slot, f32[B,N,V]; one-hot where it is a point."""
  law = draft.draft_law
  shape = draft.tokens.shape
  point = jax.nn.one_hot(draft.tokens, vocab_size, dtype=jnp.float32)
  if law is None:
    return point
  if draft.law_row is not None:
    law = law.at(jnp.broadcast_to(draft.law_row, shape))
  fixed = jnp.broadcast_to(base.is_point(draft.mode), shape)
  return jnp.where(fixed[..., None], point, law.probs)
