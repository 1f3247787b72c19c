"""All drafts of a small decoding problem, each with its exact probability.

Letters: P problems, N drafted slots, T prefixes of up to D tokens, V tokens,
in the order of `problems`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates import toys
from specjax.certificates.problems import (
  OUTPUT,
  PIPELINE,
  PROMPT,
  Law,
  LawMaker,
  Problem,
  first_prefix,
  prefixes,
)
from specjax.core import law as law_lib
from specjax.core import types

# Tables are padded to these sizes: fewer shapes, fewer compilations.
_ROWS, _COLUMNS = 64, 4


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


def drafts(problem: Problem) -> Drafts:
  """Returns every draft that can be proposed, with its probability."""
  context = _context(problem)
  plain = lambda _, logits, __: law_lib.Categorical(logits)  # noqa: E731
  maker = PIPELINE if problem.same_options else plain
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
