"""What `sample.latents_sweep` compares: ways of decoding continuous tokens.

A point is a drafter, a rule, how far ahead denoising steps are guessed, and a
scale of guidance. Plain decoding is the first of every scale: ratios are over
it.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Collection, Iterator
import dataclasses
import itertools
from typing import Any

from sample import judging, sweeps
from specjax.verify import CSpD, PathExact

RULES: dict[str, Any] = {
    'path_exact': PathExact(), 'path_exact, last 10': PathExact(10),
    'path_exact, last step': PathExact(1), 'cspd': CSpD(),
    'cspd, not aligned': CSpD(align=False),
    'cspd, 42': CSpD(inner_temperature=42.0)}


@dataclasses.dataclass(frozen=True)
class Point:
  """A way of decoding.

  Attributes:
    drafter: its name; '' for none.
    rule: a key of `RULES`. num_draft: K. prefill: share of the tokens.
    guidance: scale. iterations: of plain decoding, 0 for one a token.
    ahead: denoising steps that are guessed, see `host.mar.changed`.
    steps: 'name=value,...', fields of the denoising steps that are another
      target's: of plain decoding.
  """

  drafter: str = ''
  rule: str = 'path_exact'
  num_draft: int = 0
  prefill: float = 0.0
  guidance: float = 1.0
  iterations: int = 0
  ahead: int = 0
  steps: str = ''

  @property
  def key(self) -> str:
    """A name that is unique in a sweep."""
    more = [f'{self.iterations} iterations'] * bool(self.iterations)
    more += [f'{self.ahead} steps ahead'] * bool(self.ahead)
    more += [self.steps] * bool(self.steps)
    if not self.drafter:
      return f'{", ".join(["plain", *more])}; guidance={self.guidance:g}'
    return (f'{", ".join([self.drafter, *more])}; {self.rule}; '
            f'K={self.num_draft}; prefill={self.prefill:g}; '
            f'guidance={self.guidance:g}')

  @property
  def is_plain(self) -> bool:
    """Whether this is what others are compared with."""
    return self == Point(guidance=self.guidance)

  @property
  def changes(self) -> dict[str, Any]:
    """What `host.mar.changed` is told."""
    return {'ahead': self.ahead, **fields(self.steps)}


def fields(text: str) -> dict[str, Any]:
  """Returns the fields that 'name=value,...' gives.

  Raises:
    ValueError: it is not of that form.
  """
  found = {}
  for part in text.split(',') if text else ():
    name, _, value = part.partition('=')
    try:
      found[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      found[name] = value
    if not value:
      raise ValueError(f'--steps: {part!r} is not name=value')
  return found


def points(
    args: argparse.Namespace, drafters: Collection[str], length: int,
    has_iterations: bool,
) -> Iterator[Point]:
  """Yields the points, plain decoding first at every scale.

  Args:
    args: the options. drafters: names. length: tokens of an image.
    has_iterations: whether the target decodes several tokens at a time.
  """
  for guidance in args.guidance:
    yield Point(guidance=guidance)
    for steps in args.steps:
      yield Point(guidance=guidance, steps=steps)
    for ahead in args.ahead:
      if ahead:
        yield Point(guidance=guidance, ahead=ahead)
    for number in args.iterations if has_iterations else ():
      if number <= length:
        yield Point(guidance=guidance, iterations=number)
    for row in itertools.product(
        drafters, args.rules, args.num_draft, args.prefill):
      for ahead in args.ahead:
        yield Point(*row, guidance, ahead=ahead)


def is_judged(point: Point, args: argparse.Namespace) -> bool:
  """Whether the distance of a point's images is taken."""
  return not point.drafter or (
      point.rule in args.judged and point.num_draft == max(args.num_draft)
      and point.prefill == args.prefill[0] and point.ahead == args.ahead[0])


def parse(arguments=None) -> argparse.Namespace:
  """Returns the options.

  Raises:
    ValueError: options that cannot be run.
  """
  parser = argparse.ArgumentParser(
      description='Continuous drafts: what is kept, how fast, whose law.')
  sweeps.add_flags(
      parser, batch_size=512, repeats=3, batches=[1, 8, 128], guidance=[1.0])
  parser.add_argument('--target', required=True, help="or 'random'")
  parser.add_argument('--tokenizer', default='')
  parser.add_argument('--drafters', default='', help='name=folder, by commas')
  judging.add_flags(parser)
  parser.add_argument('--few', type=int, default=3200,
                      help='samples of points that are not judged')
  parser.add_argument('--num_draft', type=sweeps.numbers(int),
                      default=[4, 8, 16])
  parser.add_argument('--prefill', type=sweeps.numbers(float), default=[0.05])
  parser.add_argument('--iterations', type=sweeps.numbers(int),
                      default=[32, 16])
  parser.add_argument('--ahead', type=sweeps.numbers(int), default=[0, 4],
                      help='denoising steps that are guessed ahead')
  several: Any = dict(type=lambda text: [x for x in text.split(';') if x])
  parser.add_argument('--steps', **several, default=[], help=(
      'other denoising steps of plain decoding, name=value,... by '
      'semicolons: last_noise=False;first=None'))
  parser.add_argument('--rules', **several, help='by semicolons', default=[
      'path_exact', 'path_exact, last step', 'cspd', 'cspd, not aligned'])
  parser.add_argument('--judged', **several, help='by semicolons',
                      default=['path_exact', 'cspd'])
  args = parser.parse_args(arguments)
  sweeps.check(args)
  given = args.drafters or ('self=random' if args.target == 'random' else '')
  args.drafters = dict(x.split('=', 1) for x in given.split(',') if x)
  for name in ('num_draft', 'prefill', 'ahead', 'rules'):
    if not getattr(args, name):
      raise ValueError(f'--{name}: give at least one')
  for name in ('rules', 'judged'):
    unknown = sorted(set(getattr(args, name)) - set(RULES))
    if unknown:
      raise ValueError(f'--{name}: {unknown[0]!r} is unknown; known are '
                       f'{"; ".join(RULES)}')
  for steps in args.steps:
    fields(steps)
  return args
