"""Attention over whole texts, without a cache: for training.

`attend_whole` is the target's, `attend_blocks` that of block drafters,
`attend_rows` that of EAGLE. Each row sees what it would in decoding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from specjax.models import attention
from specjax.models.attention import UNSEEN, Sight

Array = jax.Array


def attend_whole(
    q: Array, k: Array, v: Array, seen: Array, *, scale: float,
    softcap: float | None, precision,
) -> Array:
  """Attention of a whole text over itself.

  A fused kernel of the vendor where there is one (half precision on NVIDIA
  GPUs): the scores are never stored.

  Args:
    q: [B,T,G,Q,H]. k, v: [B,T,G,H]. seen: bool[B,T,T]. The rest:
      `attention.attend`.

  Returns:
    [B,T,G,Q,H] in q's dtype.
  """
  half = q.dtype in (jnp.bfloat16, jnp.float16)
  if softcap is None and half and jax.default_backend() == 'gpu':
    batch, size, groups, per, head_dim = q.shape
    out = jax.nn.dot_product_attention(
        q.reshape(batch, size, groups * per, head_dim), k, v,
        mask=seen[:, None], scale=scale, implementation='cudnn')
    return out.reshape(q.shape)
  heads_first = lambda x: jnp.moveaxis(x, 2, 1)  # noqa: E731
  return attention.attend(
      q, heads_first(k), heads_first(v), Sight(seen), scale=scale,
      softcap=softcap, precision=precision)


def attend_blocks(
    q: Array, k: Array, v: Array, bk: Array, bv: Array, seen: Array, *,
    scale: float, precision,
) -> Array:
  """Attention of A blocks over a shared context and their own slots.

  Two products and one softmax; no (A*b) x (A*b) mask is ever made.

  Args:
    q: [B,A*b,G,Q,H]. k, v: [B,S,G,H]. bk, bv: [B,A*b,G,H].
    seen: bool[B,A,S]. scale: multiplies the scores.
    precision: of the matrix products.

  Returns:
    [B,A*b,G,Q,H] in q's dtype. Scores and softmax are float32.
  """
  batch, total, groups, per, head_dim = q.shape
  num, slots = seen.shape[1:]
  width = total // num
  split = lambda x: x.reshape((batch, num, width) + x.shape[2:])  # noqa: E731
  q, bk, bv = split(q), split(bk), split(bv)
  far = jnp.einsum('bawgqh,bsgh->bgqaws', q, k, precision=precision,
                   preferred_element_type=jnp.float32) * scale
  far = jnp.where(seen[:, None, None, :, None], far, UNSEEN)
  near = jnp.einsum('bawgqh,baxgh->bgqawx', q, bk, precision=precision,
                    preferred_element_type=jnp.float32) * scale
  probs = jax.nn.softmax(
      jnp.concatenate([far, near], axis=-1), axis=-1).astype(q.dtype)
  out = jnp.einsum('bgqaws,bsgh->bawgqh', probs[..., :slots], v,
                   precision=precision, preferred_element_type=jnp.float32)
  out += jnp.einsum('bgqawx,baxgh->bawgqh', probs[..., slots:], bv,
                    precision=precision, preferred_element_type=jnp.float32)
  return out.astype(q.dtype).reshape(batch, total, groups, per, head_dim)


def attend_rows(
    q: Array, stored: list[tuple[Array, Array]], seen: Array, *,
    scale: float, precision,
) -> Array:
  """Attention over all rows' first keys and each row's own later ones.

  One product over the text, one dot product a later step, one softmax; the
  scores are computed again in the backward pass.

  Args:
    q: [B,S,G,Q,H]. stored: `(k, v) [B,S,G,H]` of steps 0, 1, ...
    seen: bool[B,S,S], of step 0. scale: multiplies the scores.
    precision: of the matrix products.

  Returns:
    [B,S,G,Q,H] in q's dtype. Scores and softmax are float32.
  """
  size = q.shape[1]

  @jax.checkpoint
  def attend(q, stored):
    (k, v), later = stored[0], stored[1:]
    scores = [jnp.where(seen[:, None, None], jnp.einsum(
        'btgqh,bsgh->bgqts', q, k, precision=precision,
        preferred_element_type=jnp.float32), UNSEEN)]
    scores += [jnp.einsum(
        'btgqh,btgh->bgqt', q, own, precision=precision,
        preferred_element_type=jnp.float32)[..., None] for own, _ in later]
    probs = jax.nn.softmax(
        jnp.concatenate(scores, axis=-1) * scale,
        axis=-1).astype(q.dtype)
    out = jnp.einsum('bgqts,bsgh->btgqh', probs[..., :size], v,
                     precision=precision, preferred_element_type=jnp.float32)
    for i, (_, own) in enumerate(later):
      share = jnp.moveaxis(probs[..., size + i], 3, 1)  # [B,S,G,Q]
      out += share[..., None].astype(jnp.float32) * own[:, :, :, None]
    return out.astype(q.dtype)

  return attend(q, tuple(stored))
