"""Laws over real vectors: densities, draws, paths, and what is left of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from specjax.certificates import walks
from specjax.core import chains, density

KEYS = jax.random.split(jax.random.key(3), 20_000)
ROWS = len(KEYS)


def gaussian(mean, std):
  """Returns the same law in every row."""
  mean = jnp.broadcast_to(jnp.asarray(mean, jnp.float32), (ROWS, len(mean)))
  return density.Gaussian(mean, jnp.full_like(mean, np.log(std)))


def mixture():
  """Returns a mixture of two parts, two channels."""
  mean = jnp.asarray([[-1.0, 0.5], [1.5, 0.0]])
  return density.Mixture(
      jnp.broadcast_to(jnp.asarray([0.3, 1.1]), (ROWS, 2)),
      jnp.broadcast_to(mean, (ROWS, 2, 2)),
      jnp.broadcast_to(jnp.log(jnp.asarray([0.4, 0.7]))[:, None],
                       (ROWS, 2, 2)))


def path(rows=ROWS, who='target', **kwargs):
  """Returns the law of a toy's denoising paths, `rows` times."""
  process = walks.diffusion(**kwargs)
  return chains.Path(process, walks.params(who), jnp.full((rows, 1), 0.2),
                      jnp.full((rows,), 0.9))


def test_densities_are_scipys():
  x = np.random.default_rng(0).normal(size=(ROWS, 2))
  law = gaussian((0.3, -1.0), 0.8)
  want = stats.norm.logpdf(x, (0.3, -1.0), 0.8).sum(axis=1)
  np.testing.assert_allclose(law.log_prob(jnp.asarray(x)), want, atol=1e-4)
  weight = np.exp([0.3, 1.1]) / np.exp([0.3, 1.1]).sum()
  parts = [np.log(w) + stats.norm.logpdf(x, m, s).sum(axis=1)
           for w, m, s in zip(weight, ((-1, 0.5), (1.5, 0)), (0.4, 0.7),
                              strict=True)]
  np.testing.assert_allclose(
      mixture().log_prob(jnp.asarray(x)), np.logaddexp(*parts), atol=1e-4)


@pytest.mark.parametrize('law', [gaussian((0.3, -1.0), 0.8), mixture()],
                         ids=['gaussian', 'mixture'])
def test_draws_have_the_density(law):
  """Mean and spread of the log-density, by quadrature of the density."""
  axis = np.linspace(-6, 6, 301)
  grid = np.stack(np.meshgrid(axis, axis, indexing='ij'), -1).reshape(-1, 2)
  row = jax.tree.map(lambda x: x[:1], law)
  log_p = np.asarray(row.log_prob(jnp.asarray(grid)), float)
  weight = np.exp(log_p) * (axis[1] - axis[0])**2
  assert abs(weight.sum() - 1) < 1e-3
  draws = np.asarray(law.sample(KEYS), float)
  seen = np.asarray(law.log_prob(jnp.asarray(draws)), float)
  entropy = (weight * log_p).sum()
  assert abs(seen.mean() - entropy) < 4 * seen.std() / np.sqrt(ROWS)
  mean = (weight[:, None] * grid).sum(axis=0)
  np.testing.assert_allclose(
      draws.mean(axis=0), mean, atol=4 * draws.std() / np.sqrt(ROWS))


def test_rows_are_picked():
  law = density.Gaussian(jnp.arange(12.0).reshape(2, 3, 2),
                         jnp.zeros((2, 3, 2)))
  np.testing.assert_array_equal(
      law.at(jnp.asarray([2, 0])).mean, [[4, 5], [6, 7]])
  assert law.at(jnp.asarray([[2, 0], [1, 1]])).mean.shape == (2, 2, 2)
  process = walks.diffusion()
  paths = chains.Path(process, walks.params('target'),
                       jnp.arange(6.0).reshape(2, 3, 1), jnp.ones((2, 3)))
  some = paths.at(jnp.asarray([2, 0]))
  np.testing.assert_array_equal(some.condition, [[2], [3]])
  assert some.params['mean'].shape == (2, 1)  # shared, not picked


def test_path_is_its_noise_and_its_steps():
  """A path's density is the sum of its steps', whatever it is cut into."""
  law = path(50)
  event = law.sample(KEYS[:50])
  np.testing.assert_array_equal(law.token(event), event[:, -1])
  num = law.process.num_steps
  noise = law.noise(event, num)
  again = law.run(event[:, 0], noise)
  np.testing.assert_allclose(again, event[:, 1:], atol=2e-5)
  whole = law.tail(event[:, 0], 0).log_prob(event[:, 1:])
  last = law.tail(event[:, 3], 3).log_prob(event[:, 4:])
  front = np.zeros(50)
  for i in range(3):
    mean, log_std = law.moments(event[:, i], jnp.int32(i))
    front += stats.norm.logpdf(
        event[:, i + 1], mean, np.exp(log_std))[:, 0]
  np.testing.assert_allclose(whole - last, front, atol=1e-4)
  # Sampling an end from a state uses the steps from there on.
  tail = law.tail(event[:, 3], 3)
  assert tail.sample(KEYS[:50]).shape == (50, num - 3, 1)
  np.testing.assert_allclose(
      law.run(event[:, 3], noise[:, 3:], 3), event[:, 4:], atol=2e-5)


@pytest.mark.parametrize('most', [1, 3 * 6, 5 * 6])  # steps: 1, 3, 5 of 8
def test_many_states_are_scored_in_parts(monkeypatch, most):
  process = walks.diffusion()
  assert process.num_steps == 8
  law = chains.Path(
      process, walks.params('target'), jnp.arange(6.0).reshape(2, 3, 1) / 9,
      jnp.linspace(0.8, 1, 6).reshape(2, 3))
  event = law.sample(KEYS[:6].reshape(2, 3))
  whole = law.tail(event[..., 0, :], 0).moments(event[..., 1:, :])
  told = []
  monkeypatch.setattr(chains, '_MOST_STATES', most)
  monkeypatch.setattr(type(law), '_in_parts', lambda self, *args, f=(
      chains.Path._in_parts): told.append(args[2]) or f(self, *args))
  parts = law.tail(event[..., 0, :], 0).moments(event[..., 1:, :])
  assert told == [max(1, most // 6)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-5), parts, whole)


def test_last_step_without_noise_has_no_density():
  law = path(4, last_noise=False)
  event = law.sample(KEYS[:4])
  mean, _ = law.moments(event[:, -2], jnp.int32(law.process.num_steps - 1))
  np.testing.assert_allclose(event[:, -1], mean, atol=1e-6)
  with pytest.raises(ValueError, match='last_noise=True'):
    law.tail(event[:, 0], 0).log_prob(event[:, 1:])


def test_residual_law_and_its_price():
  """What is left of p once q is taken off; 1 / TV draws on average."""
  p, q = gaussian((0.0,), 1.0), gaussian((0.8,), 1.0)
  total = 2 * stats.norm.cdf(0.4) - 1  # TV
  turns = []

  def log_ratio(rows, x):
    jax.debug.callback(lambda: turns.append(1), ordered=True)
    return p.rows(rows).log_prob(x) - q.rows(rows).log_prob(x)

  use = jnp.arange(ROWS) % 4 > 0
  found, gave_up = density.thin(p, log_ratio, KEYS, use)
  assert not np.any(gave_up)
  found = np.asarray(found)[:, 0]
  def cdf(x):
    left = stats.norm.cdf(x) - stats.norm.cdf(x, 0.8)
    return np.clip(left / total, 0, 1) * (x < 0.4) + (x >= 0.4)
  assert stats.kstest(found[use], cdf).pvalue > 1e-3
  assert stats.kstest(found[~np.asarray(use)], stats.norm.cdf).pvalue > 1e-3
  assert found[use].max() <= 0.4 + 1e-4  # where q is larger: never
  jax.effects_barrier()
  # The slowest of all rows draws so often; the others help it.
  alone = np.log(ROWS) / -np.log(1 - total)
  assert alone > 20 and 1 / total < len(turns) <= 8


@pytest.mark.parametrize('at_once, most', [(1, None), (3, None), (2, 5)])
def test_what_is_left_does_not_depend_on_neighbours(at_once, most):
  """Rows that are done draw for others, by the others' own noise."""
  p, q = gaussian((0.0,), 1.0), gaussian((0.3,), 1.0)
  use = jnp.arange(ROWS) % 4 > 0

  def thin(rows, at_once):
    mine, theirs = p.rows(rows), q.rows(rows)
    return density.thin(
        mine, lambda i, x: (mine.rows(i).log_prob(x)
                            - theirs.rows(i).log_prob(x)),
        KEYS[rows], use[rows], most, at_once)

  together = thin(jnp.arange(ROWS), at_once)
  assert np.any(together[1]) == (most is not None)
  for rows in (jnp.array([5]), jnp.arange(40, 2, -3)):
    jax.tree.map(lambda a, b, rows=rows: np.testing.assert_allclose(
        a[rows], b, rtol=1e-6), together, thin(rows, 1))


def test_cap_is_counted_and_keeps_a_draw_of_the_target():
  p = gaussian((0.0,), 1.0)
  found, gave_up = p.residual(p, KEYS, jnp.ones((ROWS,), bool), most=3)
  assert np.all(gave_up)  # nothing is left of p
  assert stats.kstest(found[:, 0], stats.norm.cdf).pvalue > 1e-3
  _, gave_up = p.residual(p, KEYS, jnp.zeros((ROWS,), bool), most=3)
  assert not np.any(gave_up)


def test_density_that_is_no_number_ends():
  p = gaussian((0.0,), 1.0)
  q = density.Gaussian(p.mean.at[::2].set(jnp.nan), p.log_std - 1)
  _, gave_up = p.residual(q, KEYS, jnp.ones((ROWS,), bool))
  np.testing.assert_array_equal(gave_up, np.arange(ROWS) % 2 == 0)
  with pytest.raises(ValueError, match='weighted'):
    p.residual(q, KEYS, jnp.ones((ROWS,), bool), scale=jnp.ones((ROWS,)))
