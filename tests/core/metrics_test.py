"""Counters and the figures that are made of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import toys
from specjax.core import metrics, tree, types


def make_round(topology, valid, count, **kwargs):
  """Returns (draft, verdict) of a round in which `count` were accepted."""
  valid = jnp.asarray(valid, bool)
  count = jnp.asarray(count, jnp.int32)
  draft = types.Draft(
      topology=topology, tokens=jnp.zeros(valid.shape, jnp.int32),
      valid=valid, mode=jnp.zeros(topology.num_nodes, jnp.int32), **kwargs)
  verdict = types.Verdict(
      path=jnp.zeros((len(count), topology.max_depth + 1), jnp.int32),
      num_accepted=count, next_token=count * 0,
      excess=jnp.full(count.shape, 0.25), gave_up=count == 1)
  return draft, verdict


def start(batch: int, depth: int, done=()) -> types.SpecState:
  context = toys.context([[1]] * batch)
  context = context.replace(
      done=context.done.at[jnp.asarray(done, int)].set(True))
  return types.SpecState(
      context=context, target={}, drafter={},
      metrics=types.empty_metrics(batch, tree.chain(depth)))


def test_update_counts_what_was_emitted():
  """Cut-off drafts are not accepted; finished rows do not count."""
  state = start(4, 3, done=[3])
  draft, verdict = make_round(
      tree.chain(3), [[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]],
      [3, 1, 0, 3])
  # Row 0: all three accepted, but an end token cut the round after two.
  num_new = jnp.asarray([2, 2, 1, 0])
  got = metrics.update(
      state, draft, types.Scores(target_law=None), verdict, num_new)
  np.testing.assert_array_equal(
      got.histogram,
      [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
  np.testing.assert_array_equal(
      got.drafted, [[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]])
  np.testing.assert_array_equal(
      got.accepted, [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
  np.testing.assert_array_equal(got.excess, [0.25, 0.25, 0.25, 0])
  np.testing.assert_array_equal(got.gave_up, [0, 1, 0, 0])
  assert (got.bad_round == -1).all()


@pytest.mark.parametrize('width', [0, 1])
def test_narrow_rounds_count_into_wide_bins(width):
  """A narrower variant of a drafter keeps the counters' shapes."""
  state = start(2, 3)
  draft, verdict = make_round(
      tree.chain(width), np.ones((2, width)), [width, 0])
  got = metrics.update(
      state, draft, types.Scores(target_law=None), verdict,
      jnp.asarray([width + 1, 1]))
  assert got.histogram.shape == (2, 4) and got.drafted.shape == (2, 3)
  assert got.histogram[0, width] == 1 and got.histogram[1, 0] == 1
  np.testing.assert_array_equal(got.drafted.sum(axis=1), [width, width])


def test_first_bad_round_is_kept():
  """The round of the first NaN, per row; later ones do not overwrite.

  Row 3's NaN stands behind a rejected draft: nothing came of it.
  """
  state = start(4, 1, done=[2])
  draft, verdict = make_round(tree.chain(1), np.ones((4, 1)), [0, 0, 0, 0])
  finite = jnp.asarray(
      [[True, True], [False, True], [False, False], [True, False]])
  for rounds in (4, 5):
    context = state.context.replace(rounds=jnp.full(4, rounds))
    state = state.replace(context=context)
    state = state.replace(metrics=metrics.update(
        state, draft, types.Scores(target_law=None, finite=finite), verdict,
        jnp.asarray([1, 0, 0, 1])))
  np.testing.assert_array_equal(state.metrics.bad_round, [-1, 4, -1, -1])


def test_drafted_depths_of_a_tree():
  """A depth counts as drafted when any of its slots was."""
  topology = tree.from_parents((0, 0, 1, 2, 4))
  draft, _ = make_round(
      topology, [[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [0] * 5], [0, 0, 0])
  np.testing.assert_array_equal(
      metrics.drafted_at(draft), [[1, 1, 0], [1, 1, 0], [0, 0, 0]])


def test_summary_by_hand():
  """Ten rounds, K = 2: the definitions of the module, with numbers."""
  got = metrics.summarise(
      np.array([4, 3, 3]), np.array([9, 8]), np.array([6, 3]), 19, 10)
  assert got['mean_acceptance_length'] == 1.9
  assert got['draft_acceptance_rate'] == pytest.approx(9 / 17)
  assert got['per_position_acceptance'] == [0.6, 0.3]
  # Of nine first drafts six were kept; of the six, three went on.
  assert got['conditional_acceptance'] == pytest.approx([6 / 9, 3 / 6])
  assert got['acceptance_histogram'] == [4, 3, 3]


def test_summary_of_plain_decoding():
  """No drafts: length exactly 1, and no rate that divides by nothing."""
  got = metrics.summarise(
      np.array([7]), np.array([], int), np.array([], int), 7, 7)
  assert got['mean_acceptance_length'] == 1.0
  assert got['draft_acceptance_rate'] is None
  assert got['conditional_acceptance'] == []
  empty = metrics.summarise(
      np.zeros(2, int), np.zeros(1, int), np.zeros(1, int), 0, 0)
  assert empty['mean_acceptance_length'] is None
