"""The exact law of what a rule emits in one round, as coded.

All drafts are written out with their probabilities, and the noise of the rule
is divided into boxes in which it decides alike (`cells`); nothing about the
rule is derived anew. What it emits is completed with the target's own
conditionals to D + 1 tokens, and the joint law is compared with the target's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from specjax.certificates import cells as cells_lib
from specjax.certificates import enumeration, problems
from specjax.certificates.cells import NotEnumerable, Seen
from specjax.certificates.noise import Runner
from specjax.certificates.problems import Problem
from specjax.core import types
from specjax.core.tree import Topology

_MAX_DRAFTS = 200_000
# Drafts explored together: bounds memory.
_TOGETHER = 2048
# What bisection and float32 laws may lose of a total probability of 1.
_MASS = 1e-5


@dataclasses.dataclass(frozen=True)
class Found:
  """What enumeration found, per problem.

  Attributes:
    law: f64[P,V^(D+1)], joint law of the tokens emitted and completed.
    target: the same of the target.
    num_accepted: f64[P], expected. excess: f64[P], expected, as reported.
    forbidden: some noise (0 included) emits a token of target probability 0.
  """

  law: np.ndarray
  target: np.ndarray
  num_accepted: np.ndarray
  excess: np.ndarray
  forbidden: bool

  @property
  def error(self) -> float:
    """Largest difference of a probability."""
    return float(np.abs(self.law - self.target).max())

  @property
  def tv(self) -> np.ndarray:
    """Total variation f64[P] between the two laws."""
    return 0.5 * np.abs(self.law - self.target).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class ExactRow:
  """A line of a table of certificates.

  Attributes:
    rule, topology, kind, options: what was enumerated, in words.
    vocab_size: V. num_problems: P. error, tv: largest over the problems.
    num_accepted: expected accepted drafts, mean over the problems.
    forbidden: see `Found`. passed: lossless rules: within the tolerance and
      nothing forbidden; lossy ones: no further off than they report.
    note: which of the two, or empty.
  """

  rule: str
  topology: str
  kind: str
  options: str
  vocab_size: int
  num_problems: int
  error: float
  tv: float
  num_accepted: float
  forbidden: bool
  passed: bool
  note: str


def certify_rule(
    rule: Any, *, topology: Topology, kind: int | tuple[int, ...],
    vocab_size: int, num_problems: int = 4, seed: int = 0,
    options: problems.Options | None = None, cut: float = 0.0,
    params: Any = None, tolerance: float = 2e-6,
) -> ExactRow:
  """Compares the law of a rule with the target's on random problems.

  Args:
    rule: a `Verifier`. topology: static.
    kind: how slots are chosen (`core.types`), one for all or one for each.
    vocab_size: V >= 2. num_problems: P. seed: of their logits.
    options: columns [P], as `problems.random_problem`.
    cut: chance that a node's children are not all drafted.
    params: `Models.verifier`.
    tolerance: largest difference of a probability that passes.

  Raises:
    ValueError: the rule refuses such drafts.
    NotEnumerable: it cannot be enumerated: sample.
  """
  kinds = problems.kinds_of(topology, kind)
  modes = tuple(sorted(set(kinds)))
  rule.check(topology, modes, vocab_size, params)
  problem = problems.random_problem(
      topology, kinds, vocab_size, num_problems=num_problems, seed=seed,
      options=options, cut=cut)
  row = certify_problem(rule, problem, params, tolerance)
  if cut:
    return dataclasses.replace(row, options=f'{row.options}, cut {cut:g}')
  return row


def certify_problem(
    rule: Any, problem: Problem, params: Any = None, tolerance: float = 2e-6
) -> ExactRow:
  """Compares the law of a rule with the target's on given problems.

  Args and errors: see `certify_rule`; the rule is not asked whether it
  accepts such drafts.
  """
  found = exact_law(rule, problem, params)
  passed, note = found.error <= tolerance and not found.forbidden, ''
  if rule.lossy:
    passed = bool((found.tv <= found.excess + tolerance).all())
    note = 'lossy: passes when the distortion is at most the reported excess'
  return ExactRow(
      rule=rule.name, topology=describe(problem.topology),
      kind='+'.join(types.MODE_NAMES[m] for m in sorted(set(problem.kinds))),
      options=', '.join(sorted(problem.options)) or 'greedy',
      vocab_size=problem.vocab_size, num_problems=problem.size,
      error=found.error, tv=float(found.tv.max()),
      num_accepted=float(found.num_accepted.mean()),
      forbidden=found.forbidden, passed=passed, note=note)


def describe(topology: Topology) -> str:
  """Returns a topology in words: `chain 3`, `tree (2,2)` or its parents."""
  if topology.is_chain:
    return f'chain {topology.num_nodes}'
  assert topology.parents is not None
  widths: list[set[int]] = [set() for _ in range(topology.max_depth)]
  depth = (0,) + topology.depth
  for row, slots in enumerate(topology.children):
    if depth[row] < topology.max_depth:
      widths[depth[row]].add(len(slots))
  if all(len(w) == 1 for w in widths):
    return f'tree ({",".join(str(w.pop()) for w in widths)})'
  return f'tree of parents {",".join(map(str, topology.parents))}'


def exact_law(rule: Any, problem: Problem, params: Any = None) -> Found:
  """Returns the law that a rule emits on every problem.

  Args:
    rule: a `Verifier` that draws only by `core.keys.uniform` and
      `Categorical.sample`. It is not asked whether it accepts such drafts.
    problem: what is drafted and what the target says.
    params: `Models.verifier`.

  Raises:
    NotEnumerable: other randomness, or too many drafts or decisions.
  """
  made = enumeration.drafts(problem)
  if len(made.weight) > _MAX_DRAFTS:
    raise NotEnumerable(f'{len(made.weight)} drafts, more than {_MAX_DRAFTS}')
  run = Runner(rule, problem, made, params)
  parts = []
  for begin in range(0, len(made.weight), _TOGETHER):
    rows = np.arange(begin, min(begin + _TOGETHER, len(made.weight)))
    found, seen = cells_lib.explore(
        run, rows, run.num_uniforms, run.num_draws, problem.vocab_size)
    if any((found.used()[:, i] & found.used()[:, j]).any()
           for i, j in run.shared):
      raise NotEnumerable('the verdict uses the noise of one key twice')
    width, drawn = found.chance(seen.law)
    chance = width * drawn
    mass = np.bincount(found.row - begin, chance, len(rows))
    if np.abs(mass - 1).max() > _MASS:
      raise NotEnumerable(
          f'the boxes of noise have probability {mass.min():.6f}: the law of '
          'a draw depends on noise that came after it')
    chance *= made.weight[found.row] / mass[found.row - begin]
    # A box of width 0 is kept: its noise is a single value, such as u = 0.
    parts.append(_Outcomes(*(x[drawn > 0] for x in (
        made.problem[found.row], chance, seen.tokens, seen.accepted,
        _last_law(found, seen), seen.excess))))
  return _assemble(
      problem, _Outcomes(*(np.concatenate(x) for x in zip(*parts))))


class _Outcomes(NamedTuple):
  """Everything that can happen: m outcomes."""

  problem: np.ndarray  # int[m]
  chance: np.ndarray  # f64[m]
  tokens: np.ndarray  # int[m,D+1]
  accepted: np.ndarray  # int[m], drafts
  last: np.ndarray  # f64[m,V], law of the token after the accepted ones
  excess: np.ndarray  # f32[m]


def _last_law(found: cells_lib.Cells, seen: Seen) -> np.ndarray:
  """Returns f64[m,V]: the law of the final draw, or the token emitted."""
  token = np.take_along_axis(seen.tokens, seen.accepted[:, None], axis=1)
  out = np.eye(seen.law.shape[2])[token[:, 0]]
  drawn = found.final >= 0
  out[drawn] = np.nan_to_num(seen.law[drawn, found.final[drawn]])
  return out


def _assemble(problem: Problem, out: _Outcomes) -> Found:
  """Adds up all outcomes, each completed by the target's conditionals."""
  num, vocab = problem.size, problem.vocab_size
  depth = problem.topology.max_depth
  ref = problems.conditionals(problem)
  follow = _completed(ref, vocab, depth)
  law = np.zeros((num, vocab**(depth + 1)))
  forbidden = False
  index = np.zeros(len(out.accepted), int)
  for n in range(depth + 1):
    at = ref[out.problem, problems.first_prefix(vocab, n) + index]
    here = out.accepted == n
    mass = np.zeros((num, vocab**n, vocab))
    np.add.at(mass, (out.problem[here], index[here]),
              out.chance[here, None] * out.last[here])
    law += (mass.reshape(num, -1, 1) * follow[n + 1]).reshape(num, -1)
    forbidden |= bool(((out.last > 0) & (at == 0))[here].any())
    going = out.accepted > n
    token = np.where(going, out.tokens[:, n], 0)
    taken = at[np.arange(len(token)), token]
    forbidden |= bool((taken == 0)[going].any())
    index = np.where(going, index * vocab + token, 0)
  mean = lambda x: np.bincount(  # noqa: E731
      out.problem, out.chance * x, num)
  return Found(
      law=law, target=follow[0].reshape(num, -1), forbidden=forbidden,
      num_accepted=mean(out.accepted), excess=mean(out.excess))


def _completed(
    law: np.ndarray, vocab_size: int, depth: int
) -> list[np.ndarray]:
  """Returns the law of what follows each prefix, up to D + 1 tokens in all.

  Args:
    law: f64[P,T,V], conditionals.

  Returns:
    A list by prefix length i of 0 to D + 1, f64[P,V^i,V^(D+1-i)].
  """
  num = law.shape[0]
  begin = [problems.first_prefix(vocab_size, i) for i in range(depth + 2)]
  out = [np.ones((num, vocab_size**(depth + 1), 1))]
  for i in range(depth, -1, -1):
    here = law[:, begin[i]:begin[i + 1]]
    rest = out[0].reshape(num, vocab_size**i, vocab_size, -1)
    out.insert(0, (here[..., None] * rest).reshape(num, vocab_size**i, -1))
  return out
