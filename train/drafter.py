"""Trains a drafter: `python -m train.drafter --config configs/...`.

Reads rollouts of the target, trains, measures acceptance with the decoder
itself on held-out prompts, and writes the drafter, its scores, a model card
and figures to `--out`. A run that is interrupted, started again with the same
config, goes on exactly where it stopped.
"""

from __future__ import annotations

from pathlib import Path
import tempfile
import time
from typing import Any

from absl import logging
import jax

from specjax.data import packing
from specjax.distill import kinds
from specjax.distill.trainer import Trainer
from specjax.host import cli
from specjax.host import drafter as drafter_lib
from specjax.io import output
from train import card, log
from train import text as text_lib
from train.checkpoints import Checkpoints
from train.run import Run, Stop, optimiser

_FLAGS = cli.define_flags('out/drafter')
# Steps in a row without a finite loss that end a run.
_MOST_BAD = 3


def main() -> int:
  """Runs the program; returns the exit code."""
  config, quiet = _FLAGS.config.value, _FLAGS.quiet.value
  check(config)
  out = output.prepare(_FLAGS.out.value)
  stop = Stop()
  if logging.get_verbosity() < logging.DEBUG:  # orbax tells of every file
    logging.set_verbosity(logging.WARNING)
  cli.start(_FLAGS.distributed.value)
  mesh = cli.mesh(config.mesh)
  quiet = quiet or jax.process_index() > 0
  target = cli.load_target(config, mesh, quiet)

  # --- Text -----------------------------------------------------------
  text = text_lib.read(config, target, config.seed)
  ids, vocab = text_lib.vocabulary(text, target, config.draft_vocab_size)
  cli.note(
      f'{text.facts["texts"]} texts, {text.facts["supervised_tokens"]} tokens '
      f'to learn from; {len(ids)} tokens can be drafted: '
      f'{vocab["held_out_coverage"]:.2%} of the held-out text', quiet)

  # --- Task and state -------------------------------------------------
  begin = time.monotonic()
  task = kinds.build(
      config.kind, target.lm.config, len(ids), **{
          name: config[name].to_dict() for name in ('model', 'task', 'loss')})
  trainer = Trainer(task, target.lm, optimiser(config.optimizer))
  run = Run(trainer, target, ids, text, config, mesh)
  saved = Checkpoints(out / 'checkpoints', config.to_dict(), text.digest)
  state, facts = saved.restore(run.abstract(), mesh) or (run.fresh(), {})
  metrics = log.Metrics(out, facts.get('step', 0), jax.process_index() == 0)
  if facts:
    cli.note(f'going on after step {facts["step"]} of {facts["num_steps"]}',
             quiet)
  else:
    test(run, state, 0, 0.0, metrics, quiet)
  run.schedule(facts.get('num_steps') or config.steps or run.plan(begin))

  # --- Train ----------------------------------------------------------
  try:
    state, step, elapsed = train(
        run, state, facts, saved, metrics, stop, quiet)
    if step < run.num_steps:
      cli.note(f'stopped after step {step} of {run.num_steps}: the same '
               f'command goes on from {out / "checkpoints"}')
      return 128 + stop.signal
    test(run, state, step, elapsed / 60, metrics, quiet)
  finally:
    metrics.close()

  # --- Keep -----------------------------------------------------------
  last = {k: v for k, v in metrics.of('eval')[-1].items() if k != 'kind'}
  with tempfile.TemporaryDirectory() as spare:
    # All processes decode with what is loaded again; the first one's stays.
    folder = out if jax.process_index() == 0 else Path(spare)
    keep(run, state, {**vocab, **last}, metrics, folder / 'drafter', quiet)
  return 0


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
    status(log.train_line(row, num_steps), last=ends)
    broken = any(r['bad'] >= _MOST_BAD for r in reports)
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
  cli.note(log.eval_line(row), quiet)


def keep(
    run: Run, state: Any, scores: dict[str, Any], metrics: log.Metrics,
    folder: Path, quiet: bool,
) -> None:
  """Writes the drafter, and what there is to say about it."""
  config, task, target = run.config, run.trainer.task, run.target
  form = config.save.form

  def save() -> None:
    drafter_lib.save_drafter(
        folder, run.trainer.task.model, state.net, run.ids, target,
        kind=config.kind, num_draft=task.num_draft, form=form, facts={
            'metrics': scores, 'config': config.to_dict(),
            'text': run.text.facts})
  save()
  # What users will load, not what was trained: other number formats.
  loaded = drafter_lib.load_drafter(folder, target)
  scores['saved_tau'] = run.decode(loaded.params).tau
  save()
  card.write(folder, config, scores, run.text.facts, metrics, target)
  cli.note(f'tau {scores["tau"]:.3f}, {scores["saved_tau"]:.3f} as saved '
           f'({form}); wrote {folder}', quiet)


def check(config: Any) -> None:
  """Raises ValueError for values that cannot be run."""
  for name in ('minutes', 'batch_size', 'log_every', 'eval_every',
               'save_every'):
    if not config[name] > 0:
      raise ValueError(f'config.{name}={config[name]}: must be > 0')
  if config.steps < 0:
    raise ValueError(f'config.steps={config.steps}: must be > 0, or 0 for as '
                     'many as fit into config.minutes')
  data = config.mesh[0]
  if data > 0 and config.batch_size % data:
    raise ValueError(f'config.batch_size={config.batch_size}: must be a '
                     f'multiple of config.mesh[0]={data}')


def not_finite(run: Run, reports: Any, step: int, folder: Path) -> str:
  """Returns the message of a run that broke."""
  last = next(i for i, r in enumerate(reports) if r['bad'] >= _MOST_BAD)
  first = step - len(reports) + last - _MOST_BAD + 1  # counted from 0
  rows = packing.order(len(run.text.train), first, run.config.batch_size,
                       run.config.seed)
  return (f'loss or gradient not finite in {_MOST_BAD} steps in a row, from '
          f'step {first + 1} on (rows {rows[:8].tolist()} ... of the text); '
          f'these steps changed nothing, and the state is in {folder}. Lower '
          'config.optimizer.learning_rate')


if __name__ == '__main__':
  cli.run(main)
