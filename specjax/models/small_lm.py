"""A small causal model of the target's vocabulary, trained as its drafter.

A scaled copy of the target's architecture that reads tokens alone: it can be
trained on plain text before it is aligned with a target.

References: FastDraft, arXiv:2411.11055; Goel et al. 2024, arXiv:2403.00858.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from specjax.models import draft_vocab, transformer, weights
from specjax.models.attention import Block
from specjax.models.transformer_config import TransformerConfig
from specjax.models.trimmed import TrimmedLM

Array = jax.Array

# No layer has a window, so that a longer call costs no memory.
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class SmallLMConfig:
  """The shape of a small causal drafter.

  Attributes:
    decoder: its layers and widths; V and the cap of the logits are the
      target's. `tied`: the head is the embedding (the target's own head, if
      the embedding is the target's); otherwise W rows are trained.
    draft_vocab_size: W, tokens that the head scores.
    embedding: 'own' is trained, 'target' is the target's, fixed; the widths
      must then be equal.
  """

  decoder: TransformerConfig
  draft_vocab_size: int
  embedding: str = 'own'

  def __post_init__(self):
    if self.embedding not in ('own', 'target'):
      raise ValueError(f"embedding={self.embedding!r}: 'own' or 'target'")
    if not 1 <= self.draft_vocab_size <= self.decoder.vocab_size:
      raise ValueError(f'draft_vocab_size={self.draft_vocab_size}: must be '
                       f'in [1, {self.decoder.vocab_size}]')
    if any(self.decoder.local_layers):
      raise ValueError('local_layers: a small drafter sees all of the text')

  @property
  def target_dim(self) -> int | None:
    """Hidden size that the target must have; None for any."""
    return self.decoder.embed_dim if self.embedding == 'target' else None


@dataclasses.dataclass(frozen=True)
class SmallLMModel:
  """Pure functions of a small causal drafter (a `cached.CachedModel`).

  Parameters are `{'net', 'ids', 'inverse'}`, trained weights and the draft
  vocabulary, with 'head' (rows that are not trained, or copies of trained
  ones) and 'embedding' (the target's) where there are such (`attach`).
  """

  config: SmallLMConfig

  @property
  def vocab_size(self) -> int:
    """V, of the target."""
    return self.config.decoder.vocab_size

  @property
  def chunk(self) -> int:
    """Most tokens fed in one call."""
    return _CHUNK

  @property
  def taps(self) -> tuple[str, ...]:
    """No hidden states of the target are read."""
    return ()

  @property
  def lm(self) -> TrimmedLM:
    """The causal model; its parameters are `lm_params`."""
    # An untied head is kept apart from the decoder's parameters.
    decoder = dataclasses.replace(self.config.decoder, tied=True)
    return TrimmedLM(decoder, _CHUNK)

  def init(self, key: Array) -> Any:
    """Returns random weights in float32."""
    return weights.trainable(init(self.config, key))

  def attach(
      self, net: Any, target: Any, ids: Any, *, copies: bool = True
  ) -> Any:
    """Returns the parameters for decoding.

    Args:
      net: trained weights. target: the target's parameters.
      ids: int[W], ascending draft vocabulary.
      copies: whether to copy the trained rows that a tied head scores: then
        decoding need not gather them, but they do not follow `net`.

    Raises:
      ValueError: ids that are not W, ascending and in range; the target's
        embedding has another shape, when it is used.
    """
    config = self.config
    table = draft_vocab.table(
        ids, self.vocab_size, config.draft_vocab_size)
    params = {'net': net, **table}
    trimmed_head = config.draft_vocab_size < self.vocab_size
    if config.embedding == 'target':
      shape = target['embedding'].shape
      if shape != (self.vocab_size, config.decoder.embed_dim):
        raise ValueError(
            f"embedding='target': the target's is {shape}, not "
            f'{(self.vocab_size, config.decoder.embed_dim)}')
      params['embedding'] = target['embedding']
      if config.decoder.tied:
        params['head'] = draft_vocab.rows(target, table['ids'])
    elif config.decoder.tied and trimmed_head and copies:
      params['head'] = draft_vocab.rows(net, table['ids'])
    return params

  def lm_params(self, params: Any) -> Any:
    """Returns the parameters of `lm`."""
    net = params['net']
    inner = {k: v for k, v in net.items() if k != 'head'}
    if 'embedding' in params:
      inner['embedding'] = params['embedding']
    head = net.get('head', params.get('head'))
    if head is None:
      head = draft_vocab.rows(net, params['ids'])
    return {'lm': inner, 'head': head.astype(inner['embedding'].dtype),
            'ids': params['ids'], 'inverse': params['inverse']}

  def empty(self, batch: int, capacity: int) -> Any:
    """Returns an empty cache."""
    return self.lm.empty(batch, capacity)

  def extend(
      self, params: Any, cache: Any, tokens: Array, base: Array, fed: Array
  ) -> tuple[Array, Any]:
    """See `CausalLM.extend`: logits are f32[B,V], -inf outside of W."""
    return self.lm.extend(self.lm_params(params), cache, tokens, base, fed)

  def feed(
      self, params: Any, cache: Any, tokens: Array, base: Array, fed: Array
  ) -> Any:
    """See `CausalLM.feed`."""
    return self.lm.feed(self.lm_params(params), cache, tokens, base, fed)

  def grow(
      self, params: Any, cache: Any, tokens: Array, base: Array,
      position: Array, ancestors: Array, entry_position: Array | None,
      start: int,
  ) -> tuple[Array, Any]:
    """See `CausalLM.grow`: logits are f32[B,T,V], -inf outside of W."""
    return self.lm.grow(
        self.lm_params(params), cache, tokens, base, position, ancestors,
        entry_position, start)

  def states(
      self, params: Any, tokens: Array, position: Array, seen: Array
  ) -> Array:
    """Returns normed states [B,S,D] of whole texts, for training.

    Args:
      params: see the class. tokens, position: int32[B,S].
      seen: bool[B,S,S], which tokens each one attends to.
    """
    block = Block(base=jnp.zeros(tokens.shape[:1], jnp.int32),
                  position=position, ancestors=seen, whole=True)
    model = self.lm
    cache = model.empty(tokens.shape[0], 1)['cache']  # never touched
    _, found, _ = model.forward(
        self.lm_params(params), cache, tokens, block, taps=('final',),
        with_head=False)
    return found['final']

  def logits(self, head: Array, states: Array) -> Array:
    """Returns f32[...,W] of states [...,D] and rows [W,D] of a head."""
    return draft_vocab.scores(self.config.decoder, head, states)


def init(config: SmallLMConfig, key: Array) -> Any:
  """Returns random parameters, boxed with their logical axes."""
  body, top = jax.random.split(key)
  decoder = dataclasses.replace(config.decoder, tied=True)
  net = dict(transformer.init(decoder, body))
  if config.embedding == 'target':
    del net['embedding']
  if not config.decoder.tied:
    shape = (config.draft_vocab_size, decoder.embed_dim)
    net['head'] = nn.LogicallyPartitioned(
        0.02 * jax.random.normal(top, shape, decoder.dtype),
        ('vocab', 'embed'))
  return net
