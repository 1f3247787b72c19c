"""Groups of rows that share a compiled program, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import dataclasses
import re
import threading
import time
from typing import Any, ClassVar, Protocol

from specjax.certificates import (
  acceptance,
  equality,
  exact,
  faults,
  faulty_rules,
  problems,
  sampled,
)
from specjax.certificates.report import TOLERANCE, Row
from specjax.certificates.sampled import Program
from specjax.certificates.setting import Laws, Setting
from specjax.core.tree import Topology
from specjax.core.types import MODE_NAMES
from specjax.verify import Speculative

# Batches of `sampled.BATCH` texts a row, in the short and in the full form.
BATCHES, MANY_BATCHES = 4, 40
# Problems of an exact row.
_PROBLEMS, _MANY_PROBLEMS = 8, 32


class Job(Protocol):
  """Some rows, made together.

  Attributes:
    needs_quiet: nothing else may be traced meanwhile.
  """

  needs_quiet: ClassVar[bool]

  @property
  def names(self) -> tuple[str, ...]:
    """Of the rows, in order."""
    ...

  def run(
      self, names: Sequence[str], seed: int, batches: int
  ) -> Iterator[Row]:
    """Makes the rows that are named."""
    ...


def label(rule: Any) -> str:
  """Returns a rule's name and those of its fields that are not defaults."""
  name = getattr(rule, 'name', '') or type(rule).__name__
  changed = [
      f'{f.name}={getattr(rule, f.name)}' for f in dataclasses.fields(rule)
      if f.init and getattr(rule, f.name) != f.default]
  return name + (f'({", ".join(changed)})' if changed else '')


@dataclasses.dataclass(frozen=True)
class Sampled:
  """Texts of one drafter under several rules.

  Attributes:
    title: of the rows. drafter: proposes. rules: verify.
    setting: of the models and rows. params: `Models.verifier`.
    drafter_params: of a drafter that is not of the setting.
    closed_form: whether the first round's acceptance can be worked out.
    as_exact: lossy rules are set such that they have to be exact.
  """

  title: str
  drafter: Any
  rules: tuple[Any, ...]
  setting: Setting = dataclasses.field(default_factory=Setting)
  params: Any = None
  drafter_params: Any = None
  closed_form: bool = False
  as_exact: bool = False

  needs_quiet: ClassVar[bool] = False

  @property
  def names(self) -> tuple[str, ...]:
    """One a rule; two where the rule promises the plain sampler's text."""
    names = []
    for rule in self.rules:
      names.append(f'{self.title} / {label(rule)}')
      if equality.promises_text(rule) and not self.setting.all_greedy:
        names.append(f'{names[-1]} / text of plain decoding')
    return tuple(names)

  def run(
      self, names: Sequence[str], seed: int, batches: int
  ) -> Iterator[Row]:
    """Makes the rows that are named; compiles only their rules."""
    wanted = tuple(
        rule for rule in self.rules
        if any(n == f'{self.title} / {label(rule)}' or n.startswith(
            f'{self.title} / {label(rule)} / ') for n in names))
    program = Program(
        self.setting, self.setting.target, self.drafter, wanted,
        self.setting.models(self.drafter_params, self.params))
    for i, rule in enumerate(wanted):
      name = f'{self.title} / {label(rule)}'
      laws = Laws(self.setting, greedy=rule.name == 'greedy')
      if name in names:
        use = self.closed_form
        yield sampled.certify(
            program, i, name, seed=seed, batches=batches,
            expected=acceptance.expected(laws, self.drafter, rule)
            if use else None,
            bound=acceptance.bounds(laws, self.drafter) if use else None,
            lossy=False if self.as_exact else None)
      name += ' / text of plain decoding'
      if name in names:
        yield equality.same_text(program, i, name, seed=seed)


@dataclasses.dataclass(frozen=True)
class Exact:
  """One rule, by enumeration, on random laws with mixed options.

  Attributes:
    rule, topology, kind: what is enumerated. vocab_size: V.
    params: `Models.verifier`. cut: chance that drafts are cut short.
    may_skip: a rule that cannot be enumerated is no failure.
  """

  rule: Any
  topology: Topology
  kind: int
  vocab_size: int = 3
  params: Any = None
  cut: float = 0.2
  may_skip: bool = False

  needs_quiet: ClassVar[bool] = True

  @property
  def names(self) -> tuple[str, ...]:
    """One."""
    drafts = f'{exact.describe(self.topology)} {MODE_NAMES[self.kind]}'
    return (f'exact / {drafts} / {label(self.rule)}',)

  def run(
      self, names: Sequence[str], seed: int, batches: int
  ) -> Iterator[Row]:
    """Enumerates; more problems in the full form."""
    num = _PROBLEMS if batches <= BATCHES else _MANY_PROBLEMS
    begin = time.perf_counter()
    self.rule.check(self.topology, (self.kind,), self.vocab_size, self.params)
    problem = problems.random_problem(
        self.topology, self.kind, self.vocab_size, num_problems=num,
        seed=seed, options=problems.mixed_options(num), cut=self.cut)
    try:
      found = exact.exact_law(self.rule, problem, self.params)
    except exact.NotEnumerable as error:
      if not self.may_skip:
        raise
      yield Row(name=names[0], method='skipped', passed=True,
                note=f'sampled only: {error}')
      return
    row = Row(name=names[0], method='exact', passed=False, error=found.error,
              tv=float(found.tv.max()), lossy=self.rule.lossy)
    row.passed = bool(found.error <= TOLERANCE and not found.forbidden)
    if row.lossy:
      worst = int(found.tv.argmax())
      row.excess = float(found.excess[worst])
      row.passed = bool((found.tv <= found.excess + TOLERANCE).all())
    elif found.forbidden:
      row.note = 'emits a token of probability zero'
    row.seconds = time.perf_counter() - begin
    yield row


@dataclasses.dataclass(frozen=True)
class FaultyRule:
  """A fault of a rule or of the laws that it is handed, by enumeration."""

  fault: faulty_rules.Fault

  needs_quiet: ClassVar[bool] = True

  @property
  def names(self) -> tuple[str, ...]:
    """One."""
    return (f'fault: {self.fault.name}',)

  def run(
      self, names: Sequence[str], seed: int, batches: int
  ) -> Iterator[Row]:
    """Enumerates. The row passes when the law does not."""
    del batches
    begin = time.perf_counter()
    found = self.fault.examine(seed=seed)
    note = 'law off' if found.error > TOLERANCE else ''
    if found.forbidden:
      note = (note + ', emits a token of probability zero').lstrip(', ')
    yield Row(
        name=names[0], method='fault', passed=not found.passed,
        error=found.error, tv=found.tv, note=note,
        seconds=time.perf_counter() - begin)


@dataclasses.dataclass(frozen=True)
class Faults:
  """Faults planted in a loop; the same program without them must pass.

  Attributes:
    title: of the rows. drafter: proposes, within `FaultyDrafter`.
    planted: faults of target and drafter. rules: faulty ones.
    setting: of the models and rows.
  """

  title: str
  drafter: Any
  planted: tuple[faults.Planted, ...]
  rules: tuple[Any, ...] = ()
  setting: Setting = dataclasses.field(default_factory=Setting)

  needs_quiet: ClassVar[bool] = False

  @property
  def names(self) -> tuple[str, ...]:
    """The control, then one a fault."""
    words = [p.name.lower().replace('_', ' ') for p in self.planted]
    words += [rule.name for rule in self.rules]
    return (f'{self.title} / no fault',
            *(f'fault: {word} ({self.title})' for word in words))

  def run(
      self, names: Sequence[str], seed: int, batches: int
  ) -> Iterator[Row]:
    """Samples with each fault. A fault row passes when its law does not."""
    program = Program(
        self.setting, faults.FaultyTarget(self.setting.vocab_size),
        faults.FaultyDrafter(self.drafter), (Speculative(), *self.rules),
        self.setting.models())
    runs = [(0, faults.Planted.NONE), *((0, p) for p in self.planted)]
    runs += [(1 + i, faults.Planted.NONE) for i in range(len(self.rules))]
    for name, (rule, fault) in zip(self.names, runs, strict=True):
      if name not in names:
        continue
      row = sampled.certify(
          program, rule, name, seed=seed, fault=int(fault),
          batches=batches)
      if name != self.names[0]:
        row.method, row.passed = 'fault', not row.passed
      yield row


def names(jobs: Sequence[Job], only: str = '') -> tuple[str, ...]:
  """Returns the rows in whose names the regular expression `only` is found.

  Raises:
    ValueError: it is no regular expression, or is found nowhere.
  """
  try:
    pattern = re.compile(only)
  except re.error as error:
    raise ValueError(f'only={only!r}: {error}') from error
  found = tuple(
      n for job in jobs for n in job.names if pattern.search(n))
  if not found:
    raise ValueError(f'only={only!r}: found in no row of the grid')
  return found


def run(
    jobs: Sequence[Job], *, only: str = '', seed: int = 0,
    full: bool = False, workers: int = 1,
    on_row: Callable[[Row], None] | None = None,
) -> tuple[Row, ...]:
  """Makes the rows of all jobs.

  A job that raises does not end the others: its rows fail, and say why.

  Args:
    jobs: their rows' names are unique. only: which rows, see `names`.
    seed: of everything; rows do not depend on which others are made.
    full: more texts and problems. workers: sampled jobs at a time (compiling
      leaves cores idle).
    on_row: called with each row as it is made, by one thread at a time.

  Returns:
    Rows in the order of the jobs.

  Raises:
    ValueError: see `names`.
  """
  chosen = set(names(jobs, only))
  wanted = [(job, tuple(n for n in job.names if n in chosen)) for job in jobs]
  wanted = [(job, some) for job, some in wanted if some]
  lock, found = threading.Lock(), {}

  def work(item: tuple[Job, tuple[str, ...]]) -> None:
    for row in _rows(*item, seed, MANY_BATCHES if full else BATCHES):
      with lock:
        found[row.name] = row
        if on_row:
          on_row(row)

  # Enumeration replaces the source of noise while a rule is traced: alone.
  alone = [item for item in wanted if item[0].needs_quiet]
  for item in alone:
    work(item)
  pool = futures.ThreadPoolExecutor(workers)
  try:
    list(pool.map(work, [item for item in wanted if item not in alone]))
  finally:  # an interrupt ends it with the jobs that are running
    pool.shutdown(cancel_futures=True)
  return tuple(found[n] for _, some in wanted for n in some)


def _rows(
    job: Job, names: tuple[str, ...], seed: int, batches: int
) -> Iterator[Row]:
  """Yields all rows of a job; those that it fails to make have failed."""
  left, begin = list(names), time.perf_counter()
  try:
    for row in job.run(names, seed, batches):
      left.remove(row.name)
      yield row
  except Exception as error:  # pylint: disable=broad-except
    for name in left:
      yield Row(name=name, method='error', passed=False,
                note=f'{type(error).__name__}: {error}',
                seconds=time.perf_counter() - begin)
