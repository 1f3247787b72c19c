"""One round of speculative decoding: five verbs, then append."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from specjax.core import metrics, tree
from specjax.core.types import (
  Context,
  Draft,
  Drafter,
  Models,
  Scores,
  SpecState,
  Target,
  Verdict,
  Verifier,
)

Array = jax.Array


class Engine(NamedTuple):
  """Who plays: the static part of a compiled loop. Equal engines trace once.

  Attributes:
    target: scores drafts. drafter: proposes them. verifier: decides.
  """

  target: Target
  drafter: Drafter
  verifier: Verifier


def round(engine: Engine, params: Models, state: SpecState) -> SpecState:  # pylint: disable=redefined-builtin
  """Advances every unfinished row by 1 to `max_depth + 1` tokens.

  With a lossless verifier the emitted tokens follow the target's law for any
  drafter. Finished rows keep tokens and length (they still compute).

  Args:
    engine: target, drafter and rule.
    params: their parameters; read only.
    state: donated by the loop.

  Returns:
    The state after propose, score, verify, commit, sync and append; the same
    structure, shapes and dtypes.
  """
  target, drafter, verifier = engine
  draft, state = drafter.propose(params, state)
  _check_draft(state.context, draft)
  taps = tuple(dict.fromkeys(drafter.taps + verifier.taps))
  scores, state = target.score(params, state, draft, taps)
  verdict = verifier.verify(params, state.context, draft, scores)
  _check_verdict(draft, verdict)
  state = target.commit(state, draft, verdict)
  state = drafter.sync(params, state, draft, scores, verdict)
  return append(state, draft, scores, verdict)


def _check_draft(context: Context, draft: Draft) -> None:
  """Checks what a drafter returned; at trace time, so it costs nothing."""
  shape = (context.length.shape[0], draft.topology.num_nodes)
  chex.assert_shape(draft.valid, shape)
  chex.assert_shape(draft.tokens, shape + context.tokens.shape[2:])
  chex.assert_type(draft.valid, bool)
  chex.assert_type(draft.tokens, context.tokens.dtype)


def _check_verdict(draft: Draft, verdict: Verdict) -> None:
  """Checks what a rule returned; at trace time."""
  batch = draft.valid.shape[0]
  chex.assert_shape(verdict.path, (batch, draft.topology.max_depth + 1))
  chex.assert_shape(
      [verdict.num_accepted, verdict.excess, verdict.gave_up], (batch,))
  chex.assert_type(verdict.next_token, draft.tokens.dtype)


def emitted(draft: Draft, verdict: Verdict) -> Array:
  """Returns the new tokens [B,D+1(,C)]: accepted drafts, then `next_token`.

  Entries after `num_accepted` are meaningless and in the vocabulary.
  """
  depth = draft.topology.max_depth
  next_token = verdict.next_token[:, None]
  if depth == 0:
    return next_token
  drafts = draft.tokens if verdict.tokens is None else verdict.tokens
  drafts = tree.take_row(drafts, verdict.path[:, 1:] - 1)
  drafts = jnp.concatenate([drafts, drafts[:, -1:]], axis=1)
  is_next = jnp.arange(depth + 1) == verdict.num_accepted[:, None]
  is_next = is_next.reshape(is_next.shape + (1,) * (drafts.ndim - 2))
  return jnp.where(is_next, next_token, drafts)


def append(
    state: SpecState, draft: Draft, scores: Scores, verdict: Verdict
) -> SpecState:
  """Writes the new tokens, up to and including the first EOS or the limit."""
  context = state.context
  tokens = emitted(draft, verdict)
  slot = jnp.arange(tokens.shape[1])
  dest = context.length[:, None] + slot
  is_new = (slot <= verdict.num_accepted[:, None]) & ~context.done[:, None]
  is_new &= dest < context.limit[:, None]
  # A row with NaN logits stops as it was.
  is_new &= ~metrics.bad_rows(draft, scores, verdict)[:, None]
  stops = jnp.zeros(is_new.shape, bool)
  if context.options.eos is not None:
    stops = jnp.any(tokens[..., None] == context.options.eos[:, None], -1)
    after = jnp.cumsum(stops, axis=1) - stops > 0
    is_new &= ~after
  num_new = jnp.sum(is_new, axis=1, dtype=jnp.int32)
  length = context.length + num_new
  done = context.done | jnp.any(is_new & stops, axis=1)
  done |= (length >= context.limit) | (num_new == 0)
  new_metrics = metrics.update(state, draft, scores, verdict, num_new)
  options = context.options
  if options.constraint is not None:
    options = options.replace(
        constraint=options.constraint.advance(tokens, num_new))
  # The capacity is out of range, so those writes are dropped (-1 would wrap).
  dest = jnp.where(is_new, dest, context.tokens.shape[1])
  return state.replace(
      metrics=new_metrics,
      context=context.replace(
          tokens=_write(context.tokens, dest, tokens), length=length,
          done=done, rounds=context.rounds + ~context.done, options=options,
          token_round=_token_round(context, dest),
          token_kept=_token_kept(context, dest, draft, verdict),
          log_probs=_log_probs(context, scores, verdict, tokens, dest)))


def _write(buffer: Array, dest: Array, values: Array) -> Array:
  """Writes `values [B,T,...]` at `dest int32[B,T]`, dropping out of range."""
  put = jax.vmap(lambda row, i, x: row.at[i].set(x, mode='drop'))
  return put(buffer, dest, values)


def _token_round(context: Context, dest: Array) -> Array | None:
  """Records which round emitted each token: exact step lengths afterwards."""
  if context.token_round is None:
    return None
  rounds = jnp.broadcast_to(context.rounds[:, None], dest.shape)
  return _write(context.token_round, dest, rounds)


def _token_kept(
    context: Context, dest: Array, draft: Draft, verdict: Verdict
) -> Array | None:
  """Records which of the emitted tokens were accepted drafts."""
  if context.token_kept is None:
    return None
  kept = metrics.accepted(draft, verdict)
  kept = jnp.pad(kept, ((0, 0), (0, dest.shape[1] - kept.shape[1])))
  return _write(context.token_kept, dest, kept)


def _log_probs(
    context: Context, scores: Scores, verdict: Verdict, tokens: Array,
    dest: Array,
):
  """Records raw and processed log-probabilities of the emitted tokens."""
  if context.log_probs is None:
    return None
  if scores.raw is None:
    raise ValueError('this target keeps no raw logits: log-probabilities '
                     'are not available')
  # A barrier, so that the reported bits depend on the scores alone.
  rows = jax.lax.optimization_barrier(
      tree.take_row(scores.raw, verdict.path))
  raw = jax.nn.log_softmax(rows.astype(jnp.float32), axis=-1)
  raw = jnp.take_along_axis(raw, tokens[..., None], axis=-1)[..., 0]
  law = scores.target_law
  processed = jnp.stack(
      [law.at(verdict.path[:, i]).log_prob(tokens[:, i])
       for i in range(tokens.shape[1])], axis=1)
  return {
      'raw': _write(context.log_probs['raw'], dest, raw),
      'processed': _write(context.log_probs['processed'], dest, processed)}
