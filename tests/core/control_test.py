"""Controllers on scripted rounds, and the cost model behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import toys
from specjax.core import control, tree, types


def make_round(valid, count, confidence=None):
  """Returns (draft, verdict): `valid bool[B,N]`, `count int[B]` accepted."""
  valid, count = np.asarray(valid, bool), np.asarray(count, np.int32)
  num = valid.shape[1]
  draft = types.Draft(
      topology=tree.chain(num), tokens=np.zeros(valid.shape, np.int32),
      valid=jnp.asarray(valid), mode=np.zeros(num, np.int32),
      aux=None if confidence is None else {
          'confidence': jnp.asarray(confidence, jnp.float32)})
  verdict = types.Verdict(
      path=np.zeros((len(count), num + 1), np.int32),
      num_accepted=jnp.asarray(count), next_token=count,
      excess=count * 0.0, gave_up=count < 0)
  return draft, verdict


def prefix(lengths, width: int) -> np.ndarray:
  return np.arange(width) < np.asarray(lengths)[:, None]


update = jax.jit(
    lambda c, *args: c.update(*args), static_argnums=0)


@pytest.mark.parametrize('alpha,num,want', [
    (0.7, 4, 2.7731), (0.5, 1, 1.5), (0.0, 3, 1.0), (1.0, 4, 5.0),
    (1 - 3e-6, 40, 41 - 40 * 41 / 2 * 3e-6), (0.9, 0, 1.0)])
def test_expected_length(alpha, num, want):
  """Leviathan et al.'s equation 1, also where float32 would cancel."""
  got = control.expected_length(jnp.float32(alpha), num)
  np.testing.assert_allclose(got, want, rtol=6e-5)


def test_expected_speedup():
  """Tokens over time; without drafts nothing is paid for."""
  got = control.expected_speedup(jnp.float32(0.7), 4, 0.1)
  np.testing.assert_allclose(got, 2.7731 / 1.4, rtol=1e-5)
  got = control.expected_speedup(jnp.float32(0.7), 4, 0.1, 1.5)
  np.testing.assert_allclose(got, 2.7731 / 1.9, rtol=1e-5)
  np.testing.assert_allclose(
      control.expected_speedup(jnp.float32(0.7), 0, 0.1, 1.5), 1.0,
      rtol=1e-6)
  # Gains come exactly where acceptance exceeds the cost of a draft.
  for alpha in (0.25, 0.35):
    best = control.expected_speedup(
        jnp.float32(alpha), np.arange(1, 9), 0.3).max()
    assert (best > 1) == (alpha > 0.3)


# (drafted length, accepted) a round -> length of the next.
SCRIPT = [(3, 3, 5), (5, 5, 6), (6, 2, 5), (5, 4, 4), (4, 0, 3), (3, 3, 5),
          (5, 0, 4), (4, 0, 3), (3, 0, 2), (2, 1, 1), (1, 0, 1), (1, 1, 3)]


def test_heuristic_trace():
  """Two more after full acceptance, else one less; within [1, K]."""
  width, rule = 6, control.Heuristic(3)
  state = rule.empty(2, width)
  context = toys.context([[1], [1]])
  active = jnp.asarray([True, False])
  for length, accepted, following in SCRIPT:
    limit = np.asarray(rule.limit(state, context, width))
    assert list(limit) == [length, 3]
    draft, verdict = make_round(prefix(limit, width), [accepted, 0])
    state = update(rule, state, draft, verdict, active)
    assert rule.limit(state, context, width)[0] == following
  # A round without drafts leaves the length; a finished row is frozen.
  draft, verdict = make_round(np.zeros((2, width)), [0, 0])
  after = update(rule, state, draft, verdict, active)
  np.testing.assert_array_equal(after['length'], [3, 3])


def test_heuristic_grows_out_of_a_narrow_block():
  """A round at width 2 must not bound the next length by 2."""
  rule = control.Heuristic(2)
  state = rule.empty(1, 6)
  draft, verdict = make_round([[True, True]], [2])
  state = update(rule, state, draft, verdict, jnp.ones(1, bool))
  assert rule.limit(state, toys.context([[1]]), 6)[0] == 4


@pytest.mark.parametrize('first,width,want', [
    (None, 4, 4), (2, 4, 2), (9, 4, 4), (0, 4, 0)])
def test_fixed(first, width, want):
  """A constant, clipped to the drafter's width."""
  rule = control.Fixed(first)
  assert rule.limit({}, toys.context([[1]]), width)[0] == want


def test_confidence_keeps_the_weak_token():
  """The draft ends after the first token below the threshold, never at it."""
  rule = control.Confidence(threshold=0.5)
  state = rule.empty(3, 4)
  sure = [[.9, .4, .9, .9], [.4, .9, .9, .9], [.5, .6, .7, .1]]
  draft, _ = make_round(np.ones((3, 4)), [0, 0, 0], sure)
  np.testing.assert_array_equal(
      rule.keep(state, draft), prefix([2, 1, 4], 4))


def test_confidence_threshold_against_brute_force():
  """Argmin of FPR + 3 FNR over bin edges, lowest edge on ties."""
  rng = np.random.default_rng(0)
  rule = control.Confidence(threshold=0.3, bins=16, decay=0.9)
  rows, width = 3, 4
  state = rule.empty(rows, width)
  kept, lost = np.zeros((2, rows, 16))
  threshold = np.full(rows, 0.3)
  active = np.array([True, True, False])
  for _ in range(30):
    sure = rng.random((rows, width)).astype(np.float32)
    drafted = rng.integers(0, width + 1, rows)
    count = np.minimum(rng.integers(0, width + 1, rows), drafted)
    draft, verdict = make_round(prefix(drafted, width), count, sure)
    state = update(rule, state, draft, verdict, jnp.asarray(active))
    kept[active] *= 0.9
    lost[active] *= 0.9
    for b in np.flatnonzero(active):
      for slot in range(drafted[b]):
        where = kept if slot < count[b] else lost
        where[b, int(sure[b, slot] * 16)] += slot <= count[b]
      if kept[b].sum() + lost[b].sum() > 5 and kept[b].any() and lost[b].any():
        cost = [lost[b, t:].sum() / lost[b].sum()
                + 3 * kept[b, :t].sum() / kept[b].sum() for t in range(16)]
        # Float32 histograms: equal costs may differ in the last bits.
        got = float(state['threshold'][b]) * 16
        assert cost[round(got)] < min(cost) + 1e-5
        assert got == round(got)
        threshold[b] = got / 16
    np.testing.assert_allclose(state['threshold'], threshold)
  assert threshold[2] == 0.3 and (threshold[:2] != 0.3).all()


def test_confidence_needs_confidences():
  """Lookup reports none: the message says what to use instead."""
  rule = control.Confidence()
  draft, _ = make_round(np.ones((1, 2)), [0])
  with pytest.raises(ValueError, match="'heuristic' or 'tracking'"):
    rule.keep(rule.empty(1, 2), draft)


def follow(rule, acceptance: float, rounds: int, state, width: int = 5):
  """Runs scripted rounds with i.i.d. acceptance: (limits, state)."""
  rng = np.random.default_rng(1)
  context, limits = toys.context([[1]]), []
  limit = jax.jit(lambda s: rule.limit(s, context, width))
  for _ in range(rounds):
    num = int(limit(state)[0])
    limits.append(num)
    count = int(np.cumprod(rng.random(num) < acceptance).sum())
    draft, verdict = make_round(prefix([num], width), [count])
    state = update(rule, state, draft, verdict, jnp.ones(1, bool))
  return limits, state


def test_tracking_turns_off_probes_and_comes_back():
  """Off where drafting does not pay; one probe in `probe_every` rounds."""
  rule = control.Tracking(draft_cost=0.3, probe_every=8)
  limits, state = follow(rule, 0.02, 120, rule.empty(1, 5))
  late = np.asarray(limits[40:])
  assert (late > 0).sum() == len(late) // 8
  assert set(np.diff(np.flatnonzero(late))) == {8}
  limits, state = follow(rule, 0.97, 120, state)
  assert min(limits[-20:]) > 0 and np.mean(limits[-20:]) > 3
  assert float(state.acceptance[0]) > 0.8


def test_tracking_is_frozen_for_finished_rows():
  rule = control.Tracking()
  state = rule.empty(2, 3)
  draft, verdict = make_round(np.ones((2, 3)), [3, 3])
  after = update(rule, state, draft, verdict, jnp.asarray([True, False]))
  assert after.acceptance[0] > state.acceptance[0]
  assert after.acceptance[1] == state.acceptance[1]


def test_one_length_serves_all_rows():
  """It brings most tokens of all rows for the time that a round takes."""
  rule = control.Shared(costs=((2, 1.5), (4, 2.0)), probe_every=8)
  context = toys.context([[1]] * 3)

  def limit(acceptance, done=(False, False, False), idle=0):
    state = control._Track(jnp.asarray(acceptance), jnp.ones(3),
                   jnp.full((3,), idle))
    return np.asarray(rule.limit(
        state, context.replace(done=jnp.asarray(done)), 4)).tolist()

  # Tokens a round 3 and 5 (all accepted), 1 and 1 (none).
  assert limit([1.0, 1.0, 1.0]) == [4, 4, 4]
  assert limit([0.0, 0.0, 0.0]) == [0, 0, 0]
  # One good row of three: (5 + 1 + 1) / 2 and (3 + 1 + 1) / 1.5 a unit of
  # time, against 3 of plain decoding.
  assert limit([1.0, 0.0, 0.0]) == [4, 4, 4]
  dear = control.Shared(costs=((2, 2.0), (4, 3.0)))
  rule, cheap = dear, rule
  assert limit([1.0, 0.0, 0.0]) == [0, 0, 0]
  assert limit([1.0, 0.0, 0.0], (False, True, True)) == [4, 4, 4]
  rule = cheap
  assert limit([0.0, 0.0, 0.0], idle=7) != [0, 0, 0]  # a probe
  # Without costs: the straight line of the two numbers.
  line = dict(draft_cost=0.25, verify_cost=1.0, probe_every=8)
  listed = control.Shared(costs=tuple(
      (w, 1 + w / 4) for w in (1, 2, 3, 4)), probe_every=8)
  for acceptance in ([0.9, 0.8, 0.7], [0.5, 0.1, 0.9], [0.2, 0.2, 0.2]):
    rule = listed
    want = limit(acceptance)
    rule = control.Shared(**line)
    assert limit(acceptance) == want
