"""The exact law of a chain rule, as coded: no sampling, no re-derivation.

All drafts of N tokens are rows of one batch. The rule's uniforms are handed
in; for each slot the value at which its decision flips is found by bisection,
so that 2^N patterns of accept tests with known probabilities cover the cube.
The law that the last token is drawn from is caught on its way to the
sampler. What follows is completed with the target's own conditionals, and the
joint law of N + 1 tokens is compared with the target's.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates import reference as numpy_law
from specjax.certificates import toys
from specjax.core import keys, pipeline, tree, types
from specjax.core import law as law_lib
from specjax.core.round import emitted

# Text before the drafts, for penalties to look at.
PROMPT, OUTPUT = [1, 0], [1]
TOP = np.float32(1 - 2.0**-24)  # the largest value that a uniform takes
LAW = jax.jit(pipeline.law)


@dataclasses.dataclass
class Problems:
  """P pairs of context-dependent laws over V tokens, N drafts deep.

  Attributes:
    target: one array a depth, [P, V^i, V]: logits after each prefix.
    draft: likewise, depths 0 to N - 1.
    options: [P] columns of `core.types.Options`.
    keep: [P, V^i] per depth: whether slot i is drafted after that prefix.
    fixed: [P, V^i] per depth: the token that a deterministic slot has.
  """

  target: list[np.ndarray]
  draft: list[np.ndarray]
  options: dict[str, np.ndarray]
  keep: list[np.ndarray]
  fixed: list[np.ndarray]

  @property
  def sizes(self) -> tuple[int, int, int]:
    """P, V, N."""
    return (*self.target[0].shape[::2], len(self.draft))


def random_problems(
    seed: int, num: int, vocab: int, depth: int, options, *,
    scale: float = 1.5, cut: float = 0.0,
) -> Problems:
  """Returns `num` problems; a slot is not drafted with chance `cut`."""
  rng = np.random.default_rng(seed)

  def make(i):
    return rng.normal(0, scale, (num, vocab**i, vocab)).astype(np.float32)

  draft = [make(i) for i in range(depth)]
  return Problems(
      target=[make(i) for i in range(depth + 1)], draft=draft,
      options=options, fixed=[d.argmax(-1) for d in draft],
      keep=[rng.random((num, vocab**i)) >= cut for i in range(depth)])


def context_free(p, q, depth: int, num: int = 1) -> Problems:
  """Returns `num` equal problems whose laws do not depend on the prefix."""
  with np.errstate(divide='ignore'):
    p, q = (np.log(np.asarray(x, np.float32)) for x in (p, q))
  vocab = len(p)
  def tile(x, n):
    return [np.tile(x, (num, vocab**i, 1)) for i in range(n)]

  keep = [np.ones((num, vocab**i), bool) for i in range(depth)]
  return Problems(
      target=tile(p, depth + 1), draft=tile(q, depth), keep=keep,
      options={'temperature': np.ones(num)},
      fixed=[np.zeros((num, vocab**i), int) for i in range(depth)])


@dataclasses.dataclass
class Found:
  """What enumeration found, per problem."""

  law: np.ndarray  # f64[P, V^(N+1)], emitted joint law
  target: np.ndarray  # what it should be
  num_accepted: np.ndarray  # f64[P], expected
  forbidden: bool  # some noise (0 included) accepts an excluded token

  @property
  def error(self) -> float:
    """Largest difference of a probability."""
    return float(np.abs(self.law - self.target).max())


def options_of(problems: Problems, copies: int) -> types.Options:
  return types.Options(**{
      k: jnp.asarray(np.repeat(v, copies),
                     jnp.int32 if k == 'top_k' else jnp.float32)
      for k, v in problems.options.items()})


def reference(problems: Problems) -> list[np.ndarray]:
  """Returns the target's processed conditionals, f64[P, V^i, V] a depth."""
  num, vocab, depth = problems.sizes
  out = []
  for i in range(depth + 1):
    rows = np.zeros((num, vocab**i, vocab))
    for k, prefix in enumerate(itertools.product(range(vocab), repeat=i)):
      for b in range(num):
        options = {n: v[b] for n, v in problems.options.items()}
        rows[b, k] = numpy_law.law(
            problems.target[i][b, k], PROMPT, OUTPUT + list(prefix),
            **options)
    out.append(rows)
  return out


def gather(tables: list[np.ndarray], x: np.ndarray) -> np.ndarray:
  """Returns [P*X, len(tables), ...]: the entry after each draft's prefix."""
  vocab = x.max() + 1
  index, out = np.zeros(len(x), int), []
  for i, entry in enumerate(tables):
    picked = entry[:, index]
    out.append(picked.reshape((-1,) + picked.shape[2:]))
    if i < x.shape[1]:
      index = index * vocab + x[:, i]
  return np.stack(out, axis=1)


class Rows(NamedTuple):
  """All drafts of all problems as a batch, with their probabilities."""

  context: types.Context
  draft: types.Draft
  scores: types.Scores
  weight: np.ndarray  # f64[P*X]


def build(
    problems: Problems, *, modes=None, claimed=None, same_options: bool = True,
    score: Callable[..., Any] = LAW,
) -> Rows:
  """Returns the batch of all drafts.

  Args:
    modes: int[N], how slots are drawn (None: all IID).
    claimed: what the draft says about that, if it lies.
    same_options: drafts are drawn from processed logits; else from the plain
      softmax, which is as legal.
    score: makes the target's law (a fault may be planted here).
  """
  num, vocab, depth = problems.sizes
  x = np.array(list(itertools.product(range(vocab), repeat=depth)))
  tokens = jnp.asarray(np.tile(x, (num, 1)), jnp.int32)
  batch = len(tokens)
  modes = np.asarray([types.IID] * depth if modes is None else modes)
  context = toys.context(
      [PROMPT + OUTPUT] * batch, size=8, options=options_of(problems, len(x)),
      keys=jax.random.wrap_key_data(np.zeros((batch, 2), np.uint32)))
  context = context.replace(
      prompt_length=np.full(batch, len(PROMPT), np.int32))
  past = jnp.asarray(np.where(  # a chain: row r has r drafts before it
      np.tri(depth + 1, depth, -1, bool), tokens[:, None], -1), jnp.int32)
  logits = jnp.asarray(gather(problems.draft, x))
  q = law_lib.Categorical(logits)
  if same_options:
    q = LAW(context, logits, past[:, :depth])
  fixed = gather(problems.fixed, x)
  drawn = np.take_along_axis(
      np.asarray(q.probs, np.float64), np.asarray(tokens)[..., None], -1)
  chance = np.where(modes == types.IID, drawn[..., 0], fixed == tokens)
  valid = np.cumprod(gather(problems.keep, x), axis=1) > 0
  draft = types.Draft(
      topology=tree.chain(depth), tokens=tokens, valid=jnp.asarray(valid),
      mode=jnp.asarray(modes if claimed is None else claimed), draft_law=q)
  p = score(context, jnp.asarray(gather(problems.target, x)), past)
  return Rows(  # no rule reads options: without them fewer programs differ
      context=context.replace(options=types.Options()), draft=draft,
      scores=types.Scores(target_law=p), weight=chance.prod(axis=1))


@functools.partial(jax.jit, static_argnums=(0, 5))
def decide(rule, context, draft, scores, noise, copies: int):
  """Runs a rule on given noise: (tokens, count, law of the last token).

  `noise` is f32[B*copies, N] uniforms, or for sample-and-match the target's
  draws int32[B*copies, N + 1].
  """
  repeat = lambda v: jnp.repeat(v, copies, axis=0)  # noqa: E731
  context = context.replace(
      keys=repeat(context.keys), length=repeat(context.length),
      rounds=repeat(context.rounds))
  draft = draft.replace(
      tokens=repeat(draft.tokens), valid=repeat(draft.valid),
      draft_law=jax.tree.map(repeat, draft.draft_law))
  scores = jax.tree.map(repeat, scores)
  caught = []

  def sample(self, _):
    if self.logits.ndim == 3:
      return noise
    caught.append(self.probs)
    return self.mode()

  with mock.patch.object(keys, 'uniform', lambda *_: noise), (
      mock.patch.object(law_lib.Categorical, 'sample', sample)):
    verdict = rule.verify(None, context, draft, scores)
  last = jax.nn.one_hot(
      verdict.next_token, scores.target_law.vocab_size, dtype=jnp.float32)
  return (emitted(draft, verdict), verdict.num_accepted,
          caught[-1] if caught else last)


def thresholds(run, batch: int, depth: int, copies: int) -> np.ndarray:
  """Returns f64[B, N]: where each slot's test flips, by bisection.

  All settings of the other slots' uniforms are tried; where a slot matters
  it must flip at the same value in all of them.
  """
  others = np.array(list(itertools.product([0, TOP], repeat=depth - 1)))
  grid = np.zeros((depth, len(others), depth), np.float32)
  for slot in range(depth):
    grid[slot] = np.insert(others, slot, 0, axis=1)
  own = np.repeat(np.eye(depth, dtype=bool), len(others), axis=0)
  own, grid = np.resize(own, (copies, depth)), np.resize(grid, (copies, depth))
  grid = np.tile(grid, (batch, 1, 1))

  def count(value):
    return run(np.where(own, value[..., None], grid))[1]

  low = np.zeros(grid.shape[:2], np.float32)
  high = np.full_like(low, TOP)
  at_low, at_high = count(low), count(high)
  for _ in range(25):
    middle = (low + high) / 2
    same = count(middle) == at_low
    low, high = np.where(same, middle, low), np.where(same, high, middle)
  shape = (batch, depth, len(others))
  size = depth * len(others)
  flips = (at_low != at_high)[:, :size].reshape(shape)
  value = ((low + high) / 2)[:, :size].reshape(shape)
  top = np.where(flips, value, -1).max(axis=2)
  assert np.abs(np.where(flips, value - top[..., None], 0)).max() < 1e-6
  return np.where(flips.any(axis=2), top, 0.5).astype(np.float64)


def exact(rule, problems: Problems, **kwargs) -> Found:
  """Returns the emitted law of a rule with uniforms (see module)."""
  depth = problems.sizes[2]
  rows = build(problems, **kwargs)
  batch = len(rows.weight)
  copies = max(2, depth) * 2**(depth - 1)

  def run(u):
    out = decide(rule, rows.context, rows.draft, rows.scores,
                 u.reshape(-1, depth).astype(np.float32), copies)
    return [np.asarray(o).reshape((batch, copies) + o.shape[1:])
            for o in out]

  flip = thresholds(run, batch, depth, copies)
  bits = np.array(list(itertools.product([True, False], repeat=depth)))
  pick = np.arange(copies) % len(bits)
  chance = np.where(bits, flip[:, None], 1 - flip[:, None]).prod(axis=2)
  u = np.where(bits, flip[:, None] / 2, (1 + flip[:, None]) / 2)
  out = run(u[:, pick])
  by_pattern = out[1][:, :len(bits)]
  # Any other noise must decide like its pattern.
  rng = np.random.default_rng(0)
  u = rng.random((batch, copies, depth))
  code = ((u >= flip[:, None]) * 2**np.arange(depth)[::-1]).sum(axis=2)
  agree = run(u)[1] == np.take_along_axis(by_pattern, code, axis=1)
  assert agree[rows.weight > 0].all(), 'decisions are not a grid of tests'
  weight = rows.weight[:, None] * chance
  ref = reference(problems)
  zero = run(np.zeros((batch, copies, depth)))
  forbidden = any(
      _forbidden(ref, rows.weight, o[0][:, c], o[1][:, c])
      for o in (out, zero) for c in range(len(bits)))
  first = [o[:, :len(bits)].reshape((-1,) + o.shape[2:]) for o in out]
  return _assemble(problems, ref, weight.reshape(-1), *first, forbidden)


def exact_match(rule, problems: Problems, **kwargs) -> Found:
  """Returns the emitted law of sample-and-match: draws are enumerated."""
  _, vocab, depth = problems.sizes
  rows = build(problems, **kwargs)
  y = np.array(list(itertools.product(range(vocab), repeat=depth + 1)))
  batch = len(rows.weight)
  noise = np.tile(y, (batch, 1)).astype(np.int32)
  tokens, count, last = (np.asarray(o) for o in decide(
      rule, rows.context, rows.draft, rows.scores, noise, len(y)))
  p = np.asarray(rows.scores.target_law.probs, np.float64)
  chance = np.ones((batch, len(y)))
  for i in range(depth + 1):
    chance *= p[:, i][:, y[:, i]]
  weight = (rows.weight[:, None] * chance).reshape(-1)
  return _assemble(
      problems, reference(problems), weight, tokens, count, last, False)


def _forbidden(ref, weight, tokens, count) -> bool:
  """Whether an accepted token has probability 0 under the target."""
  vocab, problem = ref[0].shape[2], np.arange(len(weight))
  problem = problem * len(ref[0]) // len(weight)
  index = np.zeros(len(weight), int)
  bad = np.zeros(len(weight), bool)
  for i in range(len(ref) - 1):
    chance = ref[i][problem, index, tokens[:, i]]
    bad |= (i < count) & (chance == 0)
    index = index * vocab + tokens[:, i]
  return bool((bad & (weight > 0)).any())


def _assemble(
    problems: Problems, ref, weight, tokens, count, last, forbidden
) -> Found:
  """Adds up all branches, each completed by the target's conditionals."""
  num, vocab, depth = problems.sizes
  problem = np.repeat(np.arange(num), len(weight) // num)
  # follow[i]: law of the tokens after a prefix of i, f64[P, V^i, V^(N+1-i)].
  follow = [np.ones((num, vocab**(depth + 1), 1))]
  for i in range(depth, -1, -1):
    rest = follow[0].reshape(num, vocab**i, vocab, -1)
    follow.insert(0, (ref[i][..., None] * rest).reshape(num, vocab**i, -1))
  law = np.zeros((num, vocab**(depth + 1)))
  for n in range(depth + 1):
    here = (count == n) & (weight > 0)
    index = np.zeros(len(weight), int)
    for i in range(n):
      index = index * vocab + tokens[:, i]
    mass = np.zeros((num, vocab**n, vocab))
    np.add.at(mass, (problem[here], index[here]),
              weight[here, None] * last[here])
    law += (mass.reshape(num, -1, 1) * follow[n + 1]).reshape(num, -1)
  per = np.zeros(num)
  np.add.at(per, problem, weight * count)
  return Found(law=law, target=follow[0].reshape(num, -1),
               num_accepted=per, forbidden=forbidden)
