"""Mixtures that change with training, and the weights of slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.distill import losses, objective
from specjax.distill.objective import Mixture

HANDOVER = Mixture((('kl', 1.0),), (('kl', 0.1), ('l1', 0.9)), hold=0.3)


def inputs():
  rng = np.random.default_rng(0)
  log_p, log_q = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(2, 3, 6))))
                  for _ in range(2))
  return log_p, log_q, jnp.asarray(rng.random((2, 3)), jnp.float32)


@pytest.mark.parametrize('progress,kl,l1', [
    (-1.0, 1, 0), (0.0, 1, 0), (0.3, 1, 0), (0.65, 0.55, 0.45),
    (1.0, 0.1, 0.9), (2.0, 0.1, 0.9)])
def test_handover(progress, kl, l1):
  weights = jax.jit(HANDOVER.weights)(progress)
  assert set(weights) == {'kl', 'l1'}
  np.testing.assert_allclose(
      [weights['kl'], weights['l1']], [kl, l1], atol=1e-6)
  args = inputs()
  expected = kl * losses.loss('kl', *args) + l1 * losses.loss('l1', *args)
  found = objective.mixed(HANDOVER, progress, *args)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_mixture_without_an_end_stays():
  for mixture in (Mixture((('tvd', 2.0),)),
                  Mixture((('tvd', 2.0),), (('kl', 1.0),), hold=1.0)):
    for progress in (0.0, 0.5, 1.0, 3.0):
      weights = mixture.weights(progress)
      assert weights.pop('tvd') == 2.0 and not any(weights.values())
  assert hash(HANDOVER) == hash(Mixture(HANDOVER.first, HANDOVER.last, 0.3))


def test_unused_losses_are_not_computed(monkeypatch):
  seen, real = [], losses.loss
  monkeypatch.setattr(
      objective, 'loss', lambda n, *a, **o: seen.append(n) or real(n, *a, **o))
  mixture = Mixture((('kl', 1.0), ('ce', 0.0)), (('nla', 1.0), ('kl', 0.0)))
  objective.mixed(mixture, 0.0, *inputs())
  assert seen == ['kl', 'nla']


def test_options_reach_the_losses():
  log_p, log_q, weight = inputs()
  label = jnp.full((2, 3), -1)
  mixture = Mixture((('ce', 1.0),))
  assert objective.mixed(mixture, 0, log_p, log_q, weight, label=label) == 0
  halved = objective.mixed(mixture, 0, log_p, log_q, weight,
                           normaliser=2 * weight)
  np.testing.assert_allclose(
      halved, losses.loss('ce', log_p, log_q, weight) / 2, rtol=1e-6)


@pytest.mark.parametrize('arguments', [
    dict(first=()), dict(first=(('kld', 1.0),)), dict(hold=1.5),
    dict(first=(('kl', 1.0), ('kl', 1.0))), dict(first=(('kl', -1.0),)),
    dict(last=(('kl', 0.0),)), dict(last=(('kl', float('nan')),))])
def test_impossible_mixtures(arguments):
  with pytest.raises(ValueError):
    Mixture(**arguments)


def test_static_weights():
  np.testing.assert_allclose(
      objective.decay(3, 4.0), np.exp([0, -0.25, -0.5]), rtol=1e-6)
  np.testing.assert_allclose(
      objective.ttt_decay(4), [1, 0.8, 0.64, 0.512], rtol=1e-6)
  for bad in (lambda: objective.decay(3, 0.0),
              lambda: objective.ttt_decay(3, 1.5)):
    with pytest.raises(ValueError):
      bad()


def test_dpace_is_the_derivative_of_the_expected_length():
  rng = np.random.default_rng(1)
  log_q = jnp.log(jnp.asarray(rng.random((3, 5)), jnp.float32))
  valid = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]],
                      bool)

  def length(log_s):
    reached = jnp.exp(jnp.cumsum(jnp.where(valid, log_s, 0.0), -1))
    return jnp.sum(jnp.where(valid, reached, 0.0))

  for smoothing in (0.0, 0.3, 1.0):
    log_s = jnp.log((1 - smoothing) * jnp.exp(log_q) + smoothing)
    np.testing.assert_allclose(
        objective.dpace(log_q, valid, smoothing), jax.grad(length)(log_s),
        rtol=1e-5)
  np.testing.assert_array_equal(
      objective.dpace(log_q, valid, 1.0)[0], [5, 4, 3, 2, 1])


def test_dpace_has_no_gradient_and_survives_bad_slots():
  log_q = jnp.asarray([-1.0, -jnp.inf, jnp.nan, -2.0])
  valid = jnp.asarray([True, True, False, True])
  weight = objective.dpace(log_q, valid)
  s = np.array([(1 + np.exp(-1)) / 2, 0.5, (1 + np.exp(-2)) / 2])
  r = np.cumprod(s)
  np.testing.assert_allclose(
      weight, [r.sum(), r[1] + r[2], 0, r[2]], rtol=1e-6)
  grad = jax.grad(lambda x: objective.dpace(x, valid).sum())(log_q)
  assert not np.any(grad)
  with pytest.raises(ValueError, match='smoothing'):
    objective.dpace(log_q, valid, 1.5)
