"""Pure functions of a block drafter, as its source and its trainer need."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.models import (
  attention,
  block_drafter,
  draft_vocab,
  transformer,
  weights,
)
from specjax.models.attention import Block
from specjax.models.block_drafter import BlockConfig, BlockNet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockModel:
  """A block drafter over a target's hidden states.

  Parameters are `{'net', 'head', 'ids', 'inverse'}`: trained weights, the
  rows of the target's head that can be drafted, and the draft vocabulary
  (`attach`). `target` is the target's parameters.
  """

  config: BlockConfig

  @property
  def vocab_size(self) -> int:
    """V, of the target."""
    return self.config.decoder.vocab_size

  @property
  def taps(self) -> tuple[str, ...]:
    """Names of the hidden states that are read."""
    return tuple(f'resid_{i}' for i in self.config.taps)

  @property
  def num_slots(self) -> int:
    """G, tokens proposed in one pass."""
    return self.config.num_slots

  def init(self, key: Array) -> Any:
    """Returns random weights in float32."""
    return weights.trainable(block_drafter.init(self.config, key))

  def attach(self, net: Any, target: Any, ids: Any) -> Any:
    """Returns the parameters for decoding: shares the target's head.

    Args:
      net: trained weights. target: the target's parameters.
      ids: int[W], ascending draft vocabulary.

    Raises:
      ValueError: ids that are not W ascending tokens.
    """
    table = draft_vocab.table(
        ids, self.vocab_size, self.config.draft_vocab_size)
    return {'net': net, 'head': draft_vocab.rows(target, table['ids']),
            **table}

  def empty(self, batch: int, capacity: int) -> tuple:
    """Returns empty keys and values, one dict a layer."""
    return transformer.empty_cache(
        self.config.decoder, batch, capacity + self.config.width)

  def absorb(
      self, params: Any, cache: tuple, features: Array, base: Array,
      fed: Array,
  ) -> tuple:
    """Stores the keys and values of `features [B,T,m*D]`.

    Row t goes to position `base + t` where `fed bool[B,T]`.
    """
    position = base[:, None] + jnp.arange(features.shape[1])
    rows = self._apply(params, 'context', features, position)
    block = Block(base=base, position=position, fed=fed)
    return tuple(attention.write(entry, block, k, v)
                 for entry, (k, v) in zip(cache, rows, strict=True))

  def draft(
      self, params: Any, target: Any, cache: tuple, token: Array,
      base: Array,
  ) -> tuple[Array, tuple]:
    """Returns hidden states [B,G,D] of the slots after `token`, the cache.

    `token int32[B]` stands at position `base`; context is seen below it.
    """
    return self._apply(params, 'draft', self.embed(target, token), cache,
                       base, self.mask(target))

  def embed(self, target: Any, tokens: Array) -> Array:
    """Returns the target's embeddings [...,D] of `tokens`."""
    return draft_vocab.embed(self.config.decoder, target, tokens)

  def mask(self, target: Any) -> Array | None:
    """Returns the embedding of the mask token, or None if it is trained."""
    if self.config.mask_token is None:
      return None
    return self.embed(target, jnp.asarray(self.config.mask_token))

  def logits(self, params: Any, hidden: Array) -> Array:
    """Returns f32[...,W] of states [...,D], the Markov term left out."""
    return draft_vocab.scores(self.config.decoder, params['head'], hidden)

  def previous(self, params: Any, target: Any, tokens: Array):
    """Returns the Markov vectors [...,r] of target ids, or None."""
    if self.config.markov == 'none':
      return None
    index = jnp.take(params['inverse'], tokens, mode='clip')
    return self._apply(
        params, 'previous', index, self.embed(target, tokens))

  def bias(self, params: Any, hidden: Array, previous: Array) -> Array:
    """Returns f32[...,W], what the tokens before add to the logits."""
    return self._apply(params, 'bias', hidden, previous)

  def transitions(
      self, params: Any, hidden: Array, previous: Array, index: Array
  ) -> Array:
    """Returns f32[...,K,J], what candidate k before adds to candidate j.

    Args:
      hidden: [...,D], of the slots that score the candidates.
      previous: [...,K,r], of candidates of the slot before.
      index: int32[...,J], draft ids of the slot's own candidates.
    """
    wide = jnp.broadcast_to(
        hidden[..., None, :], previous.shape[:-1] + hidden.shape[-1:])
    gated = self._apply(params, 'gate', wide, previous)
    columns = jnp.take(params['net']['markov_out'].T, index, axis=0)
    return jnp.einsum('...kr,...jr->...kj', gated, columns.astype(
        gated.dtype), precision=self.config.decoder.precision,
        preferred_element_type=jnp.float32)

  def confidence(
      self, params: Any, hidden: Array, previous: Array | None, slot: Any
  ) -> Array | None:
    """Returns the chance f32[...] that a slot's draft is accepted.

    Given that those before it are. `slot int32[]` is the same for all.
    """
    if not self.config.confidence:
      return None
    logit = self.confidence_logit(params, hidden, previous)
    if self.config.temperatures:
      logit /= jnp.asarray(self.config.temperatures, jnp.float32)[slot]
    return jax.nn.sigmoid(logit)

  def confidence_logit(
      self, params: Any, hidden: Array, previous: Array | None
  ) -> Array:
    """Returns the confidence head's output f32[...], as it is trained."""
    return self._apply(params, 'confidence', hidden, previous)

  def spread(self, params: Any, logits: Array) -> Array:
    """Returns f32[...,V] of f32[...,W]."""
    return draft_vocab.spread(logits, params['inverse'])

  def blocks(self, params: Any, *args) -> Array:
    """Runs many blocks of whole texts (`BlockNet.__call__`)."""
    return self._apply(params, '__call__', *args)

  def _apply(self, params: Any, method: str, *args):
    net: Any = BlockNet(self.config)
    return net.apply({'params': params['net']}, *args, method=method)
