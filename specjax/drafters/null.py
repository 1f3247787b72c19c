"""No drafting: plain decoding, at any block shape."""

from __future__ import annotations

import dataclasses

from specjax.core.tree import Topology
from specjax.core.types import Draft, Models, SpecState
from specjax.drafters import base


@dataclasses.dataclass(frozen=True)
class Null(base.ChainDrafter):
  """Proposes nothing.

  With K = 0 this is plain decoding. With K > 0, or with a tree, the block is
  padded with tokens that are never accepted: the reference that any drafter
  of that shape must equal bit for bit under a greedy or matching rule (trees:
  where the target promises it).

  Attributes:
    num_speculative_tokens: K >= 0, for a chain.
    tree: a static topology instead.
  """

  tree: Topology | None = None

  modes = ()  # nothing is drawn
  least = 0

  @property
  def topology(self) -> Topology:
    """A chain of K, or the tree."""
    return super().topology if self.tree is None else self.tree

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Returns a draft without a valid slot."""
    del params
    return base.no_draft(self.topology, state.context), state
