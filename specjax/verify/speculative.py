"""Speculative sampling: token-wise rejection with a residual."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from specjax.core import keys
from specjax.core.types import Context, Draft, Models, Scores, Verdict
from specjax.verify import chains


@dataclasses.dataclass(frozen=True)
class Speculative:
  """Accepts draft x with probability min(1, p(x) / q(x)), in order.

  Lossless: emitted tokens follow the target's processed law p, provided that
  q is the law that x was drawn from. A `POINT` slot stands for the one-hot q
  of its token (accepted with probability p(x)). Position i is accepted with
  probability sum_x min(p, q) = 1 - TV(p, q).

  References: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et
  al. 2023, arXiv:2302.01318.
  """

  needs_law = False
  lossy = False
  name = 'speculative'

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Tests the drafts in order; corrects the first rejection."""
    del params
    chains.require_chain(draft, self.name)
    law = scores.target_law
    p = jnp.exp(chains.target_log_prob(draft, scores))
    q = jnp.exp(chains.draft_log_prob(draft))
    u = keys.uniform(
        keys.row(context, keys.Purpose.ACCEPT), draft.topology.num_nodes)
    # No division, strict: right for p = 0, q = 0 and u = 0 alike.
    count = chains.num_accepted(u * q < p, draft.valid)
    next_token, gave_up = _correct(context, draft, law, count)
    return chains.verdict(draft, count, next_token, gave_up)


def _correct(context: Context, draft: Draft, law, count):
  """Draws the token after the accepted prefix: residual, or bonus."""
  key = keys.row(context, keys.Purpose.RESIDUAL)
  if draft.topology.num_nodes == 0:
    token = law.at(count).sample(key)
    return token, jnp.zeros(count.shape, bool)
  rejected = chains.cut_or_rejected(draft, count)
  drawn_from = chains.draft_law_at(draft, count, law.vocab_size)
  return law.at(count).residual(drawn_from, key, rejected)
