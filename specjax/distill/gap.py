"""Whether a drafter is accepted in decoding as it was in training.

`measure` decodes with the real loop, and asks the training code, teacher
forced on the texts that came out, what it makes of every place at which a
round began. A text of a lossless decoder is the target's own, so both look at
the same drafts: what differs is the code. Differences mean that decoding
reads other states, positions or weights than training did.

Two populations are told apart. Places where rounds began are no fair sample
of a text: a round begins behind a token that was *not* drafted, or behind a
block that was accepted whole. So the mean over all places, what training
reports, differs from decoding's without any fault; it is reported beside.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.distill import losses
from specjax.distill import measure as measure_lib
from specjax.distill import teacher as teacher_lib
from specjax.distill.task import Task
from specjax.distill.watched import Watched
from specjax.drafters import ChainLM
from specjax.models.causal import CausalLM
from specjax.verify import Greedy, Speculative

Array = jax.Array

# Logits [A,K,W] that exist at a time: places of one call of the task.
_PLACES = 64


class Means(NamedTuple):
  """Chances that a draft is accepted, those before it were; by depth.

  Attributes:
    mean: f64[K], NaN without data. error: f64[K], its standard error.
    number: f64[K], drafts.
  """

  mean: np.ndarray
  error: np.ndarray
  number: np.ndarray


@dataclasses.dataclass(frozen=True)
class Gap:
  """What training and decoding make of the same places.

  Attributes:
    forced: training's chances at the places where rounds began. Greedy: the
      share of drafts that say what the target says, of those reached. Else
      the mean of sum_x min(p, q).
    decoded: the same, as the loop's own laws gave it, where it got to.
    accepted: share of drafts that the loop accepted.
    everywhere: training's, at all places of the texts. Greedy: of drafts that
      are reached from there; else of all.
    largest: f64[K], largest difference at a place between `forced` and
      `decoded`.
    rounds, tokens: decoded. texts: int32 arrays, prompt included.
  """

  forced: Means
  decoded: Means
  accepted: Means
  everywhere: Means
  largest: np.ndarray
  rounds: int
  tokens: int
  texts: tuple[np.ndarray, ...]

  @property
  def difference(self) -> np.ndarray:
    """Decoding's chance less training's, f64[K]."""
    return self.decoded.mean - self.forced.mean

  @property
  def error(self) -> np.ndarray:
    """Standard error of the difference of two independent samples.

    They are not independent, so that it is smaller in truth.
    """
    return np.hypot(self.decoded.error, self.forced.error)

  def closed(
      self, points: float = 0.02, errors: float = 2.0, least: int = 50
  ) -> bool:
    """Whether no depth differs by more than `points` or `errors` errors.

    Depths with fewer than `least` drafts in either are not judged; there has
    to be another.
    """
    known = np.minimum(self.forced.number, self.decoded.number) >= least
    size = np.abs(self.difference[known])
    limit = np.minimum(points, errors * self.error[known])
    return bool(known.any() and (size <= limit + 1e-6).all())

  def to_dict(self) -> dict[str, Any]:
    """Returns plain values, for JSON; None where there is no data."""
    def plain(x: np.ndarray) -> list[float | None]:
      return [float(v) if np.isfinite(v) else None for v in x]

    means = {name: {k: plain(v) for k, v in getattr(self, name)._asdict(
        ).items()} for name in ('forced', 'decoded', 'accepted',
                                'everywhere')}
    return {**means, 'difference': plain(self.difference),
            'error': plain(self.error), 'largest': plain(self.largest),
            'closed': self.closed(), 'rounds': self.rounds,
            'tokens': self.tokens}


def measure(
    task: Task, lm: CausalLM, params: Models, prompts: Sequence[Any], *,
    new_tokens: int = 64, temperature: float = 0.0, eos: Sequence[int] = (),
    drafter: Any = None, seed: int = 0, chunk: int = 128,
) -> Gap:
  """Compares the acceptance of training with that of decoding.

  Args:
    task: how the drafter was trained. lm: the target.
    params: of target and drafter, as for decoding.
    prompts: token ids, two or more each. new_tokens: of each text at most.
    temperature: 0 (greedy) or 1, at which training compares laws.
    eos: end tokens. drafter: a chain to decode with; None: `ChainLM` of the
      task's source and length. seed: of what is drawn.
    chunk: prompt tokens fed at a time.

  Raises:
    ValueError: another temperature, prompts that are too short, a drafter
      that is no chain or drafts more tokens than were trained.
  """
  if temperature not in (0.0, 1.0):
    raise ValueError(f'temperature={temperature}: must be 0 or 1')
  if not prompts or min(len(p) for p in prompts) < 2:
    raise ValueError('prompts: must be given, of two tokens or more each')
  drafter = drafter or ChainLM(task.num_draft, task.source())
  num = drafter.topology.num_nodes
  if not drafter.topology.is_chain or num > task.num_draft:
    raise ValueError(f'drafter: must be a chain of up to {task.num_draft}')
  rule: Any = Speculative() if temperature else Greedy()
  engine = Engine(lm, Watched(drafter), rule)
  context = measure_lib.context(
      prompts, new_tokens, eos=eos, temperature=temperature, seed=seed)
  context = context.replace(token_round=jnp.full(context.tokens.shape, -1))
  tokens, lengths, token_round, seen = jax.device_get(
      _decode(engine, params, context, chunk))
  starts = np.asarray([len(p) for p in prompts])
  drafts = _drafts(starts, lengths, token_round, seen)
  places = np.arange(tokens.shape[1])
  # A round begins with the last token of the prompt or of another round.
  is_place = (places >= starts[:, None] - 1) & (places < lengths[:, None] - 1)
  began = is_place & ((places == starts[:, None] - 1) | (
      token_round != np.roll(token_round, -1, axis=1)))
  chance = _forced(task, lm, params, tokens, lengths, is_place, num,
                   bool(temperature))
  ahead = places[:, None] + 1 + np.arange(num)
  chance[ahead >= lengths[:, None, None]] = np.nan
  return Gap(
      **_compare(drafts, chance, began, bool(temperature)),
      rounds=int(began.sum()), tokens=int((lengths - starts).sum()),
      texts=tuple(t[:n] for t, n in zip(tokens, lengths, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode(engine: Engine, params: Models, start: Any, chunk: int):
  state = loop.empty(engine, start)
  rows = jnp.ones(start.length.shape, bool)
  state = loop.start(engine, params, state, rows, chunk=chunk)
  state = loop.run(engine, params, state, jnp.int32(2**30))
  context, size = state.context, start.tokens.shape[1]
  return context.tokens, context.length, context.token_round, {
      k: state.drafter[k][:, :size] for k in ('chance', 'accepted')}


class _Drafts(NamedTuple):
  """Drafts that rounds got to, [n] each.

  Attributes:
    row: of the batch. anchor: place of the pending token. depth: from 0.
    chance, accepted: see `Watched`.
  """

  row: np.ndarray
  anchor: np.ndarray
  depth: np.ndarray
  chance: np.ndarray
  accepted: np.ndarray


def _drafts(starts, lengths, token_round, seen) -> _Drafts:
  """Returns the drafts within the texts: a cut text is no rejection."""
  out = []
  for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
    first = start
    for place in range(start, length):
      if token_round[row, place] != token_round[row, first]:
        first = place
      if seen['chance'][row, place] >= 0:
        out.append((row, first - 1, place - first,
                    seen['chance'][row, place], seen['accepted'][row, place]))
  table = np.asarray(out, np.float64).reshape(-1, 5)
  row, anchor, depth = table[:, :3].astype(int).T
  return _Drafts(row, anchor, depth, table[:, 3], table[:, 4])


def _forced(task, lm, params, tokens, lengths, is_place, num, sampled):
  """Returns f64[B,S,K], what training makes of every place; else NaN."""
  out = np.full(tokens.shape + (num,), np.nan)
  for row, length in enumerate(lengths):
    places = np.flatnonzero(is_place[row])
    for i in range(0, len(places), _PLACES):
      part = places[i:i + _PLACES]
      anchors = np.resize(part, _PLACES).astype(np.int32)
      found = _places(task, lm, num, sampled, params, tokens[row], length,
                      anchors)
      out[row, part] = np.asarray(found)[:len(part)]
  return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _places(
    task: Task, lm: CausalLM, num: int, sampled: bool, params: Models,
    tokens: Array, length: Array, anchors: Array,
) -> Array:
  """Returns f32[A,K] at places `anchors int32[A]` of one text."""
  place = jnp.arange(tokens.shape[0])
  batch = teacher_lib.Batch(
      tokens=tokens[None], position=place[None], document=(
          place < length).astype(jnp.int32)[None],
      supervised=jnp.ones((1,) + tokens.shape, bool))
  seen = teacher_lib.observe(lm, params.target, batch, task.taps)
  own = params.drafter
  log_q = jax.nn.log_softmax(task.logits(
      own, params.target, batch, seen, anchors[None])[0, :, :num], axis=-1)
  at = jnp.minimum(anchors[:, None] + jnp.arange(num), tokens.shape[0] - 1)
  if not sampled:
    said = jnp.argmax(log_q, axis=-1) == own['inverse'][seen.top[0, at]]
    return said.astype(jnp.float32)
  logits = lm.head(params.target, seen.final[0, at])[..., own['ids']]
  return losses.acceptance(logits - seen.log_z[0, at][..., None], log_q)


def _compare(
    drafts: _Drafts, chance: np.ndarray, began: np.ndarray, sampled: bool
) -> dict[str, Any]:
  """Returns the means of `Gap`.

  Args:
    chance: f64[B,S,K], NaN behind the text. began: bool[B,S].
  """
  num = chance.shape[-1]
  forced = chance[drafts.row, drafts.anchor, drafts.depth]

  def by_depth(values: np.ndarray) -> Means:
    return _means([values[drafts.depth == k] for k in range(num)])

  def reached(places: np.ndarray) -> Means:
    rows = chance[places]
    if sampled:
      return _means(list(rows.T))
    before = np.cumprod(np.pad(
        np.nan_to_num(rows), ((0, 0), (1, 0)), constant_values=1.0)[:, :-1],
        axis=1)
    return _means(list(np.where(before > 0, rows, np.nan).T))

  largest = [np.abs(forced - drafts.chance)[drafts.depth == k]
             for k in range(num)]
  return {
      'forced': by_depth(forced) if sampled else reached(began),
      'decoded': by_depth(drafts.chance),
      'accepted': by_depth(drafts.accepted),
      'everywhere': reached(np.ones_like(began)),
      'largest': np.asarray([x.max() if len(x) else np.nan
                             for x in largest])}


def _means(columns: list[np.ndarray]) -> Means:
  """Returns means of values f64[n] each; NaN are left out."""
  some = [x[np.isfinite(x)] for x in columns]
  number = np.asarray([len(x) for x in some], float)
  mean = np.asarray([x.mean() if len(x) else np.nan for x in some])
  error = np.asarray([x.std() / np.sqrt(len(x)) if len(x) else np.nan
                      for x in some])
  return Means(mean, error, number)
