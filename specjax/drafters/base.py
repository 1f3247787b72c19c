"""What most drafters share: no taps, no state, nothing to sync."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from specjax.core import tree
from specjax.core.types import POINT, Context, Draft, SpecState


@dataclasses.dataclass(frozen=True)
class Drafter:
  """Defaults of a drafter: no taps, no state, nothing to sync."""

  @property
  def modes(self) -> tuple[int, ...]:
    """Ways in which slots are chosen when rows are sampled."""
    return (POINT,)

  @property
  def taps(self) -> tuple[str, ...]:
    """No hidden states are read."""
    return ()

  def empty(self, batch: int, capacity: int) -> Any:
    """No state."""
    del batch, capacity
    return {}

  def init(self, params, state, position, fed, taps) -> SpecState:
    """Nothing to take in: the text is in `context.tokens`."""
    del params, position, fed, taps
    return state

  def sync(self, params, state, draft, scores, verdict) -> SpecState:
    """Nothing to learn."""
    del params, draft, scores, verdict
    return state


@dataclasses.dataclass(frozen=True)
class ChainDrafter(Drafter):
  """Defaults of a drafter that proposes K tokens one after another.

  Attributes:
    num_speculative_tokens: K, the static width of the block is K + 1.
  """

  num_speculative_tokens: int = 0

  # Whether any drafts at all can be proposed with K = 0.
  least = 1

  def __post_init__(self):
    if self.num_speculative_tokens < self.least:
      raise ValueError(
          f'num_speculative_tokens={self.num_speculative_tokens}: '
          f'{type(self).__name__} needs >= {self.least}')

  @property
  def topology(self) -> tree.Topology:
    """A chain of K."""
    return tree.chain(self.num_speculative_tokens)

  def narrow(self, num_draft: int) -> ChainDrafter:
    """Returns this drafter with K = `num_draft` over the same state."""
    return dataclasses.replace(self, num_speculative_tokens=num_draft)


def point_draft(topology: tree.Topology, tokens, valid, **kwargs) -> Draft:
  """Returns a draft of deterministic tokens."""
  return Draft(
      topology=topology, tokens=tokens, valid=valid,
      mode=jnp.full((topology.num_nodes,), POINT, jnp.int32), **kwargs)


def no_draft(topology: tree.Topology, context: Context) -> Draft:
  """Returns a draft without a valid slot, of the text's kind of tokens."""
  shape = (context.length.shape[0], topology.num_nodes)
  return point_draft(
      topology, jnp.zeros(shape + context.tokens.shape[2:],
                          context.tokens.dtype), jnp.zeros(shape, bool))
