"""Training's acceptance and decoding's, of a saved drafter on real text.

  python -m benchmarks.gap --target smollm2-135m-instruct \
      --drafter checkpoints/smollm2-135m-instruct-dspark \
      --questions spec_bench_dev.jsonl --num_questions 8 --new_tokens 64 \
      --out docs/results/gap.json

The target's own texts are decoded with the drafter, greedily or at
temperature 1, and judged by the training code where rounds began
(`distill.gap`). `--dtype float32` leaves nothing but the code to differ; in
bfloat16 the two programs round differently.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from benchmarks import support
from specjax.core.types import Models
from specjax.distill import gap
from specjax.distill.blocks import BlockTask
from specjax.distill.eagle import EagleTask
from specjax.distill.medusa import HeadsTask
from specjax.drafters import Lattice
from specjax.host import cli
from specjax.host import drafter as drafter_lib
from specjax.models import trained


def task_of(loaded: drafter_lib.Loaded) -> Any:
  """Returns the task that trained a saved drafter.

  Raises:
    ValueError: a drafter that reads no states of the target.
  """
  model = getattr(loaded.source, 'model', None)
  family = trained.family(model)
  if family == 'block':
    return BlockTask(model)
  if family == 'heads':
    return HeadsTask(model)
  if family == 'eagle':
    return EagleTask(model, steps=loaded.num_draft)
  raise ValueError(f'{loaded.facts.get("kind")}: reads no states of the '
                   'target, so that training has nothing else to see')


def table(found: gap.Gap) -> str:
  """Returns one line a depth."""
  lines = ['depth  drafts  training  decoding  difference  2 errors  '
           'accepted  all places  largest']
  for k in range(len(found.difference)):
    lines.append(
        f'{k + 1:5d}  {found.decoded.number[k]:6.0f}  '
        f'{found.forced.mean[k]:8.4f}  {found.decoded.mean[k]:8.4f}  '
        f'{found.difference[k]:+10.4f}  {2 * found.error[k]:8.4f}  '
        f'{found.accepted.mean[k]:8.4f}  {found.everywhere.mean[k]:10.4f}  '
        f'{found.largest[k]:7.4f}')
  return '\n'.join(lines)


def main(arguments=None) -> None:
  """Runs the program."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--target', required=True)
  parser.add_argument('--drafter', required=True)
  parser.add_argument('--questions', default='')
  parser.add_argument('--num_questions', type=int, default=8)
  parser.add_argument('--new_tokens', type=int, default=64)
  parser.add_argument('--most_tokens', type=int, default=512)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--temperatures', type=float, nargs='+',
                      default=[0.0, 1.0])
  parser.add_argument(
      '--num_candidates', type=int, default=0,
      help='decode with a lattice of that many, as configurations do by '
      'default:\nan approximation, which is to show; 0: token by token')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', required=True)
  args = parser.parse_args(arguments)
  model = support.load(args.target, args.dtype)
  loaded = support.drafter(model, args.drafter)
  task = task_of(loaded)
  drafter = None
  if args.num_candidates:
    drafter = Lattice(loaded.source, args.num_candidates)
  asked = [list(q.tokens) for q in support.questions(
      model, args.questions, args.num_questions, [args.most_tokens], 0)[0]]
  done = support.record(args.out, {
      **{name: getattr(args, name) for name in (
          'target', 'dtype', 'new_tokens', 'most_tokens', 'num_candidates',
          'seed')},
      'num_prompts': len(asked), 'kind': loaded.facts.get('kind')})
  params = Models(
      target=model.params, drafter=loaded.params)
  for temperature in args.temperatures:
    begin = time.perf_counter()
    found = gap.measure(
        task, model.lm, params, asked, new_tokens=args.new_tokens,
        temperature=temperature, eos=model.eos, drafter=drafter,
        seed=args.seed, chunk=min(128, model.lm.chunk))
    seconds = time.perf_counter() - begin
    print(f'temperature {temperature:g}: {found.rounds} rounds, '
          f'{found.tokens} tokens, {seconds:.0f} s; '
          + ('no gap' if found.closed() else 'GAP'))
    print(table(found), flush=True)
    done.add(f'T={temperature:g}', found.to_dict())


if __name__ == '__main__':
  sys.exit(cli.reported(main))
