"""Faults of rules and drafters of continuous tokens: each must be found."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import chains, density, tree
from specjax.models.ahead import Ahead
from specjax.verify.continuous import PathExact, event_of


@dataclasses.dataclass(frozen=True)
class VarianceForDeviation(PathExact):
  """Scores with the variance in the place of the deviation."""

  def tests(self, context, draft, p, q):
    """As `PathExact`, with the wrong densities."""
    _, extra, laws = super().tests(context, draft, p, q)
    end = event_of(draft)[..., laws[0].first + 1:, :]
    scored = []
    for law in laws:
      mean, log_std = law.moments(end)
      scored.append(jnp.sum(
          density.log_normal(end, mean, 2 * log_std), axis=(-2, -1)))
    return scored[0] - scored[1], extra, laws


@dataclasses.dataclass(frozen=True)
class NoFirstRejection(PathExact):
  """Keeps drafts that follow a rejected one."""

  def verify(self, params, context, draft, scores):
    """As `PathExact`, up to the last draft that passes alone."""
    p = scores.target_law
    row = jnp.broadcast_to(
        jnp.arange(draft.topology.num_nodes), draft.valid.shape)
    ratio, extra, laws = self.tests(context, draft, p.at(row),
                                    draft.draft_law)
    later = jnp.flip(jax.lax.cummax(jnp.flip(ratio, 1), axis=1), 1)
    return _Given(later, extra, laws).verify(params, context, draft, scores)


class _Given(PathExact):
  """`PathExact` with tests that are given."""

  found: tuple[Any, ...] = ()

  def __init__(self, *found):
    super().__init__()
    object.__setattr__(self, 'found', found)

  def tests(self, context, draft, p, q):
    """Returns what was given."""
    del context, draft, p, q
    return self.found

@dataclasses.dataclass(frozen=True)
class OneSet(PathExact):
  """Takes all drafts for tokens that are made at the same time."""

  def verify(self, params, context, draft, scores):
    """As `PathExact`, where a rejection ends nothing."""
    return super().verify(params, context, draft, scores.replace(
        sets=jnp.zeros_like(scores.sets)))


@dataclasses.dataclass(frozen=True)
class NoiseAgain(PathExact):
  """Corrects with the noise that made the rejected draft."""

  def correct(self, draft, p, q, key, slot, use, aux):
    """The target's own path of the drafter's noise."""
    fresh, gave_up = super().correct(
        draft, p, q, key, slot, jnp.zeros_like(use), aux)
    mine = aux[0].at(slot)
    event = tree.take_row(event_of(draft), slot)
    noise = q.noise(event, mine.path.process.num_steps)[:, mine.first:]
    again = mine.token(mine.path.run(mine.state, noise, mine.first))
    return jnp.where(use[:, None], again, fresh), gave_up


@dataclasses.dataclass(frozen=True)
class Quiet:
  """A drafter whose last step has no noise, stated as if it had some."""

  drafter: Any

  def __getattr__(self, name: str) -> Any:
    if name == 'drafter' or name.startswith('__'):
      raise AttributeError(name)
    return getattr(self.drafter, name)

  def propose(self, params, state):
    """Draws without, states with."""
    model = self.drafter.model
    silent = dataclasses.replace(
        model, process=dataclasses.replace(model.process, last_noise=False))
    draft, state = dataclasses.replace(
        self.drafter, model=silent).propose(params, state)
    law = draft.draft_law
    return draft.replace(draft_law=chains.Path(
        model.process, law.params, law.condition, law.temperature)), state


class Unseen(Ahead):
  """Keeps every state that was guessed."""

  def __call__(self, path, state, keys, first):
    """As `Ahead`, of a head that goes on saying what was guessed."""
    def head(params, x, time, condition):
      noise, between = path.process.head(
          params, x[:, :1], jax.tree.map(lambda y: y[:, :1], time), condition)
      signal = time.signal[..., None]
      token = (x[:, :1] - jnp.sqrt(1 - signal[:, :1]) * noise) / jnp.sqrt(
          signal[:, :1])
      held = (x - jnp.sqrt(signal) * token) / jnp.sqrt(1 - signal)
      return held, jnp.broadcast_to(between, x.shape)
    process = dataclasses.replace(path.process, head=head)
    return super().__call__(path.replace(process=process), state, keys, first)
