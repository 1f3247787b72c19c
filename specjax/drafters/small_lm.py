"""An independent small language model as drafter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import keys, pipeline, tree
from specjax.core import law as law_lib
from specjax.core.types import IID, POINT, Draft, Models, SpecState
from specjax.drafters import base, cached

Array = jax.Array

# Tokens fed at a time when the drafter's cache is far behind (`resync`).
_RESYNC_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class SmallLM(base.ChainDrafter):
  """Draws K tokens from a small causal LM of the target's vocabulary.

  Drafts come with their law (`IID`), or as points when every row is greedy.
  The law is made by the same pipeline and options as the target's.

  The drafter never sees its own last draft, so after full acceptance its
  cache is one token short: each round looks at the last `catch_up` committed
  tokens and stores those that it does not hold.

  Attributes:
    num_speculative_tokens: K >= 1.
    model: the drafter's network; its parameters are `params.drafter`.
    catch_up: committed tokens fed a round, >= 2. A combinator in which
      other members' tokens are accepted sets `max_depth + 1`.
    confidence_threshold: stops drafting *after* a token of smaller drafter
      probability (the token stays, so the law is exact); 0 never stops.
    resync: also feeds everything missed since the drafter last ran. Needed
      where rounds can go by without it (an off switch).
    unroll: unrolls the loop over drafts (compile time against loop overhead).

  References: Leviathan et al. 2023, arXiv:2211.17192.
  """

  num_speculative_tokens: int = 5
  model: Any = None
  catch_up: int = 2
  confidence_threshold: float = 0.0
  resync: bool = False
  unroll: bool = False

  modes = (IID,)

  def __post_init__(self):
    super().__post_init__()
    if self.model is None:
      raise ValueError("method='draft_model' needs a model")
    if self.catch_up < 2:
      raise ValueError(f'catch_up={self.catch_up}: must be >= 2')
    if not 0 <= self.confidence_threshold <= 1:
      raise ValueError(
          f'draft_confidence_threshold={self.confidence_threshold}: must be '
          'in [0, 1]')

  def resyncing(self) -> SmallLM:
    """Returns this drafter, fit to be switched off for some rounds."""
    return dataclasses.replace(self, resync=True)

  def empty(self, batch: int, capacity: int) -> Any:
    return cached.empty(self.model, batch, capacity)

  def init(self, params, state, position, fed, taps) -> SpecState:
    del taps
    return cached.init(self.model, params, state, position, fed)

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Catches up, then draws K tokens one after another."""
    context = state.context
    cache = state.drafter['model']
    if self.resync:
      cache = self._refill(params, state, cache)
    logits, cache = cached.catch_up(
        self.model, params, state, cache, self.catch_up)
    steps = _Steps(self, params, context)
    out, cache = steps.run(logits, cache)
    tokens, valid, confidence, kept = out
    draft = Draft(
        topology=self.topology, tokens=tokens, valid=valid,
        mode=jnp.full((self.num_speculative_tokens,),
                      POINT if kept is None else IID, jnp.int32),
        draft_law=None if kept is None else law_lib.Categorical(kept),
        aux={'confidence': confidence})
    state = state.replace(drafter={'model': cache, 'held': context.length})
    return draft, state

  def sync(self, params, state, draft, scores, verdict) -> SpecState:
    """Counts accepted drafts as held; the last one was drawn, never fed.

    Only where the drafts are surely its own: in a combinator (a longer
    `catch_up`) another member's may stand in their place.
    """
    del params, scores
    held = state.context.length
    if self.catch_up == 2:
      held += jnp.minimum(
          verdict.num_accepted, draft.topology.num_nodes - 1)
    return state.replace(drafter={**state.drafter, 'held': held})

  def _refill(self, params: Models, state: SpecState, cache: Any) -> Any:
    """Feeds committed tokens that went by while the drafter was off."""
    context, held = state.context, state.drafter['held']
    goal = context.root - (self.catch_up - 1)  # the rest is re-fed anyway
    goal = jnp.where(context.done, 0, goal)

    def body(carry):
      held, cache = carry
      slot = held[:, None] + jnp.arange(_RESYNC_BLOCK)
      tokens = tree.take_row(context.tokens, slot)
      cache = self.model.feed(
          params.drafter, cache, tokens, held, slot < goal[:, None])
      return jnp.minimum(held + _RESYNC_BLOCK, jnp.maximum(goal, held)), cache

    return jax.lax.while_loop(
        lambda carry: jnp.any(carry[0] < goal), body, (held, cache))[1]


@dataclasses.dataclass(frozen=True)
class _Steps:
  """The loop over drafts; a helper, so that `propose` stays readable."""

  drafter: SmallLM
  params: Models
  context: Any

  def run(self, logits: Array, cache: Any):
    """Returns `((tokens, valid, confidence, law logits | None), cache)`."""
    num = self.drafter.num_speculative_tokens
    batch = logits.shape[0]
    past = jnp.full((batch, num), -1, jnp.int32)
    active = ~self.context.done
    carry = (logits, cache, past, active)

    def body(carry, step):
      logits, cache, past, active = carry
      token, confidence, kept = self._draw(logits, past, step)
      past = past.at[:, step].set(token)
      slot = self.context.length + step
      logits, cache = self.drafter.model.extend(
          self.params.drafter, cache, token[:, None], slot,
          jnp.ones((batch, 1), bool))
      going = self._goes_on(token, confidence) & active
      return (logits, cache, past, going), (token, active, confidence, kept)

    # The last draft is not fed: the next round's catch-up does it.
    carry, outs = jax.lax.scan(
        body, carry, jnp.arange(num - 1),
        unroll=max(num - 1, 1) if self.drafter.unroll else 1)
    logits, cache, past, active = carry
    token, confidence, kept = self._draw(logits, past, num - 1)
    last = (token, active, confidence, kept)
    stacked = jax.tree.map(
        lambda a, b: jnp.concatenate([jnp.moveaxis(a, 0, 1), b[:, None]], 1),
        outs, last)
    return stacked, cache

  def _draw(self, logits: Array, past: Array, step):
    """Draws a token: `(int32[B], confidence f32[B], law logits | None)`."""
    law = pipeline.law(self.context, logits[:, None], past[:, None])
    key = keys.row(self.context, keys.Purpose.DRAFT, step)
    row = law.at(jnp.zeros(past.shape[:1], jnp.int32))
    token = row.sample(key)
    raw = law_lib.Categorical(logits.astype(jnp.float32))
    confidence = jnp.exp(raw.log_prob(token))
    kept = row.logits if isinstance(row, law_lib.Categorical) else None
    return token, confidence, kept

  def _goes_on(self, token: Array, confidence: Array) -> Array:
    """Whether to draft beyond a token; the token itself is kept."""
    going = confidence >= self.drafter.confidence_threshold
    eos = self.context.options.eos
    if eos is not None:
      going &= ~jnp.any(token[:, None] == eos, axis=-1)
    return going
