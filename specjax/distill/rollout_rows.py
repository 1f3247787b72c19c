"""The slots of a rollout: rows are fed, decoded, collected, replaced."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specjax.core import loop, types
from specjax.core.types import Context, Options, SpecState
from specjax.data.store import Record
from specjax.parallel import rules

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Settings:
  """How texts are generated.

  Attributes:
    max_new: most tokens of an answer, >= 1.
    temperatures: each >= 0; a prompt's is chosen by its index, all equally
      likely (repeat one to make it likelier).
    top_p: in (0, 1]; None or 1 keeps the whole law.
    seed: of the run.
    batch: slots; None is 1024 on accelerators and 8 on CPUs.
    refill: share of the slots, in (0, 1], that must be vacant before they
      are refilled; as many prompts are fed at a time.
    rounds: between looks of the host, >= 1.
    chunk: prompt tokens fed at a time, >= 1.
    buckets: prompts up to each of these lengths share a capacity, and hence
      a compiled program; a longer prompt is refused.
    cache_tokens: bounds slots times capacity, which is what memory goes to.
  """

  max_new: int = 512
  temperatures: tuple[float, ...] = (0.0, 1.0)
  top_p: float | None = None
  seed: int = 0
  batch: int | None = None
  refill: float = 0.125
  rounds: int = 32
  chunk: int = 64
  buckets: tuple[int, ...] = (64, 192, 512, 1024, 2048)
  cache_tokens: int = 1 << 20

  def __post_init__(self):
    checks = {
        'max_new': self.max_new >= 1, 'rounds': self.rounds >= 1,
        'chunk': self.chunk >= 1, 'refill': 0 < self.refill <= 1,
        'batch': self.batch is None or self.batch >= 1,
        'top_p': self.top_p is None or 0 < self.top_p <= 1,
        'temperatures': self.temperatures and min(self.temperatures) >= 0,
        'buckets': self.buckets and min(self.buckets) >= 1
                   and list(self.buckets) == sorted(set(self.buckets)),
        'seed': 0 <= self.seed < 2**32}
    for name, is_good in checks.items():
      if not is_good:
        raise ValueError(f'{name}={getattr(self, name)!r}: out of range')

  @property
  def is_greedy(self) -> bool:
    """Whether no row is ever sampled."""
    return not any(self.temperatures)

  def temperature(self, index: npt.NDArray[np.integer]) -> np.ndarray:
    """Returns f32: the temperature of each prompt index."""
    # A multiplicative hash: prompts of a kind often come at fixed strides.
    mixed = (np.asarray(index, np.uint64) + np.uint64(self.seed)
             ) * np.uint64(0x9E3779B97F4A7C15)
    pick = (mixed >> np.uint64(33)) % np.uint64(len(self.temperatures))
    return np.asarray(self.temperatures, np.float32)[pick.astype(np.int64)]


class Progress(NamedTuple):
  """What is known after a look at the rows.

  Attributes:
    num_done, num_prompts: of this run (without those that were skipped).
    new_tokens: generated so far. elapsed_s: since the run began, compilation
      included. share: of slots times rounds that gave a token.
  """

  num_done: int
  num_prompts: int
  new_tokens: int
  elapsed_s: float
  share: float


class Group(NamedTuple):
  """Prompts that are decoded at one batch shape."""

  batch: int
  refill: int  # rows fed at a time
  longest: int  # prompt tokens, at most
  size: int  # tokens that a slot holds
  indices: list[int]


class Tally:
  """Adds up what has been done, for `on_progress`."""

  def __init__(self, num_prompts, on_progress):
    self.num_prompts, self._hook = num_prompts, on_progress
    self.num_done = self.new_tokens = 0
    self._slots = self._busy = 0
    self._begun = time.perf_counter()

  def look(self, busy: int, slots: int, running: int) -> None:
    """Counts a chunk: slots times rounds, and how many were `busy`.

    `running` tokens are those of unfinished rows.
    """
    self._busy += busy
    self._slots += slots
    if self._hook:
      self._hook(Progress(
          self.num_done, self.num_prompts, self.new_tokens + running,
          time.perf_counter() - self._begun,
          self._busy / max(self._slots, 1)))


class Rows:
  """The slots of one group."""

  def __init__(self, engine, params, prompts, group, eos, settings, mesh,
               stream):
    self.engine, self.params, self.group = engine, params, group
    self.prompts, self.settings, self.mesh = prompts, settings, mesh
    self.eos = np.asarray(eos or (-1,), np.int32)
    self.seed = np.asarray([settings.seed, stream], np.uint32)
    self.waiting = deque(group.indices)
    # Index of the prompt in each slot; -1 is vacant.
    self.owner = np.full(group.batch, -1, np.int64)
    self.prompt_length = np.ones(group.batch, np.int32)
    self.length = self.prompt_length.copy()
    self.state = self._empty()
    self._run, _ = loop.compiled()

  def _empty(self) -> SpecState:
    """Returns a state of vacant slots, on the mesh."""
    group = self.group
    static = (self.engine, group.batch, group.size,
              dataclasses.replace(self.settings, seed=0))
    placed = None
    if self.mesh is not None:
      placed = rules.state_shardings(self.mesh, jax.eval_shape(
          functools.partial(_vacant, *static), self.eos), group.batch)
    make = jax.jit(
        _vacant, static_argnums=range(len(static)), out_shardings=placed)
    return make(*static, self.eos)

  def run(self, tally: Tally) -> Iterator[Record]:
    """Decodes all prompts of the group."""
    rounds = np.int32(self.settings.rounds)
    while self.waiting or (self.owner >= 0).any():
      while self._should_fill():
        self._fill()
      self.state = self._run(self.engine, self.params, self.state, rounds)
      yield from self._collect(tally)

  def _should_fill(self) -> bool:
    """Whether enough slots are vacant, or all that wait can come in."""
    vacant = int((self.owner < 0).sum())
    return bool(self.waiting) and vacant >= min(
        self.group.refill, len(self.waiting))

  def _fill(self) -> None:
    """Feeds the next prompts and puts them into vacant slots."""
    group = self.group
    slots = np.flatnonzero(self.owner < 0)[:group.refill]
    slots = slots[:len(self.waiting)]
    indices = np.asarray([self.waiting.popleft() for _ in slots], np.int64)
    arrays = self._arrays(indices)
    into, source = np.zeros(group.batch, bool), np.zeros(group.batch, np.int32)
    into[slots], source[slots] = True, np.arange(len(slots))
    if self.mesh is not None:
      arrays = rules.put(arrays, rules.state_shardings(
          self.mesh, arrays, group.refill))
      into, source = rules.put(
          (into, source), (self.state.context.done.sharding,) * 2)
    self.state = _admit(
        self.engine, self.params, self.state, arrays, into, source,
        self.seed, self.eos, settings=dataclasses.replace(
            self.settings, seed=0), chunk=self._chunk())
    self.owner[slots] = indices
    self.prompt_length[slots] = [len(self.prompts[i]) for i in indices]
    self.length[slots] = self.prompt_length[slots]

  def _chunk(self) -> int:
    most = getattr(self.engine.target, 'chunk', self.settings.chunk)
    return min(self.settings.chunk, most)

  def _arrays(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the host arrays of these prompts, padded to `refill` rows."""
    num = self.group.refill
    tokens = np.zeros((num, self.group.longest), np.int32)
    length, index = np.ones(num, np.int32), np.zeros(num, np.uint32)
    for row, i in enumerate(indices):
      tokens[row, :len(self.prompts[i])] = self.prompts[i]
      length[row] = len(self.prompts[i])
      index[row] = i
    return {
        'tokens': tokens, 'length': length, 'index': index,
        'temperature': self.settings.temperature(index),
        'vacant': np.arange(num) >= len(indices)}

  def _collect(self, tally: Tally) -> Iterator[Record]:
    """Yields finished rows and vacates their slots."""
    context = self.state.context
    done, length, bad = rules.fetch(
        (context.done, context.length, self.state.metrics.bad_round))
    busy = self.owner >= 0
    broken = busy & (bad >= 0)
    ended = np.flatnonzero(busy & done & ~broken)
    if ended.size:
      tokens = rules.fetch(context.tokens)
      for slot in ended.tolist():
        record = self._record(slot, tokens[slot, :length[slot]])
        tally.num_done += 1
        tally.new_tokens += len(record.answer)
        self.owner[slot] = -1
        yield record
    if broken.any():
      slot = int(np.flatnonzero(broken)[0])
      raise FloatingPointError(
          f'prompt {self.owner[slot]}: NaN or infinite logits in round '
          f'{bad[slot]}')
    # Without drafts a row gains a token a round.
    made = np.where(busy, length - self.length, 0)
    self.length = np.array(length)
    left = self.owner >= 0
    running = int((length - self.prompt_length)[left].sum())
    tally.look(int(made.sum()), int(made.max()) * len(made), running)

  def _record(self, slot: int, tokens: np.ndarray) -> Record:
    index = int(self.owner[slot])
    return Record(
        tokens=tokens.astype(np.int32), prompt_length=len(self.prompts[index]),
        temperature=float(self.settings.temperature(np.asarray([index]))[0]),
        finished=bool(np.isin(tokens[-1], self.eos)), prompt_index=index)


def _options(settings: Settings, temperature: Array, eos: Array) -> Options:
  """Returns the options of rows; the structure depends on settings only."""
  batch = temperature.shape[0]
  top_p = settings.top_p
  return Options(
      temperature=None if settings.is_greedy else temperature,
      top_p=(None if settings.is_greedy or top_p in (None, 1.0)
             else jnp.full((batch,), top_p, jnp.float32)),
      eos=jnp.broadcast_to(jnp.asarray(eos), (batch, len(eos))))


def _vacant(engine, batch: int, size: int, settings, eos) -> SpecState:
  """Returns a state without a row to decode."""
  def ones():
    return jnp.ones((batch,), jnp.int32)

  keys = jax.vmap(jax.random.key)(jnp.zeros((batch,), jnp.uint32))
  return loop.empty(engine, Context(
      tokens=jnp.zeros((batch, size), jnp.int32), length=ones(),
      prompt_length=ones(), limit=ones(), done=jnp.ones((batch,), bool),
      rounds=jnp.zeros((batch,), jnp.int32), keys=keys,
      options=_options(settings, jnp.zeros((batch,), jnp.float32), eos)))


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=('settings', 'chunk'),
    donate_argnums=2)
def _admit(
    engine, params, state, arrays, into, source, seed, eos, *, settings,
    chunk,
) -> SpecState:
  """Feeds a few prompts beside the batch, then copies them in.

  `loop.admit` would feed as many rows as the batch has; here the cost is that
  of the new rows and of one pass over the state.

  Args:
    arrays: of R rows. into: bool[B], slots that are filled. source: int32[B],
      row of each. seed: uint32[2], of the run and of the stream.
  """
  num, longest = arrays['tokens'].shape
  size = state.context.tokens.shape[1]
  base = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
  length = arrays['length']
  context = Context(
      tokens=jnp.pad(arrays['tokens'], ((0, 0), (0, size - longest))),
      length=length, prompt_length=length,
      limit=length + settings.max_new, done=arrays['vacant'],
      rounds=jnp.zeros((num,), jnp.int32),
      keys=jax.vmap(jax.random.fold_in, (None, 0))(base, arrays['index']),
      options=_options(settings, arrays['temperature'], eos))
  fresh = loop.start(
      engine, params, loop.empty(engine, context), ~arrays['vacant'],
      chunk=chunk)
  fresh = jax.tree.map(lambda x: x[source] if x.ndim else x, fresh)
  return types.select_rows(into, fresh, state)
