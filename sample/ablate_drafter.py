"""What makes a drafter good: many small ones, trained equally long.

  python -m sample.ablate_drafter --rollouts out/text --out out/ablations \
      --seconds 60 --only loss,kind --seeds 0,1
  python -m sample.ablate_plots --results out/ablations/ablations.json
  python -m sample.ablate_drafter --target tiny --out out/try --only loss

Every drafter sees the same packed text in the same order and trains for the
same time, compilation left out; then the decoder itself measures it: greedy
chains on held-out prompts, tokens a round. The target and the text are loaded
once. A row is written after each drafter; the same command goes on after an
interruption. Each drafter is a program of its own, which takes a minute or
more to compile on a GPU: `--workers 4` compiles them side by side first. With
`--save` the drafters themselves are kept in `<out>/drafters/<axis>-<label>`,
in bfloat16. Axes: see `sample.ablate_variants`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

from sample import ablate_variants, sweeps
from sample.ablate_variants import Variant
from specjax.data.packing import Packed
from specjax.distill import kinds
from specjax.distill.trainer import Trainer
from specjax.host import cli
from specjax.host import drafter as drafter_lib
from specjax.host import results as results_lib
from specjax.io import output
from train import log
from train import text as text_lib
from train.loop import optimiser
from train.run import Run

# Steps reported.
_LAST = 20
# Of training, for the tiny model and others.
_TINY_SECONDS, _SECONDS = 0.2, 60.0


class Job:
  """A drafter to train: compiled first, then run as often as there are
  seeds."""

  def __init__(self, variant: Variant, config: Any, target, text):
    """Prepares; nothing is compiled yet."""
    self.variant, self.config, self.target = variant, config, target
    text = text._replace(
        train=subset(text.train, config.data.share, config.seed))
    self.text = text
    self.ids, self.vocab = text_lib.vocabulary(
        text, target, config.draft_vocab_size)
    task = kinds.build(
        config.kind, target.lm.config, len(self.ids), **{
            name: config[name].to_dict()
            for name in ('model', 'task', 'loss')})
    self.trainer = Trainer(task, target.lm, optimiser(config.optimizer))
    self.compile_s = 0.0

  def run(self, seed: int) -> Run:
    """Returns a run of this drafter; its programs are shared."""
    config = self.config.copy_and_resolve_references()
    config.seed = seed
    return Run(self.trainer, self.target, self.ids, self.text, config, None)

  def warm(self, seed: int) -> None:
    """Compiles everything by doing it once."""
    begin = time.perf_counter()
    run = self.run(seed)
    run.schedule(2)
    state, _, _ = run.step(run.fresh(), 0)
    run.evaluate(state, 0, 0.0)
    self.compile_s = time.perf_counter() - begin

  def train(
      self, seed: int, seconds: float, folder: pathlib.Path | None = None
  ) -> dict[str, Any]:
    """Trains from the start and measures; returns the row of the results.

    Args:
      seed: of weights and batches. seconds: of training.
      folder: where the drafter is kept; None for nowhere.
    """
    run = self.run(seed)
    steps = max(1, round(seconds / run.pace()))
    run.schedule(steps)
    state = jax.block_until_ready(run.fresh())
    pending: list[Any] = []
    tokens, begin = 0, time.perf_counter()
    for step in range(steps):
      state, report, count = run.step(state, step)
      tokens += count
      pending = [*pending, report][-_LAST:]
    state = jax.block_until_ready(state)
    took = time.perf_counter() - begin
    row = run.evaluate(state, steps, took / 60)
    row.pop('minutes')
    if folder is not None:
      drafter_lib.save_drafter(
          folder, self.trainer.task.model, state.net, self.ids, self.target,
          kind=self.config.kind, num_draft=run.num_draft)
    return {
        'label': self.variant.label, 'kind': self.config.kind, 'seed': seed,
        'changes': dict(self.variant.changes),
        **row, 'seconds': took, 'tokens': tokens,
        'tokens_per_s': tokens / took, 'compile_s': self.compile_s,
        'rows': len(self.text.train),
        'passes': steps * self.config.batch_size / len(self.text.train),
        'parameters': sum(
            x.size for x in jax.tree.leaves(state.net)),
        'num_draft': len(row['per_position']),
        'last_steps': log.summary(jax.device_get(pending)), **self.vocab}


def subset(packed: Packed, share: float, seed: int) -> Packed:
  """Returns a random share of the rows; smaller shares are in larger ones."""
  count = max(1, round(share * len(packed)))
  if count == len(packed):
    return packed
  rows = np.sort(np.random.default_rng(seed).permutation(
      len(packed))[:count])
  return Packed(**{
      field.name: getattr(packed, field.name)[rows]
      for field in dataclasses.fields(packed)})


class Results:
  """The JSON file of all rows; on disk after each of them."""

  def __init__(self, path: pathlib.Path, setting: dict[str, Any]):
    """Reads what is there, of the same setting.

    Raises:
      ValueError: the file holds drafters that were trained otherwise, or on
        another device, which learns more or less in the same time.
    """
    self.path = path
    self.data: dict[str, Any] = {
        'setting': json.loads(json.dumps(setting)),
        'device': results_lib.device_name(),
        'versions': results_lib.versions(), 'axes': {}, 'runs': {}}
    if path.exists():
      found = json.loads(path.read_text())
      sweeps.same(path, found, self.data, ('setting', 'device'))
      self.data.update(axes=found['axes'], runs=found['runs'])

  def done(self, key: str, seed: int) -> bool:
    """Whether a drafter was trained; one that failed was not."""
    return 'tau' in self.data['runs'].get(f'{key} {seed}', {})

  def add(self, key: str, seed: int, row: dict[str, Any]) -> None:
    """Adds a row, writes the file and says so."""
    self.data['runs'][f'{key} {seed}'] = row
    self.save()
    print(f'{key} seed {seed}: ' + (
        f'tau {row["tau"]:.3f}, {row["step"]} steps in '
        f'{row["seconds"]:.1f} s' if 'tau' in row else row['failed']),
          flush=True)

  def save(self) -> None:
    """Writes the file; it appears whole or stays what it was."""
    output.write_json(self.path, self.data)


def chosen(names: str, tiny: bool) -> list[Variant]:
  """Returns the variants of the axes named, all if none is.

  Raises:
    ValueError: an unknown axis.
  """
  known = ablate_variants.axes(tiny)
  wanted = names.split(',') if names else list(known)
  for name in wanted:
    if name not in known:
      raise ValueError(f'--only={name}: known are {", ".join(known)}')
  return [variant for name in wanted for variant in known[name]]


def work(results: Results, jobs, seeds, args) -> None:
  """Compiles, trains and measures drafters, one after the other.

  Nothing is compiled while a drafter trains: time is what is compared.
  """
  for variant, key, make in jobs:
    try:
      job = make()
      job.warm(seeds[0])
    except Exception as error:  # one drafter must not cost the others
      for seed in seeds:
        results.add(key, seed, failure(error, seed))
      continue
    for seed in seeds:
      if results.done(key, seed):
        continue
      folder = pathlib.Path(args.out) / 'drafters' / variant.folder(seed)
      try:
        row = job.train(seed, args.seconds, folder if args.save else None)
      except Exception as error:
        row = failure(error, seed)
      results.add(key, seed, row)
    del job
    jax.clear_caches()  # each drafter is a program of its own


def failure(error: Exception, seed: int) -> dict[str, Any]:
  """Returns the row of a drafter that could not be trained."""
  return {'failed': repr(error)[:500], 'seed': seed}


def fill(jobs, seed: int, share: tuple[int, int]) -> None:
  """Compiles a share `(i, n)` of the drafters into the compilation cache."""
  for _, key, make in jobs[share[0]::share[1]]:
    try:
      make().warm(seed)
      print(f'{key}: compiled', flush=True)
    except Exception as error:  # told again by who trains it
      print(f'{key}: {error!r}'[:500], flush=True)
    jax.clear_caches()


def compile_apart(arguments: list[str], workers: int) -> None:
  """Fills the compilation cache by several processes.

  Processes, since XLA tunes kernels in memory of the device that it shares
  with whatever else its process runs: with threads (jax 0.11.2, H100) that
  ended in failed checks, a crash and a standstill.
  """
  # Memory as it is needed: there are several of them.
  environment = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  started = [subprocess.Popen(
      [sys.executable, '-m', 'sample.ablate_drafter', *arguments,
       f'--fill={number}/{workers}'], env=environment)
             for number in range(workers)]
  try:
    codes = [process.wait() for process in started]
  finally:
    for process in started:
      process.kill()
  if any(codes):
    print(f'compiling apart failed (exit codes {codes}): what is missing is '
          'compiled now', file=sys.stderr, flush=True)


def parse(arguments=None) -> argparse.Namespace:
  """Returns the options."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True)
  parser.add_argument('--target', default='smollm2-135m-instruct')
  parser.add_argument('--rollouts', default='')
  parser.add_argument('--only', default='', help='axes, by commas')
  parser.add_argument('--seconds', type=float, help='of training each')
  parser.add_argument('--seeds', default='0')
  parser.add_argument('--save', action='store_true',
                      help='keep the drafters')
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--num_prompts', type=int, default=64)
  parser.add_argument('--new_tokens', type=int, default=128)
  parser.add_argument('--learning_rate', type=float, default=2e-3)
  parser.add_argument(
      '--workers', type=int, default=0,
      help='processes that compile all drafters first, side by side')
  parser.add_argument('--fill', type=share, help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if args.seconds is None:
    args.seconds = _TINY_SECONDS if args.target == 'tiny' else _SECONDS
  return args


def share(text: str) -> tuple[int, int]:
  """Reads 'i/n'."""
  number, _, count = text.partition('/')
  return int(number), int(count)


def main(arguments=None) -> int:
  """Runs the program; returns the exit code."""
  args = parse(arguments)
  tiny = args.target == 'tiny'
  base = {} if tiny else {
      'target': args.target, 'data.rollouts': args.rollouts or None,
      'data.length': args.length, 'batch_size': args.batch_size,
      'eval.num_prompts': args.num_prompts,
      'eval.new_tokens': args.new_tokens,
      'optimizer.learning_rate': args.learning_rate}
  variants = chosen(args.only, tiny)
  seeds = [int(s) for s in args.seeds.split(',')]
  own = {kind: ablate_variants.config(Variant('', '', kind), base, tiny)
         for kind in {v.kind for v in variants}}
  results = Results(
      output.prepare(args.out) / 'ablations.json',
      {**base, 'target': args.target, 'seconds': args.seconds})
  keys = [(v, ablate_variants.trimmed(v, own[v.kind])) for v in variants]

  def missing() -> list[tuple[str, Variant]]:
    first = {key: v for v, key in reversed(keys)}
    return [(key, first[key]) for key in dict.fromkeys(k for _, k in keys)
            if not all(results.done(key, seed) for seed in seeds)]

  if not args.fill:
    for variant, key in keys:
      results.data['axes'].setdefault(variant.axis, {})[variant.label] = key
    results.save()
    if args.workers and missing():
      compile_apart(
          list(sys.argv[1:] if arguments is None else arguments),
          min(args.workers, len(missing())))
  cli.start(False)
  first = ablate_variants.config(Variant('', ''), base, tiny)
  target = cli.load_target(first, None, True)
  text = text_lib.read(first, target, 0)
  jobs = [(variant, key, functools.partial(
      Job, variant, ablate_variants.config(variant, base, tiny), target, text))
          for key, variant in missing()]
  if args.fill:
    fill(jobs, seeds[0], args.fill)
    return 0
  work(results, jobs, seeds, args)
  return 1 if missing() else 0


if __name__ == '__main__':
  sys.exit(cli.reported(main))
