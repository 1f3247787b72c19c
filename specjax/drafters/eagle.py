"""A source that continues the target's hidden states: EAGLE."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import round as round_lib
from specjax.core import tree

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EagleSource:
  """Rows over true states for what is committed, over guesses beyond.

  Row t stands for the token at t + 1: committed rows are 0 to root - 1, and
  scratch begins at the root. While drafting, a row takes its parent's output
  in the place of the target's state; `sync` runs the rows of accepted tokens
  again with the true states, whoever drafted them, so that the cache never
  depends on a guess.

  Memory: `cache`, and `hidden [B,D]`, the output of the last committed row
  (zeros for a text of one token, which has none). While drafting also
  `level [B,T,D]`, outputs of the level above.

  Attributes:
    model: a `models.EagleModel`; its parameters are `params.drafter`.

  References: EAGLE, arXiv:2401.15077; EAGLE-2 (under `GrownLM`),
  arXiv:2406.16858; EAGLE-3, arXiv:2503.01840.
  """

  model: Any

  follows = True

  @property
  def taps(self) -> tuple[str, ...]:
    return self.model.taps

  def empty(self, batch: int, capacity: int) -> Any:
    return self.model.empty(batch, capacity)

  def init(self, params, state, position, fed, taps) -> Any:
    """Runs the rows of a chunk of the prompt."""
    tokens = tree.take_row(state.context.tokens, position + 1)
    return self._commit(
        params, state.drafter, taps, tokens, position[:, 0], fed)

  def begin(self, params, state, *, behind, refill) -> tuple[Array, Any]:
    """Scores the first draft: the last committed row has been run."""
    del behind, refill  # never behind
    memory = state.drafter
    logits = self._score(params, memory['hidden'])
    return logits, {**memory, 'level': memory['hidden'][:, None]}

  def grow(self, params, context, memory, level) -> tuple[Array, Any]:
    """Runs the rows of a level from its parents' outputs."""
    del context
    parent = jnp.broadcast_to(level.parent, level.tokens.shape)
    entries = level.entry_position
    hidden, cache = self.model.extend(
        params.drafter, params.target, memory['cache'],
        tree.take_row(memory['level'], parent), level.tokens, level.base - 1,
        position=level.position - 1, ancestors=level.ancestors,
        entry_position=None if entries is None else entries - 1,
        start=level.start)
    return self._score(params, hidden), {
        **memory, 'cache': cache, 'level': hidden}

  def confidence(self, memory: Any) -> None:
    del memory

  def sync(self, params, state, draft, scores, verdict, *, own) -> Any:
    """Runs the rows of the new tokens from the target's states."""
    del own
    path = jnp.minimum(verdict.path, draft.topology.num_nodes)
    taps = {name: tree.take_row(scores.taps[name], path)
            for name in self.taps}
    fed = jnp.arange(path.shape[1]) <= verdict.num_accepted[:, None]
    return self._commit(
        params, state.drafter, taps, round_lib.emitted(draft, verdict),
        state.context.root, fed & ~state.context.done[:, None])

  def _commit(self, params, memory, taps, tokens, base, fed) -> Any:
    """Runs rows over true states; keeps the output of each text's last."""
    features = jnp.concatenate([taps[name] for name in self.taps], axis=-1)
    out, cache = self.model.extend(
        params.drafter, params.target, memory['cache'],
        self.model.observe(params.drafter, features), tokens, base, fed=fed)
    last = jnp.max(jnp.where(fed, jnp.arange(fed.shape[1]), -1), axis=1)
    hidden = jnp.where(
        last[:, None] >= 0, tree.take_row(out, last), memory['hidden'])
    return {'cache': cache, 'hidden': hidden}

  def _score(self, params, hidden: Array) -> Array:
    return self.model.spread(
        params.drafter, self.model.logits(params.drafter, hidden))
