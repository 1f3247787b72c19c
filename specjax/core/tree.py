"""Draft topologies: static shapes, ancestor masks, gathers along a path.

A node is a drafted slot; the root (the pending token) is row 0 and slot i is
row i + 1. `parents` holds rows. A chain of K drafts is `chain(K)`.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Topology:
  """The static shape of a draft; hashable, part of what a trace depends on.

  Attributes:
    num_nodes: N >= 0, drafted slots.
    max_depth: D, the longest path in drafted tokens; 0 <= D <= N.
    max_children: most siblings at one parent (bounds loops in tree rules).
    is_chain: slot i follows slot i - 1; lets targets skip masks and commits.
    parents: row of each slot's parent, or None for a tree whose parents are
      computed in `propose` (a dynamic tree of fixed size).
  """

  num_nodes: int
  max_depth: int
  max_children: int
  is_chain: bool
  parents: tuple[int, ...] | None

  def __post_init__(self):
    if self.num_nodes < 0:
      raise ValueError(f'num_nodes={self.num_nodes}: must be >= 0')
    if not 0 <= self.max_depth <= self.num_nodes:
      raise ValueError(
          f'max_depth={self.max_depth}: must be in [0, {self.num_nodes}]')
    if self.parents is None:
      return
    if len(self.parents) != self.num_nodes:
      raise ValueError(
          f'{len(self.parents)} parents for {self.num_nodes} nodes')
    for slot, parent in enumerate(self.parents):
      if not 0 <= parent <= slot:
        raise ValueError(
            f'parents[{slot}]={parent}: a parent is a row in [0, {slot}] '
            '(0 is the root, slot i is row i + 1), so that it comes before '
            'its children and there is no cycle')
    deepest = max(self.depth, default=0)
    if deepest != self.max_depth:
      raise ValueError(f'max_depth={self.max_depth}: these parents make a '
                       f'tree that is {deepest} deep')
    most = max((len(kids) for kids in self.children), default=0)
    if most != self.max_children:
      raise ValueError(f'max_children={self.max_children}: these parents '
                       f'have up to {most}')
    if self.is_chain != (self.parents == tuple(range(self.num_nodes))):
      raise ValueError(f'is_chain={self.is_chain}: the parents disagree')

  @property
  def depth(self) -> tuple[int, ...]:
    """Depth of each slot (root 0, so >= 1). Static topologies only."""
    if self.parents is None:
      raise ValueError('a dynamic topology has no static depths')
    depth = [0]
    for parent in self.parents:
      depth.append(depth[parent] + 1)
    return tuple(depth[1:])

  @property
  def children(self) -> tuple[tuple[int, ...], ...]:
    """Slots below each row, in order; N + 1 entries. Static only."""
    if self.parents is None:
      raise ValueError('a dynamic topology has no static children')
    below: list[list[int]] = [[] for _ in range(self.num_nodes + 1)]
    for slot, parent in enumerate(self.parents):
      below[parent].append(slot)
    return tuple(tuple(b) for b in below)

  @property
  def internal(self) -> tuple[int, ...]:
    """Rows that have children; all rows when parents are computed."""
    if self.parents is None:
      return tuple(range(self.num_nodes + 1))
    return tuple(sorted(set(self.parents)))


def chain(num_draft: int) -> Topology:
  """Returns the topology of `num_draft` tokens one after another."""
  if num_draft < 0:
    raise ValueError(f'num_speculative_tokens={num_draft}: must be >= 0')
  return Topology(
      num_nodes=num_draft, max_depth=num_draft,
      max_children=min(num_draft, 1), is_chain=True,
      parents=tuple(range(num_draft)))


def from_parents(parents: Sequence[int]) -> Topology:
  """Returns the topology with these parents (rows; 0 is the root)."""
  parents = tuple(int(p) for p in parents)
  depth = [0]
  for slot, parent in enumerate(parents):
    # A bad parent is reported by Topology itself.
    depth.append(depth[parent] + 1 if 0 <= parent <= slot else 0)
  return Topology(
      num_nodes=len(parents), max_depth=max(depth),
      max_children=max(collections.Counter(parents).values(), default=0),
      is_chain=parents == tuple(range(len(parents))), parents=parents)


def parent_rows(topology: Topology, parents: Array | None) -> Array:
  """Returns int32[N] or [B,N] parent rows; constants stay `[N]`.

  Broadcasting a constant to `[B, N]` early makes XLA fold it for seconds.
  """
  if parents is not None:
    return parents
  if topology.parents is None:
    raise ValueError('a dynamic topology needs Draft.parents')
  return jnp.asarray(topology.parents, jnp.int32).reshape(topology.num_nodes)


def node_depth(topology: Topology, parents: Array | None) -> Array:
  """Returns the depth of every slot, int32[N] (static) or [B,N]."""
  if topology.parents is not None and parents is None:
    return jnp.asarray(topology.depth, jnp.int32).reshape(topology.num_nodes)
  rows = parent_rows(topology, parents)
  depth = jnp.zeros(rows.shape[:-1] + (topology.num_nodes + 1,), jnp.int32)
  for _ in range(topology.max_depth):
    step = jnp.take_along_axis(depth, rows, axis=-1) + 1
    depth = jnp.concatenate([depth[..., :1], step], axis=-1)
  return depth[..., 1:]


def ancestors(topology: Topology, parents: Array | None) -> Array:
  """Returns bool[N+1,N+1] or [B,N+1,N+1]: `[.., i, j]`: j is i or above it."""
  rows = parent_rows(topology, parents)
  root = jnp.zeros(rows.shape[:-1] + (1,), jnp.int32)
  up = jnp.concatenate([root, rows], axis=-1)
  eye = jnp.eye(topology.num_nodes + 1, dtype=bool)
  seen = jnp.broadcast_to(eye, up.shape + (topology.num_nodes + 1,))
  for _ in range(topology.max_depth):
    seen = seen | jnp.take_along_axis(seen, up[..., None], axis=-2)
  return seen


def history(topology: Topology, parents: Array | None, tokens: Array) -> Array:
  """Returns the drafted tokens on the way to each row.

  Args:
    topology: static shape, N slots, depth D.
    parents: int32[B,N] for dynamic trees, else None.
    tokens: int32[B,N].

  Returns:
    int32[B,N+1,D]: row r's path from below the root, in order, padded with
    -1 (the root's row is all padding).
  """
  batch, num = tokens.shape
  depth_axis = jnp.arange(topology.max_depth)
  if topology.is_chain:
    rows = jnp.arange(num + 1)
    shown = depth_axis[None, :] < rows[:, None]
    return jnp.where(shown[None], tokens[:, None, :], -1)
  up = jnp.broadcast_to(parent_rows(topology, parents), (batch, num))
  depth = jnp.broadcast_to(node_depth(topology, parents), (batch, num))
  path = jnp.full((batch, num + 1, topology.max_depth), -1, jnp.int32)
  for slot in range(num):  # N is small; parents come first
    above = take_row(path, up[:, slot])
    mine = depth_axis[None, :] == depth[:, slot, None] - 1
    row = jnp.where(mine, tokens[:, slot, None], above)
    path = path.at[:, slot + 1].set(row)
  return path


def children(
    topology: Topology, parents: Array | None, sibling: Array | None,
) -> tuple[Array, Array]:
  """Returns the slots below each internal row, in draw order.

  Args:
    topology: static shape, N slots, C = max_children.
    parents: int32[B,N] for dynamic trees, else None.
    sibling: draw order int32[N] or [B,N], unique under a parent; None is
      the order of slots.

  Returns:
    `(slots int32, exists bool)`, [M,C] for a static order, else [B,M,C];
    rows as in `topology.internal`. Where `exists` is unset the slot is 0.
  """
  most = topology.max_children
  if topology.parents is not None and sibling is None:
    kids = [topology.children[row] for row in topology.internal]
    table = np.zeros((len(kids), most), np.int32)
    for i, below in enumerate(kids):
      table[i, :len(below)] = below
    some = np.arange(most) < np.array([[len(k)] for k in kids])
    return jnp.asarray(table), jnp.asarray(some.reshape(table.shape))
  rows = parent_rows(topology, parents)
  num = topology.num_nodes
  order = jnp.arange(num) if sibling is None else sibling
  internal = jnp.asarray(topology.internal, jnp.int32)
  mine = rows[..., None, :] == internal[:, None]
  key = jnp.where(mine, order[..., None, :], num)
  negative, slots = jax.lax.top_k(-key, most)
  exists = negative > -num
  return jnp.where(exists, slots, 0), exists


def path_to(
    topology: Topology, parents: Array | None, row: Array
) -> tuple[Array, Array]:
  """Returns the path to `row int32[B]`: `(path int32[B,D+1], depth [B])`.

  Rows of Scores, root first, padded with N + 1.
  """
  padding = topology.num_nodes + 1
  level = jnp.arange(topology.max_depth + 1)
  if topology.is_chain:
    return jnp.where(level <= row[:, None], level, padding), row
  above = ancestors(topology, parents)
  above = jnp.broadcast_to(above, row.shape + above.shape[-2:])
  above = take_row(above, row)  # [B,N+1]
  depth = node_depth(topology, parents)
  depth = jnp.pad(depth, [(0, 0)] * (depth.ndim - 1) + [(1, 0)])
  depth = jnp.broadcast_to(depth, above.shape)
  at = above[..., None] & (depth[..., None] == level)
  rows = jnp.arange(padding)[:, None]
  path = jnp.min(jnp.where(at, rows, padding), axis=1)
  return path.astype(jnp.int32), jnp.max(jnp.where(above, depth, 0), axis=1)


def deepest(
    topology: Topology, parents: Array | None, alive: Array,
    tie: Array | None = None,
) -> Array:
  """Returns the deepest row that `alive bool[B,N]` slots lead to, int32[B].

  A row is reached when its slot and all slots above it are alive. Among
  equally deep ones the largest `tie f32[B,N]` wins, then the first slot.
  """
  if topology.is_chain:
    count = jnp.cumprod(alive.astype(jnp.int32), axis=1)
    return jnp.sum(count, axis=1, dtype=jnp.int32)
  above = ancestors(topology, parents)[..., 1:, 1:]
  reached = jnp.all(alive[:, None, :] | ~above, axis=-1)
  depth = jnp.where(reached, node_depth(topology, parents), 0)
  best = jnp.max(depth, axis=1, keepdims=True)
  is_best = (depth == best) & reached
  score = jnp.zeros(alive.shape) if tie is None else tie
  slot = jnp.argmax(jnp.where(is_best, score, -jnp.inf), axis=1)
  return jnp.where(best[:, 0] > 0, slot + 1, 0).astype(jnp.int32)


def take_row(x: Array, index: Array) -> Array:
  """Gathers `x[b, index[b]]`; indices are clipped, never wrapped.

  `x` is [B,R,...], `index` int32[B] or [B,K]. The padding of a path (N + 1)
  reads the last row, so callers mask by `num_accepted`.
  """
  index = jnp.clip(index, 0, x.shape[1] - 1)
  take = jax.vmap(lambda row, i: jnp.take(row, i, axis=0, mode='clip'))
  return take(x, index)
