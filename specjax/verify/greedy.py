"""Greedy verification: keep drafts while they are the target's argmax."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from specjax.core import keys, tree
from specjax.core.types import Context, Draft, Models, Scores, Verdict
from specjax.verify import chains

Array = jax.Array


def _walk(draft: Draft, drawn: Array) -> Verdict:
  """Accepts drafts that equal `drawn int32[B,N+1]`; emits drawn tokens."""
  count = chains.num_accepted(draft.tokens == drawn[:, :-1], draft.valid)
  return chains.verdict(draft, count, tree.take_row(drawn, count))


@dataclasses.dataclass(frozen=True)
class Greedy:
  """Emits the mode of the target's law at every position.

  Guarantees the output of greedy decoding at the same block shape, bit for
  bit, for any drafter. Equal to sampling only at temperature 0.

  References: Stern et al. 2018 (blockwise parallel decoding).
  """

  needs_law = False
  lossy = False
  name = 'greedy'

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Keeps the longest prefix of drafts that are the target's argmax."""
    del params, context
    chains.require_chain(draft, self.name)
    return _walk(draft, scores.target_law.mode())


@dataclasses.dataclass(frozen=True)
class Match:
  """Draws from the target at every position; keeps drafts that agree.

  Lossless for any drafter, also one that cannot state its law. Noise is
  keyed by absolute position, so the text of a seed does not depend on the
  drafter or on the draft length. A drawn draft is accepted with probability
  sum p q, which is less than what `Speculative` reaches; for deterministic
  drafts both accept with probability p(x).
  """

  needs_law = False
  lossy = False
  name = 'match'

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Keeps the longest prefix of drafts that equal the target's draws."""
    del params
    chains.require_chain(draft, self.name)
    slot = jnp.arange(draft.topology.num_nodes + 1)
    position = context.length[:, None] + slot
    drawn = scores.target_law.sample(keys.position(context, position))
    return _walk(draft, drawn)
