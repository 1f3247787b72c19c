"""Keys: one stream for each row, purpose and counter, and never twice."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import toys
from specjax.core import keys
from specjax.core.keys import Purpose


def data(key) -> np.ndarray:
  return np.asarray(jax.random.key_data(key)).reshape(-1, 2)


def test_all_streams_differ():
  """No (row, purpose, round, index) or (row, position) shares a key."""
  context = toys.context([[1]] * 3)
  found = []
  for rounds, purpose, index in itertools.product(range(4), Purpose, range(3)):
    now = context.replace(rounds=jnp.full(3, rounds))
    found.append(data(keys.row(now, purpose, index)))
  position = jnp.tile(jnp.arange(5), (3, 1))
  found.append(data(keys.position(context, position)))
  found = np.concatenate(found)
  assert len(np.unique(found, axis=0)) == len(found)


def test_position_keys_ignore_the_round():
  """Coupled rules draw the same noise in whatever round a position comes."""
  context = toys.context([[1]] * 2)
  position = jnp.asarray([[3, 4], [5, 6]])
  later = context.replace(rounds=context.rounds + 7)
  np.testing.assert_array_equal(
      data(keys.position(context, position)),
      data(keys.position(later, position)))
  one = keys.position(context, position[:, 1])
  np.testing.assert_array_equal(
      data(one), data(keys.position(context, position)[:, 1]))


def test_row_keys_ignore_neighbours_and_slots():
  """A key is a function of the row's own key and counters."""
  context = toys.context([[1]] * 4).replace(rounds=jnp.arange(4))
  order = jnp.asarray([2, 0, 3, 1])
  moved = context.replace(
      keys=context.keys[order], rounds=context.rounds[order])
  np.testing.assert_array_equal(
      data(keys.row(context, Purpose.ACCEPT))[order],
      data(keys.row(moved, Purpose.ACCEPT)))


@pytest.mark.parametrize('purpose,number', [
    ('DRAFT', 1), ('ACCEPT', 2), ('RESIDUAL', 3), ('MATCH', 4),
    ('CONTROL', 5)])
def test_numbers_of_purposes_are_frozen(purpose, number):
  """Renumbering would change the text of every seed."""
  assert Purpose[purpose] == number


def test_noise_is_what_it_says():
  """Uniforms in [0, 1) and Gumbel noise, by moments over 30000 draws."""
  k = jax.random.split(jax.random.key(1), 3000)
  u = np.asarray(keys.uniform(k, 10))
  assert u.shape == (3000, 10) and u.min() >= 0 and u.max() < 1
  # Five standard errors.
  assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size)
  g = np.asarray(keys.gumbel(k.reshape(300, 10), 10))
  assert g.shape == (300, 10, 10) and np.isfinite(g).all()
  assert abs(g.mean() - np.euler_gamma) < 5 * np.pi / np.sqrt(6 * g.size)
  assert keys.uniform(k, 0).shape == (3000, 0)
