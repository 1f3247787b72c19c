"""Texts that must be equal token for token: coupled rules, batch layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import time
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates import sampled
from specjax.certificates import setting as setting_lib
from specjax.certificates.report import Row
from specjax.certificates.sampled import BATCH, Program
from specjax.certificates.setting import Setting
from specjax.core import loop, types
from specjax.core.types import Context
from specjax.drafters import Null
from specjax.verify import Gumbel, Match

# Compiled together: these are asked for again and again.
_PLAIN = (Match(), Gumbel(1), Gumbel(2))
# Texts whose layout is changed.
_FEW = 16


def promises_text(rule: Any) -> bool:
  """Whether a seed's text is to be the plain sampler's, for any drafter."""
  return type(rule) in (Match, Gumbel)


def same_text(program: Program, rule: int, name: str, *, seed: int) -> Row:
  """Compares texts with those of plain decoding, at any temperature.

  Noise is keyed by position, so the null drafter under the same rule says
  the same. Up to rounding: a near-tie of two tokens may fall differently in
  two programs, so texts that differ are looked at again with a fresh seed.
  """
  begin = time.perf_counter()
  it = program.rules[rule]
  plain = dataclasses.replace(
      program, drafter=Null(0), rules=_PLAIN if it in _PLAIN else (it,))
  for attempt in range(2):
    key = jax.random.key(sampled.row_seed(name, seed, attempt))
    ours = program.decode(rule, key, BATCH)
    theirs = plain.decode(plain.rules.index(it), key, BATCH)
    different = (_texts(program, ours) != _texts(plain, theirs)).any(axis=1)
    if not different.any():
      break
  return Row(
      name=name, method='equal', passed=not bool(different.any()), count=BATCH,
      error=float(different.sum()), attempts=attempt + 1,
      seconds=time.perf_counter() - begin)


def _texts(program: Program, state: types.SpecState) -> np.ndarray:
  return setting_lib.made(program.setting, state.context)


@dataclasses.dataclass(frozen=True)
class Layouts:
  """A row's text alone, and in slots that are refilled beside others.

  Attributes:
    title: of the rows. drafter, rule: who plays. setting: of the rows.
    slots: batch sizes to refill; 1 is a row alone.
  """

  title: str
  drafter: Any
  rule: Any
  slots: tuple[int, ...] = (3,)
  setting: Setting = dataclasses.field(default_factory=Setting)

  needs_quiet: ClassVar[bool] = False

  @property
  def names(self) -> tuple[str, ...]:
    """One a batch size."""
    return tuple(f'{self.title} / {self.rule.name} / {n} refilled slot'
                 + 's' * (n > 1) for n in self.slots)

  def run(
      self, names: Sequence[str], seed: int, batches: int
  ) -> Iterator[Row]:
    """Compares with the same rows in one batch."""
    del batches
    program = Program(
        self.setting, self.setting.target, self.drafter, (self.rule,),
        self.setting.models())
    for name, slots in zip(self.names, self.slots, strict=True):
      if name not in names:
        continue
      begin = time.perf_counter()
      key = jax.random.key(sampled.row_seed(name, seed, 0))
      want = _texts(program, program.decode(0, key, _FEW))
      got = refilled(program, program.context(0, key, _FEW), slots)
      different = int((want != got).any(axis=1).sum())
      yield Row(
          name=name, method='equal', passed=not different, count=_FEW,
          error=float(different), seconds=time.perf_counter() - begin)


def refilled(program: Program, rows: Context, slots: int) -> np.ndarray:
  """Decodes `rows` in `slots` slots, each refilled as soon as it is done.

  Returns:
    int[rows,L], as `setting.made`.
  """
  run, admit = loop.compiled()
  engine = program.engine
  waiting = list(range(rows.length.shape[0]))
  out = np.zeros((len(waiting), program.setting.length), int)
  slot_of = np.full(slots, -1)
  state = loop.empty(engine, _pick(rows, np.zeros(slots, int)))
  while True:
    fresh = np.zeros(slots, bool)
    for slot in range(slots):
      if slot_of[slot] < 0 and waiting:
        slot_of[slot], fresh[slot] = waiting.pop(0), True
    if (slot_of < 0).all():
      return out
    context = _pick(rows, np.maximum(slot_of, 0))
    # An empty slot must not hold the others up.
    context = context.replace(done=jnp.asarray(slot_of < 0))
    state = admit(engine, program.params, state,
                  jnp.asarray(fresh | (slot_of < 0)), context, chunk=2)
    state = run(engine, program.params, state, jnp.int32(1))
    made = setting_lib.made(program.setting, state.context)
    for slot in np.flatnonzero(np.asarray(state.context.done)).tolist():
      if slot_of[slot] >= 0:
        out[slot_of[slot]] = made[slot]
        slot_of[slot] = -1


@jax.jit
def _pick(context: Context, index: np.ndarray) -> Context:
  """Returns rows `index` as buffers of their own."""
  return jax.tree.map(
      lambda x: x[index] if x.ndim else x + 0, context)
