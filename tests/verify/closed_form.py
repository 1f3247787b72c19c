"""Best possible acceptance by enumeration, in float64 numpy.

Shares no code with the library: tuples one by one, all subsets of the
vocabulary, plain bisection.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy import optimize

# Laws (p, q) of the tables of reference values.
A = (np.array([.1, .2, .3, .4]), np.array([.4, .3, .2, .1]))
B = (np.array([.5, .25, .15, .1]), np.array([.3, .4, .2, .1]))

DraftLaw = dict[frozenset[int], float]


def tuple_probability(q: np.ndarray, drafts, mode: str) -> float:
  """Returns the probability of an ordered tuple of drafts."""
  chance, left = 1.0, np.array(q, np.float64)
  for token in drafts:
    total = left.sum() if mode == 'without_replacement' else 1.0
    if total <= 0:
      return 0.0
    chance *= left[token] / total
    if mode == 'without_replacement':
      left[token] = 0.0
  return chance


def draft_law(q: np.ndarray, num: int, mode: str) -> DraftLaw:
  """Returns the law of the set of drafts, however they are chosen."""
  order = np.argsort(-q, kind='stable').tolist()
  if mode == 'top':
    return {frozenset(order[:num]): 1.0}
  law: DraftLaw = {}
  if mode == 'top_plus_one':
    top = frozenset(order[:num - 1])
    rest = np.array([0.0 if x in top else v for x, v in enumerate(q)])
    if not rest.any():
      return {top: 1.0}
    return {top | {x}: v / rest.sum() for x, v in enumerate(rest) if v > 0}
  if mode == 'without_replacement' and np.sum(q > 0) <= num:
    return {frozenset(np.flatnonzero(q > 0).tolist()): 1.0}
  for drafts in itertools.product(range(len(q)), repeat=num):
    chance = tuple_probability(q, drafts, mode)
    if chance > 0:
      key = frozenset(drafts)
      law[key] = law.get(key, 0.0) + chance
  return law


def optimum(p: np.ndarray, law: DraftLaw) -> float:
  """Returns 1 + min over H of p(H) - Pr[drafts within H]; all 2^V of them."""
  vocab = range(len(p))
  best = 0.0
  for size in range(len(p) + 1):
    for inside in map(frozenset, itertools.combinations(vocab, size)):
      within = sum(c for drafts, c in law.items() if drafts <= inside)
      best = min(best, sum(p[x] for x in inside) - within)
  return 1 + best


def linear_program(p: np.ndarray, law: DraftLaw) -> float:
  """Returns the most mass that can go from sets of drafts to their tokens."""
  pairs = [(i, y) for i, drafts in enumerate(law) for y in sorted(drafts)]
  limits = np.zeros((len(law) + len(p), len(pairs)))
  for column, (i, y) in enumerate(pairs):
    limits[i, column] = limits[len(law) + y, column] = 1
  found = optimize.linprog(
      -np.ones(len(pairs)), A_ub=limits,
      b_ub=np.concatenate([list(law.values()), p]), method='highs')
  assert found.success
  return -found.fun


def kseq(p: np.ndarray, q: np.ndarray, num: int) -> tuple[float, float]:
  """Returns `(rho, acceptance)` of k-SEQ at its best, by bisection."""
  def beta(rho):
    return np.minimum(q, p / rho).sum()

  def some(rho):
    return 1 - (1 - beta(rho)) ** num

  low, high = 1.0, float(num)
  for _ in range(100):
    middle = (low + high) / 2
    if some(middle) <= middle * beta(middle):
      high = middle
    else:
      low = middle
  return high, some(high)


def random_laws(
    seed: int, num: int, vocab: int, width: int | None = None,
    zeros: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns p and q, f64[num, width]; half of the q are p perturbed.

  Sharp, plain and flat laws over `vocab` tokens in random places of `width`,
  with a share of further zeros; float32 holds the values exactly.
  """
  rng = np.random.default_rng(seed)
  width = vocab if width is None else width
  laws = np.zeros((2, num, width))
  for row in range(num):
    sharpness = rng.choice([0.3, 1.0, 3.0])
    p, q = rng.dirichlet([sharpness] * vocab, 2)
    if row % 2:
      q = p * np.exp(rng.normal(size=vocab) / 2)
    place = rng.permutation(width)[:vocab]
    for side, x in enumerate((p, q)):
      keep = rng.random(vocab) >= zeros
      keep[np.argsort(-x)[:3]] = True
      x = np.where(keep, np.maximum(x, 1e-12), 0)
      laws[side, row, place] = (x / x.sum()).astype(np.float32)
  return laws[0], laws[1]


def pad(x: np.ndarray, rows: int, vocab: int) -> np.ndarray:
  """Returns f64[rows, vocab]: impossible tokens and copies of row 0 added.

  Gives the laws of all tests one shape, since compiling is what takes long.
  """
  x = np.atleast_2d(np.asarray(x, np.float64))
  x = np.pad(x, ((0, 0), (0, vocab - x.shape[1])))
  return np.concatenate([x, np.repeat(x[:1], rows - len(x), axis=0)])
