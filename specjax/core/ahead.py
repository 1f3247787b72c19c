"""Denoising chains drawn in fewer calls of their head: the loop in the loop."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import loop
from specjax.core.chains import Path, Process
from specjax.core.round import Engine
from specjax.core.types import (
  Context,
  Drafter,
  Models,
  Options,
  Target,
  Verifier,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Ahead:
  """Draws chains as texts of states, some of them drafted; a `Process.ahead`.

  With a lossless rule the chains have the law that drawing them step by step
  has. A round is one call of the head for all states that are drafted, so
  that chains cost fewer calls, one after another, and more work.

  Attributes:
    target: makes chains a target (`models.denoising.Denoising`).
    drafter: drafts states, without parameters (`drafters.held.Held`); its
      field `process` is set to the chain that is drawn.
    rule: verifies states.
  """

  target: Callable[[Process], Target]
  drafter: Drafter
  rule: Verifier

  def __call__(
      self, path: Path, state: Array, keys: Array, first: int
  ) -> Array:
    """Returns the states f32[...,T-first,C] that follow `state f32[...,C]`.

    Args:
      path: the law, of one chain for each of `keys`. state: before step
        `first`. keys: key[...], consumed.
    """
    process: Any = dataclasses.replace(path.process, ahead=None)
    drafter: Any = self.drafter
    drafter = dataclasses.replace(drafter, process=process)
    engine = Engine(self.target(process), drafter, self.rule)
    lead, rows, total = keys.shape, math.prod(keys.shape), process.num_steps

    def flat(x: Array) -> Array:
      return x.reshape(rows, *x.shape[len(lead):])

    length = jnp.full((rows,), first + 1, jnp.int32)
    text = jnp.zeros((rows, total + 1, process.channels), jnp.float32)
    context = Context(
        tokens=text.at[:, first].set(flat(state)), length=length,
        prompt_length=length + 0, limit=jnp.full((rows,), total + 1, jnp.int32),
        done=jnp.zeros((rows,), bool), rounds=jnp.zeros((rows,), jnp.int32),
        keys=flat(keys), options=Options(temperature=flat(path.temperature)),
        condition=jax.tree.map(flat, path.condition))
    # Each round ends with a state of the target's, so T rounds are enough.
    ended = loop.run(engine, Models(target=path.params),
                     loop.empty(engine, context), jnp.int32(total))
    return ended.context.tokens[:, first + 1:].reshape(
        *lead, total - first, process.channels)
