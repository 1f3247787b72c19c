"""A drafter that continues the target's hidden states: EAGLE-1, EAGLE-3.

Row t takes what the target thought at position t and the token that follows,
`(f_t, emb(x_{t+1}))`, and scores x_{t+2}. Its rotary position is t: a text of
n tokens has n - 1 rows, the first token none. Behind the text a row takes the
output of the row before it in the place of the target's state.

Training runs the rows of whole texts, then lets every row go on from its own
output, as decoding does (`EagleNet.unroll`); `EagleNet.extend` is the same
arithmetic over a cache.

References: Li et al. 2024 (EAGLE), arXiv:2401.15077; Li et al. 2025
(EAGLE-3), arXiv:2503.01840; Zhang et al. 2025 (HASS), arXiv:2408.15766.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from specjax.models import attention, draft_layers, whole_attention
from specjax.models.attention import Block, Cache
from specjax.models.draft_layers import DraftLayer
from specjax.models.transformer import RMSNorm, TransformerConfig, declare

Array = jax.Array

VERSIONS = ('1', '3')


@dataclasses.dataclass(frozen=True)
class EagleConfig:
  """An EAGLE drafter's shape. Hashable.

  Version '1' (also EAGLE-2, HASS): `z = fuse([emb; f])` enters the layers, f
  being the target's state after its last norm; the first layer has no norm
  before attention, nothing is normed at the end, and the output, a guess of
  the next f, goes to the target's head. Version '3': `g = fuse(taps)` is the
  residual stream; attention reads `[norm(emb); norm(g)]`; the output is
  normed before the head.

  Attributes:
    decoder: layers of the drafter: widths, heads, norms, rotary base, dtype.
      `embed_dim`, `embed_scale` and `final_softcap` are the target's,
      `vocab_size` the target's V. Its `qk_norm`, `qkv_bias` and
      `query_scale` hold; windows and `post_norms` are not supported.
    draft_vocab_size: W, tokens that can be drafted.
    version: '1' or '3'.
    taps: version '3': layers of the target whose inputs are read (`'resid_i'`
      is the residual stream entering layer i), ascending, fused in this
      order. Version '1' reads 'final': ().
    own_head: version '3': a trained head [W,D]; else the target's rows.
    fuse_bias: whether `fuse` has a bias (published weights of version '1').
  """

  decoder: TransformerConfig
  draft_vocab_size: int
  version: str = '3'
  taps: tuple[int, ...] = ()
  own_head: bool = False
  fuse_bias: bool = False

  def __post_init__(self):
    if self.version not in VERSIONS:
      raise ValueError(
          f'version={self.version!r}: known are {", ".join(VERSIONS)}')
    first = self.version == '1'
    if first == bool(self.taps) or list(self.taps) != sorted(set(self.taps)):
      raise ValueError(
          f'taps={self.taps}: ' + ("version '1' reads 'final' alone" if first
                                   else 'must be ascending layer ids'))
    if first and self.own_head:
      raise ValueError("own_head: version '1' has the target's head")
    if not 1 <= self.draft_vocab_size <= self.decoder.vocab_size:
      raise ValueError(
          f'draft_vocab_size={self.draft_vocab_size}: must be in [1, '
          f'{self.decoder.vocab_size}], the tokens of the target')
    draft_layers.check(self.decoder)


class EagleNet(nn.Module):
  """The network; see the module docstring."""

  config: EagleConfig

  def setup(self):
    c, d = self.config, self.config.decoder
    inputs = 2 if c.version == '1' else len(c.taps)
    self.fuse = declare(self, 'fuse', (inputs * d.embed_dim, d.embed_dim),
                        (None, 'embed'), d.dtype)
    if c.fuse_bias:
      self.fuse_bias = declare(
          self, 'fuse_bias', (d.embed_dim,), ('embed',), d.dtype,
          nn.initializers.zeros_init())
    third = c.version == '3'
    self.layers = [
        DraftLayer(d, is_normed=third or i > 0, with_embedding=third,
                   name=f'layer_{i}') for i in range(d.num_layers)]
    if third:
      self.final_norm = RMSNorm(d, d.embed_dim)
    if c.own_head:
      self.head = declare(self, 'head', (c.draft_vocab_size, d.embed_dim),
                          ('vocab', 'embed'), d.dtype)

  def _fuse(self, x: Array) -> Array:
    x = jnp.dot(x.astype(self.fuse.dtype), self.fuse,
                precision=self.config.decoder.precision)
    # In the stream's dtype: vectors may be kept in float32.
    return x + self.fuse_bias.astype(x.dtype) if self.config.fuse_bias else x

  def observe(self, features: Array) -> Array:
    """Returns what rows take, [...,D], of the target's states [...,m*D]."""
    if self.config.version == '1':
      return features.astype(self.fuse.dtype)
    return self._fuse(features)

  def rows(self, given: Array, embedding: Array, position: Array,
           attends) -> Array:
    """Runs rows: outputs [B,T,D].

    Args:
      given: [B,T,D], from `observe`, or outputs of the rows before.
      embedding: [B,T,D], of the tokens that follow.
      position: int32[B,T], rotary positions.
      attends: `attend(q, k, v) -> [B,T,G,Q,H]` of each layer.
    """
    table = draft_layers.tables(self.config.decoder, position)
    x = given
    if self.config.version == '1':
      x = self._fuse(jnp.concatenate([embedding, given], axis=-1))
    for layer, attend in zip(self.layers, attends, strict=True):
      x = layer(x, table, attend, embedding)
    return x

  def extend(
      self, given: Array, embedding: Array, cache: tuple, block: Block
  ) -> tuple[Array, tuple]:
    """Runs rows over a cache: outputs [B,T,D] and the cache. Decoding."""
    d = self.config.decoder
    sight = attention.sight(cache[0], block, None)
    new: list[Cache] = []
    x = self.rows(
        given, embedding, block.position,
        [draft_layers.over_cache(d, entry, block, sight, new)
         for entry in cache])
    return x, tuple(new)

  def unroll(
      self, given: Array, embedding: Array, position: Array, seen: Array,
      steps: int, detach: bool = False,
  ) -> Array:
    """Runs the rows of whole texts, then each on from its own output.

    Step 0 of row t is the row itself. Step s is what drafting makes of it s
    tokens later: it takes the output of step s - 1 and emb(x_{t+1+s}),
    stands at position t + s, and sees step 0 of the rows up to t and steps
    1 to s of row t. Steps that leave the text repeat its last token.

    Args:
      given: [B,S,D], from `observe`.
      embedding: [B,S,D], of the text's own tokens.
      position: int32[B,S], rotary positions of the tokens.
      seen: bool[B,S,S], rows that a row sees, itself included.
      steps: K >= 1.
      detach: no gradient through outputs that are fed back. So HASS trains:
        its passes over shifted texts hold the same numbers, step s of row t
        at row t + s of pass s + 1.

    Returns:
      [B,K,S,D], the outputs by step.
    """
    d, size = self.config.decoder, given.shape[1]
    stored: list[list[tuple[Array, Array]]] = [[] for _ in self.layers]

    def attend_to(own):
      def attend(q, k, v):
        own.append((k, v))
        return whole_attention.attend_rows(
            q, own, seen, scale=d.score_scale, precision=d.precision)
      return attend

    out = []
    for step in range(steps):
      after = jnp.minimum(jnp.arange(size) + 1 + step, size - 1)
      given = self.rows(given, embedding[:, after], position + step,
                        [attend_to(own) for own in stored])
      out.append(given)
      if detach:
        given = jax.lax.stop_gradient(given)
    return jnp.stack(out, axis=1)

  def state(self, x: Array) -> Array:
    """Returns what the head multiplies, [...,D], of outputs [...,D]."""
    return self.final_norm(x) if self.config.version == '3' else x

  def everything(self, features: Array, embedding: Array) -> Array:
    """Touches every parameter: for `init`."""
    size = features.shape[1]
    out = self.unroll(
        self.observe(features), embedding, jnp.zeros((1, size), jnp.int32),
        jnp.ones((1, size, size), bool), 1)
    return self.state(out)


def init(config: EagleConfig, key: Array) -> Any:
  """Returns random parameters, boxed with their logical axes."""
  d = config.decoder
  features = jnp.zeros((1, 1, max(len(config.taps), 1) * d.embed_dim), d.dtype)
  return EagleNet(config).init(
      key, features, jnp.zeros((1, 1, d.embed_dim), d.dtype),
      method='everything')['params']


def default_taps(num_layers: int) -> tuple[int, ...]:
  """Returns the layers that published EAGLE-3 drafters of a target read."""
  return tuple(sorted({min(2, num_layers - 1), num_layers // 2,
                       max(num_layers - 3, 0)}))
