"""Grouped speculative decoding: codes of like probability stand together.

Lossy, for image tokens drafted by Jacobi windows: where the target's law is
flat, many codes would do, and exact tests reject most of what was drafted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import law as law_lib
from specjax.verify import base
from specjax.verify.rejection import Array, Test
from specjax.verify.speculative import Speculative


@dataclasses.dataclass(frozen=True)
class Grouped(Speculative):
  """Lossy: accepts x with f(x) = min(1, sum_G p / sum_G q), G a group of x.

  G(x) is x and the `group` / 2 tokens on each side of it in the order of
  target probability (at the ends of the order there are fewer), less those
  with |p - p(x)| >= `band`, and less those whose embeddings are `distance` or
  more away. After a rejection the next token is drawn from
  norm(relu(p - q f)), with the f that was used: so `excess` is, on average,
  the total variation between the law of the emitted token and the target's.
  f may be above or below the exact rule's min(1, p / q).

  A token of probability zero is never accepted. Greedy rows are exact.

  `Models.verifier['codebook'] float[K,d]` holds the embeddings, of token ids
  [offset, offset + K); it is read if `distance` is given. A token without one
  is in nobody's group but its own.

  Attributes:
    group: G >= 0, even; 0 is the exact rule.
    band: in (0, 1]; 1 drops nothing.
    distance: Euclidean, > 0; None drops nothing.
    offset: first image token's id in the vocabulary.

  References: So et al. 2025, arXiv:2508.07747 (G = 14, band 0.15, distance
  0.5 in the released code, which draws corrections from norm(relu(p - q))).
  """

  group: int = 14
  band: float = 0.15
  distance: float | None = None
  offset: int = 0

  name = 'grouped'
  lossy = True
  chains_only = True

  def __post_init__(self):
    if self.group < 0 or self.group % 2:
      raise ValueError(f'group={self.group}: must be even and >= 0')
    if not 0 < self.band <= 1:
      raise ValueError(f'band={self.band}: must be in (0, 1]')
    if self.distance is not None and not self.distance > 0:
      raise ValueError(f'distance={self.distance}: must be > 0')
    if self.offset < 0:
      raise ValueError(f'offset={self.offset}: must be >= 0')

  def check(self, topology, modes, vocab_size: int, params: Any) -> None:
    """Also: there are embeddings if they are asked for, and they fit."""
    base.Rule.check(self, topology, modes, vocab_size, params)
    if self.distance is None or not self.group:  # reads no table
      return
    if not isinstance(params, dict) or 'codebook' not in params:
      raise ValueError(
          f"verify='grouped' with distance={self.distance} needs a codebook: "
          "pass verifier_params={'codebook': vectors}, or "
          'verify_options.codebook=FILE.npy')
    size = len(params['codebook'])
    if self.offset + size > vocab_size:
      raise ValueError(f'{size} codebook entries from id {self.offset} on do '
                       f'not fit a vocabulary of {vocab_size}')

  def numerator(self, params, context, draft, scores, test) -> Array:
    """Returns q(x) sum_G p / sum_G q; p(x) on greedy rows."""
    del context
    law = scores.target_law
    if isinstance(law, law_lib.Point) or not self.group:
      return test.p
    q = jax.nn.one_hot(test.token, law.vocab_size, dtype=jnp.float32)
    if draft.draft_law is not None:
      slots = jnp.broadcast_to(base.law_rows(draft), test.token.shape)
      point = base.is_point(jnp.broadcast_to(draft.mode, test.token.shape))
      q = jnp.where(point[..., None], q, draft.draft_law.at(slots).probs)
    return self.compared(
        params, law.at(test.row).probs, q, test.token[..., None])[..., 0]

  def left_over(self, params, test: Test, p: Array, q: Array) -> Array:
    """Returns relu(p - q f), f32[...,V]."""
    del test
    if not self.group:
      return jnp.maximum(p - q, 0.0)
    token = jnp.broadcast_to(jnp.arange(p.shape[-1]), p.shape)
    return jnp.maximum(
        p - jnp.minimum(q, self.compared(params, p, q, token)), 0.0)

  def compared(self, params, p: Array, q: Array, token: Array) -> Array:
    """Returns q(x) sum_G p / sum_G q, what is compared with u q(x).

    Args:
      params: `Models`. p, q: f32[...,V], batched alike. token: int32[...,T],
        the tokens x.

    Returns:
      f32[...,T]; 0 where p(x) is.
    """
    size, reach = p.shape[-1], self.group // 2
    order = jnp.argsort(-p, axis=-1, stable=True)
    center = _take(jnp.argsort(order, axis=-1), token)
    own_p, own_q = _take(p, token), _take(q, token)

    def add(k: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
      place = center + k - reach
      other = _take(order, jnp.clip(place, 0, size - 1))
      other_p = _take(p, other)
      near = (place >= 0) & (place < size) & (
          jnp.abs(other_p - own_p) < self.band)
      near &= self._close(params, token, other)
      near |= k == reach  # itself
      return (sums[0] + jnp.where(near, other_p, 0.0),
              sums[1] + jnp.where(near, _take(q, other), 0.0))

    zero = jnp.zeros_like(own_p)
    mass_p, mass_q = jax.lax.fori_loop(0, self.group + 1, add, (zero, zero))
    ratio = mass_p / jnp.where(mass_q > 0, mass_q, 1.0)
    wide = jnp.where(mass_q > 0, own_q * ratio, own_p)
    return jnp.where(own_p > 0, wide, 0.0)

  def _close(self, params, one: Array, other: Array) -> Array:
    """Returns whether embeddings are near, bool like the tokens."""
    if self.distance is None:
      return jnp.ones(one.shape, bool)
    table = params.verifier['codebook']
    vectors, known = [], []
    for token in (one, other):
      index = token - self.offset
      known.append((index >= 0) & (index < len(table)))
      vectors.append(table[jnp.clip(index, 0, len(table) - 1)])
    square = jnp.sum((vectors[0] - vectors[1])**2, axis=-1)
    return known[0] & known[1] & (square < self.distance**2)


def _take(x: Array, index: Array) -> Array:
  """Gathers along the last axis."""
  return jnp.take_along_axis(x, index, axis=-1)
