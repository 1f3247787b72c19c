"""A drafter's vocabulary: the tokens that it may propose.

The head over 49k to 260k tokens costs a small drafter more than its layers.
It scores a fixed, sorted subset; the others get the logit -inf, so that the
law that is handed over is over the target's vocabulary and exact. Kept as
`{'ids': int32[W], 'inverse': int32[V]}` beside the parameters.

References: FR-Spec, arXiv:2502.14856; VocabTrim, arXiv:2506.22694.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def table(ids: Any, vocab_size: int) -> dict[str, Array]:
  """Returns the maps of a draft vocabulary.

  Args:
    ids: int[W], strictly ascending, in [0, V).
    vocab_size: V.

  Returns:
    `ids int32[W]` and `inverse int32[V]` (W where a token is not kept).

  Raises:
    ValueError: ids that are empty, not ascending or out of range.
  """
  ids = np.asarray(ids, np.int64)
  if ids.ndim != 1 or not ids.size or (np.diff(ids) <= 0).any() or (
      ids[0] < 0 or ids[-1] >= vocab_size):
    raise ValueError(
        f'draft vocabulary of {ids.size} ids: must be ascending and in '
        f'[0, {vocab_size})')
  inverse = np.full((vocab_size,), ids.size, np.int32)
  inverse[ids] = np.arange(ids.size)
  return {'ids': jnp.asarray(ids, jnp.int32), 'inverse': jnp.asarray(inverse)}


def most_frequent(
    counts: Any, size: int, always: tuple[int, ...] = ()
) -> np.ndarray:
  """Returns the ids of the `size` most frequent tokens, ascending.

  Args:
    counts: int[V]; ties go to the smaller id.
    size: in [len(always), V].
    always: ids kept whatever their count (end of turn, newline, ...).

  Raises:
    ValueError: a size out of range.
  """
  counts = np.array(counts, np.int64)
  if not max(len(set(always)), 1) <= size <= counts.size:
    raise ValueError(f'draft_vocab_size={size}: must be in '
                     f'[{max(len(set(always)), 1)}, {counts.size}]')
  counts[list(always)] = np.iinfo(np.int64).max
  order = np.argsort(-counts, kind='stable')
  return np.sort(order[:size])


def coverage(counts: Any, ids: Any) -> float:
  """Returns the share of the counted tokens that a draft vocabulary keeps."""
  counts = np.asarray(counts, np.float64)
  return float(counts[np.asarray(ids)].sum() / max(counts.sum(), 1.0))


def spread(logits: Array, inverse: Array) -> Array:
  """Returns [..., V] from `logits [..., W]`: -inf where nothing is kept."""
  padding = [(0, 0)] * (logits.ndim - 1) + [(0, 1)]
  wide = jnp.pad(logits, padding, constant_values=-jnp.inf)
  return jnp.take(wide, inverse, axis=-1)
