"""LANTERN and LANTERN++: acceptance relaxed over near codebook entries.

Lossy, for VQ image tokens: entries whose codebook vectors are close stand for
nearly the same patch, so a draft may count its neighbours' probability.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.verify import base, rejection
from specjax.verify.rejection import Array, Test
from specjax.verify.speculative import Speculative


def neighbours(codebook: np.ndarray, num: int) -> np.ndarray:
  """Returns the nearest codebook entries of each entry, nearest first.

  Args:
    codebook: float[K,d] vectors, all finite.
    num: in [1, K - 1]; the entry itself is not among its neighbours.

  Returns:
    int32[K,num], by Euclidean distance (float64); duplicates of an entry
    come first, and equal vectors are in order of index in every list.

  Raises:
    ValueError: not a finite matrix, or more neighbours than there are.
  """
  codebook = np.asarray(codebook, np.float64)
  if codebook.ndim != 2 or not np.isfinite(codebook).all():
    raise ValueError(f'codebook of shape {codebook.shape}: must be a finite '
                     'matrix [entries, channels]')
  size = len(codebook)
  if not 1 <= num <= size - 1:
    raise ValueError(f'num_neighbours={num}: a codebook of {size} entries '
                     f'allows 1 to {size - 1}')
  out = np.zeros((size, num), np.int32)
  # One column for equal vectors: a matrix product may round them apart.
  vectors, which = np.unique(codebook, axis=0, return_inverse=True)
  which = which.reshape(-1)
  square = (vectors**2).sum(axis=1)
  for begin in range(0, size, 1024):  # bounded memory
    index = np.arange(begin, min(begin + 1024, size))
    distance = square[None] - 2 * codebook[index] @ vectors.T
    distance[index - begin, which[index]] = -np.inf
    distance = distance[:, which]
    distance[index - begin, index] = np.inf
    out[index] = np.argsort(distance, axis=1, kind='stable')[:, :num]
  return out


@dataclasses.dataclass(frozen=True)
class Lantern(Speculative):
  """Lossy: a draft is tested with its neighbours' probability added.

  p(x) grows by the mass of its nearest neighbours, in order of distance, for
  as long as the sum stays <= `delta` (LANTERN), or <= (`lam` - 1) p(x)
  (LANTERN++). With `delta` no more than that mass moves for any one x, which
  does not bound the distortion of the output (it can be large: see
  `excess`); with `lam` and the standard residual no token becomes more than
  `lam` times as likely.

  `Models.verifier['neighbours'] int32[K,>=num_neighbours]` is the table of
  `neighbours`. Token ids outside [offset, offset + K) are tested exactly.

  Attributes:
    num_neighbours: k >= 1; 0 is the exact rule.
    delta: additive limit in [0, 1]; exactly one of `delta` and `lam`.
    lam: multiplicative limit >= 1.
    residual: 'standard' (least distortion for the acceptance obtained) or
      'official' (after the released code: when at least one neighbour
      counted, all k of a rejected token are taken out of q, or of p for
      deterministic drafts; the released window is k + 1. p itself when
      nothing is left, instead of a uniform law).
    offset: first image token's id in the vocabulary.

  References: Jang et al. 2025, arXiv:2410.03355; Park et al. 2025,
  arXiv:2502.06352.
  """

  num_neighbours: int = 1000
  delta: float | None = None
  lam: float | None = None
  residual: str = 'standard'
  offset: int = 0

  name = 'lantern'
  lossy = True
  taps = ('logits',)

  def __post_init__(self):
    if self.num_neighbours < 0:
      raise ValueError(f'num_neighbours={self.num_neighbours}: must be >= 0')
    if (self.delta is None) == (self.lam is None):
      raise ValueError(f'delta={self.delta}, lam={self.lam}: give one of them '
                       '(delta 0.1 is LANTERN, lam 2.0 is LANTERN++)')
    if self.delta is not None and not 0 <= self.delta <= 1:
      raise ValueError(f'delta={self.delta}: must be in [0, 1]')
    if self.lam is not None and not self.lam >= 1:
      raise ValueError(f'lam={self.lam}: must be >= 1')
    if self.residual not in ('standard', 'official'):
      raise ValueError(
          f"residual={self.residual!r}: 'standard' or 'official'")
    if self.offset < 0:
      raise ValueError(f'offset={self.offset}: must be >= 0')

  def check(self, topology, modes, vocab_size: int, params: Any) -> None:
    """Also: there is a table of neighbours, and it fits."""
    base.Rule.check(self, topology, modes, vocab_size, params)
    if self.num_neighbours == 0:  # reads no table
      return
    if not isinstance(params, dict) or 'neighbours' not in params:
      raise ValueError(
          "verify='lantern' needs a codebook: pass verifier_params="
          "{'neighbours': specjax.verify.neighbours(codebook, k)}, or "
          'verify_options.codebook=FILE.npy')
    size, num = params['neighbours'].shape
    if self.num_neighbours > num:
      raise ValueError(f'num_neighbours={self.num_neighbours}: the table '
                       f'holds {num} of {size} codebook entries')
    if self.offset + size > vocab_size:
      raise ValueError(f'{size} codebook entries from id {self.offset} on do '
                       f'not fit a vocabulary of {vocab_size}')

  def numerator(self, params, context, draft, scores, test) -> Array:
    """Returns p(x) plus its neighbours' mass; greedy rows: see `_greedy`."""
    wide = test.p + self.mass(params, test.token, test.p, test.p_of)[0]
    soft = rejection.soft_greedy(context, draft, scores, test)
    gain = self.mass(params, test.token, soft.p, soft.p_of)[0]
    # Greedy: accepted when it is the argmax once p(x) is replaced. Without a
    # gain a tie with the argmax stays what it was.
    near = (gain > 0) & (soft.p + gain >= soft.best)
    greedy = jnp.where(near, rejection.ALWAYS, test.p)
    return jnp.where(soft.rows, greedy, wide)

  def mass(self, params, token: Array, p: Array, p_of) -> tuple[Array, Array]:
    """Returns the neighbours' mass that a token may add, and how many.

    Args:
      params: `Models`. token: int32[...]. p: f32[...], its probability.
      p_of: tokens [...,k] -> probabilities.

    Returns:
      `(mass f32[...], count int32[...])`.
    """
    if self.num_neighbours == 0:
      return jnp.zeros(token.shape), jnp.zeros(token.shape, jnp.int32)
    near, inside = self._near(params, token)
    total = jnp.cumsum(p_of(near), axis=-1)
    if self.delta is not None:
      limit = jnp.full(token.shape, self.delta)
    else:
      assert self.lam is not None
      limit = (self.lam - 1) * p
    # A prefix in order of distance: sums only grow.
    taken = (total <= limit[..., None]) & inside[..., None]
    count = jnp.sum(taken, axis=-1, dtype=jnp.int32)
    return jnp.max(jnp.where(taken, total, 0.0), axis=-1), count

  def _near(self, params, token: Array) -> tuple[Array, Array]:
    """Returns the neighbours' ids [...,k], and whether `token` has any."""
    table = params.verifier['neighbours'][:, :self.num_neighbours]
    index = token - self.offset
    inside = (index >= 0) & (index < table.shape[0])
    index = jnp.clip(index, 0, table.shape[0] - 1)
    return table[index].astype(jnp.int32) + self.offset, inside

  def left_over(self, params, test: Test, p: Array, q: Array) -> Array:
    """Returns the law after a rejection, standard or official."""
    standard = jnp.maximum(p - q, 0.0)
    if self.residual == 'standard' or self.num_neighbours == 0:
      return standard
    _, count = self.mass(params, test.token, test.p, test.p_of)
    near, inside = self._near(params, test.token)
    out = jnp.where((inside & (count > 0))[..., None], near, p.shape[-1])
    flat = jax.vmap(lambda x, i: x.at[i].set(True, mode='drop'))
    hit = flat(jnp.zeros((out[..., 0].size, p.shape[-1]), bool),
               out.reshape(-1, out.shape[-1])).reshape(p.shape)
    is_point = q >= 1.0  # all mass on the token
    fixed = jnp.any(is_point, axis=-1, keepdims=True)
    sampled = jnp.maximum(p - jnp.where(hit, 0.0, q), 0.0)
    return jnp.where(fixed, jnp.where(hit | is_point, 0.0, p), sampled)
