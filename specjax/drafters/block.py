"""Sources that propose a whole block at once: DFlash, DSpark."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import tree
from specjax.core.types import Models, SpecState
from specjax.drafters.copying import insert
from specjax.drafters.lattice import Table, candidates
from specjax.drafters.source import Level

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockSource:
  """One pass over a block of slots; Markov terms follow the drafted path.

  The cache holds what the target's hidden states project to, for committed
  positions only. It is written once a round, from the accepted path, whoever
  drafted it: nothing is ever predicted from a prediction.

  Attributes:
    model: a `models.BlockModel`; its parameters are `params.drafter`.

  References: DFlash, arXiv:2602.06036; DSpark, arXiv:2607.05147.
  """

  model: Any

  follows = True

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.model.vocab_size

  @property
  def num_slots(self) -> int:
    """Tokens that one pass proposes."""
    return self.model.num_slots

  @property
  def taps(self) -> tuple[str, ...]:
    return self.model.taps

  def empty(self, batch: int, capacity: int) -> Any:
    return {'cache': self.model.empty(batch, capacity)}

  def init(self, params, state, position, fed, taps) -> Any:
    """Stores the context of a chunk of the prompt."""
    return {'cache': self.model.absorb(
        params.drafter, state.drafter['cache'], self._features(taps),
        position[:, 0], fed)}

  def begin(self, params, state, *, behind, refill) -> tuple[Array, Any]:
    """Runs the block; returns the logits of its first slot."""
    del behind, refill  # the context is never behind
    memory, tokens = self._run(params, state)
    return self._score(params, memory, 0, tokens)

  def _run(self, params: Models, state: SpecState) -> tuple[Any, Array]:
    context = state.context
    pending = tree.take_row(context.tokens, context.root)
    hidden, cache = self.model.draft(
        params.drafter, params.target, state.drafter['cache'], pending,
        context.root)
    return {'cache': cache, 'hidden': hidden}, pending

  def _score(self, params, memory, depth, tokens: Array):
    """Scores what follows `tokens int32[B]` at a depth: logits, memory."""
    logits, memory = self.grow(params, None, memory, Level(
        tokens=tokens[:, None], depth=depth, base=tokens,
        parent=jnp.zeros((1,), jnp.int32), position=tokens[:, None]))
    return logits[:, 0], memory

  def grow(self, params, context, memory, level) -> tuple[Array, Any]:
    """Returns the logits of the slot at `level.depth` after each token.

    Beyond the block nothing is known: the last slot is used again.
    """
    del context
    index = jnp.minimum(level.depth, self.model.num_slots - 1)
    hidden = jax.lax.dynamic_index_in_dim(
        memory['hidden'], index, axis=1)  # [B,1,D]
    logits = self.model.logits(params.drafter, hidden)
    previous = self.model.previous(
        params.drafter, params.target, level.tokens)
    shape = level.tokens.shape
    hidden = jnp.broadcast_to(hidden, shape + hidden.shape[-1:])
    if previous is not None:
      logits = logits + self.model.bias(params.drafter, hidden, previous)
    logits = jnp.broadcast_to(logits, shape + logits.shape[-1:])
    chance = self.model.confidence(
        params.drafter, hidden, previous, index)
    memory = {k: v for k, v in memory.items() if k != 'chance'}
    if chance is not None:
      memory['chance'] = chance
    return self.model.spread(params.drafter, logits), memory

  def lattice(
      self, params: Models, state: SpecState, num: int, depth: int,
      extra: Array | None = None,
  ) -> tuple[Table, Any]:
    """Returns the `num` candidates of each of `depth` slots, and memory.

    `extra int32[B,depth]` are to be among them (-1: none): in the last place,
    without a chance of their own, where they would not be.

    The first slot's are ranked with the Markov term of the pending token. Of
    the others it is not known yet which token comes before (`_guided`).
    """
    memory, pending = self._run(params, state)
    own = params.drafter
    hidden = memory['hidden'][:, :depth]
    logits = self.model.logits(own, hidden)
    before = self.model.previous(own, params.target, pending[:, None])
    if before is not None:
      logits = logits.at[:, :1].add(
          self.model.bias(own, hidden[:, :1], before))
    _, index = candidates(
        self._guided(params, hidden, logits) if before is not None
        and depth > 1 else logits, num)
    scores = jnp.take_along_axis(logits, index, axis=-1)
    tokens = jnp.take(own['ids'], index, mode='clip')
    if extra is not None:
      tokens, new = insert(tokens, extra)
      scores = jnp.where(new, -jnp.inf, scores)
    step = scores[:, 1:, None, :]
    if before is not None and depth > 1:
      previous = self.model.previous(own, params.target, tokens[:, :-1])
      step = step + self.model.transitions(
          own, hidden[:, 1:], previous, index[:, 1:])
    kept = index.shape[-1]  # all there are, if fewer than asked for
    step = jnp.broadcast_to(step, step.shape[:2] + (kept, kept))
    return Table(
        tokens, jax.nn.log_softmax(scores[:, 0], axis=-1),
        jax.nn.log_softmax(step, axis=-1)), {'cache': memory['cache']}

  def _guided(self, params: Models, hidden: Array, logits: Array) -> Array:
    """Returns logits f32[B,G,W] to choose candidates by.

    The larger of two: without any Markov term, and with that of the likeliest
    token of the slot before. One more product, for all slots at once; without
    it a slot misses the tokens that only a certain predecessor makes likely.
    """
    own = params.drafter
    best = jnp.argmax(logits[:, :-1], axis=-1)
    before = self.model.previous(
        own, params.target, jnp.take(own['ids'], best, mode='clip'))
    guided = logits[:, 1:] + self.model.bias(own, hidden[:, 1:], before)
    return logits.at[:, 1:].max(guided)

  def confidence(self, memory: Any) -> Array | None:
    return memory.get('chance')

  def sync(self, params, state, draft, scores, verdict, *, own) -> Any:
    """Stores the hidden states of the root and of the accepted drafts."""
    del own
    path = jnp.minimum(verdict.path, draft.topology.num_nodes)
    features = tree.take_row(self._features(scores.taps), path)
    fed = jnp.arange(path.shape[1]) <= verdict.num_accepted[:, None]
    return {'cache': self.model.absorb(
        params.drafter, state.drafter['cache'], features, state.context.root,
        fed & ~state.context.done[:, None])}

  def _features(self, taps: dict[str, Array]) -> Array:
    return jnp.concatenate([taps[name] for name in self.taps], axis=-1)
