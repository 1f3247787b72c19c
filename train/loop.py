"""The loop of every training script: steps, tests, states, a way to stop."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
import signal
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from specjax.distill import optimizer
from specjax.host import cli
from specjax.io import output
from specjax.io.forms import FORMS
from train import log
from train.checkpoints import Checkpoints

# Steps that are timed, and thrown away, when a run is to last some minutes,
# and the share of them that is planned for.
_TIMED, _PLANNED = 20, 0.95
# Steps in a row without a finite loss that end a run.
_MOST_BAD = 3


class Begun(NamedTuple):
  """What every training program has before it reads its data.

  Attributes:
    config: checked. out: the folder, which can be written to.
    stop: hears signals. mesh: or None for one device. quiet: for this
      process.
  """

  config: Any
  out: Path
  stop: Stop
  mesh: jax.sharding.Mesh | None
  quiet: bool


def begin(defined: cli.Flags) -> Begun:
  """Reads the flags and starts JAX.

  Raises:
    ValueError: values that cannot be run; see `check`.
    OutputError: `--out` cannot be written to.
  """
  config = defined.config.value
  check(config)
  out = output.prepare(defined.out.value)
  stop = Stop()
  cli.start(defined.distributed.value)
  mesh = cli.mesh(config.mesh)
  return Begun(config, out, stop, mesh,
               defined.quiet.value or jax.process_index() > 0)


class Run(abc.ABC):
  """A model in training: what the loop asks of it.

  Attributes:
    config: with `steps` or `minutes` (or what `plan` needs in its place),
      `log_every`, `eval_every`, `save_every` and `optimizer`.
    rates: f32[steps], the learning rate of every step, once the length of
      the run is fixed.
  """

  def __init__(self, config: Any):
    """Begins without a length."""
    self.config = config
    self.rates = np.zeros(0, np.float32)

  @abc.abstractmethod
  def fresh(self) -> Any:
    """Returns the state before the first step."""

  @abc.abstractmethod
  def abstract(self) -> Any:
    """Returns the shapes of `fresh`."""

  @abc.abstractmethod
  def step(self, state: Any, step: int) -> tuple[Any, Any, int]:
    """Returns `(state, report, count)` after step number `step`.

    A report has 'bad', steps in a row that were not finite; the count is of
    what 'per second' is said of.
    """

  @abc.abstractmethod
  def evaluate(self, state: Any, step: int, minutes: float) -> dict[str, Any]:
    """Returns the row of a test, with `step` and `minutes`."""

  @abc.abstractmethod
  def train_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of training."""

  @abc.abstractmethod
  def eval_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of a test."""

  @abc.abstractmethod
  def batch_name(self, step: int) -> str:
    """Returns which data step number `step` saw, for messages."""

  @property
  def num_steps(self) -> int:
    """Length of the run, once it is fixed."""
    return len(self.rates)

  def plan(self) -> int:
    """Returns the steps that fit into `config.minutes`, tests included.

    Compilation comes before: it would leave short runs nothing to learn in.
    """
    config = self.config
    tests = time.monotonic()
    self.evaluate(self.fresh(), 0, 0.0)  # compiled before
    tests = time.monotonic() - tests
    each = self.pace() + tests / config.eval_every
    steps = _PLANNED * 60 * config.minutes / each
    return greatest(max(1, int(steps)))  # one plan for all

  def pace(self) -> float:
    """Returns the seconds of a step, from some that are thrown away."""
    self.schedule(_TIMED + 2)
    state = self.fresh()
    for step in range(_TIMED + 2):
      state, _, _ = self.step(state, step)
      if step == 1:
        jax.block_until_ready(state)
        start = time.monotonic()
    jax.block_until_ready(state)
    return (time.monotonic() - start) / _TIMED

  def schedule(self, num_steps: int) -> None:
    """Fixes the length of the run."""
    values = self.config.optimizer
    rate = optimizer.learning_rate(
        values.learning_rate, num_steps,
        warmup=int(values.warmup * num_steps), schedule=values.schedule)
    self.rates = np.asarray(rate(jnp.arange(num_steps)))


class Stop:
  """Remembers that the program was asked to stop; the second time, stops.

  Attributes:
    signal: what `look` last returned.
  """

  def __init__(self):
    self.signal = self._own = 0
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._ask)

  def _ask(self, number: int, frame: Any) -> None:
    del frame
    if self._own:
      raise KeyboardInterrupt
    self._own = number

  def look(self, together: bool) -> int:
    """Returns the signal that asked for a stop, or 0.

    Several processes return the same. A signal to one of them is known to
    all after the next call with `together`, True in all of them at once.
    """
    if jax.process_count() == 1:
      self.signal = self._own
    elif together:
      self.signal = greatest(max(self.signal, self._own))
    return self.signal


def greatest(value: int) -> int:
  """Returns the greatest `value` of all processes, which call it together."""
  if jax.process_count() == 1:
    return value
  return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def complete(
    run: Run, folder: Path, digest: str, mesh: jax.sharding.Mesh | None,
    stop: Stop, quiet: bool,
) -> tuple[Any, log.Metrics, int]:
  """Trains from the start, or from where an interrupted run stopped.

  Args:
    run: what is trained. folder: of metrics and states.
    digest: hash of the data; states of other data are refused.
    mesh: where states are replicated, or None. stop: asks for an early end.

  Returns:
    `(state, metrics, exit code)`; the code is not 0 if it was stopped, and
    the state is then on disk.

  Raises:
    FloatingPointError: several steps in a row without a finite loss.
  """
  saved = Checkpoints(folder / 'checkpoints', run.config.to_dict(), digest)
  state, facts = saved.restore(run.abstract(), mesh) or (run.fresh(), {})
  metrics = log.Metrics(folder, facts.get('step', 0), jax.process_index() == 0)
  if facts:
    cli.note(f'going on after step {facts["step"]} of {facts["num_steps"]}',
             quiet)
  else:
    test(run, state, 0, 0.0, metrics, quiet)
  run.schedule(
      facts.get('num_steps') or run.config.steps or run.plan())
  with metrics:
    state, step, elapsed = train(
        run, state, facts, saved, metrics, stop, quiet)
    if step < run.num_steps:
      cli.note(f'stopped after step {step} of {run.num_steps}: the same '
               f'command goes on from {saved.folder}')
      return state, metrics, 128 + stop.signal
    test(run, state, step, elapsed / 60, metrics, quiet)
  return state, metrics, 0


def train(
    run: Run, state: Any, facts: dict[str, Any], saved: Checkpoints,
    metrics: log.Metrics, stop: Stop, quiet: bool,
) -> tuple[Any, int, float]:
  """Trains to the end, or until asked to stop; the state is then on disk.

  Returns:
    `(state, steps done, seconds of training)`, of the whole run.

  Raises:
    FloatingPointError: several steps in a row without a finite loss.
  """
  config, num_steps, status = run.config, run.num_steps, log.Status(quiet)
  step, elapsed = facts.get('step', 0), facts.get('elapsed_s', 0.0)
  if facts and step % config.eval_every == 0:  # stopped before the test
    test(run, state, step, elapsed / 60, metrics, quiet)
  pending: list[Any] = []
  mark = time.monotonic()
  stop.look(together=True)
  while step < num_steps and not stop.signal:
    state, *report = run.step(state, step)
    pending.append(report)
    step += 1
    tests, saves = step % config.eval_every == 0, step % config.save_every == 0
    looks = step == num_steps or tests or saves or (
        step % config.log_every == 0)
    ends = bool(stop.look(together=looks)) or step == num_steps
    if not (ends or looks):
      continue
    reports = jax.device_get([r for r, _ in pending])  # waits for the steps
    now = time.monotonic()
    elapsed, took = elapsed + now - mark, now - mark
    row = metrics.write('train', {
        'step': step, 'minutes': elapsed / 60, **log.summary(reports),
        'learning_rate': float(run.rates[step - 1]),
        'tokens_per_s': sum(n for _, n in pending) / took,
        'left_s': (num_steps - step) * took / len(pending)})
    pending = []
    broken = any(r['bad'] >= _MOST_BAD for r in reports)
    # What follows is below.
    status(run.train_line(row), last=ends or tests or broken)
    if ends or saves or broken:
      saved.save(state, step, {'num_steps': num_steps, 'elapsed_s': elapsed})
    if broken:
      raise FloatingPointError(not_finite(run, reports, step, saved.folder))
    if tests and not stop.signal:
      test(run, state, step, elapsed / 60, metrics, quiet)
    mark = time.monotonic()
  return state, step, elapsed


def test(
    run: Run, state: Any, step: int, minutes: float, metrics: log.Metrics,
    quiet: bool,
) -> None:
  """Measures a state, once."""
  if any(row['step'] == step for row in metrics.of('eval')):
    return
  row = metrics.write('eval', run.evaluate(state, step, minutes))
  cli.note(run.eval_line(row), quiet)


def check(config: Any) -> None:
  """Raises ValueError for values that cannot be run."""
  length = 'epochs' if 'epochs' in config else 'minutes'
  for name in (length, 'batch_size', 'log_every', 'eval_every', 'save_every'):
    if not config[name] > 0:
      raise ValueError(f'config.{name}={config[name]}: must be > 0')
  form = config.save.form if 'save' in config else FORMS[0]
  if form not in FORMS:
    raise ValueError(f'config.save.form={form!r}: known are '
                     f'{", ".join(FORMS)}')
  if config.steps < 0:
    raise ValueError(f'config.steps={config.steps}: must be > 0, or 0 for as '
                     f'many as fit into config.{length}')
  schedule = config.optimizer.schedule
  if schedule not in optimizer.SCHEDULES:
    raise ValueError(f'config.optimizer.schedule={schedule!r}: known are '
                     f'{", ".join(optimizer.SCHEDULES)}')
  rate = config.optimizer.learning_rate
  if not 0 < rate < float('inf'):  # before anything is loaded
    raise ValueError(f'config.optimizer.learning_rate={rate}: must be > 0')
  data = config.mesh[0]
  if data > 0 and config.batch_size % data:
    raise ValueError(f'config.batch_size={config.batch_size}: must be a '
                     f'multiple of config.mesh[0]={data}')


def not_finite(run: Run, reports: Any, step: int, folder: Path) -> str:
  """Returns the message of a run that broke."""
  last = next(i for i, r in enumerate(reports) if r['bad'] >= _MOST_BAD)
  first = step - len(reports) + last - _MOST_BAD + 1  # counted from 0
  return (f'loss or gradient not finite in {_MOST_BAD} steps in a row, from '
          f'step {first + 1} on ({run.batch_name(first)}); '
          f'these steps changed nothing, and the state is in {folder}. Lower '
          'config.optimizer.learning_rate, and give another --out')


def optimiser(values: Any) -> Any:
  """Returns the optimiser at rate 1: each step is given its rate."""
  options = {k: v for k, v in values.to_dict().items() if k not in (
      'learning_rate', 'warmup', 'schedule')}
  return optimizer.make(
      learning_rate=1.0, steps=1, schedule='constant', **options)
