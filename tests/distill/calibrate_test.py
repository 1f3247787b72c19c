"""Sequential temperature scaling, on heads that are wrong in known ways."""

import numpy as np
import pytest

from specjax.distill import calibrate

NUM, SLOTS = 40_000, 3
# What the logits below were multiplied by.
TRUE = np.asarray([2.0, 0.5, 4.0])


def rounds(seed: int):
  """Returns logits, and drafts that are accepted with known chances."""
  rng = np.random.default_rng(seed)
  honest = rng.normal(1.0, 1.5, (NUM, SLOTS))
  accepted = rng.random((NUM, SLOTS)) < 1 / (1 + np.exp(-honest))
  return honest * TRUE, accepted


def errors(logits, accepted, temperatures):
  label = np.logical_and.accumulate(accepted, axis=1)
  chance = calibrate.joint(logits, temperatures)
  return [calibrate.ece(chance[:, k], label[:, k]) for k in range(SLOTS)]


def test_the_error_by_hand():
  # Bins of 0.05: 0.31 and 0.33 share one, 0.9 is alone, 1 is in the last.
  chance, label = [0.31, 0.33, 0.9, 1.0], [0, 1, 1, 0]
  want = (abs(0.64 - 1) + 0.1 + 1.0) / 4
  assert calibrate.ece(chance, label) == pytest.approx(want)
  assert calibrate.ece(chance, label, [1, 1, 0, 0]) == pytest.approx(0.18)
  assert calibrate.ece(chance, label, num_bins=1) == pytest.approx(0.54 / 4)
  assert calibrate.ece(chance, label, [0] * 4) == 0


def test_temperatures_undo_what_was_done():
  """Whatever comes after a rejection is not taken for accepted."""
  logits, accepted = rounds(0)
  found = calibrate.fit(logits, accepted)
  np.testing.assert_allclose(found, TRUE, rtol=0.12)
  held_out = rounds(1)
  before, after = errors(*held_out, 1.0), errors(*held_out, found)
  assert min(before) > 0.02 and max(after) < 0.012


def test_each_is_the_best_of_the_grid_after_those_before():
  logits, accepted = rounds(2)
  grid = np.asarray([0.5, 1.0, 2.0, 3.0])
  found = calibrate.fit(logits, accepted, grid=grid)
  for k in range(SLOTS):
    tried = [errors(logits, accepted, np.r_[found[:k], t, found[k + 1:]])[k]
             for t in grid]
    assert grid[np.argmin(tried)] == found[k]


def test_only_what_was_drafted_counts():
  logits, accepted = rounds(3)
  drafted = np.zeros(logits.shape, bool)
  drafted[:, 0] = True
  drafted[: NUM // 2, 1] = True
  wrong = accepted.copy()
  wrong[NUM // 2:, 1] = False
  found = calibrate.fit(logits, wrong, drafted)
  np.testing.assert_allclose(found, [*TRUE[:2], 1.0], rtol=0.12)
  assert found[2] == 1.0


@pytest.mark.parametrize('bad,match', [
    (dict(accepted=np.ones((2, 3))), 'alike'),
    (dict(drafted=np.ones((4, 2))), 'alike'),
    (dict(grid=[1.0, 0.0]), 'grid'), (dict(grid=[]), 'grid')])
def test_bad_values_are_named(bad, match):
  good = dict(logits=np.zeros((4, 3)), accepted=np.ones((4, 3), bool))
  with pytest.raises(ValueError, match=match):
    calibrate.fit(**{**good, **bad})
