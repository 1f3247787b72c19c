"""A drafter's vocabulary, and what it shares of the target's two ends.

Drafters read the target's embeddings and score with rows of its head. The
head over 49k to 260k tokens costs a small drafter more than its layers. It
scores a fixed, sorted subset; the others get the logit -inf, so that the law
that is handed over is over the target's vocabulary and exact. Kept as
`{'ids': int32[W], 'inverse': int32[V]}` beside the parameters.

References: FR-Spec, arXiv:2502.14856; VocabTrim, arXiv:2506.22694.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Ends(Protocol):
  """What embeddings and logits depend on; configs have it.

  See `transformer.TransformerConfig`.
  """

  @property
  def dtype(self) -> str:
    """Of embeddings."""
    ...

  @property
  def precision(self) -> jax.lax.Precision:
    """Of the product with the head."""
    ...

  @property
  def embed_scale(self) -> float | None:
    """What multiplies embeddings, or None."""
    ...

  @property
  def final_softcap(self) -> float | None:
    """Tanh bound of logits, or None."""
    ...


def table(
    ids: Any, vocab_size: int, width: int | None = None
) -> dict[str, Array]:
  """Returns the maps of a draft vocabulary.

  Args:
    ids: int[W], strictly ascending, in [0, V).
    vocab_size: V. width: W that is asked for, or None for any.

  Returns:
    `ids int32[W]` and `inverse int32[V]` (W where a token is not kept).

  Raises:
    ValueError: ids that are empty, not ascending, out of range or not W.
  """
  ids = np.asarray(ids, np.int64)
  if ids.ndim != 1 or not ids.size or (np.diff(ids) <= 0).any() or (
      ids[0] < 0 or ids[-1] >= vocab_size):
    raise ValueError(
        f'draft vocabulary of {ids.size} ids: must be ascending and in '
        f'[0, {vocab_size})')
  if width not in (None, ids.size):
    raise ValueError(f'draft vocabulary of {ids.size} ids for '
                     f'draft_vocab_size={width}')
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
  if logits.shape[-1] == inverse.shape[0]:
    return logits  # ids are ascending: all of them, in order
  padding = [(0, 0)] * (logits.ndim - 1) + [(0, 1)]
  wide = jnp.pad(logits, padding, constant_values=-jnp.inf)
  return jnp.take(wide, inverse, axis=-1)


def rows(params: Any, ids: Array) -> Array:
  """Returns the rows [W,D] of a model's head, its embedding if it is tied."""
  head = params['head'] if 'head' in params else params['embedding']
  if ids.shape[0] == head.shape[0]:
    return head  # not a second copy of it
  return jnp.take(head, ids, axis=0)


def embed(config: Ends, target: Any, tokens: Array) -> Array:
  """Returns the target's embeddings [...,D] of ids, which are clipped."""
  x = jnp.take(target['embedding'], tokens, axis=0, mode='clip')
  x = x.astype(config.dtype)
  scale = config.embed_scale
  return x if scale is None else x * jnp.asarray(scale, x.dtype)


def scores(config: Ends, head: Array, x: Array) -> Array:
  """Returns f32[...,W] of normed states [...,D] and rows [W,D] of a head."""
  return bounded(config, product(config, head, x))


def product(
    config: Ends, head: Array, x: Array, spec: str = '...d,vd->...v'
) -> Array:
  """Returns states `x` times a head in float32, not bounded yet."""
  return jnp.einsum(
      spec, x, head.astype(x.dtype), precision=config.precision,
      preferred_element_type=jnp.float32)


def bounded(config: Ends, logits: Array) -> Array:
  """Returns logits under the target's tanh bound, if it has one."""
  cap = config.final_softcap
  return logits if cap is None else jnp.tanh(logits / cap) * cap
