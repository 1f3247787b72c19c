"""Prompt lookup with several matches at once, side by side in a tree."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from specjax.core import topologies, tree
from specjax.core.types import Draft, Models, SpecState
from specjax.drafters import base
from specjax.drafters.lookup import Lookup, copy_text


@dataclasses.dataclass(frozen=True)
class LookupTree(base.Drafter):
  """Proposes what followed the best few earlier occurrences of the suffix.

  The longest matching suffix comes first, the newest (or oldest) among equal
  ones; matches whose continuation begins with a token that is already there
  are passed over, so that no two branches begin alike.

  Attributes:
    lengths: drafted tokens of each branch, best match first; its length is
      the number of matches.
    prompt_lookup_max, prompt_lookup_min, prefer: as in `Lookup`.
  """

  lengths: tuple[int, ...] = (8, 4, 4)
  prompt_lookup_max: int = 3
  prompt_lookup_min: int = 1
  prefer: str = 'newest'

  def __post_init__(self):
    topologies.sequences(self.lengths)  # raises when they make no tree
    _ = self.lookup

  @functools.cached_property
  def topology(self) -> tree.Topology:
    return topologies.sequences(self.lengths)

  @property
  def lookup(self) -> Lookup:
    """The search for matches."""
    return Lookup(max(self.lengths), self.prompt_lookup_max,
                  self.prompt_lookup_min, self.prefer)

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Copies the continuation of each match into its branch."""
    del params
    context = state.context
    score = self.lookup.score(context.tokens, context.length)
    follows = jnp.roll(context.tokens, -1, axis=1)
    tokens, valid = [], []
    for length in self.lengths:
      end = jnp.argmax(score, axis=1)
      hit = jnp.max(score, axis=1) >= 0
      text, fine = copy_text(
          context.tokens, end + 1, jnp.where(hit, context.length, 0), length,
          context.options.eos)
      tokens.append(text)
      valid.append(fine)
      first = tree.take_row(follows, end)[:, None]
      score = jnp.where(follows == first, -1, score)
    slots = self._slots()
    return base.point_draft(
        self.topology, jnp.concatenate(tokens, axis=1)[:, slots],
        jnp.concatenate(valid, axis=1)[:, slots]), state

  def _slots(self) -> np.ndarray:
    """Returns int[N]: of each slot, its place among branches end to end."""
    begin = np.cumsum((0,) + self.lengths)
    paths = topologies.to_paths(self.topology)
    return np.asarray([begin[path[0]] + len(path) - 1 for path in paths])
