"""Small decoding problems whose drafts can all be written out.

A problem is P pairs of context-dependent laws over V tokens: one row of
logits after every prefix of up to D drafted tokens. `drafts` lists all token
tuples that a drafter could propose, each with its exact probability.

Letters: P problems, N drafted slots, D depth, V tokens, T prefixes of at most
D tokens, ordered by length, then as numbers in base V.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates import reference, toys
from specjax.core import law as law_lib
from specjax.core import pipeline, types
from specjax.core.tree import Topology

# Text before the drafts, for penalties to look at.
PROMPT, OUTPUT = [1, 0], [1]
# Tables are padded to these sizes: fewer shapes, fewer compilations.
_ROWS, _COLUMNS = 64, 4

Law = law_lib.Law
LawMaker = Callable[[types.Context, Any, Any], Law]
Options = dict[str, np.ndarray]
_LAW = jax.jit(pipeline.law)


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
  target_law: LawMaker = _LAW
  stated_law: LawMaker | None = None

  @property
  def size(self) -> int:
    """P."""
    return self.target.shape[0]

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.target.shape[2]


@dataclasses.dataclass(frozen=True)
class Drafts:
  """All n drafts of positive probability, and the laws they are judged by.

  Attributes:
    problem: int[n]. tokens: int32[n,N]. valid: bool[n,N].
    weight: f64[n], probability of the draft; sums to 1 in each problem.
    after: int[n,N+1], the prefix that ends in each row (root first).
    target_law, draft_law: laws after each prefix, [P,T*,V] (padded); the
      draft's is None where it states none.
    raw: f32[P,T,V], the target's logits before `pipeline.law`.
    context: P rows.
  """

  problem: np.ndarray
  tokens: np.ndarray
  valid: np.ndarray
  weight: np.ndarray
  after: np.ndarray
  target_law: Law
  draft_law: Law | None
  raw: np.ndarray
  context: types.Context


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


def drafts(problem: Problem) -> Drafts:
  """Returns every draft that can be proposed, with its probability."""
  context = _context(problem)
  plain = lambda _, logits, __: law_lib.Categorical(logits)  # noqa: E731
  maker = _LAW if problem.same_options else plain
  drawn = _table(problem, context, problem.draft, maker)
  stated: Law | None = drawn
  if not problem.states_law:
    stated = None
  elif problem.stated_law is not None:
    stated = _table(problem, context, problem.draft, problem.stated_law)
  rows = _grow(problem, _probabilities(drawn))
  return Drafts(
      **rows, draft_law=stated, raw=problem.target, context=context,
      target_law=_table(problem, context, problem.target, problem.target_law))


def _context(problem: Problem) -> types.Context:
  """Returns P rows that end in PROMPT + OUTPUT."""
  options = types.Options(**{
      name: jnp.asarray(v, jnp.int32 if name == 'top_k' else jnp.float32)
      for name, v in problem.options.items()})
  context = toys.context(
      [PROMPT + OUTPUT] * problem.size, size=8, options=options,
      keys=jax.random.wrap_key_data(
          jnp.zeros((problem.size, 2), jnp.uint32)))
  return context.replace(
      prompt_length=np.full(problem.size, len(PROMPT), np.int32))


def _table(
    problem: Problem, context: types.Context, logits: np.ndarray,
    maker: LawMaker,
) -> Law:
  """Returns the laws after all prefixes, as numpy arrays [P,T*,...]."""
  rows = logits.shape[1]
  texts = prefixes(problem.vocab_size, problem.topology.max_depth)[:rows]
  size = -(-rows // _ROWS) * _ROWS
  past = np.full((size, max(_COLUMNS, problem.topology.max_depth)), -1)
  for t, text in enumerate(texts):
    past[t, :len(text)] = text
  padded = np.pad(logits, ((0, 0), (0, size - rows), (0, 0)))
  law = maker(context, jnp.asarray(padded), jnp.asarray(np.broadcast_to(
      past.astype(np.int32), (problem.size,) + past.shape)))
  return jax.tree.map(np.asarray, law)


def _probabilities(law: Law) -> np.ndarray:
  """Returns f64[...,V]: what sampling from the law amounts to."""
  if isinstance(law, law_lib.Point):
    return np.eye(law.vocab_size)[law.value]
  return softmax(law.logits)


def softmax(logits: Any) -> np.ndarray:
  """Returns the law of float32 logits in float64; NaN where there is none."""
  logits = np.asarray(logits, np.float64)
  with np.errstate(invalid='ignore'):
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def _grow(problem: Problem, q: np.ndarray) -> dict[str, np.ndarray]:
  """Extends drafts slot by slot; those of probability 0 are left out."""
  vocab, topology = problem.vocab_size, problem.topology
  problem_of = np.arange(problem.size)
  tokens = np.zeros((problem.size, 0), np.int32)
  valid = np.zeros((problem.size, 0), bool)
  after = np.zeros((problem.size, 1), np.int64)
  weight = np.ones(problem.size)
  assert topology.parents is not None
  for slot, parent in enumerate(topology.parents):
    prefix = after[:, parent]
    chance, fine = _slot(problem, slot, tokens, q[problem_of, prefix],
                         problem.draft[problem_of, prefix])
    rank = topology.children[parent].index(slot)
    fine &= rank < problem.limit[problem_of, prefix]
    old, token = np.nonzero(chance > 0)
    depth = topology.depth[slot]
    code = prefix[old] - first_prefix(vocab, depth - 1)
    code = first_prefix(vocab, depth) + code * vocab + token
    tokens = np.concatenate(
        [tokens[old], token[:, None].astype(np.int32)], axis=1)
    valid = np.concatenate([valid[old], fine[old, None]], axis=1)
    after = np.concatenate([after[old], code[:, None]], axis=1)
    weight = weight[old] * chance[old, token]
    problem_of = problem_of[old]
  return dict(problem=problem_of, tokens=tokens, valid=valid, weight=weight,
              after=after)


def _slot(
    problem: Problem, slot: int, tokens: np.ndarray, q: np.ndarray,
    logits: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the law of a slot given those before it, and if it is drafted.

  Args:
    tokens: int32[n,slot], the slots before. q: f64[n,V], the law at its
      parent. logits: f32[n,V], by which deterministic children are ranked.

  Returns:
    `(f64[n,V], bool[n])`. Where nothing is left to draw the slot is not
    drafted, and holds any token: no rule may look at it.
  """
  assert problem.topology.parents is not None
  siblings = problem.topology.children[problem.topology.parents[slot]]
  rank, kind = siblings.index(slot), problem.kinds[slot]
  everywhere = np.ones(len(tokens), bool)
  if kind in (types.POINT, types.MATCH) or (
      kind == types.TOP_PLUS_ONE and slot != siblings[-1]):
    order = np.argsort(-logits, axis=1, kind='stable')
    return np.eye(q.shape[1])[order[:, rank]], everywhere
  if kind == types.IID:
    return q, everywhere
  left = q.copy()
  for other in siblings[:rank]:
    if problem.kinds[other] in (types.WITHOUT_REPLACEMENT,
                                types.TOP_PLUS_ONE):
      left[np.arange(len(left)), tokens[:, other]] = 0.0
  mass = left.sum(axis=1, keepdims=True)
  some = mass[:, 0] > 0
  law = np.where(some[:, None], left / np.where(mass > 0, mass, 1.0),
                 1.0 / q.shape[1])
  return law, some
