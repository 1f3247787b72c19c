"""The scheduler against the literal loop, and what makes it lossless."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.drafters.scheduler import schedule

SCHEDULE = jax.jit(schedule)
SHAPES = [(1, 5), (4, 3), (7, 1), (3, 6)]


def literal(chance, throughput, active) -> list[int]:
  """Admits the best slot that is next in its row, one after another."""
  rows, num = chance.shape
  lengths, total = [0] * rows, float(sum(active))
  load = sum(active)
  while True:
    ends = [(-np.prod(chance[r, :lengths[r] + 1]), r) for r in range(rows)
            if active[r] and lengths[r] < num]
    if not ends:
      return lengths
    cost, row = min(ends)
    if (total - cost) * throughput[load + 1] <= total * throughput[load]:
      return lengths
    total, load = total - cost, load + 1
    lengths[row] += 1


def problems(shape, count: int = 60):
  """Yields chances and speeds whose sums and products are exact."""
  rows, num = shape
  rng = np.random.default_rng(rows)
  for i in range(count):
    chance = rng.choice([0, 0.25, 0.5, 0.75, 1, 1], shape)
    drop = rng.choice([0, 0.25, 2], p=[0.4, 0.5, 0.1],
                      size=rows * (num + 1) + 1)
    speed = np.maximum(64 - np.cumsum(drop), 1 if i % 2 else 0)
    active = rng.random(rows) < (0.7 if i % 3 else 1)
    yield chance.astype(np.float32), speed.astype(np.float32), active


@pytest.mark.parametrize('shape', SHAPES)
def test_the_literal_loop(shape):
  found = []
  for chance, speed, active in problems(shape):
    got = np.asarray(SCHEDULE(chance, speed, active))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, literal(chance, speed, active))
    found.append(got.sum())
    if active.all():
      np.testing.assert_array_equal(got, schedule(
          jnp.asarray(chance), jnp.asarray(speed)))
  assert len(set(found)) > 2


@pytest.mark.parametrize('shape', SHAPES)
def test_more_load_never_admits_more(shape):
  """A speed that falls faster with the tokens of a step."""
  fewer = 0
  for chance, speed, active in problems(shape):
    falls = 0.98 ** np.arange(len(speed), dtype=np.float32)
    before = np.asarray(SCHEDULE(chance, speed, active))
    after = np.asarray(SCHEDULE(chance, speed * falls, active))
    assert (after <= before).all()
    fewer += int((after < before).any())
  assert fewer


def test_a_speed_that_does_not_fall_admits_all_that_may_be_accepted():
  chance = np.asarray([[1, 0.5, 0.5], [0.5, 0, 1]], np.float32)
  got = SCHEDULE(chance, np.ones(9, np.float32))
  np.testing.assert_array_equal(got, [3, 1])


@pytest.mark.parametrize('shape', SHAPES)
def test_a_draft_is_admitted_whatever_is_thought_of_later_ones(shape):
  """Chances from slot k on do not change what happens to those before."""
  rng = np.random.default_rng(9)
  moved = 0
  for chance, speed, active in problems(shape):
    row, slot = rng.integers(shape[0]), rng.integers(shape[1])
    other = chance.copy()
    other[row, slot:] = rng.random(shape[1] - slot)
    one, two = (np.asarray(SCHEDULE(c, speed, active))[row]
                for c in (chance, other))
    assert min(one, slot) == min(two, slot)
    moved += int(one != two)
  assert moved


def test_the_first_drop_ends_it():
  """The paper's example: two drafts would pay, but one alone does not."""
  speed = np.asarray([1, 1, 0.5, 0.45], np.float32)
  for second in (0.0, 1.0):
    got = SCHEDULE(np.asarray([[0.8, second]], np.float32), speed)
    np.testing.assert_array_equal(got, [0])
