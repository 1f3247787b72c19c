"""Whether a confidence head is right, seen and mended in real rounds.

    found = calibrate(model, target.lm, params, measure.context(prompts, 128))
    model = calibrated(model, found.temperatures)

The head learns from the text's own tokens. What it is asked is about drafts,
at the temperature of decoding: the decoder itself drafts here, and each slot
gets the temperature that makes its chances come true.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import verify
from specjax.core.round import Engine
from specjax.core.types import Context, Models
from specjax.distill import calibrate as scaling
from specjax.distill import measure
from specjax.drafters import ChainLM
from specjax.drafters.block import BlockSource

Array = jax.Array

_LARGEST = 16.0  # logits beyond it are chances of 0 or 1 in float32


class Rounds(NamedTuple):
  """What decoding showed; R rounds a row, most of which may not have been.

  Attributes:
    logits: f32[B,R,G], of the head, without temperatures.
    accepted: bool[B,R,G], drafts that were kept.
    drafted: bool[B,R,G], drafts that were verified.
  """

  logits: np.ndarray
  accepted: np.ndarray
  drafted: np.ndarray

  def of(self, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the three as [n,G]: the rounds in which some rows drafted."""
    some = self.drafted[rows].any(axis=-1)
    return (self.logits[rows][some], self.accepted[rows][some],
            self.drafted[rows][some])


class Calibration(NamedTuple):
  """What became of a confidence head.

  Attributes:
    temperatures: by slot; none if they would not have helped.
    before, after: calibration error by slot (`calibrate.ece`, of joint
      chances), in rounds that they were not fitted on.
    rounds: of both kinds, together.
  """

  temperatures: tuple[float, ...]
  before: tuple[float, ...]
  after: tuple[float, ...]
  rounds: int

  def to_values(self) -> dict[str, Any]:
    """Returns JSON values: errors, and the rounds that they come from."""
    return {'before': list(self.before), 'after': list(self.after),
            'rounds': self.rounds}

  def describe(self) -> str:
    """Returns the mean errors as text."""
    before, after = f'{np.mean(self.before):.1%}', f'{np.mean(self.after):.1%}'
    if not self.temperatures:
      return f'{before}, which no temperatures were found to lower'
    return f'{before} before, {after} after'


def has_head(model: Any) -> bool:
  """Whether a drafter's model says how sure it is."""
  return getattr(model.config, 'confidence', False)


def calibrated(model: Any, temperatures: Any) -> Any:
  """Returns the model whose head's logits are divided by slot.

  Args:
    model: with a confidence head. temperatures: [G] > 0, or () for none.
  """
  return dataclasses.replace(model, config=dataclasses.replace(
      model.config, temperatures=tuple(map(float, temperatures))))


def calibrate(
    model: Any, lm: Any, params: Models, start: Context, *, chunk: int = 128
) -> Calibration:
  """Returns temperatures fitted on every second row, tried on the others.

  They are kept if they lower the mean error of the rows that they were not
  fitted on. Chances are those of `start`'s sampling temperatures.

  Args:
    model: a `BlockModel`; temperatures that it has are not looked at.
    lm: the target. params: of both.
    start: prompts that nothing was trained on, at least two.
    chunk: of prompts.

  Raises:
    ValueError: a model without a confidence head, or a single row.
  """
  if not has_head(model):
    raise ValueError('this drafter has no confidence head')
  if len(start.length) < 2:
    raise ValueError('one prompt: calibration needs two, to fit and to try')
  seen = observe(model, lm, params, start, chunk=chunk)
  fitted = scaling.fit(*seen.of(slice(0, None, 2)))
  tried = seen.of(slice(1, None, 2))
  before = scaling.errors(*tried)
  after = scaling.errors(*tried, temperatures=fitted)
  if after.mean() >= before.mean():
    fitted, after = np.zeros(0), before
  return Calibration(
      tuple(fitted.tolist()), tuple(before.tolist()), tuple(after.tolist()),
      int(seen.drafted.any(axis=-1).sum()))


def observe(
    model: Any, lm: Any, params: Models, start: Context, *, chunk: int = 128
) -> Rounds:
  """Decodes with chains of all slots; returns what the head said, and when.

  Args: see `calibrate`.
  """
  source = _Noted(BlockSource(calibrated(model, ())))
  engine = Engine(lm, ChainLM(model.num_slots, source), verify.get(
      'greedy' if start.options.temperature is None else 'speculative'))
  noted = jax.device_get(_decode(engine, params, start, chunk=chunk))
  chance = np.asarray(noted['chance'], np.float64)
  with np.errstate(divide='ignore'):
    logits = np.log(chance) - np.log1p(-chance)
  return Rounds(np.clip(logits, -_LARGEST, _LARGEST), noted['accepted'],
                noted['drafted'])


@functools.partial(jax.jit, static_argnums=0, static_argnames='chunk')
def _decode(engine: Engine, params: Models, start: Context, chunk: int):
  return measure.decoded(engine, params, start, chunk=chunk).drafter['noted']


@dataclasses.dataclass(frozen=True)
class _Noted:
  """A source that writes down its chances and what became of the drafts.

  Its memory is 'inner'; 'chance' f32[B,G] of the draft that is made, and
  'noted': three arrays [B,R,G] by round, see `Rounds`.
  """

  source: BlockSource

  follows = False

  @property
  def taps(self) -> tuple[str, ...]:
    return self.source.taps

  def empty(self, batch: int, capacity: int) -> Any:
    # A round emits a token at least.
    shape = batch, capacity + 1, self.source.num_slots
    return {'inner': self.source.empty(batch, capacity),
            'chance': jnp.zeros((batch, shape[-1]), jnp.float32), 'noted': {
                'chance': jnp.full(shape, 0.5, jnp.float32),
                'accepted': jnp.zeros(shape, bool),
                'drafted': jnp.zeros(shape, bool)}}

  def init(self, params, state, position, fed, taps) -> Any:
    inner = self.source.init(params, _inside(state), position, fed, taps)
    return {**state.drafter, 'inner': inner}

  def begin(self, params, state, *, behind, refill) -> tuple[Array, Any]:
    logits, inner = self.source.begin(
        params, _inside(state), behind=behind, refill=refill)
    return logits, self._told({**state.drafter, 'inner': inner}, 0)

  def grow(self, params, context, memory, level) -> tuple[Array, Any]:
    logits, inner = self.source.grow(
        params, context, memory['inner'], level)
    return logits, self._told({**memory, 'inner': inner}, level.depth)

  def confidence(self, memory: Any) -> Array | None:
    return self.source.confidence(memory['inner'])

  def sync(self, params, state, draft, scores, verdict, *, own) -> Any:
    """Writes down a round."""
    drafted = draft.valid & ~state.context.done[:, None]
    slot = jnp.arange(drafted.shape[1])
    new = {'chance': state.drafter['chance'], 'drafted': drafted,
           'accepted': drafted & (slot < verdict.num_accepted[:, None])}
    put = jax.vmap(lambda rows, at, x: rows.at[at].set(x, mode='drop'))
    # A row that is done goes on counting nothing: out of range, dropped.
    size = state.drafter['noted']['drafted'].shape[1]
    at = jnp.where(state.context.done, size, state.context.rounds)
    noted = {k: put(x, at, new[k]) for k, x in state.drafter['noted'].items()}
    inner = self.source.sync(
        params, _inside(state), draft, scores, verdict, own=own)
    return {**state.drafter, 'inner': inner, 'noted': noted}

  def _told(self, memory: Any, depth: Any) -> Any:
    chance: Any = self.confidence(memory)
    return {**memory, 'chance': memory['chance'].at[:, depth].set(
        chance[:, 0])}


def _inside(state: Any) -> Any:
  return state.replace(drafter=state.drafter['inner'])
