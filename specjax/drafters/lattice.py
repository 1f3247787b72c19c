"""Trees and chains over a lattice: a few candidates a slot, scored together.

A block drafter scores all slots in one pass. Of each slot only the K
likeliest tokens are kept, and the Markov terms between neighbouring slots are
worked out for all pairs of them at once. What is left of drafting is walking
through tables of K x K numbers: no pass over the vocabulary a token, or a
level.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core import keys, pipeline
from specjax.core import law as law_lib
from specjax.core import tree as tree_lib
from specjax.core.tree import Topology
from specjax.core.types import IID, POINT, Draft, Models, SpecState
from specjax.drafters import base
from specjax.drafters import source as source_lib
from specjax.drafters.copying import Copy, Copying, mix
from specjax.drafters.grown_lm import Pool, best_of

Array = jax.Array

# Candidates are looked for in that many groups of the vocabulary.
_GROUPS = 1024


class Table(NamedTuple):
  """Candidates of every slot and how well neighbours go together.

  Attributes:
    tokens: int32[B,G,K], target ids.
    first: f32[B,K], log-probabilities of the first slot's candidates.
    step: f32[B,G-1,K,K], those of slot k + 1 after each candidate of slot k.
      Both are normalised over the K candidates.
  """

  tokens: Array
  first: Array
  step: Array


@dataclasses.dataclass(frozen=True)
class _LatticeDrafter(source_lib.Sourced, base.Drafter):
  """What both shapes share: the source and its candidates.

  Attributes:
    source: a `block.BlockSource`.
    num_candidates: K, candidates a slot, >= 1; 2 with copies.
    copying: mixes in what followed earlier occurrences of the text's end.
  """

  source: Any = None
  num_candidates: int = 16
  copying: Copying | None = dataclasses.field(default=None, kw_only=True)

  def __post_init__(self):
    if self.source is None:
      raise ValueError('a lattice needs a block drafter')
    least = 1 if self.copying is None else 2
    if self.num_candidates < least:
      raise ValueError(
          f'num_candidates={self.num_candidates}: must be >= {least}')
    if self.topology.max_depth > self.source.num_slots:
      raise ValueError(
          f'drafts of up to {self.topology.max_depth} tokens: this drafter '
          f'proposes {self.source.num_slots} in one pass')

  @property
  def topology(self) -> Topology:
    """A chain of all the source's slots."""
    return tree_lib.chain(self.source.num_slots)

  def _table(self, params: Models, state: SpecState) -> tuple[Table, Any]:
    depth = self.topology.max_depth
    if self.copying is None:
      return self.source.lattice(params, state, self.num_candidates, depth)
    copy = self.copying.find(state.context, depth)
    table, memory = self.source.lattice(
        params, state, self.num_candidates, depth, copy.tokens)
    return _mixed(table, copy), memory


@dataclasses.dataclass(frozen=True)
class Lattice(_LatticeDrafter):
  """A static tree, or a chain, of candidates in order of rank.

  The r-th child of a node is the r-th likeliest candidate after it
  (`POINT`). A chain is drawn from the candidates' law when rows are sampled
  (`IID`): a law on K tokens, which is handed over as it is.

  Attributes:
    tree: a static topology; None is a chain of all the source's slots.
  """

  tree: Topology | None = None

  @property
  def topology(self) -> Topology:
    return super().topology if self.tree is None else self.tree

  @property
  def modes(self) -> tuple[int, ...]:
    return (IID,) if self.topology.is_chain else (POINT,)

  def narrow(self, num_draft: int) -> Lattice:
    """Returns this drafter with a chain of `num_draft` over its state."""
    return dataclasses.replace(self, tree=tree_lib.chain(num_draft))

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Runs the block once, then walks."""
    table, memory = self._table(params, state)
    sampled = state.context.options.temperature is not None
    if sampled and self.topology.is_chain:
      draft = self._drawn(state.context, table)
    else:
      draft = self._ranked(state.context, table)
    return draft, state.replace(drafter=memory)

  def _ranked(self, context, table: Table) -> Draft:
    """Follows ranks: the same tree every round, filled by what is likely."""
    topology, batch = self.topology, table.tokens.shape[0]
    depth, most = topology.depth, topology.max_children
    up = topology.parents or ()
    if most > self.num_candidates:
      raise ValueError(f'{most} children of a node, but num_candidates='
                       f'{self.num_candidates}')
    scores, first = _top(table.first, most)  # [B,C]
    # [B,G-1,K,C]: ranked candidates after each candidate.
    gains, after = _top(table.step, most)
    chosen = jnp.zeros((batch, topology.num_nodes), jnp.int32)
    likely = jnp.zeros((batch, topology.num_nodes), bool)
    rank = np.asarray([topology.children[p].index(i)
                       for i, p in enumerate(up)])
    for level in range(1, topology.max_depth + 1):
      slots = np.asarray([i for i, d in enumerate(depth) if d == level])
      if level == 1:
        new, score = first[:, rank[slots]], scores[:, rank[slots]]
      else:
        above = chosen[:, np.asarray(up)[slots] - 1]
        index = above * most + rank[slots]
        new, score = (jnp.take_along_axis(
            x[:, level - 2].reshape(batch, -1), index, axis=1)
            for x in (after, gains))  # of [B,K,C]
      chosen = chosen.at[:, slots].set(new)
      likely = likely.at[:, slots].set(jnp.isfinite(score))
    flat = table.tokens.reshape(batch, -1)
    place = (np.asarray(depth) - 1) * self.num_candidates
    tokens = jnp.take_along_axis(flat, chosen + place, axis=1)
    return base.point_draft(
        topology, tokens, likely & ~context.done[:, None])

  def _drawn(self, context, table: Table) -> Draft:
    """Draws a chain: each token from the candidates after the one before."""
    batch, num = table.tokens.shape[0], self.topology.num_nodes
    vocab_size = self.source.vocab_size
    past = jnp.full((batch, num), -1, jnp.int32)
    kept, scores = [], table.first
    for slot in range(num):
      here = table.tokens[:, slot]
      wide = jax.vmap(lambda i, x: jnp.full(
          (vocab_size,), -jnp.inf).at[i].set(x))(here, scores)
      law: Any = pipeline.law(context, wide[:, None], past[:, None])
      row = law.at(jnp.zeros((batch,), jnp.int32))
      token = row.sample(keys.row(context, keys.Purpose.DRAFT, slot))
      kept.append(row.logits)
      past = past.at[:, slot].set(token)
      if slot + 1 < num:
        index = jnp.argmax(here == token[:, None], axis=1)
        scores = jax.vmap(lambda t, i: t[i])(table.step[:, slot], index)
    valid = jnp.broadcast_to(~context.done[:, None], past.shape)
    return Draft(
        topology=self.topology, tokens=past, valid=valid,
        mode=jnp.full((num,), IID, jnp.int32),
        draft_law=law_lib.Categorical(jnp.stack(kept, axis=1)))


@dataclasses.dataclass(frozen=True)
class GrownLattice(_LatticeDrafter):
  """A tree of the N likeliest paths through the lattice (`POINT`).

  Like `GrownLM`: each level expands the `tree_top_k` likeliest nodes, by all
  their candidates, and of everything that was seen the N likeliest are kept.

  Attributes:
    num_speculative_tokens: N, drafted slots.
    tree_depth: longest path, at most the source's slots.
    tree_top_k: nodes expanded a level.
  """

  num_speculative_tokens: int = 24
  tree_depth: int = 6
  tree_top_k: int = 8

  modes = (POINT,)

  def __post_init__(self):
    super().__post_init__()
    top, depth = self.tree_top_k, self.tree_depth
    most = self.num_candidates * (1 + (depth - 1) * top)
    if not 1 <= top <= self.num_candidates or depth < 1:
      raise ValueError(f'tree_top_k={top}, tree_depth={depth}: must be in '
                       f'[1, {self.num_candidates}] and >= 1')
    if not depth <= self.num_speculative_tokens <= most:
      raise ValueError(
          f'num_speculative_tokens={self.num_speculative_tokens}: such a tree '
          f'holds {depth} to {most}')

  @property
  def topology(self) -> Topology:
    """A dynamic tree: `parents` is None."""
    return Topology(
        num_nodes=self.num_speculative_tokens, max_depth=self.tree_depth,
        max_children=min(self.num_candidates, self.num_speculative_tokens),
        is_chain=False, parents=None)

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Runs the block once, expands, keeps the best paths."""
    table, memory = self._table(params, state)
    pool = self._expand(table)
    tokens, parents, score = best_of(pool, self.num_speculative_tokens)
    valid = jnp.isfinite(score) & ~state.context.done[:, None]
    draft = base.point_draft(
        self.topology, tokens, valid, parents=parents,
        aux={'log_prob': score})
    return draft, state.replace(drafter=memory)

  def _expand(self, table: Table) -> Pool:
    """Returns all candidate paths."""
    batch, _, num = table.tokens.shape
    top = self.tree_top_k
    root = jnp.full((batch, num), -1, jnp.int32)
    pool = [Pool(table.first, root, table.tokens[:, 0])]
    score, index = jax.lax.top_k(table.first, top)
    ids = index
    for level in range(1, self.tree_depth):
      rows = jax.vmap(lambda t, i: t[i])(table.step[:, level - 1], index)
      flat = (score[..., None] + rows).reshape(batch, top * num)
      pool.append(Pool(
          flat, jnp.repeat(ids, num, axis=1),
          jnp.tile(table.tokens[:, level], (1, top))))
      if level + 1 < self.tree_depth:
        score, best = jax.lax.top_k(flat, top)
        index = best % num
        ids = num + (level - 1) * top * num + best
    return Pool(*(jnp.concatenate(x, axis=1)
                  for x in zip(*pool, strict=True)))


def _mixed(table: Table, copy: Copy) -> Table:
  """Gives copied tokens their share, after the copied token before only."""
  hit = table.tokens == copy.tokens[..., None]  # [B,G,K]
  first = mix(table.first, hit[:, 0], copy.share[:, 0])
  after = hit[:, :-1, :, None] & hit[:, 1:, None, :]  # [B,G-1,K,K]
  share = jnp.broadcast_to(copy.share[:, 1:, None], after.shape[:-1])
  return Table(table.tokens, first, mix(table.step, after, share))


def candidates(logits: Array, num: int) -> tuple[Array, Array]:
  """Returns values and places of about the `num` largest of f32[...,W].

  Exact in small vocabularies. In large ones the best of each of 1,024
  interleaved groups compete: two of the largest fall into one group once in
  a while, then the smaller is missed. A sort of W numbers is avoided.
  """
  size = logits.shape[-1]
  if size <= 4 * _GROUPS or num > _GROUPS // 8:
    best, index = jax.lax.top_k(logits, min(num, size))
    return best, index.astype(jnp.int32)
  pad = [(0, 0)] * (logits.ndim - 1) + [(0, -size % _GROUPS)]
  grouped = jnp.pad(logits, pad, constant_values=-jnp.inf).reshape(
      logits.shape[:-1] + (-1, _GROUPS))
  member = jnp.argmax(grouped, axis=-2).astype(jnp.int32)
  best, group = jax.lax.top_k(jnp.max(grouped, axis=-2), num)
  index = jnp.take_along_axis(member, group, axis=-1) * _GROUPS + group
  return best, index.astype(jnp.int32)


def _top(scores: Array, num: int) -> tuple[Array, Array]:
  """Returns the `num` largest along the last axis, in order.

  One is an argmax: a top-k is a sort.
  """
  if num == 1:
    index = jnp.argmax(scores, axis=-1, keepdims=True)
    return jnp.max(scores, axis=-1, keepdims=True), index.astype(jnp.int32)
  best, index = jax.lax.top_k(scores, num)
  return best, index.astype(jnp.int32)
