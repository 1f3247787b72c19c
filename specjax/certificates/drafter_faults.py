"""Faults of drafters that read the target's states, and rows that find them.

Two kinds. A drafter that states another law than the one it drew from bends
the text: its law must be off. A drafter that draws from the wrong law, and
says so, is lossless all the same: the text's law must hold, and the number of
rounds must be off. Both are switched on by `condition['fault']`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import enum
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates import rounds, sampled, toys
from specjax.certificates.report import SIZE, Row
from specjax.certificates.sampled import Program
from specjax.certificates.setting import Laws, Setting
from specjax.core import law as law_lib
from specjax.core import tree
from specjax.core.types import Draft
from specjax.drafters.source import Level
from specjax.verify import Speculative


class Fault(enum.IntEnum):
  """What `condition['fault']` says."""

  NONE = 0
  # Of the law that is stated.
  PART_LEFT_OUT = 1
  TRIMMED_TOKEN_COUNTED = 2
  BEFORE_THE_PIPELINE = 3
  LAW_BEFORE_REDRAW = 6
  TOKENS_BEFORE_REDRAW = 7
  # Of what is drawn from.
  SYNC_SKIPPED = 4
  SLOT_TOO_FAR = 5


OF_LAWS = frozenset((Fault.PART_LEFT_OUT, Fault.TRIMMED_TOKEN_COUNTED,
                     Fault.BEFORE_THE_PIPELINE, Fault.LAW_BEFORE_REDRAW,
                     Fault.TOKENS_BEFORE_REDRAW))


@dataclasses.dataclass(frozen=True)
class FaultySource:
  """A source that drafts from the wrong place when told to.

  Attributes:
    source: what it stands for.
    by_slot: each depth is drafted by a slot, or a head, of its own.
  """

  source: Any
  by_slot: bool = False

  def __getattr__(self, name: str) -> Any:
    if name in ('source', 'by_slot') or name.startswith('__'):
      raise AttributeError(name)
    return getattr(self.source, name)

  # A `runtime_checkable` protocol looks these up in the class.
  @property
  def taps(self) -> tuple[str, ...]:
    return self.source.taps

  @property
  def follows(self) -> bool:
    return self.source.follows

  def empty(self, batch, capacity):
    return self.source.empty(batch, capacity)

  def init(self, params, state, position, fed, taps):
    return self.source.init(params, state, position, fed, taps)

  def begin(self, params, state, *, behind, refill):
    """SLOT_TOO_FAR: as `grow`."""
    logits, memory = self.source.begin(
        params, state, behind=behind, refill=refill)
    if self.by_slot:
      context = state.context
      pending = tree.take_row(context.tokens, context.root)[:, None]
      wrong, _ = self.source.grow(params, context, memory, Level(
          tokens=pending, depth=1, base=context.length,
          parent=jnp.zeros((1,), jnp.int32), position=pending))
      logits = jnp.where(_is(context, Fault.SLOT_TOO_FAR), wrong[:, 0],
                         logits)
    return logits, memory

  def grow(self, params, context, memory, level):
    """SLOT_TOO_FAR: drafts of depth d come from where those of d + 1 do."""
    extra = _is(context, Fault.SLOT_TOO_FAR).astype(jnp.int32)
    return self.source.grow(
        params, context, memory, level.replace(depth=level.depth + extra))

  def confidence(self, memory):
    return self.source.confidence(memory)

  def sync(self, params, state, draft, scores, verdict, *, own):
    """SYNC_SKIPPED: nothing is learnt; what drafting stored is kept."""
    new = self.source.sync(params, state, draft, scores, verdict, own=own)
    old = {name: state.drafter[name] for name in new}
    skips = _is(state.context, Fault.SYNC_SKIPPED)
    return jax.tree.map(lambda a, b: jnp.where(skips, a, b), old, new)


@dataclasses.dataclass(frozen=True)
class Misstating:
  """A drafter that states another law than it drew from when told to.

  Attributes:
    drafter: draws. plain: the same with a part of its law left out (Markov
      terms, copies), over the same state; None where there is none.
  """

  drafter: Any
  plain: Any = None

  def __getattr__(self, name: str) -> Any:
    if name in ('drafter', 'plain') or name.startswith('__'):
      raise AttributeError(name)
    return getattr(self.drafter, name)

  def propose(self, params, state):
    """See `Fault`; drafts are those of the drafter."""
    draft, new = self.drafter.propose(params, state)
    context, logits = state.context, draft.draft_law.logits
    # As if the tokens that cannot be drafted had been scored like the rest.
    rest = jnp.max(logits, axis=-1, keepdims=True)
    counted = jnp.where(jnp.isfinite(logits), logits, rest)
    hot = context.options.temperature[:, None, None]
    said = {Fault.TRIMMED_TOKEN_COUNTED: counted,
            Fault.BEFORE_THE_PIPELINE: jnp.where(
                (hot > 0) & jnp.isfinite(logits), logits * hot, logits)}
    if self.plain is not None:
      other, _ = self.plain.propose(params, state)
      said[Fault.PART_LEFT_OUT] = other.draft_law.logits
    for fault, value in said.items():
      logits = jnp.where(_is(context, fault), value, logits)
    return _stating(draft, logits), new


@dataclasses.dataclass(frozen=True)
class FaultyWindow:
  """A Jacobi window that is drawn again wrongly when told to.

  Attributes:
    drafter: a `Jacobi`.
  """

  drafter: Any

  def __getattr__(self, name: str) -> Any:
    if name == 'drafter' or name.startswith('__'):
      raise AttributeError(name)
    return getattr(self.drafter, name)

  def sync(self, params, state, draft, scores, verdict):
    """LAW_BEFORE_REDRAW: new tokens are said to come from the old laws;
    TOKENS_BEFORE_REDRAW: old tokens, guesses too, from the new ones.
    """
    after = self.drafter.sync(params, state, draft, scores, verdict)
    context, old, new = state.context, state.drafter, after.drafter
    tokens, logits = new['tokens'], new['logits']
    place = jnp.arange(tokens.shape[1]) + verdict.num_accepted[:, None] + 1
    stale = (place < old['held'][:, None]) & _is(
        context, Fault.LAW_BEFORE_REDRAW)
    kept = (place < tokens.shape[1]) & _is(
        context, Fault.TOKENS_BEFORE_REDRAW)
    return after.replace(drafter={
        **new, 'tokens': jnp.where(
            kept, tree.take_row(draft.tokens, place), tokens),
        'logits': jnp.where(
            stale[..., None], tree.take_row(old['logits'], place), logits)})


@dataclasses.dataclass(frozen=True)
class Sharper(Setting):
  """A target whose laws differ more from place to place: old ones are wrong."""

  @functools.cached_property
  def tables(self) -> dict[str, np.ndarray]:
    """As of `Setting`, the target's more spread."""
    return {**super().tables, 'target': toys.table(0, self.vocab_size, 1.0)}


def _is(context: Any, fault: Fault) -> jax.Array:
  return context.condition['fault'] == fault


def _stating(draft: Draft, logits: jax.Array) -> Draft:
  return draft.replace(draft_law=law_lib.Categorical(logits))


@dataclasses.dataclass(frozen=True)
class Drafted:
  """Texts of a drafter: their law, the rounds they take, planted faults.

  Attributes:
    title: of the rows. drafter: proposes; told of faults by the context.
    setting: of the models and rows. planted: faults that must be found.
    known: of the shape whose rounds can be worked out, the drafter itself if
      it is one; None: only the law is tested.
    rule: verifies.
  """

  title: str
  drafter: Any
  setting: Setting
  planted: tuple[Fault, ...] = ()
  known: Any = None
  rule: Any = dataclasses.field(default_factory=Speculative)

  needs_quiet: ClassVar[bool] = False

  @property
  def names(self) -> tuple[str, ...]:
    """The drafter as it is, then one a fault."""
    return (f'{self.title} / {self.rule.name}', *(
        f'fault: {fault.name.lower().replace("_", " ")} ({self.title})'
        for fault in self.planted))

  def run(
      self, names: Sequence[str], seed: int, batches: int
  ) -> Iterator[Row]:
    """Makes the rows that are named; a fault's passes when it was found."""
    program = Program(
        self.setting, self.setting.target, self.drafter, (self.rule,),
        self.setting.models())
    want = None if self.known is None else rounds.expected(
        Laws(self.setting), self.known, self.rule)
    for name, fault in zip(self.names, (Fault.NONE, *self.planted),
                           strict=True):
      if name not in names:
        continue
      few = batches if fault == Fault.NONE else max(batches // 4, 1)
      # A law that is misstated changes rounds too: that is not asked.
      row = sampled.certify(
          program, 0, name, seed=seed, batches=few, fault=int(fault),
          rounds=None if fault in OF_LAWS else want)
      if fault != Fault.NONE:
        row.method = 'fault'
        row.passed = not row.passed if fault in OF_LAWS else (
            row.note == sampled.ROUNDS_OFF and _holds(row))
      yield row


def _holds(row: Row) -> bool:
  """Whether the texts' law holds, at the level of the first attempt or the
  repetition's.
  """
  level = SIZE if row.attempts == 1 else sampled.SIZE_AGAIN
  return row.p_value is not None and row.p_value > level
