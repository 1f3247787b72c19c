"""Measures drafters: `python -m specjax.bench --config configs/bench_….py`.

Decodes the same prompts plainly and with each run of the config, in turn, as
often as `config.repeats` says, and writes to `--out`:

* `bench.json`: a row for each run, batch size and category (see
  `specjax.eval.speed`), with device, versions, command and config.
* `bench.md`: the same as tables, and what the columns mean.
* `answers/<run>.jsonl`: the first batch size, in Spec-Bench's answer format;
  further ones are `<run>.batch<N>.jsonl`.
* `speedup_by_category.png`, `acceptance_by_position.png`,
  `speed_by_batch.png`.

Ctrl-C keeps the repeats that are finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import os
import re
import shlex
import sys
import time
from typing import Any

import jax

import specjax
from specjax.data import questions
from specjax.eval import plots, report, speed
from specjax.host import cli, methods
from specjax.host import results as results_lib
from specjax.host import rules as rules_lib
from specjax.host.generate import choose_rule
from specjax.host.requests import Result
from specjax.host.status import BenchStatus
from specjax.io import output
from specjax.io import prompts as prompts_io

_FLAGS = cli.define_flags('out/bench')

PLAIN = 'plain'
_KEYS = frozenset((
    'target', 'dtype', 'prompts', 'max_prompts', 'categories', 'runs',
    'verify', 'verify_options', 'sampling', 'batch_sizes', 'repeats', 'mesh',
    'seed', 'exact'))
_RUN_KEYS = frozenset(('name', 'speculative', 'verify', 'verify_options'))
# Names become file names.
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._+-]*')


def main() -> int:
  """Runs the program; returns the exit code."""
  config, quiet = _FLAGS.config.value, _FLAGS.quiet.value
  check(config)
  out = output.prepare(_FLAGS.out.value)
  output.prepare(out / 'answers')
  options = cli.sampling(config.sampling)
  prompts, num_skipped = read_prompts(config, _FLAGS.keep_going.value, quiet)
  check_sizes(config, prompts, options)
  cli.start(_FLAGS.distributed.value)
  mesh = cli.mesh(config.mesh)
  target = cli.load_target(config, mesh, quiet)
  runs = build(config, target, options, quiet)

  # --- Measure --------------------------------------------------------
  turns = sum(len(p.turns or ('',)) for p in prompts) * options.n
  programs = len(runs) * len(config.batch_sizes)
  status = BenchStatus(
      quiet, num_turns=turns, num_runs=programs * config.repeats,
      num_programs=programs)
  measured: list[dict[str, Any]] = []
  interrupted = False
  try:
    for batch_size in config.batch_sizes:
      work = functools.partial(
          decode, config, target, prompts, options, batch_size)
      compile_s = {}
      for run in runs:
        compile_s[run.name] = warm_up(work, run)
        status.compiled(
            f'{run.name}, batch {batch_size}', compile_s[run.name])
      for repeat in range(config.repeats):
        # A repeat counts once all its runs are there: no plain, no ratio.
        group = []
        for run in runs:
          status.begin(f'{run.name}, batch {batch_size}, repeat '
                       f'{repeat + 1}/{config.repeats}', batch_size)
          results = work(run, status)
          status.end(results.wall_s)
          group.append({
              'run': run.name, 'batch_size': batch_size, 'repeat': repeat,
              'compile_s': compile_s[run.name],
              **measurement(results, prompts)})
        measured += group
  except KeyboardInterrupt:
    if not measured:
      raise
    interrupted = True

  # --- Report ---------------------------------------------------------
  if jax.process_index() == 0:
    rows = speed.rows(measured, PLAIN)
    setting = describe(config, target, options, prompts, num_skipped)
    write(out, {**setting, 'interrupted': interrupted, 'rows': rows},
          measured)
    if not quiet:
      show(rows)
      cli.note(f'wrote {out}/bench.json, {out}/bench.md, answers and plots')
  return 130 if interrupted else 0


@dataclasses.dataclass(frozen=True)
class Run:
  """A drafter to measure: what `generate` needs of it, and its name."""

  name: str
  drafter: Any
  params: Any
  verify: Any
  tables: Any = None  # arrays of the rule


def check(config) -> None:
  """Raises ValueError for keys and values that cannot be right."""
  for what, keys in (('unknown', set(config) - _KEYS),
                     ('missing', _KEYS - set(config))):
    if keys:
      raise ValueError(f'config.{min(keys)}: {what}; a benchmark has the '
                       f'keys {", ".join(sorted(_KEYS))}')
  if config.repeats < 1:
    raise ValueError(f'config.repeats={config.repeats}: must be >= 1')
  if not config.runs:
    raise ValueError('config.runs: at least one run is needed')
  names = [PLAIN]
  for run in config.runs:
    if not isinstance(run, Mapping) or not set(run) <= _RUN_KEYS:
      raise ValueError(f'config.runs: {run!r} must be a dict of '
                       f'{", ".join(sorted(_RUN_KEYS))}')
    name = run.get('name')
    if not isinstance(name, str) or not _NAME.fullmatch(name):
      raise ValueError(
          f'config.runs: name={name!r}: must be letters, digits, or any of '
          '. _ + - (it becomes a file name)')
    if name in names:
      raise ValueError(f'config.runs: the name {name!r} is taken')
    names.append(name)


def check_sizes(config, prompts: Sequence[Any], options) -> None:
  """Raises ValueError for a batch that the prompts cannot fill."""
  num = len(prompts) * options.n
  sizes = tuple(config.batch_sizes)
  if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
    raise ValueError(
        f'config.batch_sizes={sizes}: must be different integers >= 1')
  if max(sizes) > num:
    raise ValueError(
        f'config.batch_sizes={sizes}: {num} prompts (times samples) cannot '
        f'fill {max(sizes)} slots; use more prompts or smaller batches')


def read_prompts(
    config, keep_going: bool, quiet: bool
) -> tuple[list[specjax.Prompt], int]:
  """Returns the prompts to use, and how many rows were malformed."""
  skipped: list[str] = []
  prompts = list(questions.QUESTIONS)
  if config.prompts is not None:
    prompts = prompts_io.read(
        config.prompts, keep_going=keep_going, on_error=skipped.append)
  for message in skipped:
    cli.note(f'skipped: {message}', quiet)
  kept = speed.select(
      [p.category for p in prompts], config.categories, config.max_prompts)
  return [prompts[index] for index in kept], len(skipped)


def build(config, target: specjax.Model, options, quiet) -> list[Run]:
  """Returns plain decoding and the runs of the config.

  Everything that can be refused is refused here, before the first of them
  has cost any time.
  """
  load_drafter = cli.load_drafter(target, quiet)
  runs = [{'name': PLAIN, 'speculative': None, 'verify': 'auto'}, *config.runs]
  out = []
  for run in runs:
    speculative = run.get('speculative') or {'method': 'null'}
    try:
      drafter, params = methods.build(speculative, target, load_drafter)
      shared = None if 'verify' in run else config.verify_options
      verify, tables = rules_lib.build(
          run.get('verify', config.verify),
          run.get('verify_options', shared), target.vocab_size)
      choose_rule(verify, drafter, [options], target.vocab_size, tables)
    except ValueError as error:
      raise ValueError(f"config.runs, {run['name']}: {error}") from error
    out.append(Run(run['name'], drafter, params, verify, tables))
  return out


def decode(
    config, target, prompts, options, batch_size: int, run: Run, on_result
) -> specjax.Results:
  """Decodes all prompts once."""
  return specjax.generate(
      target, run.drafter, prompts, options, drafter_params=run.params,
      verify=run.verify, verifier_params=run.tables,
      batch_size=batch_size, seed=config.seed, exact=config.exact,
      on_result=on_result)


class _EnoughError(Exception):
  """Ends a warm-up."""


def warm_up(work: Callable[..., specjax.Results], run: Run) -> float:
  """Compiles a run and decodes until its first answer.

  The first execution of a program is slower than the later ones. It is the
  real work that is begun and left, so that all shapes are those of the
  repeats.

  Returns:
    Seconds before decoding began: compiling, or reading the cache.
  """
  start = time.perf_counter()

  def stop(result: Result):
    # Its clock started when its row was admitted, after compilation.
    raise _EnoughError(time.perf_counter() - start - result.wall_s)

  try:
    work(run, stop)
  except _EnoughError as enough:
    return enough.args[0]
  raise AssertionError('a run without results')


def measurement(
    results: specjax.Results, prompts: Sequence[specjax.Prompt]
) -> dict[str, Any]:
  """Returns the plain dict that `specjax.eval` works on."""
  categories = speed.groups([p.category for p in prompts])
  by_group: dict[str, list[Result]] = {speed.OVERALL: list(results)}
  for result in results:
    group = categories[result.request.prompt_index]
    by_group.setdefault(group, []).append(result)
  setup = {k: results.description[k]
           for k in ('drafter', 'verify', 'lossy', 'num_speculative_tokens')}
  return {
      'wall_s': results.wall_s,
      'figures': {group: {**setup, **results_lib.summarise(own)}
                  for group, own in by_group.items()},
      'answers': [_answer(r, prompts, categories) for r in results]}


def _answer(result: Result, prompts, groups: Sequence[str]) -> dict[str, Any]:
  request = result.request
  prompt = prompts[request.prompt_index]
  return {
      'prompt': request.prompt_index, 'stream': request.stream,
      'turn': request.turn, 'question_id': prompt.id,
      'category': prompt.category, 'group': groups[request.prompt_index],
      'text': result.text, 'tokens': result.tokens, 'rounds': result.rounds,
      'step_lengths': list(result.step_lengths),
      'wall_s': result.wall_s}


def describe(config, target, options, prompts, num_skipped) -> dict[str, Any]:
  """Returns what the numbers depend on."""
  default = specjax.Sampling()
  shown = {f.name: getattr(options, f.name)
           for f in dataclasses.fields(options)}
  return {
      'target': target.name, 'dtype': target.lm.config.dtype,
      'device': results_lib.device_name(), 'num_cpu_cores': os.cpu_count(),
      'versions': results_lib.versions(),
      'command': shlex.join(
          ['python', '-m', 'specjax.bench', *sys.argv[1:]]),
      'num_prompts': len(prompts),
      'num_prompts_by_category': dict(Counter(p.category for p in prompts)),
      'num_skipped_prompts': num_skipped, 'num_repeats': config.repeats,
      'sampling': {
          k: v for k, v in shown.items()
          if k in ('temperature', 'max_new_tokens')
          or v != getattr(default, k)},
      'config': config.to_dict(), 'tstamp': time.time()}


def write(out, summary: dict[str, Any], measured) -> None:
  """Writes all files; each appears whole or not at all."""
  rows, first = summary['rows'], measured[0]['batch_size']
  for run, size in dict.fromkeys(
      (m['run'], m['batch_size']) for m in measured):
    name = run if size == first else f'{run}.batch{size}'
    chosen = speed.median_repeat(measured, run, size)
    with output.JsonLines(out / 'answers' / f'{name}.jsonl') as file:
      for line in report.answers(chosen, f"{summary['target']}-{run}"):
        file.write(line)
  title = (f"{summary['target']} ({summary['dtype']}) on "
           f"{report.device(summary)}")
  for draw in (plots.speedup_by_category, plots.acceptance_by_position,
               plots.speed_by_batch):
    draw(rows, out / f'{draw.__name__}.png', title)
  output.write_text(out / 'bench.md', report.markdown(summary))
  # Last: who finds it finds the rest.
  output.write_json(out / 'bench.json', summary)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
  """Prints the overall figures."""
  width = max(len(r['run']) for r in rows)
  for row in rows:
    if row['category'] == speed.OVERALL:
      print(f"{row['run']:<{width}}  batch {row['batch_size']:<3} "
            f"{row['tokens_per_s']:8.1f} tokens/s  speed-up "
            f"{row['speedup']:.2f} ({row['speedup_min']:.2f}-"
            f"{row['speedup_max']:.2f})  "
            f"{row['mean_acceptance_length']:.2f} tokens/round")


if __name__ == '__main__':
  cli.run(main)
