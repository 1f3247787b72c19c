"""The law of whole texts out of the compiled loop: some rows of the grid.

Rows of four kinds (ragged prompts, own temperatures, filters, penalties, end
tokens and limits; one kind greedy) run in one batch; `certificates.sampled`
counts their texts. `python -m specjax.certify` makes all rows.
"""

import pytest

from specjax.certificates import cases, jobs, sampled

GRID = cases.grid()


@pytest.mark.parametrize('only, num, most', [
    (r'^small model / (speculative|block|match)$', 3, 3),
    (r'^lookup tree / (speculative|match)', 3, 2),
    (r'^on and off / ', 2, 3)])
def test_texts_follow_the_law(only, num, most):
  """`num` rows of drafters that draft up to `most` tokens deep."""
  rows = jobs.run(GRID, only=only)
  assert len(rows) == num
  for row in rows:
    assert row.passed, row
    if row.method == 'sampled':
      assert row.count >= 4 * sampled.BATCH and row.detectable_tv < 0.05
      # Nothing accepted, or nothing rejected, would show nothing.
      assert 0.05 < row.accepted < 0.8 * most
      assert 1 < row.tokens_per_round < 1 + 0.8 * most


def test_plain_decoding():
  for row in jobs.run(GRID, only='^no drafts / '):
    assert row.passed, row
    if row.method == 'sampled':
      assert row.accepted == 0 and row.tokens_per_round == 1


def test_faults_of_the_loop_are_found():
  rows = jobs.run(GRID, only=r'\(chain\)$|^chain / no fault$')
  assert len(rows) == 7
  for row in rows:
    assert row.passed, row
    if row.method == 'fault':
      assert row.p_value < 1e-12 and row.attempts == 2
