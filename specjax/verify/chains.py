"""What the rules for chains share: walking, paths, laws of drafted tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from specjax.core import law as law_lib
from specjax.core.types import MATCH, POINT, Draft, Scores, Verdict

Array = jax.Array


def require_chain(draft: Draft, rule: str) -> None:
  """Raises at trace time when a chain rule is handed a tree."""
  if not draft.topology.is_chain:
    raise ValueError(f'verify={rule!r} walks a chain, but the drafter '
                     f'proposes a tree of {draft.topology.num_nodes} nodes')


def num_accepted(accept: Array, valid: Array) -> Array:
  """Returns int32[B], the length of the accepted prefix of bool[B,N]."""
  kept = (accept & valid).astype(jnp.int32)
  return jnp.sum(jnp.cumprod(kept, axis=1), axis=1, dtype=jnp.int32)


def path(count: Array, num_nodes: int) -> Array:
  """Returns int32[B,N+1]: rows 0 to `count`, padded with N + 1."""
  rows = jnp.arange(num_nodes + 1)
  return jnp.where(rows <= count[:, None], rows, num_nodes + 1)


def verdict(
    draft: Draft, count: Array, next_token: Array,
    gave_up: Array | None = None,
) -> Verdict:
  """Builds the verdict of a lossless chain rule."""
  no = jnp.zeros(count.shape, bool)
  return Verdict(
      path=path(count, draft.topology.num_nodes), num_accepted=count,
      next_token=next_token, excess=jnp.zeros(count.shape, jnp.float32),
      gave_up=no if gave_up is None else gave_up)


def target_log_prob(draft: Draft, scores: Scores) -> Array:
  """Returns f32[B,N], log p of each draft under the row it follows."""
  tokens = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
  return scores.target_law.log_prob(tokens)[:, :-1]


def draft_log_prob(draft: Draft) -> Array:
  """Returns f32[B,N], log q of each draft; 0 where the slot is a point."""
  shape = draft.tokens.shape
  if draft.draft_law is None:
    return jnp.zeros(shape, jnp.float32)
  law = draft.draft_law
  if draft.law_row is not None:
    law = law.at(jnp.broadcast_to(draft.law_row, shape))
  return jnp.where(is_point(draft), 0.0, law.log_prob(draft.tokens))


def is_point(draft: Draft) -> Array:
  """Returns bool[N] or [B,N]: the slot stands for a point mass."""
  return (draft.mode == POINT) | (draft.mode == MATCH)


def cut_or_rejected(draft: Draft, count: Array) -> Array:
  """Returns bool[B]: a drafted token was rejected at slot `count`.

  False when the chain ended there (all accepted, or not drafted further):
  the next token then comes from the target's law, not from a residual.
  """
  drafted = jnp.pad(draft.valid, ((0, 0), (0, 1)))
  return jnp.take_along_axis(drafted, count[:, None], axis=1)[:, 0]


def draft_law_at(draft: Draft, slot: Array, vocab_size: int) -> law_lib.Law:
  """Returns the law of drafted slot `slot int32[B]` (clipped)."""
  return law_lib.at_slot(draft, slot, vocab_size)
