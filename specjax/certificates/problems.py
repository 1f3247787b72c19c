"""Small decoding problems whose drafts can all be written out.

A problem is P pairs of context-dependent laws over V tokens: one row of
logits after every prefix of up to D drafted tokens. `enumeration.drafts`
lists all token tuples that a drafter could propose.

Letters: P problems, N drafted slots, D depth, V tokens, T prefixes of at most
D tokens, ordered by length, then as numbers in base V.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from specjax.certificates import reference
from specjax.core import law as law_lib
from specjax.core import pipeline, types
from specjax.core.tree import Topology

# Text before the drafts, for penalties to look at.
PROMPT, OUTPUT = [1, 0], [1]

Law = law_lib.Law
LawMaker = Callable[[types.Context, Any, Any], Law]
Options = dict[str, np.ndarray]
# The law that a target decodes by.
PIPELINE = jax.jit(pipeline.law)


@dataclasses.dataclass(frozen=True)
class Problem:
  """P decoding problems for one topology.

  Attributes:
    topology: static, at least one slot.
    kinds: per slot, how it is chosen: IID, WITHOUT_REPLACEMENT, ...
      (`core.types`). The deterministic children of a node are the tokens of
      largest draft logit, in that order (lowest id first on ties).
    target: f32[P,T,V], logits after each prefix of 0 to D tokens.
    draft: f32[P,T',V], logits after each prefix of 0 to D - 1 tokens.
    options: columns [P] of `core.types.Options`, without end tokens.
    limit: int[P,T']: children of a node beyond that many are not drafted.
      Their own children may be: no rule is to get that far.
    same_options: drafts are drawn with the target's options, else from the
      plain softmax, which is as legal.
    states_law: whether the draft comes with a law; without one, all kinds
      must be deterministic.
    is_dynamic: the rule is told parents as an array, not as a constant.
    claimed: what the draft says about `kinds`, if it lies.
    target_law, stated_law: make the target's law, and the law that the draft
      says it was drawn from; other than the defaults only to plant faults.
  """

  topology: Topology
  kinds: tuple[int, ...]
  target: np.ndarray
  draft: np.ndarray
  options: Options
  limit: np.ndarray
  same_options: bool = True
  states_law: bool = True
  is_dynamic: bool = False
  claimed: tuple[int, ...] | None = None
  target_law: LawMaker = PIPELINE
  stated_law: LawMaker | None = None

  @property
  def size(self) -> int:
    """P."""
    return self.target.shape[0]

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.target.shape[2]


def first_prefix(vocab_size: int, length: int) -> int:
  """Returns the number of prefixes shorter than `length` tokens."""
  return sum(vocab_size**i for i in range(length))


def prefixes(vocab_size: int, depth: int) -> list[tuple[int, ...]]:
  """Returns all prefixes of at most `depth` tokens, in table order."""
  return [x for i in range(depth + 1)
          for x in itertools.product(range(vocab_size), repeat=i)]


def kinds_of(topology: Topology, kind: int | tuple[int, ...]):
  """Returns one kind a slot, from one for all or one for each."""
  kinds = (kind,) * topology.num_nodes if isinstance(kind, int) else kind
  if len(kinds) != topology.num_nodes or not kinds:
    raise ValueError(
        f'{len(kinds)} kinds for {topology.num_nodes} slots: at least one '
        'slot, and one kind for each')
  return tuple(kinds)


def mixed_options(num: int, seed: int = 7, greedy: int = 2) -> Options:
  """Returns columns that mix all filters and penalties.

  Args:
    num: P rows. seed: of the mix. greedy: of the last rows, temperature 0.
  """
  rng = np.random.default_rng(seed)
  pick = lambda *values: rng.choice(values, num)  # noqa: E731
  temperature = pick(0.6, 1.0, 1.5)
  temperature[max(num - greedy, 0):] = 0.0
  return {
      'temperature': temperature, 'top_k': pick(0, 0, 2),
      'top_p': pick(1.0, 1.0, 0.8), 'min_p': pick(0.0, 0.0, 0.25),
      'repetition_penalty': pick(1.0, 1.3),
      'presence_penalty': pick(0.0, 0.4),
      'frequency_penalty': pick(0.0, 0.3)}


def random_problem(
    topology: Topology, kind: int | tuple[int, ...], vocab_size: int, *,
    num_problems: int = 4, seed: int = 0, options: Options | None = None,
    cut: float = 0.0, scale: float = 1.5, same_options: bool = True,
) -> Problem:
  """Returns problems with normal logits.

  Args:
    topology: static. kind: of all slots, or one for each.
    options: columns [P]; None is temperature 1, {} is greedy rows only.
    cut: chance in [0, 1] that a node's children are not all drafted; then
      their number is uniform below that.
    scale: standard deviation of logits.
  """
  rng = np.random.default_rng(seed)
  num_target = first_prefix(vocab_size, topology.max_depth + 1)
  num_draft = first_prefix(vocab_size, topology.max_depth)

  def make(rows: int) -> np.ndarray:
    shape = (num_problems, rows, vocab_size)
    return rng.normal(0, scale, shape).astype(np.float32)

  most = topology.max_children
  less = rng.integers(0, most, (num_problems, num_draft))
  whole = rng.random(less.shape) >= cut
  return Problem(
      topology, kinds_of(topology, kind), target=make(num_target),
      draft=make(num_draft), limit=np.where(whole, most, less),
      options=_columns(options, num_problems), same_options=same_options)


def context_free(
    p, q, topology: Topology, kind: int | tuple[int, ...]
) -> Problem:
  """Returns problems whose laws do not depend on the prefix.

  Args:
    p, q: f[V] or f[P,V], the target's and the draft's probabilities; zeros
      are allowed.
  """
  with np.errstate(divide='ignore'):
    p, q = (np.log(np.atleast_2d(np.asarray(x, np.float32))) for x in (p, q))
  num_problems, vocab_size = p.shape
  num_target = first_prefix(vocab_size, topology.max_depth + 1)
  num_draft = first_prefix(vocab_size, topology.max_depth)
  return Problem(
      topology, kinds_of(topology, kind),
      target=np.repeat(p[:, None], num_target, axis=1),
      draft=np.repeat(q[:, None], num_draft, axis=1),
      limit=np.full((num_problems, num_draft), topology.max_children),
      options=_columns(None, num_problems))


def _columns(options: Options | None, num: int) -> Options:
  if options is None:
    return {'temperature': np.ones(num)}
  for name, column in options.items():
    if len(column) != num:
      raise ValueError(
          f'options[{name!r}] has {len(column)} rows for {num} problems')
  return options


def conditionals(problem: Problem) -> np.ndarray:
  """Returns what the target's laws should be, f64[P,T,V].

  By `reference`, which shares no code with the pipeline.
  """
  texts = prefixes(problem.vocab_size, problem.topology.max_depth)
  out = np.zeros(problem.target.shape)
  for b in range(problem.size):
    options = {name: v[b] for name, v in problem.options.items()}
    for t, text in enumerate(texts):
      out[b, t] = reference.law(
          problem.target[b, t], PROMPT, OUTPUT + list(text), **options)
  return out
