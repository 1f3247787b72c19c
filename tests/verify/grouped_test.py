"""Grouped acceptance: groups by hand, its function, what it reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import one_step
import pytest

from specjax.certificates import toys
from specjax.core import loop, tree
from specjax.core.round import Engine
from specjax.core.types import IID, POINT, Models
from specjax.drafters import Jacobi
from specjax.host import rules as host_rules
from specjax.verify import Grouped, Speculative, get

VOCAB, NUM, CLOSE = 6, 256, 1e-5
BOOK = np.random.default_rng(2).normal(size=(4, 2)).astype(np.float32)
VERIFIER = {'codebook': jnp.asarray(BOOK)}
RULES = {'wide': Grouped(10, 1.0), 'pair': Grouped(2, 1.0),
         'band': Grouped(4, 0.1), 'near': Grouped(6, 0.4, 2.6, 1)}
by_rule = pytest.mark.parametrize('name', RULES)


def brute(rule: Grouped, p, q, x: int) -> float:
  """Returns the chance that x is accepted, member by member."""
  order = np.lexsort((np.arange(len(p)), -p)).tolist()
  at, half = order.index(x), rule.group // 2
  members = {x}
  for y in order[max(at - half, 0):at + half + 1]:
    far = abs(p[y] - p[x]) >= rule.band
    if rule.distance is not None:
      ids = [i - rule.offset for i in (x, y)]
      far |= not all(0 <= i < len(BOOK) for i in ids) or (
          np.linalg.norm(BOOK[ids[0]] - BOOK[ids[1]]) >= rule.distance)
    if not far:
      members.add(y)
  mass_p, mass_q = (sum(law[y] for y in members) for law in (p, q))
  if p[x] == 0:
    return 0.0
  return min(1.0, mass_p / mass_q) if mass_q > 0 else 1.0


@functools.cache
def problems(zeros: int = 2):
  node = one_step.random_node(1, NUM, VOCAB, zeros)
  return one_step.softmax(node.target), one_step.softmax(node.draft)


@by_rule
def test_acceptance_against_a_loop(name):
  """Groups end where the order does; nobody is in them twice."""
  rule, (p, q) = RULES[name], problems()
  token = np.tile(np.arange(VOCAB), (NUM, 1))
  got = np.asarray(jax.jit(rule.compared)(
      Models(target=None, verifier=VERIFIER), jnp.float32(p), jnp.float32(q),
      token))
  # Members may be dropped by a hair's breadth.
  edge = np.abs(np.abs(p[:, :, None] - p[:, None]) - rule.band) < 1e-6
  seen = 0
  for b in range(NUM):
    if edge[b].any():
      continue
    for x in range(VOCAB):
      if q[b, x] > 0:
        assert min(got[b, x] / q[b, x], 1) == pytest.approx(
            brute(rule, p[b], q[b], x), abs=CLOSE)
        seen += 1
  assert seen > 4 * NUM
  assert (got[p == 0] == 0).all()


@functools.cache
def measure(rule, mode: int):
  node = one_step.random_node(1, NUM, VOCAB)
  rows, weight = one_step.build(node, [mode])
  return one_step.measure(rule, rows, weight, VERIFIER)


@by_rule
@pytest.mark.parametrize('mode', [IID, POINT], ids=['drawn', 'point'])
def test_excess_is_the_distance(name, mode):
  """TV(o, p) = E[excess], problem by problem, also where f < min(1, p/q)."""
  found, exact = measure(RULES[name], mode), measure(Speculative(), mode)
  np.testing.assert_allclose(found.distance, found.excess, atol=CLOSE)
  extra = found.accepted - exact.accepted
  assert (extra <= found.excess + CLOSE).all()
  assert (found.excess > 0.01).mean() > 0.1 and extra.mean() > 0
  if mode == POINT:
    np.testing.assert_allclose(extra, found.excess, atol=CLOSE)
  elif name in ('pair', 'band'):  # accepts some tokens too rarely
    assert (extra < found.excess - 0.01).any()


def test_the_standard_left_over_would_say_too_little():
  """What the released code draws corrections from."""
  class Released(Grouped):
    def left_over(self, params, test, p, q):
      return jnp.maximum(p - q, 0.0)

  found = measure(Released(2, 1.0), IID)
  assert np.abs(found.distance - found.excess).max() > 0.01


def test_drawn_drafts_are_accepted_as_the_formula_says():
  p, q = problems()
  for name, rule in RULES.items():
    want = [sum(q[b, x] * brute(rule, p[b], q[b], x) for x in range(VOCAB)
                if q[b, x] > 0) for b in range(NUM)]
    got = measure(rule, IID).accepted
    assert np.quantile(np.abs(got - want), 0.97) < CLOSE, name


def test_a_group_of_one_is_the_exact_rule():
  one_step.assert_speculative(Grouped(0), 'chain')
  # Nobody is near enough: up to the rounding of q p / q.
  alone = measure(Grouped(4, 1e-9), IID)
  np.testing.assert_allclose(alone.law, alone.target, atol=CLOSE)
  alone = measure(Grouped(4, 1.0, 1e-9), IID)
  np.testing.assert_allclose(alone.law, alone.target, atol=CLOSE)


def text(rule, options):
  drafter = Jacobi(4, 16)
  context = toys.context([[1], [2, 3]] * 32, size=40, new=30,
                         options=options)
  engine = Engine(toys.ToyLM(16), drafter, rule)
  rule.check(drafter.topology, drafter.modes, 16, None)

  @jax.jit
  def run(context):
    state = loop.start(
        engine, params, loop.empty(engine, context), ~context.done, chunk=4)
    return loop.run(engine, params, state, jnp.int32(100))

  params = Models(target=toys.toy_params(0, 16, 0.6))
  return run(context)


def test_windows_that_it_verifies_are_kept_for_longer():
  """In the loop: fewer rounds, paid for by the excess that is reported."""
  options = toys.sampled(64)
  options = options.replace(
      temperature=options.temperature.at[::2].set(0.0))
  exact, wide = text(Speculative(), options), text(Grouped(8), options)
  rounds = [np.asarray(s.context.rounds) for s in (exact, wide)]
  assert rounds[1][1::2].mean() < 0.9 * rounds[0][1::2].mean()
  excess = np.asarray(wide.metrics.excess)
  assert (excess[1::2] > 0).all() and (excess[::2] == 0).all()
  # Greedy rows stay what they are.
  np.testing.assert_array_equal(
      exact.context.tokens[::2], wide.context.tokens[::2])
  greedy = text(Grouped(8), options.replace(temperature=None))
  np.testing.assert_array_equal(
      exact.context.tokens[::2], greedy.context.tokens[::2])


@pytest.mark.parametrize('options,message', [
    ({'group': 3}, 'group=3'), ({'group': -2}, 'group=-2'),
    ({'band': 0}, 'band=0'), ({'band': 1.1}, 'band=1.1'),
    ({'band': float('nan')}, 'band=nan'), ({'distance': 0}, 'distance=0'),
    ({'offset': -1}, 'offset=-1')], ids=str)
def test_values_out_of_range(options, message):
  with pytest.raises(ValueError, match=message):
    get('gsd', **options)


def test_what_it_cannot_verify():
  chain, pair = tree.chain(3), tree.from_parents([0, 0])
  with pytest.raises(ValueError, match='is for chains'):
    Grouped().check(pair, (IID,), 60, None)
  near = Grouped(distance=0.5)
  for params in (None, {}, {'neighbours': np.zeros((50, 8))}):
    with pytest.raises(ValueError, match='needs a codebook'):
      near.check(chain, (IID,), 60, params)
  book = {'codebook': np.zeros((50, 8))}
  near.check(chain, (IID,), 60, book)
  with pytest.raises(ValueError, match='50 codebook entries from id 11'):
    Grouped(distance=0.5, offset=11).check(chain, (IID,), 60, book)
  Grouped(0, distance=0.5).check(chain, (IID,), 60, None)


def test_by_name_with_a_file(tmp_path):
  path = tmp_path / 'book.npy'
  np.save(path, BOOK.astype(np.float64))
  rule, arrays = host_rules.build(
      'grouped', {'distance': 0.5, 'codebook': str(path)}, 8)
  assert rule == Grouped(distance=0.5)
  assert arrays['codebook'].dtype == np.float32
  np.testing.assert_array_equal(arrays['codebook'], BOOK)
  assert host_rules.build('gsd', {'group': 4}, 8) == (Grouped(4), None)
  with pytest.raises(ValueError, match='no codebook without a distance'):
    host_rules.build('grouped', {'codebook': str(path)}, 8)
