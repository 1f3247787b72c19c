"""The law of whole texts out of the compiled loop: G-tests with known power.

Each row of a batch writes a text; texts of a kind are counted and compared
with the exact law of whole texts. A second test looks at pairs of rows, whose
first tokens must be independent. A third compares how many drafts the first
round keeps with its exact expectation, or with the bound that no lossless
rule exceeds.

No row is judged by one seed: one that fails is repeated with a fresh seed and
more texts, and fails only if it fails again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates import fit
from specjax.certificates import setting as setting_lib
from specjax.certificates.fit import Cells
from specjax.certificates.report import SIZE, Row
from specjax.certificates.setting import NUM_KINDS, Laws, Setting
from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models, SpecState

# Texts in one call of the compiled loop.
BATCH = 8192
# Level of the repetition, which has more texts.
SIZE_AGAIN = 1e-4
MORE = 4
# Chance of missing the stated total variation at the first test; with more
# texts the repetition misses it still less, so both find it with >= 0.99.
_MISS = 0.005
# Standard errors that acceptance may be off.
_ERRORS = 4.0
# Notes of rows whose texts may have the right law all the same.
ACCEPTANCE_OFF, ROUNDS_OFF = 'acceptance off', 'rounds off'


@dataclasses.dataclass(frozen=True)
class OneOf:
  """Several rules in one program; `condition['rule'] int32[]` picks one.

  Compiling takes longer than sampling, and most of a program is not its rule.
  """

  rules: tuple[Any, ...]

  @property
  def taps(self) -> tuple[str, ...]:
    """Those of all rules."""
    return tuple(dict.fromkeys(t for r in self.rules for t in r.taps))

  def verify(self, params, context, draft, scores):
    """Runs the rule of this call."""
    return jax.lax.switch(context.condition['rule'], [
        functools.partial(r.verify, params, context, draft, scores)
        for r in self.rules])


@functools.partial(jax.jit, static_argnums=0)
def decode(engine: Engine, params: Models, context) -> SpecState:
  """Feeds the prompts and runs all rows to their end; the final state."""
  state = loop.empty(engine, context)
  state = loop.start(engine, params, state, ~context.done, chunk=2)
  return loop.run(engine, params, state, jnp.int32(1000))


@dataclasses.dataclass
class Tally:
  """Counts over batches.

  Attributes:
    texts: f64[kinds,(V+1)^L]. near: f64[kinds/2,V,V], first tokens of
      neighbours. same: f64[kinds,V,V], of the nearest rows of one kind.
    first: f64[kinds,3], sums over rows of: tokens kept of the first draft, its
      square, and whether any was.
    excess: f64[2], sum and sum of squares over texts.
    taken: f64[kinds,2], sums of rounds and of their squares over texts.
    tokens, rounds: made altogether.
  """

  texts: np.ndarray
  near: np.ndarray
  same: np.ndarray
  first: np.ndarray
  excess: np.ndarray
  taken: np.ndarray
  tokens: int = 0
  rounds: int = 0

  @classmethod
  def empty(cls, setting: Setting) -> Tally:
    """Returns zeros."""
    v, pairs = setting.vocab_size, NUM_KINDS // 2
    return cls(
        np.zeros((NUM_KINDS, (v + 1)**setting.length)),
        np.zeros((pairs, v, v)), np.zeros((NUM_KINDS, v, v)),
        np.zeros((NUM_KINDS, 3)), np.zeros(2), np.zeros((NUM_KINDS, 2)))

  @property
  def count(self) -> int:
    """Texts."""
    return int(self.texts.sum())

  def add(self, setting: Setting, state: SpecState) -> None:
    """Counts the texts of a batch."""
    context = state.context
    if not np.asarray(context.done).all():
      raise RuntimeError('rows that never end')
    histogram = np.asarray(state.metrics.histogram)
    if (histogram.sum(axis=1) != np.asarray(context.rounds)).any():
      raise RuntimeError('rounds are miscounted')
    made = setting_lib.made(setting, context)
    base = setting.vocab_size + 1
    index = np.ravel_multi_index(tuple(made.T), (base,) * setting.length)
    start = np.asarray(context.prompt_length)[:, None]
    by = np.asarray(context.token_round)
    column = np.arange(by.shape[1])
    inside = (column >= start) & (
        column < np.asarray(context.length)[:, None])
    kept = ((by == 0) & inside).sum(axis=1) - 1
    rounds = np.asarray(context.rounds, float)
    for kind in range(NUM_KINDS):
      rows = slice(kind, None, NUM_KINDS)
      self.texts[kind] += np.bincount(
          index[rows], minlength=self.texts.shape[1])
      few = kept[rows].astype(float)
      self.first[kind] += few.sum(), (few**2).sum(), (few > 0).sum()
      taken = rounds[rows]
      self.taken[kind] += taken.sum(), (taken**2).sum()
    # A row is in one pair only, so that the pairs are independent.
    one, two = np.split(made[:, 0].reshape(-1, 4, NUM_KINDS), 2, axis=1)
    for kind in range(NUM_KINDS):
      np.add.at(self.same[kind], tuple(one[:, i, kind] for i in (0, 1)), 1)
    for pair in range(NUM_KINDS // 2):
      np.add.at(self.near[pair], tuple(
          two[:, :, 2 * pair + i].reshape(-1) for i in (0, 1)), 1)
    excess = np.asarray(state.metrics.excess, np.float64)
    self.excess += excess.sum(), (excess**2).sum()
    self.tokens += int((np.asarray(context.length) - start[:, 0]).sum())
    self.rounds += int(rounds.sum())


@dataclasses.dataclass(frozen=True)
class Program:
  """Rules over one target and one drafter, compiled together.

  Attributes:
    setting, target, drafter, rules: who plays. params: of all of them.
  """

  setting: Setting
  target: Any
  drafter: Any
  rules: tuple[Any, ...]
  params: Models

  @property
  def engine(self) -> Engine:
    """The static part of the compiled loop."""
    rules: Any = OneOf(self.rules)
    return Engine(self.target, self.drafter, rules)

  def context(self, rule: int, key: jax.Array, rows: int, fault: int = 0):
    """Returns fresh rows under one rule."""
    return self.setting.context(
        rows, self.drafter.topology.max_depth, key,
        condition={'rule': jnp.int32(rule), 'fault': jnp.int32(fault)})

  def decode(
      self, rule: int, key: jax.Array, rows: int, fault: int = 0
  ) -> SpecState:
    """Decodes `rows` texts under one rule; the final state."""
    return decode(
        self.engine, self.params, self.context(rule, key, rows, fault))

  def sample(
      self, rule: int, seed: int, batches: int, fault: int = 0
  ) -> Tally:
    """Counts `batches * BATCH` texts under one rule."""
    tally = Tally.empty(self.setting)
    for i in range(batches):
      key = jax.random.fold_in(jax.random.key(seed), i)
      tally.add(self.setting, self.decode(rule, key, BATCH, fault))
    return tally


def pair_cells(laws: Laws, tally: Tally) -> list[Cells]:
  """Returns pairs of first tokens, and the products that they follow."""
  one = [laws.of('target', k, ()) for k in range(NUM_KINDS)]
  cells = [Cells(seen.reshape(-1), np.outer(p, p).reshape(-1))
           for seen, p in zip(tally.same, one)]
  return cells + [
      Cells(seen.reshape(-1), np.outer(p, q).reshape(-1))
      for seen, p, q in zip(tally.near, one[0::2], one[1::2])]


def text_cells(laws: Laws, tally: Tally) -> list[Cells]:
  """Returns texts, and the laws that they follow."""
  return [Cells(tally.texts[k], laws.texts(k)) for k in range(NUM_KINDS)]


def row_seed(name: str, seed: int, attempt: int) -> int:
  """Returns a seed that depends on nothing but its arguments."""
  return zlib.crc32(f'{name}/{seed}/{attempt}'.encode())


def certify(
    program: Program, rule: int, name: str, *, seed: int, batches: int,
    expected: np.ndarray | None = None, bound: np.ndarray | None = None,
    rounds: np.ndarray | None = None, fault: int = 0,
    lossy: bool | None = None,
) -> Row:
  """Returns the row of one rule of a program.

  Args:
    program, rule: what is certified; `rule` indexes `program.rules`.
    name: of the row. seed: of the certificate. batches: of `BATCH` texts.
    expected: f64[kinds], drafts that the first round keeps, or None.
    bound: f64[kinds], chance that it keeps any is at most this, or None.
    rounds: f64[kinds], that a text takes, or None; NaN is not known.
    fault: what is planted (`faults.Planted`).
    lossy: held against what the rule reports; None: if it says so itself.
  """
  begin = time.perf_counter()
  it = program.rules[rule]
  laws = Laws(program.setting, greedy=it.name == 'greedy')
  lossy = it.lossy if lossy is None else lossy
  for attempt, size in enumerate((SIZE, SIZE_AGAIN)):
    tally = program.sample(
        rule, row_seed(name, seed, attempt), batches * MORE**attempt, fault)
    row = _judge(name, lossy, laws, tally, size)
    _judge_acceptance(row, tally, expected, None if lossy else bound)
    if rounds is not None:
      _judge_rounds(row, tally, rounds)
    if row.passed:
      break
  row.attempts = attempt + 1
  row.seconds = time.perf_counter() - begin
  return row


def _judge(
    name: str, lossy: bool, laws: Laws, tally: Tally, size: float
) -> Row:
  """Returns the row of a tally: texts and pairs."""
  texts = text_cells(laws, tally)
  row = Row(name=name, method='sampled', passed=False, count=tally.count)
  test = fit.g_test(texts)
  row.tv = fit.total_variation(texts)
  row.detectable_tv = fit.detectable_tv(
      test.freedom, test.number, size / 2, 1 - _MISS)
  row.tokens_per_round = tally.tokens / tally.rounds
  if lossy:
    row.lossy = True
    mean = tally.excess[0] / tally.count
    spread = math.sqrt(max(tally.excess[1] / tally.count - mean**2, 0.0))
    row.excess = tally.excess[0] / tally.tokens
    chance = fit.noise(texts, size)
    allowed = mean + _ERRORS * spread / math.sqrt(tally.count) + chance
    row.passed = bool(row.tv <= allowed)
    # What is left of a text's total variation once chance is taken off.
    row.detectable_tv = chance
    row.note = f'reports {mean:.3f} a text'
    return row
  pairs = fit.g_test(pair_cells(laws, tally))
  row.p_value = min(1.0, 2 * min(test.p_value, pairs.p_value))
  row.passed = row.p_value > size
  if not row.passed:
    row.note = ('texts off the law' if test.p_value <= pairs.p_value
                else 'rows depend on each other')
  return row


def _judge_acceptance(
    row: Row, tally: Tally, expected: np.ndarray | None,
    bound: np.ndarray | None,
) -> None:
  """Compares what the first round keeps with what it should keep."""
  count = tally.count / NUM_KINDS
  mean = tally.first[:, 0] / count
  variance = np.maximum(tally.first[:, 1] / count - mean**2, 0.0)
  row.accepted = float(mean.mean())
  # The last term: where nothing was seen, the variance is not zero.
  slack = _ERRORS * np.sqrt(variance / count) + _ERRORS**2 / count
  if expected is not None:
    row.expected = float(np.mean(expected))
    if (np.abs(mean - expected) > slack).any():
      row.passed = False
      row.note = (row.note + f'; {ACCEPTANCE_OFF}').lstrip('; ')
  if bound is not None:
    some = tally.first[:, 2] / count
    slack = _ERRORS * np.sqrt(some * (1 - some) / count) + _ERRORS**2 / count
    if (some > bound + slack).any():
      row.passed = False
      row.note = (row.note + '; accepts more than any rule can').lstrip('; ')


def _judge_rounds(row: Row, tally: Tally, expected: np.ndarray) -> None:
  """Compares how many rounds texts took with how many they should take."""
  count = tally.count / NUM_KINDS
  mean = tally.taken[:, 0] / count
  variance = np.maximum(tally.taken[:, 1] / count - mean**2, 0.0)
  slack = _ERRORS * np.sqrt(variance / count) + _ERRORS**2 / count
  if (np.abs(mean - expected) > slack).any():
    row.passed = False
    row.note = (row.note + f'; {ROUNDS_OFF}').lstrip('; ')
