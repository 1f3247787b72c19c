"""Drafters on real questions: acceptance, cost, speed, all in one run.

  python -m benchmarks.drafters --target smollm2-135m-instruct \
      --questions spec_bench_dev.jsonl --num_questions 120 \
      --drafters drafters.json --out docs/results/h100_drafters.json

`drafters.json` maps names to speculative configurations (`host.methods`);
`{dir}` in a `model` is replaced by `--dir`. Every question is decoded by plain
decoding and by each drafter in turn, so that ratios are of one run. Times are
those of decoding: prefill apart.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import setup
import specjax
from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.data import filters
from specjax.data import questions as builtin_questions
from specjax.distill import measure
from specjax.drafters import Null
from specjax.host import methods, tiny
from specjax.verify import get as rule_named


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt in tokens; `size` is the slots that its programs have."""

  category: str
  tokens: tuple[int, ...]
  size: int


def questions(model, path: str, limit: int, sizes, new: int):
  """Returns the first turns, spread evenly over the file, by size."""
  if path:
    rows = [json.loads(line) for line in open(path) if line.strip()]
    texts = [(r.get('category', 'other'), r['turns'][0]) for r in rows]
  else:
    texts = [(q.category, q.turns[0]) for q in builtin_questions.QUESTIONS]
  step = max(len(texts) / limit, 1)
  picked = [texts[int(i * step)] for i in range(min(limit, len(texts)))]
  found, dropped = [], 0
  for category, text in picked:
    templated = model.tokenizer.apply_chat_template(
        [{'role': 'user', 'content': text}])
    tokens = model.tokenizer.encode(templated, add_bos=False)
    fits = [s for s in sizes if len(tokens) + new <= s]
    if fits:
      found.append(Question(category, tuple(tokens), fits[0]))
    else:
      dropped += 1
  return found, dropped


class Runner:
  """One drafter: its two programs at each size, and what it has decoded."""

  def __init__(self, name, model, drafter, params, temperature, new):
    rule = 'greedy' if not temperature else 'speculative'
    self.name, self.model, self.new = name, model, new
    self.temperature = temperature
    self.engine = Engine(model.lm, drafter, rule_named(rule))
    self.params = Models(target=model.params, drafter=params)
    self.programs: dict[int, Any] = {}
    self.rows: list[dict[str, Any]] = []
    self.histogram = np.zeros(
        drafter.topology.max_depth + 1, np.int64)

  def context(self, question: Question, seed: int):
    """Returns a batch of one."""
    built = measure.context(
        [question.tokens], self.new, size=question.size, seed=seed,
        eos=self.model.eos, temperature=self.temperature)
    return built.replace(token_round=jnp.full(built.tokens.shape, -1))

  def compile(self, size: int) -> None:
    """Compiles both programs ahead of time."""
    run, admit = loop.compiled()
    context = self.context(Question('', (1, 2, 3), size), 0)
    empty = jax.jit(lambda c: loop.empty(self.engine, c))
    state = jax.eval_shape(empty, context)
    rows = jnp.ones((1,), bool)
    self.programs[size] = (
        empty.lower(context).compile(),
        admit.lower(self.engine, self.params, state, rows, context,
                    chunk=64).compile(),
        run.lower(self.engine, self.params, state, np.int32(1)).compile())

  def __call__(self, question: Question, seed: int) -> None:
    """Decodes one question and notes what happened."""
    empty, admit, run = self.programs[question.size]
    context = self.context(question, seed)
    state = empty(context)
    state = jax.block_until_ready(admit(
        self.params, state, jnp.ones((1,), bool), context))
    seconds, state = setup.timed(run, self.params, state, np.int32(10**6))
    length = int(state.context.length[0])
    start = len(question.tokens)
    new = np.asarray(state.context.tokens[0, start:length])
    rounds = np.asarray(state.context.token_round[0, start:length])
    loop_at = filters.trailing_loop(new)
    cut = loop_at[0] if loop_at else len(new)
    self.histogram += np.asarray(state.metrics.histogram[0])
    self.rows.append({
        'category': question.category, 'tokens': len(new),
        'rounds': int(state.context.rounds[0]), 'seconds': seconds,
        'fresh_tokens': int(cut),
        'fresh_rounds': int(rounds[cut - 1]) + 1 if cut else 0,
        'text': new.tolist()})


def summary(runner: Runner, plain: Runner) -> dict[str, Any]:
  """Returns what a table shows of a drafter."""
  total = lambda key, rows=runner.rows: sum(r[key] for r in rows)  # noqa: E731
  at_least = np.cumsum(runner.histogram[::-1])[::-1] / max(
      runner.histogram.sum(), 1)
  speed = [a['seconds'] / max(a['tokens'], 1) / (
      b['seconds'] / max(b['tokens'], 1))
           for a, b in zip(plain.rows, runner.rows, strict=True)]
  categories = sorted({r['category'] for r in runner.rows})
  step = 1e3 * sum(r['seconds'] for r in plain.rows) / sum(
      r['rounds'] for r in plain.rows)
  ms_round = 1e3 * total('seconds') / total('rounds')

  def of(category):
    rows = [r for r in runner.rows if r['category'] == category]
    return {'tau': total('tokens', rows) / total('rounds', rows),
            'n': len(rows)}

  return {
      'tau': total('tokens') / total('rounds'),
      'tau_before_repetition': total('fresh_tokens') / max(
          total('fresh_rounds'), 1),
      'share_repetition': 1 - total('fresh_tokens') / total('tokens'),
      'speedup': (sum(r['seconds'] for r in plain.rows)
                  / sum(r['tokens'] for r in plain.rows))
                 / (total('seconds') / total('tokens')),
      'speedup_by_question': setup.spread(speed),
      'tokens_per_s': total('tokens') / total('seconds'),
      'ms_round': ms_round, 'round_over_plain_step': ms_round / step,
      'accepted_at_depth': at_least[1:].tolist(),
      'conditional': (at_least[1:] / np.maximum(
          at_least[:-1], 1e-9)).tolist(),
      'same_text_as_plain': sum(
          a['text'] == b['text'] for a, b in zip(
              plain.rows, runner.rows, strict=True)),
      'by_category': {c: of(c) for c in categories}}


def main() -> None:
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
  args = parser.parse_args()
  record = setup.Record(args.out)
  model = tiny.model() if args.target == 'tiny' else specjax.load(
      args.target, quiet=True)
  sizes = [int(s) for s in args.sizes.split(',')]
  asked, dropped = questions(
      model, args.questions, args.num_questions, sizes, args.new_tokens)
  record.data['setting'] = {
      'target': args.target, 'dtype': model.lm.config.dtype,
      'num_questions': len(asked), 'too_long': dropped,
      'new_tokens': args.new_tokens, 'slots': sizes, 'batch': 1}
  configs = json.loads(pathlib.Path(args.drafters).read_text())
  names = args.only.split(',') if args.only else list(configs)
  made = {}
  for name in names:
    config = dict(configs[name])
    if isinstance(config.get('model'), str):
      config['model'] = config['model'].replace('{dir}', args.dir)
    made[name] = methods.build(config, model, specjax.load)
  for temperature in map(float, args.temperatures.split(',')):
    runners = [Runner('plain', model, Null(0), None, temperature,
                      args.new_tokens)]
    runners += [Runner(n, model, d, p, temperature, args.new_tokens)
                for n, (d, p) in made.items()]
    begin = time.perf_counter()
    with ThreadPoolExecutor(args.threads) as pool:
      jobs = [pool.submit(r.compile, s) for r in runners
              for s in sorted({q.size for q in asked})]
      for job in jobs:
        job.result()
    print(f'compiled in {time.perf_counter() - begin:.0f} s', flush=True)
    for seed, question in enumerate([asked[0], *asked]):
      for runner in runners:
        runner(question, seed)
      if not seed:  # warm-up
        for runner in runners:
          runner.rows.clear()
          runner.histogram[:] = 0
      if seed % 20 == 0 or seed == len(asked):
        if seed:
          record.data['sections'][f'T={temperature:g}'] = {
              r.name: summary(r, runners[0]) for r in runners}
          record.save()
    for runner in runners:
      s = summary(runner, runners[0])
      print(f"T={temperature:g} {runner.name:28s} tau {s['tau']:.3f} "
            f"({s['tau_before_repetition']:.3f} before repetition) "
            f"{s['ms_round']:.3f} ms a round, {s['speedup']:.3f}x", flush=True)


if __name__ == '__main__':
  main()
