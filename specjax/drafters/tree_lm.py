"""A static token tree, grown level by level from a source."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core import keys, pipeline
from specjax.core import law as law_lib
from specjax.core.tree import Topology
from specjax.core.types import (
  IID,
  MATCH,
  POINT,
  TOP_PLUS_ONE,
  WITHOUT_REPLACEMENT,
  Draft,
  Models,
  SpecState,
)
from specjax.drafters import base
from specjax.drafters import source as source_lib

Array = jax.Array

_MODES = {'iid': IID, 'without_replacement': WITHOUT_REPLACEMENT,
          'top_plus_one': TOP_PLUS_ONE, 'top_k': POINT, 'coupled': MATCH}


@dataclasses.dataclass(frozen=True)
class TreeLM(source_lib.Sourced, base.Drafter):
  """Drafts the children of a node together, level by level.

  The source is asked once a level. When every row is greedy all
  ways of drafting are 'top_k'.

  Attributes:
    tree: a static topology (`core.topologies`).
    model: a `source.Source` or a causal language model, as for `ChainLM`.
    draft_sample_method: how the children of a node are chosen.
      'iid': drawn independently from the drafter's law.
      'without_replacement': drawn one after another, each from what the law
        leaves of the vocabulary (Gumbel top-k, in draw order).
      'top_k': the likeliest tokens (`POINT`).
      'top_plus_one': all but the last are the likeliest tokens, the last is
        drawn from the rest.
      'coupled': child k maximises over the k-th noise vector that it shares
        with the target (rule 'gumbel').
  """

  tree: Topology | None = None
  model: Any = None
  draft_sample_method: str = 'without_replacement'

  def __post_init__(self):
    if self.model is None:
      raise ValueError("method='draft_model' needs a model")
    if not isinstance(self.tree, Topology) or self.tree.parents is None:
      raise ValueError(f'tree={self.tree!r}: must be a static topology with '
                       'drafted slots (specjax.core.topologies)')
    if self.tree.num_nodes < 1:
      raise ValueError('the tree has no drafted slots; use Null')
    if self.draft_sample_method not in _MODES:
      raise ValueError(
          f'draft_sample_method={self.draft_sample_method!r}: known are '
          f'{", ".join(sorted(_MODES))}')

  @property
  def topology(self) -> Topology:
    assert self.tree is not None
    return self.tree

  @property
  def modes(self) -> tuple[int, ...]:
    return (_MODES[self.draft_sample_method],)

  @property
  def catch_up(self) -> int:
    """Committed tokens that its cache may lack: a whole accepted path."""
    return self.topology.max_depth + 1

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Catches up, then grows the tree."""
    logits, memory = self.source.begin(
        params, state, behind=self.catch_up, refill=False)
    draft, memory = _Growth(self, params, state.context).run(logits, memory)
    return draft, state.replace(drafter=memory)


class _Level(NamedTuple):
  """Static facts about the internal rows at one depth.

  Attributes:
    rows: their numbers. parents: of each, its place in the level above.
    children: slots below each row.
  """

  rows: np.ndarray
  parents: np.ndarray
  children: tuple[tuple[int, ...], ...]


def levels(topology: Topology) -> list[_Level]:
  """Returns the internal rows of a static tree, level by level."""
  depth = (0,) + topology.depth
  up = (-1,) + (topology.parents or ())
  out: list[_Level] = []
  for level in range(topology.max_depth):
    rows = [r for r in topology.internal if depth[r] == level]
    above = list(out[-1].rows) if out else []
    out.append(_Level(
        np.asarray(rows), np.asarray([above.index(up[r]) if above else 0
                                      for r in rows]),
        tuple(topology.children[r] for r in rows)))
  return out


@dataclasses.dataclass(frozen=True)
class _Growth:
  """The loop over levels; a helper, so that `propose` stays readable."""

  drafter: TreeLM
  params: Models
  context: Any

  def run(self, logits: Array, memory: Any) -> tuple[Draft, Any]:
    """Returns the draft and the source's memory, from the root's logits."""
    topology, context = self.drafter.topology, self.context
    batch = logits.shape[0]
    logits = logits[:, None]
    past = jnp.full((batch, 1, topology.max_depth), -1, jnp.int32)
    tokens = jnp.zeros((batch, topology.num_nodes), jnp.int32)
    valid = jnp.zeros(tokens.shape, bool)
    kept, place = [], np.zeros(topology.num_nodes, np.int32)
    offset = np.concatenate([[0], np.cumsum(
        [len(level.rows) for level in levels(topology)])])
    seen: np.ndarray | None = None
    for depth, level in enumerate(levels(topology)):
      if depth:
        seen = _see(seen, level)
        rows = level.rows - 1
        past = past[:, level.parents].at[:, :, depth - 1].set(tokens[:, rows])
        logits, memory = self._feed(
            memory, tokens[:, rows], depth, seen, level.parents)
      law = pipeline.law(context, logits, past)
      shaped = pipeline.shaped(context, logits, past)
      for count in sorted({len(kids) for kids in level.children}):
        here = [i for i, k in enumerate(level.children) if len(k) == count]
        slots = np.asarray([level.children[i] for i in here])
        place[slots] = (offset[depth] + np.asarray(here))[:, None]
        drawn, fine = self._children(law, shaped, level, here, depth, count)
        tokens = tokens.at[:, slots].set(drawn)
        valid = valid.at[:, slots].set(fine)
      if isinstance(law, law_lib.Categorical):
        kept.append(law.logits)
    drawn_from = (law_lib.Categorical(jnp.concatenate(kept, axis=1))
                  if kept and self._mode() not in (POINT, MATCH) else None)
    return Draft(
        topology=topology, tokens=tokens, valid=valid,
        mode=jnp.full((topology.num_nodes,), self._mode(), jnp.int32),
        draft_law=drawn_from, law_row=jnp.asarray(place)), memory

  def _mode(self) -> int:
    if self.context.options.temperature is None:
      return POINT
    return self.drafter.modes[0]

  def _feed(self, memory, tokens: Array, depth: int, seen: np.ndarray,
            parents: np.ndarray):
    """Feeds the internal rows at `depth`; entries above were fed before."""
    start = seen.shape[1] - seen.shape[0]
    length = self.context.length[:, None]
    entry = [len(level.rows) for level in
             levels(self.drafter.topology)[1:depth + 1]]
    depths = np.repeat(np.arange(len(entry)), entry)
    return self.drafter.source.grow(
        self.params, self.context, memory, source_lib.Level(
            tokens=tokens, depth=depth, base=self.context.length,
            parent=jnp.asarray(parents, jnp.int32),
            position=jnp.broadcast_to(length + depth - 1, tokens.shape),
            ancestors=jnp.asarray(seen), entry_position=length + depths,
            start=start))

  def _children(self, law, shaped: Array, level: _Level, here, depth: int,
                count: int) -> tuple[Array, Array]:
    """Chooses `count` children of rows `here`: tokens, valid [B,F,count]."""
    shaped = shaped[:, np.asarray(here)]
    if self._mode() == POINT:
      best, tokens = jax.lax.top_k(shaped, count)
      return tokens.astype(jnp.int32), jnp.isfinite(best)
    q = law_lib.Categorical(law.logits[:, np.asarray(here)])
    rows = level.rows[np.asarray(here)]
    if self._mode() == MATCH:
      position = jnp.broadcast_to(
          self.context.length[:, None] + depth, shaped.shape[:2])
      tokens = jnp.stack([
          jnp.argmax(q.logits + keys.shared_gumbel(
              self.context, position, k, q.vocab_size), axis=-1)
          for k in range(count)], axis=-1).astype(jnp.int32)
      return tokens, jnp.ones(tokens.shape, bool)
    noise = jnp.stack(
        [keys.row(self.context, keys.Purpose.DRAFT, int(r)) for r in rows], 1)
    return draw_children(self._mode(), q, shaped, noise, count)


def draw_children(
    mode: int, q, shaped: Array, noise: Array, count: int
) -> tuple[Array, Array]:
  """Draws children from their law: `(tokens, valid) [B,F,count]`."""
  if mode == IID:
    # One stream a sibling.
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    tokens = jnp.stack(
        [q.sample(fold(noise, k)) for k in range(count)], axis=-1)
    return tokens, jnp.ones(tokens.shape, bool)
  if mode == WITHOUT_REPLACEMENT:
    # Descending perturbed scores are the order in which they are drawn.
    score = q.logits + keys.gumbel(noise, q.vocab_size)
    best, tokens = jax.lax.top_k(score, count)
    return tokens.astype(jnp.int32), jnp.isfinite(best)
  _, top = jax.lax.top_k(shaped, count - 1)
  vocab = jnp.arange(q.vocab_size)
  logits = q.logits
  for k in range(count - 1):
    logits = jnp.where(vocab == top[..., k, None], -jnp.inf, logits)
  x = law_lib.Categorical(logits).sample(noise)[..., None]
  some = jnp.isfinite(jnp.max(logits, axis=-1, keepdims=True))
  tokens = jnp.concatenate([top.astype(jnp.int32), x], axis=-1)
  valid = jnp.concatenate([jnp.ones(top.shape, bool), some], axis=-1)
  return tokens, valid


def _see(seen: np.ndarray | None, level: _Level) -> np.ndarray:
  """Returns bool[F, entries so far + F]: what each new entry sees."""
  own = np.eye(len(level.rows), dtype=bool)
  if seen is None:  # children of the root: nothing above them is scratch
    return own
  return np.concatenate([seen[level.parents], own], axis=1)
