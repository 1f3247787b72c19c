"""`specjax.certify`: a certificate for one's own rule or drafter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from specjax import verify
from specjax.certificates import jobs as jobs_lib
from specjax.certificates import toys
from specjax.certificates.exact import describe
from specjax.certificates.jobs import Exact, Job, Sampled
from specjax.certificates.report import Certificate
from specjax.certificates.setting import Setting
from specjax.core import topologies, tree
from specjax.core.tree import Topology
from specjax.core.types import (
  IID,
  MATCH,
  MODE_NAMES,
  POINT,
  TOP_PLUS_ONE,
  WITHOUT_REPLACEMENT,
)
from specjax.drafters import ChainLM, TreeLM

# How a small model draws drafts of each kind.
METHODS = {
    IID: 'iid', WITHOUT_REPLACEMENT: 'without_replacement',
    TOP_PLUS_ONE: 'top_plus_one', POINT: 'top_k', MATCH: 'coupled'}
# Enumeration grows as V^N: no more tokens than this.
_MOST_TOKENS = 3


def certify(
    rule: Any, drafter: Any = None, *,
    topology: Topology | Sequence[Topology] | None = None,
    kinds: Sequence[int | str] | None = None, params: Any = None,
    drafter_params: Any = None, vocab_size: int = 4, full: bool = False,
    seed: int = 0,
) -> Certificate:
  """Compares the law of what a rule emits with the target's.

  By enumeration where its decisions can be enumerated, and by texts of the
  compiled loop in any case: rows of several temperatures, filters, penalties,
  end tokens and limits side by side.

  Args:
    rule: a `verify.Rule` (a frozen dataclass), or the name of one. A rule
      that says `lossy` passes when texts are no further off than the
      `excess` that it reports.
    drafter: None drafts with a toy model in each way that the rule takes;
      else this one is used, and nothing is enumerated.
    topology: static shapes of drafts, N >= 1; None is a chain of 3 and, if
      the rule walks trees, the tree (2, 1). Not with a drafter.
    kinds: of drafts (`core.types`, by name or number); None is all that the
      rule takes. Not with a drafter.
    params: arrays of the rule, `Models.verifier`.
    drafter_params: of `drafter`, `Models.drafter`; None is the parameters of
      a `certificates.toys.ToyLM` of `vocab_size` tokens.
    vocab_size: V >= 3; texts are shorter for a larger one. Exact rows use no
      more than 3 tokens, or V where `params` is given (arrays may depend on
      it).
    full: ten times as many texts, four times as many problems.
    seed: of everything.

  Returns:
    A certificate: `passed`, `rows`, `table()`, `to_dict()`. A rule that
    raises while it runs has failing rows, which say why.

  Raises:
    ValueError: nothing could be certified: an argument is out of range, or
      the rule refuses all drafts that were asked for.
  """
  if isinstance(rule, str):
    rule = verify.get(rule)
  if drafter is not None:
    if topology is not None or kinds is not None:
      raise ValueError('a drafter comes with its topology and kinds')
    rule.check(drafter.topology, drafter.modes, vocab_size, params)
    grid: list[Job] = [Sampled(
        type(drafter).__name__, drafter, (rule,), Setting(vocab_size), params,
        drafter_params)]
  else:
    grid = list(_grid(rule, _topologies(rule, topology), _modes(rule, kinds),
                      params, vocab_size))
  if not grid:
    raise ValueError(f'rule {jobs_lib.label(rule)!r} refuses all of these '
                     'topologies and kinds of drafts')
  rows = jobs_lib.run(grid, seed=seed, full=full)
  return Certificate(rows, {
      'rule': jobs_lib.label(rule), 'seed': seed,
      'form': 'full' if full else 'short', 'vocab_size': vocab_size})


def _grid(
    rule: Any, shapes: Sequence[Topology], modes: Sequence[int], params: Any,
    vocab_size: int,
) -> Iterator[Job]:
  """Yields the jobs of every combination that the rule takes."""
  model, setting = toys.ToyLM(vocab_size), Setting(vocab_size)
  few = vocab_size if params else min(vocab_size, _MOST_TOKENS)
  for shape in shapes:
    for mode in modes:
      try:
        rule.check(shape, (mode,), vocab_size, params)
      except ValueError:
        continue
      if mode != MATCH:  # its drafts and its verification share noise
        yield Exact(rule, shape, mode, few, params, may_skip=True)
      drafter: Any = TreeLM(shape, model, METHODS[mode])
      if shape.is_chain and mode == IID:
        drafter = ChainLM(shape.num_nodes, model)
      yield Sampled(f'{describe(shape)} {MODE_NAMES[mode]}', drafter, (rule,),
                    setting, params, closed_form=True)


def _topologies(rule: Any, given: Any) -> Sequence[Topology]:
  if given is not None:
    return (given,) if isinstance(given, Topology) else tuple(given)
  if getattr(rule, 'chains_only', False):
    return (tree.chain(3),)
  return tree.chain(3), topologies.branching((2, 1))


def _modes(rule: Any, kinds: Sequence[int | str] | None) -> Sequence[int]:
  """Returns kinds of drafts as numbers."""
  if kinds is None:
    return tuple(getattr(rule, 'modes', METHODS))
  names = list(MODE_NAMES)
  bad = [k for k in kinds if k not in names and k not in METHODS]
  if bad:
    raise ValueError(f'kinds={bad}: known are {", ".join(names)}')
  return tuple(names.index(k) if isinstance(k, str) else k for k in kinds)
