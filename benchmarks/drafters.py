"""Drafters on real questions: acceptance, cost, speed, all in one run.

  python -m benchmarks.drafters --target smollm2-135m-instruct \
      --questions spec_bench_dev.jsonl --num_questions 120 \
      --drafters drafters.json --out docs/results/h100_drafters.json

`drafters.json` maps names to speculative configurations (`host.methods`);
`{dir}` in a `model` is replaced by `--dir`. Every question is decoded by plain
decoding and by each drafter in turn, so that ratios are of one run. Times are
those of decoding: prefill apart. What cannot be built or compiled is left out;
`skipped` in the record says why, by section.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from benchmarks import setup, support
import specjax
from specjax.drafters import Null
from specjax.host import cli, methods


def main(arguments=None) -> None:
  """Runs the program."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--out', required=True)
  parser.add_argument('--target', default='smollm2-135m-instruct')
  parser.add_argument('--drafters', required=True)
  parser.add_argument('--dir', default='.')
  parser.add_argument('--only', default='')
  parser.add_argument('--questions', default='')
  parser.add_argument('--num_questions', type=int, default=120)
  parser.add_argument('--new_tokens', type=int, default=256)
  parser.add_argument('--sizes', default='512,1536')
  parser.add_argument('--temperatures', default='0')
  parser.add_argument('--threads', type=int, default=14)
  args = parser.parse_args(arguments)
  record = setup.Record(args.out)
  model = support.load(args.target)
  sizes = [int(s) for s in args.sizes.split(',')]
  asked, dropped = support.questions(
      model, args.questions, args.num_questions, sizes, args.new_tokens)
  record.data['setting'] = {
      'target': args.target, 'dtype': model.lm.config.dtype,
      'num_questions': len(asked), 'too_long': dropped,
      'new_tokens': args.new_tokens, 'slots': sizes, 'batch': 1}
  configs = json.loads(pathlib.Path(args.drafters).read_text())
  names = args.only.split(',') if args.only else list(configs)
  made, unbuilt = build({n: configs[n] for n in names}, model, args.dir)
  for temperature in map(float, args.temperatures.split(',')):
    section = f'T={temperature:g}'
    runners = [
        support.Runner(name, model, drafter, params, temperature,
                       args.new_tokens)
        for name, (drafter, params) in made.items()]
    runners, failed = support.able(
        runners, [q.size for q in asked], args.threads)
    skipped = {**unbuilt, **failed}
    record.data.setdefault('skipped', {})[section] = skipped
    for name, why in skipped.items():
      print(f'{section} {name}: skipped: {why}', flush=True)
    if [r.name for r in runners] in ([], ['plain']):
      raise ValueError(f'{section}: no drafter is left')

    def save(number: int, section=section, runners=runners) -> None:
      if number % 20 == 0 or number == len(asked):
        record.data['sections'][section] = {
            r.name: support.summary(r, runners[0]) for r in runners}
        record.save()

    support.take_turns(runners, asked, args.threads, save)
    for name, row in record.data['sections'][section].items():
      print(f"{section} {name:28s} tau {row['tau']:.3f} "
            f"({row['tau_before_repetition']:.3f} before repetition) "
            f"{row['ms_round']:.3f} ms a round, {row['speedup']:.3f}x",
            flush=True)


def build(
    configs: dict[str, Any], model: Any, folder: str
) -> tuple[dict[str, tuple[Any, Any]], dict[str, str]]:
  """Returns drafters with their parameters, and why the others are not.

  Args:
    configs: by name. model: the target. folder: `{dir}` in a `model`.
  """
  made: dict[str, tuple[Any, Any]] = {'plain': (Null(0), None)}
  failed = {}
  for name, config in configs.items():
    config = dict(config)
    if isinstance(config.get('model'), str):
      config['model'] = config['model'].replace('{dir}', folder)
    try:
      made[name] = methods.build(config, model, specjax.load)
    except ValueError as error:
      failed[name] = str(error)
  return made, failed


if __name__ == '__main__':
  sys.exit(cli.reported(main))
