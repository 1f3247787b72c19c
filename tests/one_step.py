"""The law of the next token under a rule, at one node, as the rule is coded.

All drafts of a node with C children are rows of one batch, with their
probabilities. The rule's uniforms are handed in and the value at which each
child's test flips is found by bisection; the law that the correction is drawn
from is caught on its way to the sampler. Nothing is derived a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from specjax.core import keys, tree, types
from specjax.core import law as law_lib
from specjax.verify import Speculative

TOP = np.float32(1 - 2.0**-24)  # the largest value that a uniform takes
# Programs here are compiled once and run for milliseconds.
_COMPILE = {'xla_backend_optimization_level': 0}


class Node(NamedTuple):
  """P problems: logits of the target's law and the draft's, f32[P,V]."""

  target: np.ndarray
  draft: np.ndarray


def softmax(logits) -> np.ndarray:
  """Returns f64[..., V]."""
  x = np.asarray(logits, np.float64)
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def random_node(seed: int, num: int, vocab: int, zeros: int = 2) -> Node:
  """Returns laws of many sharpnesses, with up to `zeros` excluded tokens."""
  rng = np.random.default_rng(seed)

  def logits():
    x = rng.normal(size=(num, vocab)) * rng.uniform(0.2, 3, (num, 1))
    out = rng.permuted(np.tile(np.arange(vocab), (num, 1)), axis=1)
    out = out < rng.integers(0, zeros + 1, (num, 1))
    return np.where(out, -np.inf, x).astype(np.float32)

  return Node(logits(), logits())


class Rows(NamedTuple):
  """Every draft of every problem as a batch of B = P V^C rows."""

  context: types.Context
  draft: types.Draft
  scores: types.Scores


@dataclasses.dataclass
class Found:
  """What a rule does with the problems."""

  law: np.ndarray  # f64[P,V], of the next token
  target: np.ndarray  # f64[P,V], what it should be
  accepted: np.ndarray  # f64[P], probability that a draft is
  excess: np.ndarray  # f64[P], expected

  @property
  def distance(self) -> np.ndarray:
    """Total variation between the two laws, f64[P]."""
    return np.abs(self.law - self.target).sum(axis=1) / 2


def drafts(node: Node, modes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns all drafts int[X,C] and their probabilities f64[P,X]."""
  q = softmax(node.draft)
  num, vocab = q.shape
  most = len(modes)
  x = np.array(list(itertools.product(range(vocab), repeat=most)))
  top = np.argsort(-q, axis=1, kind='stable')
  rest, weight = np.repeat(q[:, None], len(x), axis=1), np.ones((num, len(x)))
  for j, mode in enumerate(modes):
    fixed = mode in (types.POINT, types.MATCH) or (
        mode == types.TOP_PLUS_ONE and j < most - 1)
    drawn = rest[:, np.arange(len(x)), x[:, j]]
    weight *= (x[:, j] == top[:, j, None]) if fixed else drawn
    if mode != types.IID:
      rest[:, np.arange(len(x)), x[:, j]] = 0
      rest /= np.maximum(rest.sum(axis=-1, keepdims=True), 1e-300)
  return x, weight


def build(
    node: Node, modes: Sequence[int], *, final=None, bias=None,
    temperature: float = 1.0,
) -> tuple[Rows, np.ndarray]:
  """Returns all drafts as a batch, and their probabilities f64[P,X].

  Args:
    modes: [C], how the children are chosen.
    final: f32[P,V,D], the target's hidden state after each token.
    bias: f32[P,V], added to the target's logits; -inf bans.
    temperature: 0 makes every row greedy (`target` are logits before it).
  """
  x, weight = drafts(node, modes)
  num, vocab = node.target.shape
  batch, most = num * len(x), len(modes)
  tokens = np.tile(x, (num, 1))
  problem = np.repeat(np.arange(num), len(x))
  # The rows after the children decide nothing here: a law of their own.
  behind = np.random.default_rng(0).normal(size=(batch, most, vocab))
  logits = np.concatenate([node.target[problem, None], behind], axis=1)
  taps = {'logits': logits.astype(np.float32)}
  if final is not None:
    own = final[problem[:, None], tokens]
    taps['final'] = np.concatenate([np.zeros_like(own[:, :1]), own], axis=1)
  draft = types.Draft(
      topology=tree.from_parents([0] * most), tokens=tokens.astype(np.int32),
      valid=np.ones((batch, most), bool), mode=np.asarray(modes, np.int32),
      draft_law=law_lib.Categorical(node.draft[problem, None]),
      law_row=np.zeros(most, np.int32))
  options = types.Options(
      temperature=np.full(batch, temperature, np.float32),
      bias=None if bias is None else bias[problem].astype(np.float32))
  return Rows(_context(options), draft, _scores(options, taps)), weight


def _context(options: types.Options) -> types.Context:
  """Returns rows with one token of text each.

  In numpy, like everything here: each eager operation would be compiled.
  """
  batch = len(options.temperature)
  words = np.random.default_rng(batch).integers(0, 2**32, (batch, 2))
  one = np.ones(batch, np.int32)
  return types.Context(
      tokens=np.zeros((batch, 4), np.int32), length=one, prompt_length=one,
      limit=4 * one, done=one == 0, rounds=0 * one, options=options,
      keys=jax.random.wrap_key_data(words.astype(np.uint32)))


def _scores(options: types.Options, taps: dict) -> types.Scores:
  """Returns the target's answer: its law at the rows' temperature."""
  logits = taps['logits'].astype(np.float32)
  if options.bias is not None:
    logits = logits + options.bias[:, None]
  heat = options.temperature[:, None, None]
  best = logits.argmax(axis=-1)[..., None] == np.arange(logits.shape[-1])
  law = np.where(heat > 0, logits / np.where(heat > 0, heat, 1),
                 np.where(best, 0, -np.inf))
  return types.Scores(
      target_law=law_lib.Categorical(law.astype(np.float32)), taps=taps)


@functools.partial(jax.jit, static_argnums=0, compiler_options=_COMPILE)
def decide(rule, verifier: Any, rows: Rows, u):
  """Runs a rule on uniforms `u f32[B,N]`.

  Returns:
    `(Verdict, law f32[B,V] that the next token is drawn from)`.
  """
  caught = []

  def sample(self, _):
    caught.append(self.probs)
    return self.mode()

  models = types.Models(target=None, verifier=verifier)
  with mock.patch.object(keys, 'uniform', lambda *_: u), (
      mock.patch.object(law_lib.Categorical, 'sample', sample)):
    verdict = rule.verify(models, *rows)
  return verdict, caught[-1]


def measure(
    rule, rows: Rows, weight: np.ndarray, verifier: Any = None
) -> Found:
  """Returns the law of the next token and the expected excess."""
  tokens = np.asarray(rows.draft.tokens)
  batch, most = tokens.shape

  def run(u):
    verdict, law = decide(rule, verifier, rows, np.asarray(u, np.float32))
    path, count = np.asarray(verdict.path), np.asarray(verdict.num_accepted)
    stop = np.where(count > 0, path[:, 1], 0)
    return stop, np.asarray(law, np.float64), np.asarray(verdict.excess)

  def only(j, value):
    """Uniforms that reject, if anything does, but for child j."""
    return np.where(np.arange(most) == j, np.reshape(value, (-1, 1)), TOP)

  flip = np.stack([_flip(lambda v, j=j: run(only(j, v))[0] == j + 1, batch)
                   for j in range(most)], axis=1)
  u = np.random.default_rng(0).random((batch, most))
  passed = np.c_[u < flip, np.ones(batch, bool)]
  guess = (passed.argmax(axis=1) + 1) % (most + 1)
  sure = (np.abs(u - flip) > 1e-5).all(axis=1)
  np.testing.assert_array_equal(run(u)[0][sure], guess[sure])
  law = np.zeros((batch, rows.scores.target_law.vocab_size))
  excess, reached = np.zeros(batch), np.ones(batch)
  for j in range(most):
    chance = reached * flip[:, j]
    law[np.arange(batch), tokens[:, j]] += chance
    excess += chance * run(only(j, np.zeros(batch)))[2]
    reached = reached * (1 - flip[:, j])
  _, left, extra = run(np.full((batch, most), TOP))
  law += reached[:, None] * left
  excess += reached * extra

  def mean(x):
    return np.einsum('px,px...->p...', weight,
                     x.reshape(weight.shape + x.shape[1:]))

  target = softmax(rows.scores.target_law.logits[:, 0])
  return Found(law=mean(law), target=mean(target),
               accepted=mean(1 - reached), excess=mean(excess))


def _flip(accepts, batch: int) -> np.ndarray:
  """Returns f64[B] in [0, 1]: a test passes exactly below this uniform."""
  low, high = np.zeros(batch, np.float32), np.full(batch, TOP)
  never, always = ~accepts(low), accepts(high)
  for _ in range(25):
    middle = (low + high) / 2
    passed = accepts(middle)
    low, high = np.where(passed, middle, low), np.where(passed, high, middle)
  value = (low.astype(np.float64) + high) / 2
  return np.where(always, 1.0, np.where(never, 0.0, value))


def random_rows(seed: int, parents: Sequence[int], batch: int = 96,
                vocab: int = 6) -> Rows:
  """Returns random drafts of a chain or tree; a third of the rows is greedy.

  Drawn and deterministic slots, undrafted ones, banned tokens, and logits
  that are multiples of one half: exact ties are frequent.
  """
  rng = np.random.default_rng(seed)
  topology, num = tree.from_parents(parents), len(parents)
  logits = np.round(2 * rng.normal(size=(batch, num + 1, vocab))) / 2
  logits = logits.astype(np.float32)
  bias = np.where(rng.random((batch, vocab)) < 0.2, -np.inf, 0)
  bias[:, 0] = 0
  options = types.Options(
      temperature=rng.choice([0, 0.8, 1.3], batch).astype(np.float32),
      bias=bias.astype(np.float32))
  draft = types.Draft(
      topology=topology,
      tokens=rng.integers(0, vocab, (batch, num)).astype(np.int32),
      valid=rng.random((batch, num)) < 0.9,
      mode=rng.choice([types.IID, types.POINT], num).astype(np.int32),
      draft_law=law_lib.Categorical(
          rng.normal(size=(batch, num + 1, vocab)).astype(np.float32)),
      law_row=np.asarray(parents, np.int32))
  taps = {'logits': logits, 'final': logits}
  return Rows(_context(options), draft, _scores(options, taps))


@functools.partial(jax.jit, static_argnums=0, compiler_options=_COMPILE)
def verify(rule, verifier: Any, rows: Rows) -> types.Verdict:
  """Runs a rule on its own noise."""
  return rule.verify(types.Models(target=None, verifier=verifier), *rows)


SHAPES = {'chain': (0, 1, 2), 'tree': (0, 0, 1, 1, 0, 2)}


def assert_speculative(rule, shape: str, verifier: Any = None) -> None:
  """Asserts that a rule's verdicts are those of `Speculative`, bit by bit."""
  rows = random_rows(3, SHAPES[shape])
  want = verify(Speculative(), verifier, rows)
  assert len(set(np.asarray(want.num_accepted).tolist())) > 2
  jax.tree.map(np.testing.assert_array_equal,
               verify(rule, verifier, rows), want)
