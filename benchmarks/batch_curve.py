"""Speed against plain decoding by batch size, with a controller and without.

  python -m benchmarks.batch_curve --target smollm2-135m-instruct \
      --drafter checkpoints/smollm2-135m-instruct-dspark \
      --questions spec_bench_dev.jsonl --out docs/results/h100_batch_curve.json

At every batch size the same questions are decoded plainly, with chains of the
drafter, and with the drafter under a controller that may draft less or not at
all. What is compared is tokens a second while all rows run: end tokens are
ignored, every run covers about `--new_tokens` tokens a row, prefill is left
out. Controllers know what a round costs at each width: that is measured
first, at the same batch size.

* `tracking`: `control.Tracking`, each row for itself.
* `shared`: `control.Shared`, one length for all rows.

Draws `batch_curve.png` beside `--out`. Each batch size is written when it is
finished; the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import setup, support
from specjax.core import control, loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.distill import measure
from specjax.drafters import Adaptive, ChainLM, Null
from specjax.eval.plots import COLOURS, MARKERS, finish, new_figure
from specjax.host import cli
from specjax.verify import get as rule_named

# Slots for this many times the tokens that are to be covered.
_ROOM = 3


class Program:
  """A compiled way of decoding at a batch size."""

  def __init__(self, model, drafter, params, batch: int, size: int,
               state_of: Any = None):
    """Prepares; works on the state of `state_of`, None for its own."""
    self.model, self.batch, self.size = model, batch, size
    self.engine = Engine(model.lm, drafter, rule_named('greedy'))
    self.params = Models(target=model.params, drafter=params)
    # Compiled, so that no two buffers are one.
    owner = self.engine._replace(drafter=state_of or drafter)
    self._make = jax.jit(lambda context: loop.empty(owner, context))
    self.run: Any = None
    self.admit: Any = None
    self.rounds = 1  # of a measurement; set by `settle`

  def empty(self, prompts: list[tuple[int, ...]]):
    """Returns a state that holds prompts, not fed yet."""
    return self._make(measure.context(prompts, self.size, size=self.size))

  def shape(self):
    """Returns the state's shapes."""
    return jax.eval_shape(lambda: self.empty([(1, 2, 3)] * self.batch))

  def compile_run(self) -> None:
    """Compiles the loop."""
    run, _ = loop.compiled()
    self.run = run.lower(self.engine, self.params, self.shape(),
                         np.int32(1)).compile()

  def compile_admit(self) -> None:
    """Compiles feeding the prompts."""
    _, admit = loop.compiled()
    state = self.shape()
    self.admit = admit.lower(
        self.engine, self.params, state, jnp.ones((self.batch,), bool),
        state.context, chunk=64).compile()

  def fed(self, prompts):
    """Returns a state with the prompts fed."""
    state = self.empty(prompts)
    return self.admit(self.params, state, jnp.ones((self.batch,), bool),
                      jax.tree.map(jnp.array, state.context))

  def step_s(self, steps: int) -> float:
    """Returns seconds a round; caches hold zeros, which costs the same."""
    times = []
    for _ in range(4):
      state = jax.block_until_ready(self.empty([(1, 2, 3)] * self.batch))
      times.append(setup.timed(
          self.run, self.params, state, np.int32(steps))[0] / steps)
    return float(np.median(times[1:]))


@dataclasses.dataclass
class Runner:
  """What is compared: a program, and how its state comes about."""

  program: Program
  source: Program  # feeds the prompts
  controller: Any = None

  def state(self, prompts):
    """Returns a state ready to decode."""
    state = self.source.fed(prompts)
    if self.controller is not None:  # the drafter's state, and its own
      width = self.program.engine.drafter.num_draft
      state = state.replace(drafter={
          'inner': state.drafter,
          'control': self.controller.empty(len(prompts), width)})
    return jax.block_until_ready(state)

  def settle(self, prompts, tokens: int) -> None:
    """Chooses the rounds that cover about `tokens` a row; warms up."""
    program = self.program
    program.rounds = max(tokens // 4, 1)
    _, got, _ = self(prompts)
    per_round = got / (len(prompts) * program.rounds)
    program.rounds = max(1, round(tokens / per_round))

  def __call__(self, prompts) -> tuple[float, int, int]:
    """Returns seconds, new tokens of all rows, rounds."""
    state = self.state(prompts)
    before = int(state.context.length.sum())
    seconds, state = setup.timed(
        self.program.run, self.program.params, state,
        np.int32(self.program.rounds))
    return (seconds, int(state.context.length.sum()) - before,
            int(state.context.rounds.max()))


def narrow(drafter: Any, width: int) -> Any:
  """Returns the drafter at a width; at 0 what keeps it up to date."""
  return drafter.idle() if width == 0 else drafter.narrow(width)


def fitted(ratio: dict[int, float]) -> control.Tracking:
  """Returns `Tracking` with the costs of a straight line through widths."""
  slope, level = np.polyfit(*zip(*ratio.items(), strict=True), 1) if (
      len(ratio) > 1) else (0.0, *ratio.values())
  return control.Tracking(
      draft_cost=max(float(slope), 0.0), verify_cost=max(float(level), 0.1))


class Bench:
  """One batch size: first what rounds cost, then the comparison."""

  def __init__(self, model, drafter, params, batch: int, args):
    """Prepares the programs of the first part."""
    self.batch, self.args, self.params = batch, args, params
    self.drafter, self.model = drafter, model
    num = drafter.topology.num_nodes
    self.widths = sorted({0, *args.widths, num})
    self.by_width = {w: self._program(narrow(drafter, w), state_of=drafter)
                     for w in self.widths}
    self.full = self.by_width[num]
    self.plain = self._program(Null(0))
    self.runners: dict[str, Runner] = {}

  def _program(self, drafter, **kwargs) -> Program:
    return Program(self.model, drafter, self.params, self.batch,
                   self.args.size, **kwargs)

  def first(self) -> list[Any]:
    """Returns the compilations that `costs` needs."""
    return [p.compile_run for p in (self.plain, *self.by_width.values())]

  def costs(self) -> dict[str, float]:
    """Returns milliseconds a round, plain and at each width."""
    steps = max(self.args.new_tokens // 4, 1)
    return {'plain': 1e3 * self.plain.step_s(steps)} | {
        str(w): 1e3 * p.step_s(steps) for w, p in self.by_width.items()}

  def second(self, costs: dict[str, float]) -> list[Any]:
    """Makes what is compared; returns the compilations it needs."""
    plain, full = self.plain, self.full
    ratio = {w: costs[str(w)] / costs['plain'] for w in self.widths if w}
    num = self.drafter.topology.num_nodes
    self.runners = {'plain': Runner(plain, plain),
                    'drafter': Runner(full, full)}
    for name, controller in (
        ('tracking', fitted(ratio)),
        ('shared', control.Shared(costs=tuple(ratio.items())))):
      inner = Adaptive(self.drafter, controller, exact_shape=False,
                       widths=tuple(w for w in self.widths if w < num))
      self.runners[name] = Runner(self._program(inner), full, controller)
    programs = [r.program for r in self.runners.values()]
    return [p.compile_run for p in programs if p.run is None] + [
        plain.compile_admit, full.compile_admit]

  def compare(self, groups) -> dict[str, Any]:
    """Measures all of them in turn, on lists of prompts."""
    found: dict[str, list[tuple[float, int, int]]] = {
        name: [] for name in self.runners}
    for runner in self.runners.values():
      runner.settle(groups[0], self.args.new_tokens)
    for _ in range(self.args.repeats):
      for prompts in groups:
        for name, runner in self.runners.items():
          found[name].append(runner(prompts))
    tracking = self.runners['tracking'].controller
    return {
        'draft_cost': tracking.draft_cost,
        'verify_cost': tracking.verify_cost, 'groups': len(groups),
        'runs': {name: summary(rows, found['plain'], self.batch)
                 for name, rows in found.items()}}


def summary(rows, plain, batch: int) -> dict[str, Any]:
  """Returns what is shown of a way of decoding."""
  speed = [t / s for s, t, _ in rows]
  ratios = [(t / s) / (u / v) for (s, t, _), (v, u, _) in zip(
      rows, plain, strict=True)]
  tokens, rounds = (sum(r[i] for r in rows) for i in (1, 2))
  return {
      'speedup': (tokens / sum(s for s, _, _ in rows)) / (
          sum(t for _, t, _ in plain) / sum(s for s, _, _ in plain)),
      'speedup_by_run': setup.spread(ratios),
      'tokens_per_s': setup.spread(speed),
      'tau': tokens / (batch * rounds)}


def groups_of(model, batch: int, args):
  """Returns lists of `batch` prompts; few lists, each of mixed kinds."""
  asked, _ = support.questions(
      model, args.questions, 10**6, [args.size], _ROOM * args.new_tokens)
  order = np.random.default_rng(0).permutation(len(asked))
  prompts = [asked[i].tokens for i in order]
  while len(prompts) < batch:
    prompts = prompts + prompts
  count = min(max(len(prompts) // batch, 1), args.groups)
  return [prompts[i * batch:(i + 1) * batch] for i in range(count)]


def draw(data: dict[str, Any], path: pathlib.Path) -> None:
  """Draws speed-ups by batch size; whiskers span the runs."""
  figure, axes = new_figure(7.0)
  sections = {int(b): s['runs'] for b, s in data['sections'].items()}
  batches = sorted(sections)
  for number, name in enumerate(n for n in sections[batches[0]]
                                if n != 'plain'):
    rows = [sections[b][name] for b in batches]
    mean = np.array([r['speedup'] for r in rows])
    spread = [r['speedup_by_run'] for r in rows]
    axes.errorbar(
        batches, mean, [np.maximum(mean - [s['min'] for s in spread], 0),
                        np.maximum([s['max'] for s in spread] - mean, 0)],
        marker=MARKERS[number], color=COLOURS[number], label=name,
        capsize=3)
  axes.axhline(1.0, color='black', linestyle='--', linewidth=1.2)
  axes.set_xscale('log', base=2)
  axes.set_xticks(batches, [str(b) for b in batches])
  axes.set_xlabel('batch size (sequences decoded at once)')
  axes.set_ylabel('speed-up over plain decoding (×)')
  finish(figure, axes, f'{data["setting"]["target"]} on {data["device"]}\n'
          'Tokens a second against plain decoding; whiskers: range', path)


def parse(arguments=None) -> argparse.Namespace:
  """Returns the options."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True)
  parser.add_argument('--target', default='smollm2-135m-instruct')
  parser.add_argument('--drafter', required=True, help="a folder, or 'tiny'")
  parser.add_argument('--config', default='{}', help='JSON: its shape')
  parser.add_argument('--questions', default='')
  parser.add_argument('--batches', default='1,2,4,8,16,32,64')
  parser.add_argument('--widths', default='4', help='beside 0 and the full')
  parser.add_argument('--groups', type=int, default=8)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--new_tokens', type=int, default=128)
  parser.add_argument('--max_prompt', type=int, default=384)
  parser.add_argument('--threads', type=int, default=14)
  args = parser.parse_args(arguments)
  args.widths = [int(w) for w in args.widths.split(',') if w]
  args.batches = [int(b) for b in args.batches.split(',')]
  args.size = args.max_prompt + _ROOM * args.new_tokens
  return args


def main(arguments=None) -> None:
  """Runs the program."""
  args = parse(arguments)
  model = support.load(args.target)
  drafter, params = support.build(
      model, {**json.loads(args.config), 'method': 'draft_head',
              'model': '{dir}'}, args.drafter)
  if isinstance(drafter, ChainLM):
    drafter = drafter.resyncing()
  done = support.record(args.out, {
      name: getattr(args, name) for name in (
          'target', 'config', 'widths', 'groups', 'repeats', 'new_tokens',
          'max_prompt')} | {'dtype': model.lm.config.dtype})
  sections = done.data['sections']
  benches = [Bench(model, drafter, params, batch, args)
             for batch in args.batches if str(batch) not in sections]
  # All at once: nothing is compiled while something is timed.
  support.compile_all(
      [job for bench in benches for job in bench.first()], args.threads)
  costs = {bench.batch: bench.costs() for bench in benches}
  support.compile_all(
      [job for bench in benches for job in bench.second(costs[bench.batch])],
      args.threads)
  for bench in benches:
    done.add(str(bench.batch), {
        'round_ms': costs[bench.batch],
        **bench.compare(groups_of(model, bench.batch, args))})
    draw(done.data, done.path.with_name('batch_curve.png'))


if __name__ == '__main__':
  sys.exit(cli.reported(main))
