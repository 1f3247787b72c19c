"""Pure functions of an EAGLE drafter, as its source and its trainer need."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.models import draft_vocab, eagle, transformer, weights
from specjax.models.attention import Block
from specjax.models.eagle import EagleConfig, EagleNet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EagleModel:
  """An EAGLE drafter over a target's hidden states.

  Parameters are `{'net', 'ids', 'inverse'}` and, unless the net has a head of
  its own, `'head'`: trained weights, the draft vocabulary, and the rows of
  the target's head that can be drafted (`attach`). `target` is the target's
  parameters. States D wide are outputs of rows, or what `observe` returns.
  """

  config: EagleConfig

  @property
  def taps(self) -> tuple[str, ...]:
    """Names of the hidden states that are read."""
    if self.config.version == '1':
      return ('final',)
    return tuple(f'resid_{i}' for i in self.config.taps)

  def init(self, key: Array) -> Any:
    """Returns random weights in float32."""
    return weights.trainable(eagle.init(self.config, key))

  def attach(self, net: Any, target: Any, ids: Any) -> Any:
    """Returns the parameters for decoding: shares the target's head.

    Args:
      net: trained weights. target: the target's parameters.
      ids: int[W], ascending draft vocabulary.

    Raises:
      ValueError: ids that are not W ascending tokens.
    """
    table = draft_vocab.table(
        ids, self.config.decoder.vocab_size, self.config.draft_vocab_size)
    if self.config.own_head:
      return {'net': net, **table}
    return {'net': net, 'head': draft_vocab.rows(target, table['ids']),
            **table}

  def empty(self, batch: int, capacity: int) -> Any:
    """Returns `{'cache': keys and values a layer, 'hidden': [B,D]}`."""
    d = self.config.decoder
    return {'cache': transformer.empty_cache(d, batch, capacity),
            'hidden': jnp.zeros((batch, d.embed_dim), d.dtype)}

  def observe(self, params: Any, features: Array) -> Array:
    """Returns what rows take, [...,D], of taps [...,m*D]."""
    return self._apply(params, 'observe', features)

  def extend(
      self, params: Any, target: Any, cache: tuple, given: Array,
      tokens: Array, base: Array, *, fed: Array | None = None,
      position: Array | None = None, ancestors: Array | None = None,
      entry_position: Array | None = None, start: int = 0,
  ) -> tuple[Array, tuple]:
    """Runs rows behind those below `base`; stores their keys and values.

    Args:
      params, target: parameters. cache: of all layers.
      given: [B,T,D], states that the rows take.
      tokens: int32[B,T], which follow them.
      base: int32[B], number of the first row.
      fed: bool[B,T], rows that exist; None: all.
      position: int32[B,T]; None: rows one after another. The rest is for
        trees: see `attention.Block`.

    Returns:
      The rows' outputs [B,T,D] and the cache.
    """
    if position is None:
      position = base[:, None] + jnp.arange(tokens.shape[1])
    block = Block(
        base=base, position=position, fed=fed, ancestors=ancestors,
        entry_position=entry_position, start=start)
    return self._apply(params, 'extend', given, self.embed(target, tokens),
                       cache, block)

  def unroll(
      self, params: Any, target: Any, features: Array, tokens: Array,
      position: Array, seen: Array, steps: int, detach: bool = False,
  ) -> Array:
    """Runs whole texts for training: `EagleNet.unroll`, [B,K,S,D].

    Args:
      features: [B,S,m*D], taps. tokens: int32[B,S], the texts.
    """
    given = self.observe(params, features)
    return self._apply(params, 'unroll', given, self.embed(target, tokens),
                       position, seen, steps, detach)

  def embed(self, target: Any, tokens: Array) -> Array:
    """Returns the target's embeddings [...,D] of `tokens`."""
    return draft_vocab.embed(self.config.decoder, target, tokens)

  def logits(self, params: Any, hidden: Array) -> Array:
    """Returns the drafter's f32[...,W] of rows' outputs [...,D]."""
    hidden, d = self._apply(params, 'state', hidden), self.config.decoder
    if self.config.own_head:  # trained without the target's bound
      return draft_vocab.product(d, params['net']['head'], hidden)
    return draft_vocab.scores(d, params['head'], hidden)

  def target_logits(self, params: Any, target: Any, final: Array) -> Array:
    """Returns the target's f32[...,W] of its states [...,D] after the norm."""
    head = params.get('head')
    if head is None:
      head = draft_vocab.rows(target, params['ids'])
    return draft_vocab.scores(self.config.decoder, head, final)

  def spread(self, params: Any, logits: Array) -> Array:
    """Returns f32[...,V] of f32[...,W]."""
    return draft_vocab.spread(logits, params['inverse'])

  def _apply(self, params: Any, method: str, *args):
    net: Any = EagleNet(self.config)
    return net.apply({'params': params['net']}, *args, method=method)
