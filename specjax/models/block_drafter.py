"""A drafter that proposes a block of tokens in one forward pass.

DFlash (arXiv:2602.06036) and DSpark (arXiv:2607.05147): a few layers run over
the block `[last token, mask, mask, ...]`, both ways, and attend to the
target's hidden states, whose keys and values are the only cache. Each slot
scores one position. A Markov head adds a term that depends on the token
drawn before, so that the drafts of a block fit together; a confidence head
estimates the chance that a draft is accepted.

Training runs many blocks a text at once, decoding one: `BlockNet.__call__` and
`BlockNet.draft` are the same arithmetic.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from specjax.models import draft_layers, whole_attention
from specjax.models.attention import Block, Cache, Sight
from specjax.models.draft_layers import DraftLayer
from specjax.models.transformer import RMSNorm, TransformerConfig, declare

Array = jax.Array

LAYOUTS = ('anchor', 'mask')
MARKOV_HEADS = ('none', 'vanilla', 'gated')
MARKOV_INPUTS = ('table', 'embedding')


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """A block drafter's shape. Hashable.

  Attributes:
    decoder: layers of the drafter: widths, heads, norms, rotary base, dtype.
      `embed_dim`, `embed_scale` and `final_softcap` are the target's,
      `vocab_size` the target's V. Options: see `EagleConfig`.
    taps: layers of the target whose inputs are read: ids of the residual
      stream entering layer i (`'resid_i'`), ascending.
    draft_vocab_size: W, tokens that can be drafted.
    num_slots: G, tokens proposed in one pass.
    layout: 'anchor': slot k predicts the token after its own position, G
      slots; 'mask': slot k predicts its own position, the first slot
      nothing, G + 1 slots (the published DFlash weights).
    mask_token: id whose embedding stands for what is not known yet, or None
      for a trained vector.
    markov: 'none' (DFlash), 'vanilla' or 'gated' (DSpark).
    markov_rank: r.
    markov_input: 'table': a trained vector for each kept token and one for
      all others; 'embedding': a projection of the target's embedding.
    confidence: whether there is a confidence head.
    temperatures: what its logits are divided by, a number > 0 for each slot
      (`distill.confidence` fits them); () for 1.
  """

  decoder: TransformerConfig
  taps: tuple[int, ...]
  draft_vocab_size: int
  num_slots: int = 8
  layout: str = 'anchor'
  mask_token: int | None = None
  markov: str = 'vanilla'
  markov_rank: int = 128
  markov_input: str = 'table'
  confidence: bool = True
  temperatures: tuple[float, ...] = ()

  def __post_init__(self):
    draft_layers.check(self.decoder)
    for name, value, known in (
        ('layout', self.layout, LAYOUTS),
        ('markov', self.markov, MARKOV_HEADS),
        ('markov_input', self.markov_input, MARKOV_INPUTS)):
      if value not in known:
        raise ValueError(f'{name}={value!r}: known are {", ".join(known)}')
    if not self.taps or list(self.taps) != sorted(set(self.taps)):
      raise ValueError(f'taps={self.taps}: must be ascending layer ids')
    if self.num_slots < 1 or self.markov_rank < 1:
      raise ValueError(f'num_slots={self.num_slots}, markov_rank='
                       f'{self.markov_rank}: must be >= 1')
    if self.temperatures and not (
        self.confidence and len(self.temperatures) == self.num_slots
        and min(self.temperatures) > 0):
      raise ValueError(f'temperatures={self.temperatures}: must be > 0, one '
                       'for each slot of a drafter with a confidence head')
    if self.draft_vocab_size > self.decoder.vocab_size:
      raise ValueError(
          f'draft_vocab_size={self.draft_vocab_size}: the target has '
          f'{self.decoder.vocab_size} tokens')

  @property
  def width(self) -> int:
    """Slots of a block, b."""
    return self.num_slots + (self.layout == 'mask')

  @property
  def first(self) -> int:
    """The slot that predicts the first draft."""
    return self.width - self.num_slots


class BlockNet(nn.Module):
  """The network; see the module docstring."""

  config: BlockConfig

  def setup(self):
    c, d = self.config, self.config.decoder
    self.fuse = declare(
        self, 'fuse', (len(c.taps) * d.embed_dim, d.embed_dim),
        (None, 'embed'), d.dtype)
    self.context_norm = RMSNorm(d, d.embed_dim)
    self.layers = [DraftLayer(d, name=f'layer_{i}')
                   for i in range(d.num_layers)]
    self.final_norm = RMSNorm(d, d.embed_dim)
    if c.mask_token is None:
      self.mask = declare(self, 'mask', (d.embed_dim,), ('embed',), d.dtype)
    rank = c.markov_rank
    if c.markov != 'none':
      rows = (c.draft_vocab_size + 1 if c.markov_input == 'table'
              else d.embed_dim)
      self.markov_in = declare(
          self, 'markov_in', (rows, rank), (None, None), d.dtype)
      self.markov_out = declare(
          self, 'markov_out', (rank, c.draft_vocab_size), (None, None),
          d.dtype)
    if c.markov == 'gated':
      self.markov_gate = declare(
          self, 'markov_gate', (d.embed_dim + rank, rank), (None, None),
          d.dtype)
      self.markov_gate_bias = declare(
          self, 'markov_gate_bias', (rank,), (None,), d.dtype,
          nn.initializers.zeros_init())
    if c.confidence:
      size = d.embed_dim + (rank if c.markov != 'none' else 0)
      self.confidence_out = declare(
          self, 'confidence_out', (size,), (None,), jnp.float32)
      self.confidence_bias = declare(
          self, 'confidence_bias', (), (), jnp.float32,
          nn.initializers.zeros_init())

  def context(self, features: Array, position: Array):
    """Returns `(k, v) [B,T,G,H]` a layer for `features [B,T,m*D]`."""
    d = self.config.decoder
    x = jnp.dot(features.astype(self.fuse.dtype), self.fuse,
                precision=d.precision)
    x = self.context_norm(x)
    table = draft_layers.tables(d, position)
    return [layer.attention.keys(x, table) for layer in self.layers]

  def block_input(self, anchor: Array, mask: Array | None) -> Array:
    """Returns [...,b,D] from the anchors' embedding [...,D]."""
    rest = self.mask if mask is None else mask
    rest = jnp.broadcast_to(
        rest.astype(anchor.dtype), anchor.shape[:-1]
        + (self.config.width - 1, anchor.shape[-1]))
    return jnp.concatenate([anchor[..., None, :], rest], axis=-2)

  def __call__(
      self, features: Array, text_position: Array, anchor: Array,
      anchor_position: Array, seen: Array, mask: Array | None = None,
  ) -> Array:
    """Runs A blocks of each text: training.

    Args:
      features: [B,S,m*D]. text_position: int32[B,S], rotary positions.
      anchor: [B,A,D], embeddings of the blocks' first tokens.
      anchor_position: int32[B,A].
      seen: bool[B,A,S], context that a block may see: strictly before its
        anchor, same document.
      mask: [D], embedding of `mask_token`, if the config has one.

    Returns:
      [B,A,G,D], normed states of the slots that predict.
    """
    c, d = self.config, self.config.decoder
    batch, num = anchor.shape[:2]
    z = self.block_input(anchor, mask).reshape(batch, num * c.width, -1)
    position = anchor_position[..., None] + jnp.arange(c.width)
    table = draft_layers.tables(d, position.reshape(batch, -1))
    context = self.context(features, text_position)

    def attend_to(k, v):
      def attend(q, bk, bv):
        return whole_attention.attend_blocks(
            q, k, v, bk, bv, seen, scale=d.score_scale,
            precision=d.precision)
      return attend

    for layer, (k, v) in zip(self.layers, context, strict=True):
      z = layer(z, table, attend_to(k, v))
    z = self.final_norm(z).reshape(batch, num, c.width, -1)
    return z[:, :, c.first:]

  def draft(
      self, anchor: Array, cache: tuple, base: Array,
      mask: Array | None = None,
  ) -> tuple[Array, tuple]:
    """Runs one block a row over cached context: decoding.

    Args:
      anchor: [B,D]. cache: keys and values of the context, one dict a layer.
      base: int32[B], the anchor's position; context is seen below it.

    Returns:
      [B,G,D], like `__call__`, and the cache. The block's own entries are in
      it, from `base` on: never seen again, since context is written over
      them or the next block is.
    """
    c, d = self.config, self.config.decoder
    z = self.block_input(anchor, mask)
    position = base[:, None] + jnp.arange(c.width)
    table = draft_layers.tables(d, position)
    slots = cache[0]['k'].shape[2]
    seen = jnp.arange(slots) < base[:, None] + c.width
    sight = Sight(jnp.broadcast_to(
        seen[:, None], position.shape + (slots,)))
    block = Block(base=base, position=position)
    new: list[Cache] = []
    for layer, entry in zip(self.layers, cache, strict=True):
      z = layer(z, table, draft_layers.over_cache(
          d, entry, block, sight, new))
    return self.final_norm(z)[:, c.first:], tuple(new)

  def previous(self, index: Array, embedding: Array) -> Array:
    """Returns the Markov vector [...,r] of previous tokens.

    Args:
      index: int32[...], draft ids, W for tokens that are not kept.
      embedding: [...,D] of the same tokens.
    """
    if self.config.markov_input == 'table':
      return jnp.take(self.markov_in, index, axis=0, mode='clip')
    return jnp.dot(embedding.astype(self.markov_in.dtype), self.markov_in,
                   precision=self.config.decoder.precision)

  def gate(self, hidden: Array, previous: Array) -> Array:
    """Returns what multiplies `markov_out`, [...,r] (DSpark's heads)."""
    if self.config.markov == 'vanilla':
      return previous
    both = jnp.concatenate([hidden, previous.astype(hidden.dtype)], axis=-1)
    gate = jnp.dot(both, self.markov_gate,
                   precision=self.config.decoder.precision)
    return jax.nn.sigmoid(gate + self.markov_gate_bias) * previous

  def bias(self, hidden: Array, previous: Array) -> Array:
    """Returns f32[...,W], what the previous token adds to the logits."""
    return jnp.dot(
        self.gate(hidden, previous), self.markov_out,
        precision=self.config.decoder.precision,
        preferred_element_type=jnp.float32)

  def confidence(self, hidden: Array, previous: Array | None) -> Array:
    """Returns the logit f32[...] of the chance that a slot is accepted.

    Inputs are detached: the head cannot hurt the drafter.
    """
    x = hidden.astype(jnp.float32)
    if previous is not None:
      x = jnp.concatenate([x, previous.astype(jnp.float32)], axis=-1)
    x = jax.lax.stop_gradient(x)
    return x @ self.confidence_out + self.confidence_bias

  def everything(self, features, position, anchor, anchor_position, seen):
    """Touches every parameter: for `init`."""
    mask = None if self.config.mask_token is None else anchor[0, 0]
    out = self(features, position, anchor, anchor_position, seen, mask)
    e = None
    if self.config.markov != 'none':
      e = self.previous(jnp.zeros(out.shape[:-1], jnp.int32), out)
      self.bias(out, e)
    if self.config.confidence:
      self.confidence(out, e)


def init(config: BlockConfig, key: Array) -> Any:
  """Returns random parameters, boxed with their logical axes."""
  d = config.decoder
  x = jnp.zeros((1, 1, len(config.taps) * d.embed_dim), d.dtype)
  zero = jnp.zeros((1, 1), jnp.int32)
  anchor = jnp.zeros((1, 1, d.embed_dim), d.dtype)
  return BlockNet(config).init(
      key, x, zero, anchor, zero, jnp.ones((1, 1, 1), bool),
      method='everything')['params']


def default_taps(num_layers: int, count: int) -> tuple[int, ...]:
  """Returns `count` layers spread over a target, as published drafters do.

  Ids of the residual stream *entering* a layer, hence one more than the
  published ids of the stream leaving one.
  """
  if count == 1:
    return (num_layers // 2 + 1,)
  step = (num_layers - 4) / (count - 1)
  return tuple(round(1 + i * step) + 1 for i in range(count))
