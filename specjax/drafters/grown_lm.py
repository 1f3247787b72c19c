"""A tree that a source grows where it is most confident."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax.core import pipeline, tree
from specjax.core.tree import Topology
from specjax.core.types import POINT, Draft, Models, SpecState
from specjax.drafters import base
from specjax.drafters import source as source_lib

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class GrownLM(source_lib.Sourced, base.Drafter):
  """Expands the likeliest nodes, then keeps the best of all candidates.

  A path's probability under the drafter stands in for its chance of being
  accepted. Each level expands the `tree_top_k` likeliest nodes of the one
  before by `tree_top_k` children; of all candidates the
  `num_speculative_tokens` likeliest are kept (a child is never likelier than
  its parent, so that these form a tree). Deterministic given the text
  (`POINT`), hence lossless in spite of the choice. Shapes are fixed; parents
  are data.

  Attributes:
    num_speculative_tokens: N >= 1, drafted slots, the root not counted.
    model: a `source.Source` or a causal language model, as for `ChainLM`.
    tree_depth: longest path in tokens, >= 1; it costs as many forward passes.
    tree_top_k: nodes expanded a level, and children of each, >= 1.

  References: Li et al. 2024 (EAGLE-2), arXiv:2406.16858.
  """

  num_speculative_tokens: int = 59
  model: Any = None
  tree_depth: int = 6
  tree_top_k: int = 10

  modes = (POINT,)

  def __post_init__(self):
    if self.model is None:
      raise ValueError("method='draft_model' needs a model")
    if self.tree_depth < 1 or self.tree_top_k < 1:
      raise ValueError(f'tree_depth={self.tree_depth}, tree_top_k='
                       f'{self.tree_top_k}: must be >= 1')
    num, most = self.num_speculative_tokens, self.num_candidates
    if not self.tree_depth <= num <= most:
      raise ValueError(
          f'num_speculative_tokens={num}: a tree of depth {self.tree_depth} '
          f'grown by {self.tree_top_k} holds {self.tree_depth} to {most}')

  @property
  def num_candidates(self) -> int:
    """Candidates that are looked at, of which the best are kept."""
    k = self.tree_top_k
    return k + (self.tree_depth - 1) * k * k

  @property
  def num_scratch(self) -> int:
    """Slots of its cache that growing needs beyond the text."""
    return (self.tree_depth - 1) * self.tree_top_k

  @property
  def topology(self) -> Topology:
    """A dynamic tree: `parents` is None."""
    return Topology(
        num_nodes=self.num_speculative_tokens, max_depth=self.tree_depth,
        max_children=min(self.tree_top_k, self.num_speculative_tokens),
        is_chain=False, parents=None)

  def empty(self, batch: int, capacity: int) -> Any:
    return super().empty(batch, capacity + self.num_scratch)

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Catches up, expands level by level, keeps the best candidates."""
    context = state.context
    logits, memory = self.source.begin(
        params, state, behind=self.tree_depth + 1, refill=False)
    pool, memory = self._expand(params, context, logits, memory)
    tokens, parents, score = best_of(pool, self.num_speculative_tokens)
    valid = jnp.isfinite(score) & ~context.done[:, None]
    draft = base.point_draft(
        self.topology, tokens, valid, parents=parents,
        aux={'log_prob': score})
    return draft, state.replace(drafter=memory)

  def _expand(self, params, context, logits: Array, memory):
    """Grows all candidates; returns them and the source's memory."""
    k, batch = self.tree_top_k, logits.shape[0]
    past = jnp.full((batch, 1, self.tree_depth), -1, jnp.int32)
    score, token = _children(context, logits[:, None], past, k)
    score, token = score[:, 0], token[:, 0]
    pool = [Pool(score, jnp.full((batch, k), -1, jnp.int32), token)]
    ids = jnp.broadcast_to(jnp.arange(k), (batch, k))
    # The frontier: candidate ids, scores, texts, and what each entry sees.
    past = jnp.broadcast_to(past, (batch, k, self.tree_depth))
    past = past.at[:, :, 0].set(token)
    seen = jnp.broadcast_to(jnp.eye(k, dtype=bool), (batch, k, k))
    parent = jnp.zeros((batch, k), jnp.int32)
    for depth in range(1, self.tree_depth):
      start = (depth - 1) * k
      level = jnp.repeat(jnp.arange(depth), k)
      length = context.length[:, None]
      logits, memory = self.source.grow(
          params, context, memory, source_lib.Level(
              tokens=past[:, :, depth - 1], depth=depth, base=context.length,
              parent=parent,
              position=jnp.broadcast_to(length + depth - 1, (batch, k)),
              ancestors=seen, entry_position=length + level, start=start))
      gain, token = _children(context, logits, past, k)
      flat = (score[..., None] + gain).reshape(batch, k * k)
      pool.append(Pool(
          flat, jnp.repeat(ids, k, axis=1), token.reshape(batch, k * k)))
      score, best = jax.lax.top_k(flat, k)
      ids = k + (depth - 1) * k * k + best
      parent = best // k
      past = tree.take_row(past, parent).at[:, :, depth].set(
          jnp.take_along_axis(token.reshape(batch, k * k), best, axis=1))
      own = jnp.broadcast_to(jnp.eye(k, dtype=bool), (batch, k, k))
      seen = jnp.concatenate([tree.take_row(seen, parent), own], axis=2)
    joined = [jnp.concatenate(x, axis=1) for x in zip(*pool, strict=True)]
    return Pool(*joined), memory


class Pool(NamedTuple):
  """Candidates, [B,num]: path log-probability, parent (-1: root), token."""

  score: Array
  parent: Array
  token: Array


def best_of(pool: Pool, num: int) -> tuple[Array, Array, Array]:
  """Keeps the `num` likeliest candidates, in the order of the pool.

  A child is never likelier than its parent and comes after it, so what is
  kept is a tree.

  Returns:
    Tokens, parents (rows of `Scores`, 0 the root) and path log-probabilities,
    [B,num] each.
  """
  size = pool.score.shape[1]
  _, best = jax.lax.top_k(pool.score, num)
  best = jnp.sort(best, axis=1)
  take = lambda x: jnp.take_along_axis(x, best, axis=1)  # noqa: E731
  # Where a kept candidate went: its parent's slot, or the root.
  slot_of = jax.vmap(lambda i: jnp.zeros((size,), jnp.int32).at[i].set(
      jnp.arange(num)))(best)
  parent = take(pool.parent)
  rows = 1 + jnp.take_along_axis(slot_of, jnp.maximum(parent, 0), axis=1)
  return take(pool.token), jnp.where(parent < 0, 0, rows), take(pool.score)


def _children(context, logits: Array, past: Array, k: int):
  """Returns log-probabilities and tokens of the k likeliest, [B,F,k]."""
  shaped = pipeline.shaped(context, logits, past)
  best, token = jax.lax.top_k(shaped, k)
  log_p = best - jax.nn.logsumexp(shaped, axis=-1, keepdims=True)
  # NaN would count as the largest score, and be kept without its parent.
  log_p = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p)
  return log_p, token.astype(jnp.int32)
