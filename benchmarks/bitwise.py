"""Bitwise losslessness at a fixed block shape, over separate compilations.

  python -m benchmarks.bitwise --out docs/results/h100_bitwise.json
  python -m benchmarks.bitwise --out docs/results/h100_bitwise_again.json \
      --compare docs/results/h100_bitwise.json --widths 7

For each dtype, batch size and K: the null drafter padded to K, a scripted
drafter (the null drafter's text with drafts spoilt at random: every draft
position is accepted and rejected) and prompt lookup decode the same prompts
greedily and by sample-and-match. Tokens and raw log-probabilities (the bits
of the scores) must be equal. The scripted program is compiled a second time,
and `--compare` checks the bits against another process. Exits non-zero when
anything differs.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import itertools
import json
import sys
from typing import Any

import jax
import numpy as np

from benchmarks import setup, support
import specjax
from specjax.core import loop
from specjax.core.types import Models
from specjax.drafters import Lookup, Null, Scripted
from specjax.host import cli, decoder


def keep(width: int) -> float:
  """Returns P(draft is right) so that the last one is reached often."""
  return 0.5 ** (1.5 / width) if width > 1 else 0.5




@dataclasses.dataclass
class Case:
  """One dtype, batch size, K and rule."""

  dtype: str
  batch: int
  width: int
  rule: str


def drafters(width: int) -> dict[str, Any]:
  """Returns the drafters of a case; the reference first."""
  return {'null': Null(width), 'scripted': Scripted(width, keep(width)),
          'lookup': Lookup(width, min(width, 3), 1)}


def prompts(model, batch: int) -> list[list[int]]:
  """Returns ragged prompts, the same for every case."""
  rng = np.random.default_rng(1)
  high = min(model.vocab_size, 40000)
  out = [rng.integers(3, high, 9 + 3 * i).tolist() for i in range(batch)]
  # A repeated stretch, so that lookup finds something.
  return [p + p[-6:] for p in out]


class Program:
  """A compiled run of one drafter in one case."""

  def __init__(self, model, case: Case, drafter: Any, args):
    self.model, self.case, self.args = model, case, args
    self.engine = setup.engine(model.lm, drafter, case.rule)
    self.params = Models(target=model.params)
    self.rounds = np.int32(args.tokens)

  def start(self, script: np.ndarray | None = None):
    """Returns the prefilled state; one admission program for all drafters.

    (None of them keeps a state of its own, so the null drafter's serves.)
    """
    case, args, model = self.case, self.args, self.model
    if script is None:
      script = np.zeros((case.batch, args.size), np.int32)
    temperature = 0.0 if case.rule == 'greedy' else 1.0
    return setup.state(
        setup.engine(model.lm, Null(case.width), case.rule),
        vocab_size=model.vocab_size, batch=case.batch, size=args.size,
        prompts=prompts(model, case.batch), params=self.params, chunk=64,
        log_probs=True, script=script,
        sampling=specjax.Sampling(temperature=temperature))

  def compile(self) -> None:
    """Compiles the rounds; thread-safe."""
    shapes = jax.eval_shape(self.start)
    options: tuple = ()
    if self.args.exact:
      options = decoder.EXACT_OPTIONS.get(jax.default_backend(), ())
    run, _ = loop.compiled(options)
    self.run = run.lower(
        self.engine, self.params, shapes, self.rounds).compile()

  def __call__(self, script: np.ndarray | None = None):
    """Runs; returns what each row says and the bits of its scores."""
    out = self.run(self.params, self.start(script), self.rounds)
    context = out.context
    return jax.device_get({
        'tokens': context.tokens, 'length': context.length,
        'raw': context.log_probs['raw'], 'histogram': out.metrics.histogram,
        'drafted': out.metrics.drafted, 'accepted': out.metrics.accepted})


def compare(a: dict, b: dict, num_prompt: list[int]) -> dict[str, Any]:
  """Counts differing tokens and score bits over what both have said."""
  tokens = scores = compared = 0
  first = None
  for row, start in enumerate(num_prompt):
    end = min(a['length'][row], b['length'][row])
    same = a['tokens'][row, start:end] == b['tokens'][row, start:end]
    bits = (a['raw'][row, start:end].view(np.int32)
            == b['raw'][row, start:end].view(np.int32))
    tokens += int((~same).sum())
    scores += int((~bits).sum())
    compared += int(end - start)
    if not same.all() and first is None:
      first = [row, int(np.argmin(same))]
  return {'compared': compared, 'token_differences': tokens,
          'score_bit_differences': scores, 'first': first}


class Trial:
  """All programs of a case: reference, drafters, one of them twice."""

  def __init__(self, model, case: Case, args, pool):
    self.model, self.case, self.tokens = model, case, args.tokens
    names = drafters(case.width)
    self.programs = {n: Program(model, case, d, args)
                     for n, d in names.items()}
    self.programs['scripted_again'] = Program(
        model, case, names['scripted'], args)
    self.jobs = [pool.submit(p.compile) for p in self.programs.values()]

  def run(self) -> dict[str, Any]:
    """Returns the case's row of the record."""
    for job in self.jobs:
      job.result()
    want = self.programs.pop('null')()
    lengths = [len(p) for p in prompts(self.model, self.case.batch)]
    row: dict[str, Any] = dataclasses.asdict(self.case)
    digest = hashlib.sha256()
    for i, start in enumerate(lengths):  # what every drafter has reached
      end = start + self.tokens
      digest.update(want['tokens'][i, start:end].tobytes())
      digest.update(want['raw'][i, start:end].tobytes())
    row['digest'] = digest.hexdigest()
    for name, program in self.programs.items():
      got = program(want['tokens'])
      one = compare(want, got, lengths)
      drafted, accepted = got['drafted'].sum(0), got['accepted'].sum(0)
      reached = np.minimum(
          drafted, np.concatenate([drafted[:1], accepted[:-1]]))
      one['accepted_by_position'] = accepted.tolist()
      one['rejected_by_position'] = (reached - accepted).tolist()
      row[name] = one
    return row


def verdict(row: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
  """Returns what is wrong with a row; empty when all bits agree."""
  wrong = []
  for name, one in row.items():
    if not isinstance(one, dict):
      continue
    if one['token_differences'] or one['score_bit_differences']:
      wrong.append(f'{name}: {one}')
    if name.startswith('scripted') and not (
        all(one['accepted_by_position']) and all(one['rejected_by_position'])):
      wrong.append(f'{name}: a draft position was never tested: {one}')
  if before is not None and before['digest'] != row['digest']:
    wrong.append('another process computed other bits')
  return wrong


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('--out', required=True)
  parser.add_argument('--target', default='smollm2-135m-instruct')
  parser.add_argument('--dtypes', default='bfloat16,float32')
  parser.add_argument('--batches', default='1,4,8')
  parser.add_argument('--widths', default='1,3,7,15')
  parser.add_argument('--rules', default='greedy')
  parser.add_argument('--tokens', type=int, default=256)
  parser.add_argument('--size', type=int, default=320)
  parser.add_argument('--threads', type=int, default=8)
  parser.add_argument('--compare', default='',
                      help='record of another process: bits must agree')
  parser.add_argument('--exact', action='store_true')
  args = parser.parse_args()
  record = setup.Record(args.out)
  before = {}
  if args.compare:
    with open(args.compare, encoding='utf-8') as file:
      for row in json.load(file)['sections']['bitwise']['cases']:
        before[row['dtype'], row['rule'], row['batch'], row['width']] = row
  rows: list[dict[str, Any]] = []
  failures = 0
  with ThreadPoolExecutor(args.threads) as pool:
    for dtype in args.dtypes.split(','):
      model = support.load(args.target, dtype)
      trials = [
          Trial(model, Case(dtype, batch, width, rule), args, pool)
          for rule, batch, width in itertools.product(
              args.rules.split(','), map(int, args.batches.split(',')),
              map(int, args.widths.split(',')))]
      for trial in trials:
        row = trial.run()
        c = trial.case
        wrong = verdict(row, before.get(
            (c.dtype, c.rule, c.batch, c.width)))
        rows.append(row)
        failures += bool(wrong)
        print(c, 'EQUAL' if not wrong else f'DIFFERENT {wrong}', flush=True)
        record.data['sections']['bitwise'] = {
            'exact_options': args.exact, 'tokens': args.tokens,
            'compared_with': args.compare, 'failures': failures,
            'cases': rows}
        record.save()
  return int(failures > 0)


if __name__ == '__main__':
  sys.exit(cli.reported(main))
