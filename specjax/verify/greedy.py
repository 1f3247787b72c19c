"""Rules that compare drafts with tokens that the target itself has drawn."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from specjax.core import keys, tree
from specjax.core.types import (
  MATCH,
  POINT,
  Context,
  Draft,
  Models,
  Scores,
  Verdict,
)
from specjax.verify import base

Array = jax.Array


def _walk(draft: Draft, drawn: Array) -> Verdict:
  """Accepts the drafts that equal `drawn int32[B,N+1]` at their parent."""
  topology = draft.topology
  if topology.num_nodes == 0:
    row = jnp.zeros(drawn.shape[:1], jnp.int32)
    return base.finish(draft, row, drawn[:, 0])
  parents = jnp.broadcast_to(base.parent_rows(draft), draft.tokens.shape)
  agrees = draft.tokens == jnp.take_along_axis(drawn, parents, axis=1)
  row = tree.deepest(topology, draft.parents, agrees & draft.valid)
  return base.finish(draft, row, tree.take_row(drawn, row))


@dataclasses.dataclass(frozen=True)
class Greedy(base.Rule):
  """Emits the mode of the target's law at every position.

  For chains, guarantees the output of greedy decoding at the same block
  shape, bit for bit, for any drafter. For trees the same holds where the
  target promises it (`CausalLM.exact_trees`), else up to near-ties. Equal to
  sampling only at temperature 0.

  References: Stern et al. 2018 (blockwise parallel decoding).
  """

  name = 'greedy'

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Keeps the longest path of drafts that are the target's argmax."""
    del params, context
    return _walk(draft, scores.target_law.mode())


@dataclasses.dataclass(frozen=True)
class Match(base.Rule):
  """Draws from the target after every node; keeps drafts that agree.

  Lossless for any drafter, also one that cannot state its law, on chains and
  on trees. Noise is keyed by absolute position, so the text of a seed does
  not depend on the drafter, on the draft length or on the tree. A set S of
  deterministic drafts is accepted with probability p(S), as by rejection with
  one-hot laws; a drawn draft with sum p q only, which is less than what
  `Speculative` reaches.
  """

  name = 'match'

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Keeps the longest path of drafts that equal the target's draws."""
    del params
    noise = keys.position(context, _positions(context, draft))
    return _walk(draft, scores.target_law.sample(noise))


@dataclasses.dataclass(frozen=True)
class Gumbel(base.Rule):
  """Shared randomness: draft and target maximise over the same noise.

  Lossless, and the text of a seed depends on `num_noise` only: not on the
  drafter, the tree or the batch, also at temperature > 0. With one noise
  vector a position this is `Match` with drafts from a coupled drafter (kind
  'match'), accepted with probability sum_x 1 / sum_y max(p_y / p_x,
  q_y / q_x), at least (1 - TV) / (1 + TV). With n, sibling k of a node is
  drawn with the k-th vector and the target maximises over the largest noise
  of the n: more siblings, more agreement.

  Attributes:
    num_noise: n >= 1, noise vectors a position; siblings beyond n are never
      favoured.

  References: Daliri et al. 2024, arXiv:2408.07978; Rowan et al. 2025,
  arXiv:2506.05632.
  """

  num_noise: int = 1

  name = 'gumbel'
  modes = (POINT, MATCH)
  advice = ("use a coupled drafter (draft_sample_method 'coupled'), or "
            "'speculative' for drawn drafts")

  def __post_init__(self):
    if self.num_noise < 1:
      raise ValueError(f'num_noise={self.num_noise}: must be >= 1')

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Keeps the longest path of drafts that equal the target's choices."""
    del params
    position = _positions(context, draft)
    drawn = coupled(context, scores.target_law, position, self.num_noise)
    return _walk(draft, drawn)


def coupled(context: Context, law, position: Array, num_noise: int) -> Array:
  """Chooses tokens int32[B,R] by the largest of `num_noise` shared noises.

  A token of law p: the largest of n Gumbel vectors is a Gumbel vector,
  shifted by log n.
  """
  if not hasattr(law, 'logits') or num_noise == 1:
    return law.sample(keys.position(context, position))
  noise = keys.shared_gumbel(context, position, 0, law.vocab_size)
  for k in range(1, num_noise):
    noise = jnp.maximum(noise, keys.shared_gumbel(
        context, position, k, law.vocab_size))
  return jnp.argmax(law.logits + noise, axis=-1).astype(jnp.int32)


def _positions(context: Context, draft: Draft) -> Array:
  """Returns int32[B,N+1]: the position that each row's law is for."""
  topology = draft.topology
  if topology.is_chain:
    depth = jnp.arange(topology.num_nodes + 1)
  else:
    depth = tree.node_depth(topology, draft.parents)
    depth = jnp.pad(depth, [(0, 0)] * (depth.ndim - 1) + [(1, 0)])
  return context.length[:, None] + depth
