"""A chain of tokens, drawn one after another from a source."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import keys, pipeline
from specjax.core import law as law_lib
from specjax.core.types import IID, POINT, Draft, Models, SpecState
from specjax.drafters import base
from specjax.drafters import source as source_lib

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ChainLM(source_lib.Sourced, base.ChainDrafter):
  """Draws K tokens from a source: a small LM, or a head on the target.

  Drafts come with their law (`IID`), or as points when every row is greedy.
  The law is made by the same pipeline and options as the target's.

  Attributes:
    num_speculative_tokens: K >= 1.
    model: a `source.Source`, or a causal language model of the target's
      vocabulary (`cached.CachedModel`); parameters are `params.drafter`.
    catch_up: committed tokens that a language model's cache may lack, >= 2.
      A combinator in which other members' tokens are accepted sets
      `max_depth + 1`.
    confidence_threshold: stops drafting *after* a token of smaller drafter
      probability (the token stays, so the law is exact); 0 never stops.
    acceptance_threshold: stops drafting *before* a token whose chance of
      being accepted is estimated to be smaller, by the source's confidence
      head; 0 never stops.
    resync: also feeds everything missed since the drafter last ran. Needed
      where rounds can go by without it (an off switch).
    unroll: unrolls the loop over drafts (compile time against loop overhead).

  References: Leviathan et al. 2023, arXiv:2211.17192.
  """

  num_speculative_tokens: int = 5
  model: Any = None
  catch_up: int = 2
  confidence_threshold: float = 0.0
  acceptance_threshold: float = 0.0
  resync: bool = False
  unroll: bool = False

  modes = (IID,)

  def __post_init__(self):
    super().__post_init__()
    if self.model is None:
      raise ValueError("method='draft_model' needs a model")
    if self.catch_up < 2:
      raise ValueError(f'catch_up={self.catch_up}: must be >= 2')
    for name, value in (
        ('draft_confidence_threshold', self.confidence_threshold),
        ('draft_acceptance_threshold', self.acceptance_threshold)):
      if not 0 <= value <= 1:
        raise ValueError(f'{name}={value}: must be in [0, 1]')

  def resyncing(self) -> ChainLM:
    """Returns this drafter, fit to be switched off for some rounds."""
    return dataclasses.replace(self, resync=True)

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Catches up, then draws K tokens one after another."""
    logits, memory = self.source.begin(
        params, state, behind=self.catch_up, refill=self.resync)
    out, memory = _Steps(self, params, state.context).run(logits, memory)
    tokens, valid, confidence, kept = out
    draft = Draft(
        topology=self.topology, tokens=tokens, valid=valid,
        mode=jnp.full((self.num_speculative_tokens,),
                      POINT if kept is None else IID, jnp.int32),
        draft_law=None if kept is None else law_lib.Categorical(kept),
        aux={'confidence': confidence})
    return draft, state.replace(drafter=memory)

  def sync(self, params, state, draft, scores, verdict) -> SpecState:
    """Hands the verdict on.

    In a combinator (a longer `catch_up`) another member's drafts may stand
    in the place of its own.
    """
    return state.replace(drafter=self.source.sync(
        params, state, draft, scores, verdict, own=self.catch_up == 2))


@dataclasses.dataclass(frozen=True)
class _Steps:
  """The loop over drafts; a helper, so that `propose` stays readable."""

  drafter: ChainLM
  params: Models
  context: Any

  def run(self, logits: Array, memory: Any):
    """Returns `((tokens, valid, confidence, law logits | None), memory)`."""
    source = self.drafter.source
    num = self.drafter.num_speculative_tokens
    batch = logits.shape[0]
    past = jnp.full((batch, num), -1, jnp.int32)
    carry = (logits, memory, past, ~self.context.done)

    def body(carry, step):
      logits, memory, past, active = carry
      active &= self._worth(memory)
      token, confidence, kept = self._draw(logits, past, step)
      past = past.at[:, step].set(token)
      slot = self.context.length + step
      logits, memory = source.grow(
          self.params, self.context, memory, source_lib.Level(
              tokens=token[:, None], depth=step + 1, base=slot,
              parent=jnp.zeros((1,), jnp.int32), position=slot[:, None]))
      going = self._goes_on(token, confidence) & active
      return ((logits[:, 0], memory, past, going),
              (token, active, confidence, kept))

    # The last draft is not fed: the next round's catch-up does it.
    carry, outs = jax.lax.scan(
        body, carry, jnp.arange(num - 1),
        unroll=max(num - 1, 1) if self.drafter.unroll else 1)
    logits, memory, past, active = carry
    active &= self._worth(memory)
    token, confidence, kept = self._draw(logits, past, num - 1)
    last = (token, active, confidence, kept)
    stacked = jax.tree.map(
        lambda a, b: jnp.concatenate([jnp.moveaxis(a, 0, 1), b[:, None]], 1),
        outs, last)
    return stacked, memory

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

  def _worth(self, memory: Any) -> Array:
    """Whether the next token is likely enough to be accepted, bool[B]."""
    threshold = self.drafter.acceptance_threshold
    if not threshold:
      return jnp.bool_(True)
    chance = self.drafter.source.confidence(memory)
    if chance is None:
      raise ValueError(
          f'draft_acceptance_threshold={threshold}: this drafter has no '
          'confidence head')
    return chance[:, 0] >= threshold

  def _goes_on(self, token: Array, confidence: Array) -> Array:
    """Whether to draft beyond a token; the token itself is kept."""
    going = confidence >= self.drafter.confidence_threshold
    eos = self.context.options.eos
    if eos is not None:
      going &= ~jnp.any(token[:, None] == eos, axis=-1)
    return going
