"""What `sample.lantern_sweep` compares: ways of decoding image codes.

A point is a drafter, a rule, a temperature and a scale of guidance. Plain
decoding is the first of every temperature and scale: ratios are over it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import dataclasses
import json
from typing import Any, TypeAlias

from sample import judging, sweeps

# Stands for the smaller decoder in the configuration of a drafter.
DRAFTER = '{drafter}'
# The first fields of a point.
_Row: TypeAlias = tuple[str, str, Any, str, Any]


@dataclasses.dataclass(frozen=True)
class Point:
  """One way of decoding.

  Attributes:
    family: of the figure: 'plain', 'exact', 'LANTERN', ...
    label: what tells it from others of its family.
    drafting: a speculative configuration, None for none.
    verify: the rule's name. options: its fields, without the codebook.
    temperature: 0 is greedy. guidance: scale, 1 is off.
  """

  family: str
  label: str
  drafting: dict[str, Any] | None
  verify: str
  options: dict[str, Any]
  temperature: float
  guidance: float

  @property
  def key(self) -> str:
    """A name that is unique in a sweep."""
    return (f'{self.family}; {self.label}; T={self.temperature:g}; '
            f'guidance={self.guidance:g}')

  @property
  def reads_codebook(self) -> bool:
    """Whether the rule knows which codes look alike."""
    return self.verify == 'lantern'


def points(args: argparse.Namespace, num_codes: int) -> list[Point]:
  """Returns the points of a sweep, plain decoding first.

  Args:
    args: the options of `sample.lantern_sweep`; without a `drafter` all
      drafts are Jacobi's.
    num_codes: V; rules with more neighbours than V - 1 are refused.

  Raises:
    ValueError: `--neighbours` that the codebook does not have.
  """
  bad = [k for k in args.neighbours if not 1 <= k < num_codes]
  if bad:
    raise ValueError(f'--neighbours={bad[0]}: a codebook of {num_codes} '
                     f'entries allows 1 to {num_codes - 1}')
  out: list[Point] = []
  for guidance in args.guidance:
    for temperature in args.temperatures:
      rows: list[_Row] = [
          ('plain', '', None, 'auto', {}), *_drafted(args),
          *_training_free(args)]
      out.extend(Point(*row, temperature, guidance) for row in rows)
  return out


def _drafted(args: argparse.Namespace) -> Iterator[_Row]:
  """Yields the rows of a drafter that was trained, if there is one."""
  if not args.drafter:
    return
  chain = {'model': DRAFTER, 'num_speculative_tokens': args.num_draft}
  tree = {'model': DRAFTER, 'speculative_token_tree': args.tree,
          'draft_sample_method': 'without_replacement'}
  exact = f'chain of {args.num_draft}'
  yield 'exact', exact, chain, 'speculative', {}
  yield 'exact', f'tree {args.tree}', tree, 'speculative', {}
  for k in args.neighbours:
    for delta in args.delta:
      yield ('LANTERN', f'k={k}, delta={delta:g}', chain, 'lantern',
             {'num_neighbours': k, 'delta': delta})
    for lam in args.lam:
      yield ('LANTERN++', f'k={k}, lambda={lam:g}', tree, 'lantern',
             {'num_neighbours': k, 'lam': lam})


def _training_free(args: argparse.Namespace) -> Iterator[_Row]:
  """Yields the rows of Jacobi's drafts."""
  window = {'method': 'jacobi', 'num_speculative_tokens': args.window}
  coupled = {**window, 'redraft': 'coupled'}
  yield 'SJD', f'window of {args.window}', window, 'speculative', {}
  yield 'SJD', 'coupled', coupled, 'speculative', {}
  for group in args.group:
    yield ('GSD', f'G={group}', window, 'grouped', {'group': group})
  for k in args.neighbours:
    for delta in args.delta:
      yield ('SJD, LANTERN', f'k={k}, delta={delta:g}', coupled, 'lantern',
             {'num_neighbours': k, 'delta': delta})


def describe(point: Point) -> dict[str, Any]:
  """Returns JSON values that say what a point is."""
  return json.loads(json.dumps(dataclasses.asdict(point)))


def parse(arguments=None) -> argparse.Namespace:
  """Returns the options."""
  parser = argparse.ArgumentParser(
      description='Quality against speed of image decoding.')
  sweeps.add_flags(
      parser, batch_size=250, repeats=8, batches=[1], guidance=[1.0, 2.0])
  parser.add_argument('--target', required=True, help="or 'random'")
  parser.add_argument('--tokenizer', default='')
  parser.add_argument('--drafter', default='',
                      help='a smaller decoder, or a trained drafter')
  parser.add_argument('--dtype', default=None)
  judging.add_flags(parser)
  parser.add_argument('--neighbours', type=sweeps.numbers(int),
                      help='default: 10,100; of random models 3')
  parser.add_argument('--delta', type=sweeps.numbers(float),
                      default=[0.05, 0.1, 0.2, 0.4])
  parser.add_argument('--lam', type=sweeps.numbers(float), default=[2.0, 5.0])
  parser.add_argument('--group', type=sweeps.numbers(int), default=[14])
  parser.add_argument('--temperatures', type=sweeps.numbers(float),
                      default=[1.0])
  parser.add_argument('--num_draft', type=int, default=5)
  parser.add_argument('--tree', default='branching:4,2,2,1')
  parser.add_argument('--window', type=int, default=16)
  args = parser.parse_args(arguments)
  if args.neighbours is None:
    args.neighbours = [3] if args.target == 'random' else [10, 100]
  return args


def check(args: argparse.Namespace) -> None:
  """Raises ValueError for options that cannot be run."""
  sweeps.check(args)
  for name in ('window', 'num_draft'):
    if getattr(args, name) < 1:
      raise ValueError(f'--{name}={getattr(args, name)}: must be >= 1')
  if not args.temperatures:
    raise ValueError('--temperatures: give at least one')
