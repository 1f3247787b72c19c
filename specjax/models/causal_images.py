"""A causal decoder of images of real tokens, in an order of each image's own.

As a target and as a drafter's source. Text and `context.condition` ('order',
'label', 'guidance') are those of `models.masked_images`; guidance is there if
and only if the head is a `GuidedHead`. Attention is causal: keys and values of
the tokens so far are cached, and one pass scores a whole window of drafts. The
decoder is told two places a slot, that of the token it reads and that of the
token it is asked about (as sigma-GPTs are, Pannatier et al. 2024,
arXiv:2404.09562), so that its weights serve any order.

Slots: slot 0 reads the class; slot k >= 1 reads the token of `order[k - 1]`
and its place. What the decoder says in slot k, its normed state, is what the
head is told of the token of `order[k]`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import tree
from specjax.core.types import Context, Models, Scores, SpecState
from specjax.models import weights
from specjax.models.attention import Block
from specjax.models.denoised_images import DenoisedImages
from specjax.models.diffusion import Diffusion
from specjax.models.diffusion_head import bare
from specjax.models.transformer import (
  Transformer,
  TransformerConfig,
  empty_cache,
)

Array = jax.Array

_NO_TREE = 'real tokens are drafted as a chain, and this draft is a tree'


@dataclasses.dataclass(frozen=True)
class CausalImages(DenoisedImages):
  """A causal decoder with a denoising head. Hashable.

  Serves as a target, and as the model of a `ChainDensity` (a
  `drafters.source.Source`). Parameters are `{'mar': ..., 'head': ...}`, where
  'mar' is `{'net', 'in': {'kernel', 'bias'}, 'place_in', 'place_out'}` and
  'net' the decoder's. Weights may be float32 whatever `config.dtype` is: they
  are cast where they are used (stored in it, nothing is left to cast).

  Attributes:
    config: the decoder's shape; `vocab_size` 1 and `num_conditions`
      `num_classes + 1`: class c is row 1 + c of the embedding, the last row is
      any class. Its dtype is that of matrices and cache; what is said of
      tokens is float32.
    num_tokens: N. channels: C. num_classes: see `label`.
    process: the denoising chain of the head.
    chunk: most tokens fed in one call; bounds sliding-window rings. Prefill
      chunks and K + 1 must not exceed it.
  """

  config: TransformerConfig
  num_tokens: int
  channels: int
  num_classes: int
  process: Diffusion
  chunk: int = 128

  scoring = 'one pass over all drafts (causal)'

  def __post_init__(self):
    for name in ('num_tokens', 'channels', 'num_classes', 'chunk'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: must be >= 1')
    if self.channels != self.process.channels:
      raise ValueError(f'tokens of {self.channels} channels, and a head of '
                       f'{self.process.channels}')
    c, rows = self.config, self.num_classes + 1
    if c.vocab_size != 1 or c.num_conditions != rows:
      raise ValueError(
          f'vocab_size={c.vocab_size}, num_conditions={c.num_conditions}: '
          f'must be 1 and {rows} for num_classes={self.num_classes}')
    if c.grid_width is not None:
      raise ValueError(f'grid_width={c.grid_width}: slots are in an order of '
                       "each image's own, not that of a grid")

  def random(self, key: Array) -> dict[str, Any]:
    """Returns parameters as training begins with them, float32."""
    config = dataclasses.replace(self.config, dtype='float32')
    net, kernel, place_in, place_out, head = jax.random.split(key, 5)
    width, size = config.embed_dim, self.num_tokens
    bound = math.sqrt(6 / (self.channels + width))
    return {'head': bare(self.process.head).init(head), 'mar': {
        'net': weights.random_params(config, net),
        'in': {'kernel': jax.random.uniform(
            kernel, (self.channels, width), minval=-bound, maxval=bound),
               'bias': jnp.zeros((width,))},
        'place_in': 0.02 * jax.random.normal(place_in, (size, width)),
        'place_out': 0.02 * jax.random.normal(place_out, (size, width))}}

  def empty(self, batch: int, capacity: int) -> Any:
    """Returns the cache, leaves [B,...] or, guided, [B,2,...].

    `held int32[B]`, of a source: tokens of each text that are stored.
    """
    cache = empty_cache(
        self.config, (1 + self.is_guided) * batch, capacity, chunk=self.chunk)
    return {'cache': self._split(cache), 'held': jnp.zeros((batch,), jnp.int32)}

  # --- What is said of a token ----------------------------------------------

  def whole(
      self, params: Mapping[str, Any], tokens: Array, order: Array,
      label: Array,
  ) -> Array:
    """Returns what is said of all tokens, f32[B,N,D], in one pass.

    Teacher-forced, without a cache and without guidance. Entry k is of the
    token of place `order[k]`, given those of `order[:k]`.

    Args:
      params: of the decoder (`'mar'`). tokens: f32[B,N,C], by place.
      order: int32[B,N]. label: int32[B].
    """
    text = jnp.pad(tree.take_row(tokens, order[:, :-1]),
                   ((0, 0), (1, 0), (0, 0)))
    slot = jnp.broadcast_to(jnp.arange(self.num_tokens), order.shape)
    # A whole text leaves the cache alone: any will do.
    said, _ = self._run(
        params, self.inputs(params, order, label, text, slot),
        empty_cache(self.config, 1, 1), Block(
            base=jnp.zeros(order.shape[:1], jnp.int32), position=slot,
            whole=True))
    return said

  def features(
      self, params: Any, context: Context, text: Array, known: Array
  ) -> Any:
    """Returns what heads are told of the token that follows, [B,R,...].

    By whole passes: `score` and `grow` return the same out of their caches.

    Args:
      params: of this model. text: f32[B,S,C], see the module.
      known: int32[B,R], tokens of the image that are there, in [0, N).
    """
    order, label = self.conditions(context)
    image = tree.take_row(text[:, 1:], jnp.argsort(order, axis=-1))

    def said(label: Array) -> Array:
      return tree.take_row(
          self.whole(params['mar'], image, order, label), known)

    return said(label) if not self.is_guided else self._guided(
        context, known, said(label),
        said(jnp.full_like(label, self.num_classes)))

  def inputs(
      self, params: Mapping[str, Any], order: Array, label: Array,
      tokens: Array, slot: Array,
  ) -> Array:
    """Returns what the decoder reads, [B,T,D] in its dtype.

    Args:
      params: of the decoder. order: int32[B,N]. label: int32[B].
      tokens: f32[B,T,C], those of the text's slots. slot: int32[B,T]; what is
        outside of [0, N) is of no use, and finite.
    """
    net: Any = Transformer(self.config)
    # A cache that holds NaN shows it to those that must not see it: 0 * NaN.
    tokens = jnp.where(jnp.isfinite(tokens), tokens, 0.0)
    kernel, bias = params['in']['kernel'], params['in']['bias']
    first = net.apply({'params': params['net']}, label[:, None] + 1,
                      method='embed').astype(jnp.float32)
    x = jnp.dot(tokens, kernel, precision=self.config.precision) + bias
    x += params['place_in'][tree.take_row(order, slot - 1)]
    x = jnp.where(slot[..., None] < 1, first, x)
    x += params['place_out'][tree.take_row(order, slot)]
    return x.astype(self.config.dtype)

  # --- Target ----------------------------------------------------------------

  def init(
      self, params: Models, state: SpecState, position: Array, fed: Array,
      taps: Any,
  ) -> Any:
    """Feeds a chunk: `(state, {})` of a target, the memory of a source.

    A target is called with names of taps, a source with their values.
    """
    context, is_source = state.context, isinstance(taps, dict)
    memory = state.drafter if is_source else state.target
    _, cache = self._feed(
        params.drafter if is_source else params.target, context,
        memory['cache'], tree.take_row(context.tokens, position),
        position[:, 0], fed)
    held = jnp.max(jnp.where(fed, position + 1, 0), axis=1)
    memory = {'cache': cache, 'held': jnp.maximum(memory['held'], held)}
    return memory if is_source else (state.replace(target=memory), {})

  def score(self, params: Models, state: SpecState, draft, taps):
    """Returns the laws after the root and after each draft, of one pass."""
    del taps
    if not draft.topology.is_chain:
      raise ValueError(_NO_TREE)
    context = state.context
    pending = tree.take_row(context.tokens, context.root)
    tokens = jnp.concatenate([pending[:, None], draft.tokens], axis=1)
    # Barriers: as in `CausalLM.raw`.
    features, cache = jax.lax.optimization_barrier(self._feed(
        params.target, context, state.target['cache'],
        jax.lax.optimization_barrier(tokens), context.root))
    # `inputs` hides tokens that are not numbers; nothing may follow them.
    bad = jnp.any(~jnp.isfinite(tokens), axis=-1)
    finite = jnp.cumsum(bad, axis=1) == 0
    for x in jax.tree.leaves(features):
      finite &= jnp.all(jnp.isfinite(x.reshape(*bad.shape, -1)), axis=-1)
    return Scores(
        target_law=self.law(params.target, context, features),
        finite=finite), state.replace(
            target={**state.target, 'cache': cache})

  def commit(self, state: SpecState, draft, verdict) -> SpecState:
    """A chain's entries are in place."""
    del draft, verdict
    return state

  # --- Source ----------------------------------------------------------------

  def begin(
      self, params: Models, state: SpecState, *, behind: int, refill: bool
  ) -> tuple[Any, Any]:
    """Returns what is said of the next token, [B,...], and the memory.

    Feeds the committed tokens that the cache lacks, as `drafters.cached` does;
    a `refill`, which `ChainDensity` does not ask for, is a ValueError.
    """
    if refill:
      raise ValueError('refill: this drafter cannot be off for some rounds')
    context, memory = state.context, state.drafter
    base = context.root - (behind - 1)
    slot = base[:, None] + jnp.arange(behind)
    # Only what is missing is stored again: a sliding window's ring has already
    # lost keys that older tokens would see.
    features, cache = self._feed(
        params.drafter, context, memory['cache'],
        tree.take_row(context.tokens, slot), base,
        slot >= memory['held'][:, None])
    return jax.tree.map(lambda x: x[:, -1], features), {
        'cache': cache, 'held': context.length}

  def grow(
      self, params: Models, context: Context, memory: Any, level: Any
  ) -> tuple[Any, Any]:
    """Returns what is said of the token after each, [B,T,...], memory."""
    if level.ancestors is not None:
      raise ValueError(_NO_TREE)
    features, cache = self._feed(
        params.drafter, context, memory['cache'], level.tokens, level.base)
    return features, {**memory, 'cache': cache}

  def confidence(self, memory: Any) -> None:
    """There is no head for it."""
    del memory

  def sync(self, params, state, draft, scores, verdict, *, own) -> Any:
    """Counts accepted drafts as held; the last one was drawn, never fed."""
    del params, scores
    held = state.context.length
    if own:
      kept = verdict.num_accepted
      if verdict.kept is not None:  # some may have been corrected
        kept = jnp.sum(jnp.cumprod(verdict.kept, axis=1), axis=1)
      held += jnp.minimum(kept, draft.topology.num_nodes - 1)
    return {**state.drafter, 'held': held}

  def _feed(
      self, params: Any, context: Context, cache: Any, tokens: Array,
      base: Array, fed: Array | None = None,
  ) -> tuple[Any, Any]:
    """Feeds `tokens f32[B,T,C]` at slots `base + t` where `fed bool[B,T]`.

    Returns what is said of the token after each, [B,T,...], and the cache.
    """
    if tokens.shape[1] > self.chunk:
      raise ValueError(f'{tokens.shape[1]} tokens in one call, but chunk='
                       f'{self.chunk}: raise chunk, or draft fewer tokens')
    order, label = self.conditions(context)
    if self.is_guided:
      label = jnp.stack(
          [label, jnp.full_like(label, self.num_classes)], 1).reshape(-1)
      order, tokens, base, fed = jax.tree.map(
          lambda x: jnp.repeat(x, 2, axis=0), (order, tokens, base, fed))
      cache = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), cache)
    slot = base[:, None] + jnp.arange(tokens.shape[1])
    said, cache = self._run(
        params['mar'],
        self.inputs(params['mar'], order, label, tokens, slot), cache,
        Block(base=base, position=slot, fed=fed))
    if self.is_guided:
      said = self._guided(context, slot[::2], said[::2], said[1::2])
    return said, self._split(cache)

  def _run(
      self, params: Mapping[str, Any], x: Array, cache: Any, block: Block
  ) -> tuple[Array, Any]:
    """Returns the normed states f32[B,T,D] and the cache."""
    net: Any = Transformer(self.config)
    cast = jax.tree.map(  # scales of norms stay as they are
        lambda w: w if w.ndim == 1 else w.astype(self.config.dtype),
        params['net'])
    _, found, cache = net.apply(
        {'params': cast}, x, cache, block, taps=('final',), with_head=False)
    return found['final'].astype(jnp.float32), cache

  def _split(self, cache: Any) -> Any:
    """Returns [B,2,...] of [2B,...], whose pairs are neighbours; if guided."""
    return cache if not self.is_guided else jax.tree.map(
        lambda x: x.reshape(-1, 2, *x.shape[1:]), cache)

  def _guided(
      self, context: Context, slot: Array, said: Array, without: Array
  ) -> Any:
    """Returns the condition of a `GuidedHead`, leaves [B,R,...]."""
    return {'with': said, 'without': without, 'scale': tree.take_row(
        context.condition['guidance'], jnp.clip(
            slot, 0, self.num_tokens - 1))}
