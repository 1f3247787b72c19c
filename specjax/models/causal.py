"""A decoder as a `Target`, and as the model of a small-LM drafter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import pipeline, tree
from specjax.core.types import (
  Context,
  Draft,
  Models,
  Scores,
  SpecState,
  Verdict,
)
from specjax.models import attention
from specjax.models.attention import Block
from specjax.models.transformer import (
  Transformer,
  TransformerConfig,
  empty_cache,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CausalLM:
  """A causal decoder that scores drafts over its key-value cache.

  Attributes:
    config: the decoder's shape.
    chunk: most tokens fed in one call; bounds sliding-window rings. Prefill
      chunks and N + 1 must not exceed it.
    exact_trees: attend to the nodes of a tree in the order of their paths.
      At one block shape and program, a node's logits are then a function of
      its text alone, bit for bit: neither siblings, nor the node's slot, nor
      how much of its path was committed before matter, as they do otherwise
      in the last bits. Holds where matrix products give a row the same bits
      wherever it stands in the block, as chains need too (tested on CPUs).
      Every node reads its own copy of the cache, N + 1 times the size of a
      layer's: for short contexts.
  """

  config: TransformerConfig
  chunk: int = 256
  exact_trees: bool = False

  def __post_init__(self):
    if self.chunk < 1:
      raise ValueError(f'chunk={self.chunk}: must be >= 1')

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.config.vocab_size

  @property
  def num_ids(self) -> int:
    """Ids that a prompt may hold: V, and conditions."""
    return self.vocab_size + self.config.num_conditions

  @property
  def max_length(self) -> int | None:
    """Tokens of context that the model is made for; None: nobody says."""
    return self.config.max_length

  def empty(self, batch: int, capacity: int) -> Any:
    """Returns `{'cache': one dict a layer}`."""
    return {'cache': empty_cache(
        self.config, batch, capacity, chunk=self.chunk)}

  def forward(
      self, params: Any, cache: Any, x: Array, block: Block, **kwargs
  ) -> tuple[Array | None, dict[str, Array], Any]:
    """Runs the decoder with bare parameters: `(logits, taps, cache)`."""
    if block.size > self.chunk:
      raise ValueError(
          f'{block.size} tokens in one call or tree, but chunk={self.chunk}: '
          'raise chunk, or draft fewer tokens')
    if block.ancestors is not None:
      block = block.replace(exact=self.exact_trees)
    model: Any = Transformer(self.config)
    return model.apply({'params': params}, x, cache, block, **kwargs)

  def head(self, params: Any, x: Array) -> Array:
    """Returns float32 logits [B,T,V] of states [B,T,D] after the last norm."""
    model: Any = Transformer(self.config)
    return model.apply({'params': params}, x, method='head')

  def extend(
      self, params: Any, state: Any, tokens: Array, base: Array, fed: Array
  ) -> tuple[Array, Any]:
    """Feeds `tokens [B,T]` at slots `base + t` where `fed bool[B,T]`.

    Returns the last token's raw logits f32[B,V] and the new state. For
    drafters: parameters and state are the bare model's.
    """
    final, state = self._feed(params, state, tokens, base, fed, ('final',))
    return self.head(params, final['final'][:, -1:])[:, 0], state

  def feed(
      self, params: Any, state: Any, tokens: Array, base: Array, fed: Array
  ) -> Any:
    """Like `extend`, without logits."""
    return self._feed(params, state, tokens, base, fed, ())[1]

  def grow(
      self, params: Any, state: Any, tokens: Array, base: Array,
      position: Array, ancestors: Array, entry_position: Array | None,
      start: int,
  ) -> tuple[Array, Any]:
    """Feeds entries `start` to `start + T - 1` of a tree, a level of it, say.

    For drafters, like `extend`. Slots from `base` on are scratch: feeding
    from `base` again overwrites them.

    Args:
      params, state: of the bare model.
      tokens: int32[B,T].
      base: int32[B], slot of entry 0; all slots below are visible.
      position: int32[B,T], `base` plus the depth of each token.
      ancestors: bool[T,start+T] or [B,T,start+T], entries that each token
        sees, itself included; parents come before children.
      entry_position: int32[B,start+T], positions of all entries so far, or
        None when `start` is 0.
      start: static; entries fed by earlier calls. `start + T <= chunk`.

    Returns:
      Raw logits f32[B,T,V] of every token, and the new state.

    Raises:
      ValueError: a tree larger than `chunk`, or a sliding window without
        `entry_position`.
    """
    block = Block(
        base=base, position=position, ancestors=ancestors,
        entry_position=entry_position, start=start)
    logits, _, cache = self.forward(params, state['cache'], tokens, block)
    assert logits is not None
    return logits, {**state, 'cache': cache}

  def _feed(self, params, state, tokens, base, fed, taps):
    position = base[:, None] + jnp.arange(tokens.shape[1])
    block = Block(base=base, position=position, fed=fed)
    _, found, cache = self.forward(
        params, state['cache'], tokens, block, taps=taps, with_head=False)
    return found, {**state, 'cache': cache}

  def inputs(
      self, params: Any, context: Context, tokens: Array, position: Array
  ) -> Array:
    """Returns what the decoder is fed: tokens [B,T], or states [B,T,D].

    For targets whose prompts are more than tokens.
    """
    del params, context, position
    return tokens

  def first(self, context: Context) -> Array | None:
    """Returns int32[B], the first slot of each text; None: all begin at 0."""
    del context
    return None

  def init(
      self, params: Models, state: SpecState, position: Array, fed: Array,
      taps: tuple[str, ...],
  ) -> tuple[SpecState, dict[str, Array]]:
    """Feeds a chunk of the prompt (no logits are computed)."""
    tokens = tree.take_row(state.context.tokens, position)
    x = self.inputs(params.target, state.context, tokens, position)
    block = Block(base=position[:, 0], position=position, fed=fed,
                  first=self.first(state.context))
    _, found, cache = self.forward(
        params.target, state.target['cache'], x, block, taps=taps,
        with_head=False)
    return state.replace(target={**state.target, 'cache': cache}), found

  def raw(
      self, params: Models, state: SpecState, draft: Draft,
      taps: tuple[str, ...],
  ) -> tuple[Array, dict[str, Array], SpecState]:
    """Returns raw logits [B,N+1,V], taps, and the state with N + 1 entries.

    `draft.resume`, when given, is `(hidden [B,N+1,D], layer)`: the stream
    entering a static layer whose lower part has been run by the drafter.
    """
    context = state.context
    topology = draft.topology
    block = _draft_block(context.root, draft).replace(
        first=self.first(context))
    if draft.resume is None:
      pending = tree.take_row(context.tokens, context.root)
      x = jnp.concatenate([pending[:, None], draft.tokens], axis=1)
      x = self.inputs(params.target, context, x, block.position)
      start = 0
    else:
      x, start = draft.resume.hidden, draft.resume.layer
    if x.shape[1] != topology.num_nodes + 1:
      raise ValueError(f'{x.shape[1]} rows for {topology.num_nodes} drafts')
    # The barriers keep XLA from fusing the forward pass with what surrounds
    # it: equal block shapes must give equal bits under any drafter or rule.
    x = jax.lax.optimization_barrier(x)
    out = self.forward(params.target, state.target['cache'], x, block,
                       start=start, taps=taps)
    logits, found, cache = jax.lax.optimization_barrier(out)
    return logits, found, state.replace(
        target={**state.target, 'cache': cache})

  def score(
      self, params: Models, state: SpecState, draft: Draft,
      taps: tuple[str, ...],
  ) -> tuple[Scores, SpecState]:
    """Scores the root and the drafts in one call.

    Besides the decoder's taps there is 'logits': raw, before `core.law`.
    """
    return scored(self.raw, params, state, draft, taps)

  def commit(
      self, state: SpecState, draft: Draft, verdict: Verdict
  ) -> SpecState:
    """Compacts the accepted path of a tree; a chain is already in place."""
    if draft.topology.is_chain:
      return state
    path = jnp.clip(verdict.path, 0, draft.topology.num_nodes)
    cache = tuple(
        attention.compact(layer, state.context.root, path)
        for layer in state.target['cache'])
    return state.replace(target={**state.target, 'cache': cache})

  def lower(
      self, params: Models, state: SpecState, tokens: Array,
      position: Array, layer: int,
  ) -> tuple[Array, SpecState]:
    """Runs layers below `layer` on this target's own cache.

    For early-exit drafters, which write the lower layers of scratch slots
    while drafting. Returns the stream [B,T,D] entering `layer`.
    """
    block = Block(base=position[:, 0], position=position)
    _, found, cache = self.forward(
        params.target, state.target['cache'], tokens, block, stop=layer,
        with_head=False)
    state = state.replace(target={**state.target, 'cache': cache})
    return found[f'resid_{layer}'], state


def scored(
    raw: Any, params: Models, state: SpecState, draft: Draft,
    taps: tuple[str, ...],
) -> tuple[Scores, SpecState]:
  """Scores a draft with a target's `raw`: one law for logits of any origin."""
  inner = tuple(name for name in taps if name != 'logits')
  logits, found, state = raw(params, state, draft, inner)
  if 'logits' in taps:
    found = {**found, 'logits': logits}
  past = tree.history(draft.topology, draft.parents, draft.tokens)
  keep_raw = state.context.log_probs is not None
  law = pipeline.law(state.context, logits, past)
  return Scores(
      target_law=law, taps=found,
      finite=pipeline.healthy(state.context, logits, law),
      raw=logits if keep_raw else None), state


def _draft_block(root: Array, draft: Draft) -> Block:
  """Returns where the root and the drafted slots stand."""
  topology = draft.topology
  offset = jnp.arange(topology.num_nodes + 1)
  if topology.is_chain:
    return Block(base=root, position=root[:, None] + offset)
  depth = tree.node_depth(topology, draft.parents)
  depth = jnp.concatenate(
      [jnp.zeros(depth.shape[:-1] + (1,), jnp.int32), depth], axis=-1)
  position = root[:, None] + depth
  return Block(base=root, position=position,
               ancestors=tree.ancestors(topology, draft.parents))
