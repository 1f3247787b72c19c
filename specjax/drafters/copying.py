"""A second opinion from the text itself, mixed into a drafter's law.

A language model repeats itself, and its prompt, in ways that a small drafter
cannot know and that a search finds for free. The token that followed an
earlier occurrence of the present suffix becomes one of the lattice's
candidates, and takes a share of the probability, larger after longer matches.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.core.types import Context
from specjax.drafters.lookup import Lookup, copy_text

Array = jax.Array


class Copy(NamedTuple):
  """What followed the best match: int32[B,G] tokens, -1 beyond its end."""

  tokens: Array
  share: Array  # f32[B,G], for each token after the one copied before it


@dataclasses.dataclass(frozen=True)
class Copying:
  """Prompt lookup with a measured reliability.

  Attributes:
    shares: of the probability, for a match of 1, 2, ... tokens; the last
      one holds for all longer matches. A copied token that was accepted
      lengthens the match of the next. At temperature T a share is taken to
      its power 1 + T. The default lies between how often copies are right in
      greedy answers of SmolLM2-135M-Instruct (0.2 after one token, 0.8 after
      five, 0.95 after 24), and the shares that make its DSpark drafter's law
      likeliest there (0, 0.44, 0.87): what the drafter knows anyway needs no
      share.
    prefer: 'newest' or 'oldest' among equally long matches.
  """

  shares: tuple[float, ...] = (
      0.04, 0.25, 0.4, 0.55, 0.6, 0.62, 0.65, 0.65, 0.68, 0.7, 0.72, 0.75,
      0.78, 0.8, 0.82, 0.85)
  prefer: str = 'newest'

  def __post_init__(self):
    if not self.shares or not all(0 <= x < 1 for x in self.shares):
      raise ValueError(f'shares={self.shares}: chances in [0, 1), of matches '
                       'of 1, 2, ... tokens')
    _ = self.lookup  # raises for what it does not take

  @property
  def lookup(self) -> Lookup:
    """The search for matches."""
    return Lookup(
        prompt_lookup_max=len(self.shares), prefer=self.prefer)

  def find(self, context: Context, num: int) -> Copy:
    """Returns up to `num` tokens that follow the longest match."""
    end, run = self.lookup.match(context.tokens, context.length)
    tokens, valid = copy_text(
        context.tokens, end + 1, jnp.where(run > 0, context.length, 0), num,
        context.options.eos)
    index = jnp.clip(
        run[:, None] + jnp.arange(num), 1, len(self.shares)) - 1
    share = jnp.asarray(self.shares, jnp.float32)[index]
    heat = context.options.temperature
    if heat is not None:
      share = share ** (1 + heat[:, None])
    return Copy(jnp.where(valid, tokens, -1), jnp.where(valid, share, 0.0))


def insert(tokens: Array, copied: Array) -> tuple[Array, Array]:
  """Makes copied tokens candidates, in the last place if they are new.

  Args:
    tokens: int32[B,G,K], candidates, best first.
    copied: int32[B,G]; -1 inserts nothing.

  Returns:
    The candidates, and bool[B,G,K]: which of them the drafter did not choose.
  """
  same = tokens == copied[..., None]
  last = jnp.arange(tokens.shape[-1]) == tokens.shape[-1] - 1
  new = last & ~jnp.any(same, -1, keepdims=True) & (copied[..., None] >= 0)
  return jnp.where(new, copied[..., None], tokens), new


def mix(scores: Array, hit: Array, share: Array) -> Array:
  """Moves a share of the probability to one candidate.

  Args:
    scores: f32[...,K], log-probabilities.
    hit: bool[...,K], set for that candidate, if there is one.
    share: f32[...], in [0, 1).

  Returns:
    `log((1 - share) exp(scores) + share [hit])`; normalised if `scores` was,
    and never above 0.
  """
  share = share * jnp.any(hit, axis=-1)
  rest = scores + jnp.log1p(-share)[..., None]
  own = jnp.where(hit, jnp.log(share)[..., None], -jnp.inf)
  # Rounding must not make a path likelier than what it goes on from.
  return jnp.minimum(jnp.logaddexp(rest, own), 0.0)
