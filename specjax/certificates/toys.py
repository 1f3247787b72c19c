"""Toy models of a few lines, whose laws can be worked out exactly."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core import pipeline, tree, types
from specjax.core.types import Context, Options, Scores


@dataclasses.dataclass(frozen=True)
class ToyLM:
  """A second-order Markov chain that reads its past from a token cache.

  Logits are `table[previous, current]`; `previous` comes from the cache, so
  that a stale entry or a wrong slot changes the law. Serves as a target and
  as the model of a `ChainLM`.
  """

  vocab_size: int = 4

  def empty(self, batch: int, capacity: int) -> Any:
    return {'cache': jnp.full((batch, capacity), -1, jnp.int32)}

  def _put(self, cache, slot, tokens, fed):
    slot = jnp.where(fed & (slot >= 0), slot, cache.shape[1])
    return jax.vmap(lambda r, i, x: r.at[i].set(x, mode='drop'))(
        cache, slot, tokens)

  def _logits(self, params, cache, slot, parent_slot):
    table = params['table']
    now = jnp.clip(tree.take_row(cache, slot), 0)
    before = jnp.where(parent_slot >= 0, tree.take_row(cache, parent_slot), 0)
    return table[jnp.clip(before, 0), now]

  def feed(self, params, state, tokens, base, fed):
    slot = base[:, None] + jnp.arange(tokens.shape[1])
    return {'cache': self._put(state['cache'], slot, tokens, fed)}

  def extend(self, params, state, tokens, base, fed):
    state = self.feed(params, state, tokens, base, fed)
    last = base[:, None] + tokens.shape[1] - 1
    logits = self._logits(params, state['cache'], last, last - 1)
    return logits[:, 0], state

  def grow(self, params, state, tokens, base, position, ancestors,
           entry_position, start):
    """Feeds a level of a tree: logits of every token, state."""
    size = tokens.shape[1]
    slot = base[:, None] + start + jnp.arange(size)
    cache = self._put(
        state['cache'], slot, tokens, jnp.ones_like(slot, bool))
    # The parent is the newest entry it sees, or the last committed token.
    above = jnp.broadcast_to(
        ancestors, (slot.shape[0],) + ancestors.shape[-2:])
    entry = jnp.arange(start + size)
    above = above & (entry != start + jnp.arange(size)[:, None])
    parent = base[:, None] + jnp.max(jnp.where(above, entry, -1), axis=-1)
    return self._logits(params, cache, slot, parent), {'cache': cache}

  def init(self, params, state, position, fed, taps):
    tokens = tree.take_row(state.context.tokens, position)
    cache = self._put(state.target['cache'], position, tokens, fed)
    return state.replace(target={'cache': cache}), {}

  def score(self, params, state, draft, taps):
    context, topology = state.context, draft.topology
    pending = tree.take_row(context.tokens, context.root)
    tokens = jnp.concatenate([pending[:, None], draft.tokens], axis=1)
    slot = context.root[:, None] + jnp.arange(topology.num_nodes + 1)
    cache = self._put(state.target['cache'], slot, tokens,
                      jnp.ones_like(slot, bool))
    parents = jnp.broadcast_to(
        tree.parent_rows(topology, draft.parents), draft.tokens.shape)
    up = jnp.pad(parents, ((0, 0), (1, 0)), constant_values=-1)
    logits = self._logits(
        params.target, cache, slot, context.root[:, None] + up)
    past = tree.history(topology, draft.parents, draft.tokens)
    raw = logits if context.log_probs is not None else None
    found = {'logits': logits, 'final': logits}
    return Scores(target_law=pipeline.law(context, logits, past),
                  taps={name: found[name] for name in taps},
                  finite=pipeline.finite(logits), raw=raw), state.replace(
                      target={'cache': cache})

  def commit(self, state, draft, verdict):
    if draft.topology.is_chain:
      return state
    cache, root = state.target['cache'], state.context.root
    path = jnp.clip(verdict.path, 0, draft.topology.num_nodes)
    taken = tree.take_row(cache, root[:, None] + path)
    slot = root[:, None] + jnp.arange(path.shape[1])
    return state.replace(target={
        'cache': self._put(cache, slot, taken, jnp.ones_like(slot, bool))})


def table(seed: int, vocab_size: int, scale: float = 1.5) -> np.ndarray:
  """Returns random logits f32[V,V,V]."""
  rng = np.random.default_rng(seed)
  return rng.normal(0, scale, (vocab_size,) * 3).astype(np.float32)


def toy_params(seed: int, vocab_size: int, scale: float = 1.5):
  """Returns the parameters of a `ToyLM`."""
  return {'table': jnp.asarray(table(seed, vocab_size, scale))}


def context(
    prompts: list[list[int]], *, size: int = 32, new: int | None = None,
    seed: int = 0, options: Options | None = None, keys=None, **kwargs,
) -> Context:
  """Returns a context of ragged prompts, `size` slots a row."""
  batch = len(prompts)
  tokens = np.zeros((batch, size), np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, :len(prompt)] = prompt
  length = jnp.asarray([len(p) for p in prompts], jnp.int32)
  limit = jnp.full((batch,), size, jnp.int32)
  if new is not None:
    limit = jnp.minimum(length + new, size)
  if keys is None:
    keys = jax.random.split(jax.random.key(seed), batch)
  return Context(
      tokens=jnp.asarray(tokens), length=length, prompt_length=length + 0,
      limit=limit, done=jnp.zeros((batch,), bool),
      rounds=jnp.zeros((batch,), jnp.int32), keys=keys,
      options=options or Options(), **kwargs)


def sampled(batch: int, **kwargs) -> Options:
  """Returns options with these values in every row (temperature 1)."""
  kwargs = {'temperature': 1.0, **kwargs}
  whole = {'top_k', 'min_new'}
  return Options(**{
      k: jnp.full((batch,), v, jnp.int32 if k in whole else jnp.float32)
      for k, v in kwargs.items()})


@dataclasses.dataclass(frozen=True)
class ByRow:
  """Several rules in one program; `condition['rule']` says which is used.

  Compiling is most of a test's time: one program tests them all.
  """

  rules: tuple

  @property
  def taps(self) -> tuple[str, ...]:
    """Those of all rules."""
    return tuple(dict.fromkeys(t for rule in self.rules for t in rule.taps))

  def verify(self, params, context, draft, scores):
    verdict = self.rules[0].verify(params, context, draft, scores)
    for i, rule in enumerate(self.rules[1:], 1):
      verdict = types.select_rows(
          context.condition['rule'] == i,
          rule.verify(params, context, draft, scores), verdict)
    return verdict
