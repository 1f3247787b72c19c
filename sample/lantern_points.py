"""What `sample.lantern_sweep` compares: ways of decoding image codes.

A point is a drafter, a rule, a temperature and a scale of guidance. Plain
decoding is the first of every temperature and scale: ratios are over it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import dataclasses
import json
from typing import Any

# Stands for the smaller decoder in the configuration of a drafter.
DRAFTER = '{drafter}'


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
      rows = [('plain', '', None, 'auto', {}), *_drafted(args),
              *_training_free(args)]
      out.extend(Point(*row, temperature, guidance) for row in rows)
  return out


def _drafted(args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
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


def _training_free(args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
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
