"""Drafts from a script: acceptance as a dial."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from specjax.core import keys, tree
from specjax.core.tree import Topology
from specjax.core.types import Draft, Models, SpecState
from specjax.drafters import base


@dataclasses.dataclass(frozen=True)
class Scripted(base.ChainDrafter):
  """Proposes `condition['script'] int32[B,S]` at the current position.

  With the target's own text as the script, each draft is right with
  probability `keep`, independently, so any acceptance can be dialled in: for
  simulating speed-ups, and for tests that need every draft position both
  accepted and rejected. A wrong draft is a neighbouring token id.

  Attributes:
    num_speculative_tokens: K >= 1.
    keep: probability that a draft is left as scripted, in [0, 1].
  """

  num_speculative_tokens: int = 4
  keep: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.keep <= 1:
      raise ValueError(f'keep={self.keep}: must be in [0, 1]')

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Copies the next K tokens of the script, some of them spoilt."""
    del params
    context, num = state.context, self.num_speculative_tokens
    if context.condition is None or 'script' not in context.condition:
      raise ValueError("Scripted needs condition['script'] int32[B,S]")
    script = context.condition['script']
    index = context.length[:, None] + jnp.arange(num)
    tokens = tree.take_row(script, index)
    noise = keys.uniform(keys.row(context, keys.Purpose.DRAFT), num)
    spoilt = jnp.where(tokens > 0, tokens - 1, tokens + 1)
    tokens = jnp.where(noise < self.keep, tokens, spoilt)
    valid = jnp.broadcast_to(~context.done[:, None], tokens.shape)
    return base.point_draft(self.topology, tokens, valid), state


@dataclasses.dataclass(frozen=True)
class ScriptedTree(base.Drafter):
  """Proposes the script along a random path through a tree.

  After every node one child, any of them, has the script's next token (with
  probability `keep`); the others are near it in number. So paths through all
  parts of the tree are accepted.

  Attributes:
    tree: a static topology.
    keep: probability that the right child is left as scripted, in [0, 1].
  """

  tree: Topology
  keep: float = 1.0

  def __post_init__(self):
    if self.tree.parents is None:
      raise ValueError('ScriptedTree needs a static topology')
    if not 0 <= self.keep <= 1:
      raise ValueError(f'keep={self.keep}: must be in [0, 1]')

  @property
  def topology(self) -> Topology:
    """The tree."""
    return self.tree

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Copies the script into a path; the rest is wrong."""
    del params
    context, num = state.context, self.tree.num_nodes
    if context.condition is None or 'script' not in context.condition:
      raise ValueError("ScriptedTree needs condition['script'] int32[B,S]")
    rank, siblings = np.zeros((2, num), np.int32)
    for slots in self.tree.children:
      rank[list(slots)] = np.arange(len(slots))
      siblings[list(slots)] = len(slots)
    noise = keys.uniform(keys.row(context, keys.Purpose.DRAFT), 2 * num + 1)
    lucky = noise[:, np.asarray(self.tree.parents)] * siblings
    right = lucky.astype(jnp.int32) == rank
    right &= noise[:, num + 1:] < self.keep
    index = context.length[:, None] + np.asarray(self.tree.depth) - 1
    token = tree.take_row(context.condition['script'], index)
    other = jnp.where(token > rank, token - 1 - rank, token + 1 + rank)
    valid = jnp.broadcast_to(~context.done[:, None], token.shape)
    return base.point_draft(
        self.tree, jnp.where(right, token, other), valid), state
