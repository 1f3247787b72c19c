"""A chain of continuous tokens, drawn one after another from a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import keys
from specjax.core.types import IID, Draft, Models, SpecState
from specjax.drafters import base
from specjax.drafters import source as source_lib

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ChainDensity(source_lib.Sourced, base.ChainDrafter):
  """Draws K continuous tokens from a model with a density.

  The counterpart of `ChainLM`: drafts come with the law and the event that
  they were drawn as.

  Attributes:
    num_speculative_tokens: K >= 1.
    model: as `ChainLM.model`, with features (leaves [B,...], of rows
      [B,R,...]) in the place of logits, and `law(params, context, features)`,
      the density of what follows; parameters are `params.drafter`.
    catch_up: as in `ChainLM`.
    prefill: tokens that the target makes alone before the first draft: early
      prefixes differ most (Wang et al. 2024, arXiv:2411.11925, section 3.3).
  """

  num_speculative_tokens: int = 4
  model: Any = None
  catch_up: int = 2
  prefill: int = 0

  modes = (IID,)

  def __post_init__(self):
    super().__post_init__()
    if self.model is None:
      raise ValueError('a continuous chain needs a model to draw from')
    if self.catch_up < 2:
      raise ValueError(f'catch_up={self.catch_up}: must be >= 2')
    if self.prefill < 0:
      raise ValueError(f'prefill={self.prefill}: must be >= 0')

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Catches up, then draws K tokens one after another."""
    source, context = self.source, state.context
    num, batch = self.num_speculative_tokens, context.length.shape[0]
    features, memory = source.begin(
        params, state, behind=self.catch_up, refill=False)

    def draw(features, step):
      law = self.model.law(params.drafter, context, jax.tree.map(
          lambda x: x[:, None], features))
      row = law.at(jnp.zeros((batch,), jnp.int32))
      event = row.sample(keys.row(context, keys.Purpose.DRAFT, step))
      return row.token(event), event

    def body(carry, step):
      features, memory = carry
      token, event = draw(features, step)
      slot = context.length + step
      new, memory = source.grow(
          params, context, memory, source_lib.Level(
              tokens=token[:, None], depth=step + 1, base=slot,
              parent=jnp.zeros((1,), jnp.int32), position=slot[:, None]))
      new = jax.tree.map(lambda x: x[:, 0], new)
      return (new, memory), (token, event, features)

    # The last draft is not fed: the next round's catch-up does it.
    carry, outs = jax.lax.scan(body, (features, memory), jnp.arange(num - 1))
    features, memory = carry
    last = (*draw(features, num - 1), features)
    tokens, events, given = jax.tree.map(
        lambda a, b: jnp.concatenate([jnp.moveaxis(a, 0, 1), b[:, None]], 1),
        outs, last)
    drafting = ~context.done & (
        context.length - context.prompt_length >= self.prefill)
    draft = Draft(
        topology=self.topology, tokens=tokens,
        # Nothing is drafted behind the end.
        valid=drafting[:, None] & (
            context.length[:, None] + jnp.arange(num)
            < context.limit[:, None]),
        mode=jnp.full((num,), IID, jnp.int32),
        draft_law=self.model.law(params.drafter, context, given),
        event=events)
    return draft, state.replace(drafter=memory)

  def sync(self, params, state, draft, scores, verdict) -> SpecState:
    """Hands the verdict on."""
    return state.replace(drafter=self.source.sync(
        params, state, draft, scores, verdict, own=self.catch_up == 2))
