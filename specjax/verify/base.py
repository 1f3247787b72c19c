"""What the rules share: attributes, checks, laws of slots, the verdict."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from specjax.core import tree
from specjax.core.tree import Topology
from specjax.core.types import (
  IID,
  MATCH,
  MODE_NAMES,
  POINT,
  TOP_PLUS_ONE,
  WITHOUT_REPLACEMENT,
  Draft,
  Scores,
  Verdict,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rule:
  """Defaults of a rule: lossless, for trees and every kind of draft.

  Class attributes of subclasses:
    name: in configs and summaries. lossy: the output law may differ.
    taps: hidden states of the target that it reads.
    modes: kinds of drafts (`core.types`) that it verifies.
    chains_only: it does not walk trees. advice: what to use instead.
    continuous: it is for tokens of real numbers, not of a vocabulary.
  """

  name: ClassVar[str] = ''
  lossy: ClassVar[bool] = False
  taps: ClassVar[tuple[str, ...]] = ()
  modes: ClassVar[tuple[int, ...]] = (
      IID, WITHOUT_REPLACEMENT, TOP_PLUS_ONE, POINT, MATCH)
  chains_only: ClassVar[bool] = False
  continuous: ClassVar[bool] = False
  advice: ClassVar[str] = "use 'match' or 'speculative'"

  def check(
      self, topology: Topology, modes: tuple[int, ...], vocab_size: int,
      params: Any,
  ) -> None:
    """Raises ValueError when this rule cannot verify such drafts.

    Called on the host, before anything is compiled.

    Args:
      topology, modes: of the drafter. vocab_size: V of the target; 0 where
        tokens are real numbers.
      params: what `Models.verifier` will be.
    """
    del params
    if self.continuous != (vocab_size == 0):
      what = 'real numbers' if self.continuous else 'a vocabulary'
      raise ValueError(f'verify={self.name!r} is for tokens of {what}, and '
                       "this model's are not")
    if self.chains_only and not topology.is_chain:
      raise ValueError(
          f'verify={self.name!r} is for chains, and the drafter proposes a '
          f'tree of {topology.num_nodes} nodes: {self.advice}')
    bad = [MODE_NAMES[m] for m in modes if m not in self.modes]
    if bad and topology.num_nodes:
      known = ', '.join(MODE_NAMES[m] for m in self.modes)
      raise ValueError(
          f'verify={self.name!r} needs drafts of kind {known}, with the law '
          f'that they were drawn from; this drafter makes {", ".join(bad)} '
          f'drafts: {self.advice}')


def finish(
    draft: Draft, row: Array, next_token: Array,
    excess: Array | None = None, gave_up: Array | None = None,
) -> Verdict:
  """Builds the verdict that accepts the path to `row int32[B]`."""
  path, depth = tree.path_to(draft.topology, draft.parents, row)
  return Verdict(
      path=path, num_accepted=depth, next_token=next_token,
      excess=jnp.zeros(row.shape) if excess is None else excess,
      gave_up=jnp.zeros(row.shape, bool) if gave_up is None else gave_up)


def parent_rows(draft: Draft) -> Array:
  """Returns int32[N] or [B,N], the row that each slot follows."""
  return tree.parent_rows(draft.topology, draft.parents)


def reached(draft: Draft) -> Array:
  """Returns bool[B,N]: the slot and all above it were drafted."""
  above = tree.ancestors(draft.topology, draft.parents)[..., 1:, 1:]
  return jnp.all(draft.valid[:, None] | ~above, axis=-1)


def target_log_prob(draft: Draft, scores: Scores) -> Array:
  """Returns f32[B,N], log p of each draft under the row it follows."""
  return scores.target_law.log_prob_at(parent_rows(draft), draft.tokens)


def law_rows(draft: Draft) -> Array:
  """Returns int32[N] or [B,N]: the row of `draft_law` of each slot."""
  if draft.law_row is not None:
    return draft.law_row
  return jnp.arange(draft.topology.num_nodes)


def draft_log_prob(draft: Draft) -> Array:
  """Returns f32[B,N], log q of each draft; 0 where the slot is a point.

  The law before siblings are removed: for a chain, or a first sibling.
  """
  if draft.draft_law is None:
    return jnp.zeros(draft.tokens.shape, jnp.float32)
  log_q = draft.draft_law.log_prob_at(law_rows(draft), draft.tokens)
  return jnp.where(is_point(draft.mode), 0.0, log_q)


def is_point(mode: Array) -> Array:
  """Returns bool like `mode`: the slot stands for a point mass."""
  return (mode == POINT) | (mode == MATCH)


def row_keys(keys: Array, num: int) -> Array:
  """Returns key[B,num], told apart by index, from key[B]."""
  index = jnp.arange(num, dtype=jnp.uint32)
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
  return fold(keys, index)
