"""LANTERN: the table of neighbours, their mass, acceptance and left-overs."""

import jax
import jax.numpy as jnp
import numpy as np
import one_step
import pytest

from specjax.core import law as law_lib
from specjax.core.types import IID, POINT, Models
from specjax.verify import Lantern, Speculative, neighbours


def distances(codebook) -> np.ndarray:
  """Returns squared distances f64[K,K], one pair at a time."""
  codebook = np.asarray(codebook, np.float64)
  return ((codebook[:, None] - codebook[None]) ** 2).sum(axis=-1)


def brute_neighbours(codebook, num: int) -> np.ndarray:
  """Sorts all others by (distance, index), and keeps the first."""
  far = distances(codebook)
  rows = []
  for i, row in enumerate(far):
    order = np.lexsort((np.arange(len(far)), row))
    rows.append(order[order != i][:num])
  return np.asarray(rows)


@pytest.mark.parametrize('size,channels,num', [
    (30, 2, 29), (60, 3, 7), (1030, 1, 4), (2, 1, 1)])
def test_neighbours_of_a_grid(size, channels, num):
  """Small integers: distances are exact, ties and duplicates frequent."""
  codebook = np.random.default_rng(size).integers(0, 9, (size, channels))
  got = neighbours(codebook, num)
  assert got.dtype == np.int32  # holds every id
  np.testing.assert_array_equal(got, brute_neighbours(codebook, num))


@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.float16])
def test_neighbours_of_random_vectors(dtype):
  """Duplicates come first, in order of index; then by distance."""
  rng = np.random.default_rng(0)
  codebook = (rng.normal(size=(67, 5)) + 3).astype(dtype)
  twins = [(3, 40), (3, 66), (12, 13)]
  for i, j in twins:
    codebook[j] = codebook[i]
  got = neighbours(codebook, 66)
  np.testing.assert_array_equal(got, brute_neighbours(codebook, 66))
  assert [list(got[i, :2]) for i in (3, 40, 66)] == [[40, 66], [3, 66],
                                                     [3, 40]]
  # Every other entry once, and never itself.
  for i, row in enumerate(got):
    assert sorted([i, *row]) == list(range(67))
  # Distances are symmetric, and grow along a row.
  far = distances(codebook)
  along = np.take_along_axis(far, got, axis=1)
  assert (np.diff(along, axis=1) >= 0).all()
  np.testing.assert_array_equal(along, far[got, np.arange(67)[:, None]])


def test_duplicates_keep_their_order_in_every_list():
  """Whatever a matrix product makes of equal columns on this machine."""
  rng = np.random.default_rng(1)
  codebook = rng.normal(size=(900, 8)) + 5
  codebook[rng.choice(900, 80)] = codebook[rng.choice(900, 80)]
  got = neighbours(codebook, 899)
  kind = np.unique(codebook, axis=0, return_inverse=True)[1].reshape(-1)
  assert kind.max() < 850
  groups = kind[got]
  breaks = np.diff(groups, axis=1) != 0
  same = ~breaks & (np.diff(got, axis=1) <= 0)
  assert not same.any()
  # A group is one run, less the entry itself where it is alone.
  alone = np.bincount(kind)[kind] == 1
  np.testing.assert_array_equal(breaks.sum(axis=1), kind.max() - alone)


VOCAB, K, ENTRIES = 12, 5, 9
OFFSET = 2  # ids 0, 1 and 11 are no image tokens
TABLE = neighbours(np.random.default_rng(1).normal(size=(ENTRIES, 2)), K + 1)
VERIFIER = {'neighbours': TABLE.astype(np.uint16)}
MODELS = Models(target=None, verifier={'neighbours': jnp.asarray(
    TABLE.astype(np.uint16))})


def limit_of(rule: Lantern, px: float) -> float:
  return rule.delta if rule.lam is None else (rule.lam - 1) * px


def brute_mass(rule: Lantern, p, x: int) -> tuple[float, int, float]:
  """Returns (mass, count, how near a sum comes to the limit) in a loop."""
  if not rule.offset <= x < rule.offset + ENTRIES:
    return 0.0, 0, np.inf
  limit, total, near = limit_of(rule, p[x]), 0.0, np.inf
  for count, neighbour in enumerate(
      TABLE[x - rule.offset, :rule.num_neighbours]):
    more = total + p[neighbour + rule.offset]
    if more != limit:
      near = min(near, abs(more - limit))
    if more > limit:
      return total, count, near
    total = more
  return total, rule.num_neighbours, near


@pytest.mark.parametrize('limit,offset', [
    ({'delta': 0.0}, 0), ({'delta': 0.3}, OFFSET), ({'delta': 1.0}, 0),
    ({'lam': 1.0}, OFFSET), ({'lam': 1.7}, VOCAB - ENTRIES),
    ({'lam': 4.0}, OFFSET)], ids=str)
def test_mass_and_prefix_against_a_loop(limit, offset):
  """Neighbours are added in order until one is too much; none after it."""
  rule = Lantern(K, offset=offset, **limit)
  node = one_step.random_node(7, 100, VOCAB, 6)
  p = one_step.softmax(node.target).astype(np.float32)
  token = jnp.asarray(np.arange(VOCAB)[None].repeat(100, 0), jnp.int32)
  law = jnp.asarray(p)
  mass, count = (np.asarray(x) for x in rule.mass(
      MODELS, token, law, lambda t: jax.vmap(lambda r, i: r[i])(law, t)))
  seen = set()
  for b in range(100):
    for x in range(VOCAB):
      want, number, near = brute_mass(rule, p[b].astype(np.float64), x)
      if near > 1e-6:
        assert abs(mass[b, x] - want) < 1e-6 and count[b, x] == number
        seen.add(number)
  assert {0, K} <= seen or len(seen) > 2  # not the same count everywhere
  if rule.lam is not None:
    assert (p + mass <= rule.lam * p * (1 + 1e-6)).all()
  inside = (offset <= np.arange(VOCAB)) & (np.arange(VOCAB) < offset + ENTRIES)
  assert (mass[:, ~inside] == 0).all() and (count[:, ~inside] == 0).all()


@pytest.mark.parametrize('rule,shape', [
    (Lantern(0, delta=0.5, residual='official'), 'chain'),
    (Lantern(3, delta=0.0), 'chain'), (Lantern(3, delta=0.0), 'tree'),
    (Lantern(3, lam=1.0), 'tree')],
    ids=['k=0', 'delta=0', 'delta=0 on a tree', 'lam=1 on a tree'])
def test_nothing_relaxed_is_speculative(rule, shape):
  """Same verdicts on the same noise, greedy rows with exact ties too."""
  table = neighbours(np.random.default_rng(2).normal(size=(6, 2)), 3)
  one_step.assert_speculative(rule, shape, {'neighbours': table})


def test_delta_does_not_bound_the_distance():
  """100 equally likely tokens, half of them drafted, one neighbour each.

  delta = 0.01 admits that neighbour: every draft passes, at distance 1/2.
  """
  half = np.where(np.arange(100) < 50, 0.0, -np.inf)[None]
  node = one_step.Node(
      np.zeros((1, 100), np.float32), half.astype(np.float32))
  rows, weight = one_step.build(node, [IID])
  table = {'neighbours': (np.arange(100)[:, None] + 50) % 100}
  found = one_step.measure(Lantern(1, delta=0.01), rows, weight, table)
  np.testing.assert_allclose(found.accepted, 1, atol=1e-6)
  np.testing.assert_allclose(found.distance, 0.5, atol=1e-6)
  np.testing.assert_allclose(found.excess, 0.5, atol=1e-6)


def test_tokens_outside_the_codebook_are_tested_exactly():
  """Text ids before the offset and after the last entry."""
  node = one_step.random_node(5, 150, VOCAB, 2)
  rows, _ = one_step.build(node, [IID])
  x = rows.draft.tokens[:, 0]
  outside = (x < OFFSET) | (x >= OFFSET + ENTRIES)
  u = np.random.default_rng(0).random((len(x), 1)).astype(np.float32)
  rule = Lantern(K, delta=0.3, offset=OFFSET)
  got, exact = (one_step.decide(r, VERIFIER, rows, u)
                for r in (rule, Speculative()))
  same = np.asarray(got[0].num_accepted == exact[0].num_accepted)
  assert same[outside].all() and not same[~outside].all()
  assert (np.asarray(got[0].excess)[outside] == 0).all()
  np.testing.assert_allclose(got[1][outside], exact[1][outside], atol=1e-7)


def official(rule: Lantern, p, q, x: int, is_point: bool):
  """Returns what the released code leaves of p after x was rejected.

  The whole window of neighbours goes, not the admitted prefix of it: out of
  q for drawn drafts, out of p for deterministic ones.
  """
  _, count, near = brute_mass(rule, p, x)
  inside = rule.offset <= x < rule.offset + ENTRIES
  window = TABLE[x - rule.offset, :rule.num_neighbours] + rule.offset if (
      inside and count >= 1) else np.zeros(0, int)
  if is_point:
    left = p.copy()
    left[window], left[x] = 0, 0
  else:
    q = q.copy()
    q[window] = 0
    left = np.maximum(p - q, 0)
  return (left / left.sum() if left.sum() > 0 else p), near


@pytest.mark.parametrize('children,limit', [
    (1, {'delta': 0.2}), (2, {'lam': 2.5})], ids=str)
def test_official_left_over(children, limit):
  """Rejections with drawn and deterministic drafts, chain and node."""
  rule = Lantern(K, residual='official', offset=OFFSET, **limit)
  node = one_step.random_node(5, 20 // children**2, VOCAB, 4)
  p, q = (one_step.softmax(x) for x in node)
  for mode in (IID, POINT):
    rows, _ = one_step.build(node, [mode] * children)
    tokens = rows.draft.tokens
    top = np.full(tokens.shape, one_step.TOP)
    verdict, law = one_step.decide(rule, VERIFIER, rows, top)
    count, law = np.asarray(verdict.num_accepted), np.asarray(law)
    checked = differs = 0
    for b in np.flatnonzero(count == 0):
      i = b * len(node.target) // len(tokens)
      left, margin = p[i], np.inf
      for x in tokens[b]:
        law_x = np.eye(VOCAB)[x] if mode == POINT else q[i]
        standard = np.maximum(left - law_x, 0)
        left, near = official(rule, left, law_x, x, mode == POINT)
        margin = min(margin, near)
      if margin < 1e-5:
        continue
      np.testing.assert_allclose(law[b], left, atol=2e-5)
      assert (law[b][p[i] == 0] == 0).all()  # never any token at all
      checked += 1
      differs += standard.sum() == 0 or (
          np.abs(standard / standard.sum() - left).max() > 0.01)
    assert checked > 50 and differs > 20, (checked, differs)


def test_official_left_over_without_mass_is_the_target():
  """All that p supports is the token and its neighbours: p, not every token.
  """
  rule = Lantern(K, lam=2.0, residual='official', offset=OFFSET)
  x = 4
  window = TABLE[x - OFFSET, :K] + OFFSET
  logits = np.full((1, VOCAB), -np.inf, np.float32)
  logits[0, [window[1], window[2]]] = 1.0, 0.0
  rows, _ = one_step.build(one_step.Node(logits, logits), [POINT])
  _, law = one_step.decide(
      rule, VERIFIER, rows, np.full((VOCAB, 1), one_step.TOP))
  np.testing.assert_allclose(
      law[x], one_step.softmax(logits)[0], atol=1e-6)


@pytest.mark.parametrize('law,limit', [
    ('mixed', {'delta': 0.25}), ('mixed', {'lam': 3.0}),
    ('point', {'lam': 3.0})], ids=str)
def test_greedy_rows(law, limit):
  """Accepted when it is the argmax once p(x) is replaced, at temperature 1."""
  rule = Lantern(K, offset=OFFSET, **limit)
  node = one_step.random_node(3, 100, VOCAB, 3)
  rows, _ = one_step.build(node, [POINT], temperature=0.0)
  p = one_step.softmax(node.target)
  best = p.argmax(axis=1)
  if law == 'point':
    value = np.asarray(rows.scores.target_law.logits).argmax(axis=-1)
    rows = rows._replace(
        context=rows.context.replace(
            options=rows.context.options.replace(temperature=None)),
        scores=rows.scores.replace(
            target_law=law_lib.Point(value.astype(np.int32), VOCAB)))
  verdict = one_step.verify(rule, VERIFIER, rows)
  accepted = np.asarray(verdict.num_accepted).reshape(p.shape)
  excess = np.asarray(verdict.excess).reshape(p.shape)
  token = np.asarray(verdict.next_token).reshape(p.shape)
  relaxed = 0
  for b in range(len(p)):
    for x in range(VOCAB):
      mass, _, near = brute_mass(rule, p[b], x)
      ahead = p[b, x] + mass - p[b].max()
      if x != best[b] and (near < 1e-6 or abs(ahead) < 1e-6):
        continue
      want = x == best[b] or (mass > 0 and ahead > 0)
      assert accepted[b, x] == want
      assert excess[b, x] == (want and x != best[b])
      assert want or token[b, x] == best[b]
      relaxed += want and x != best[b]
  assert relaxed > 10
