"""Losses: closed forms, gradients against independent ones, bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.distill import losses

B, T, V, W = 2, 5, 12, 8  # W of V tokens are kept
POINTWISE = [name for name in losses.NAMES if name != 'tvd_pp']
# Two tokens whose terms are easily written down.
P2, Q2 = np.array([0.75, 0.25]), np.array([0.5, 0.5])


def laws(seed: int, kept: int = W, vocabulary: int = V):
  """Returns log_p, of less than all mass, and logits of the drafter."""
  rng = np.random.default_rng(seed)
  logits = 2 * rng.normal(size=(B, T, vocabulary))
  log_p = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))[..., :kept]
  return log_p, jnp.asarray(rng.normal(size=(B, T, kept)), jnp.float32)


def mask(seed: int = 0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) < 0.7),
                     jnp.float32)


def of_logits(name, log_p, logits, weight, **options):
  return losses.loss(name, log_p, jax.nn.log_softmax(logits), weight,
                     **options)


@functools.partial(jax.jit, static_argnames=('name', 'n_samples'))
def gradient(name, log_p, logits, weight, n_samples=None, key=None):
  return jax.grad(of_logits, argnums=2)(
      name, log_p, logits, weight, n_samples=n_samples, key=key)


def numeric(name: str, p, q, tail: float, beta: float = 0.5, label=None):
  """Returns a loss in float64, over a law with the tail written out."""
  p, q = np.append(p, tail), np.append(q, 0.0)
  m = beta * p + (1 - beta) * q
  alpha = np.minimum(p, q).sum()
  kept = slice(0, -1)

  def kl(a, b):
    use = a > 0
    return np.sum(a[use] * np.log(a[use] / b[use]))

  best = np.argmax(p[kept]) if label is None else label
  return {
      'ce': -math.log(q[best]), 'kl': kl(p[kept], q[kept]),
      'reverse_kl': kl(q, p), 'tvd': 1 - alpha, 'l1': np.abs(p - q).sum(),
      'jsd': beta * kl(p, m) + (1 - beta) * kl(q, m),
      'nla': -math.log(alpha),
      'lk': math.exp(-3 * alpha) * kl(p[kept], q[kept])
            + (1 - math.exp(-3 * alpha)) * (1 - alpha),
  }[name]


@pytest.mark.parametrize('name', POINTWISE)
def test_values_are_those_of_the_definition(name):
  log_p, logits = laws(1)
  log_q = jax.nn.log_softmax(logits)
  found = np.asarray(losses.pointwise(name, log_p, log_q, beta=0.3))
  p, q = np.exp(np.float64(log_p)), np.exp(np.float64(log_q))
  for i in np.ndindex(B, T):
    expected = numeric(name, p[i], q[i], 1 - p[i].sum(), beta=0.3)
    np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name,value', [
    ('ce', math.log(2)), ('kl', 0.75 * math.log(1.5) - 0.25 * math.log(2)),
    ('reverse_kl', 0.5 * math.log(4 / 3)), ('tvd', 0.25), ('l1', 0.5),
    ('jsd', 0.375 * math.log(1.2) + 0.25 * math.log(0.8)
            + 0.125 * math.log(2 / 3) + 0.25 * math.log(4 / 3)),
    ('nla', math.log(4 / 3))])
def test_two_tokens(name, value):
  found = losses.pointwise(name, jnp.log(P2), jnp.log(Q2))
  np.testing.assert_allclose(found, value, rtol=2e-6)


def test_half_of_l1_is_tvd_and_equals_are_at_distance_zero():
  log_p, logits = laws(2)
  log_q = jax.nn.log_softmax(logits)
  l1 = losses.pointwise('l1', log_p, log_q)
  np.testing.assert_array_equal(l1, 2 * losses.pointwise('tvd', log_p, log_q))
  direct = jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1) + (
      1 - jnp.exp(log_p).sum(-1))
  np.testing.assert_allclose(l1, direct, atol=2e-6)
  for name in set(POINTWISE) - {'ce'}:
    same = losses.pointwise(name, log_q, log_q)
    np.testing.assert_allclose(same, 0, atol=1e-6, err_msg=name)
    at_zero = gradient(name, log_q, logits, jnp.ones((B, T)))
    np.testing.assert_allclose(at_zero, 0, atol=1e-6, err_msg=name)


def test_hard_labels_and_tokens_that_are_not_kept():
  log_p, logits = laws(3)
  log_q = jax.nn.log_softmax(logits)
  label = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) % W
  label = label.at[1, 2].set(-1)
  found = np.asarray(losses.pointwise('ce', log_p, log_q, label=label))
  expected = -np.take_along_axis(
      np.asarray(log_q), np.asarray(label)[..., None], -1)[..., 0]
  assert found[1, 2] == 0
  expected[1, 2] = 0
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('name', [n for n in POINTWISE if n != 'lk'])
def test_gradients_are_the_finite_differences(name):
  log_p, logits = laws(4)
  direction = jnp.asarray(np.random.default_rng(5).normal(size=logits.shape))
  weight = mask()
  p, w = np.exp(np.float64(log_p)), np.float64(weight)

  def value(step):
    x = np.float64(logits) + step * np.float64(direction)
    q = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    terms = [w[i] * numeric(name, p[i], q[i], 1 - p[i].sum())
             for i in np.ndindex(B, T)]
    return sum(terms) / w.sum()

  slope = (value(1e-5) - value(-1e-5)) / 2e-5
  found = jnp.vdot(gradient(name, log_p, logits, weight), direction)
  np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-6)


def test_the_share_of_lk_has_no_gradient():
  log_p, logits = laws(4)
  alpha = losses.acceptance(log_p, jax.nn.log_softmax(logits))
  shares = {'kl': jnp.exp(-3 * alpha), 'tvd': 1 - jnp.exp(-3 * alpha)}
  parts = [gradient(name, log_p, logits, share) * share.sum()
           for name, share in shares.items()]
  found = gradient('lk', log_p, logits, jnp.ones((B, T)))
  np.testing.assert_allclose(found, sum(parts) / (B * T), atol=1e-6)


def policy_gradient(log_p, logits, weight, reward):
  """Returns -E_{x ~ q}[grad log q(x) * reward(x)], by enumeration."""
  q = jax.nn.softmax(logits)
  # d log q(x) / d logit(v) = 1[x = v] - q(v)
  score = jnp.eye(W) - q[..., None, :]
  per = -jnp.einsum('btx,btx,btxv->btv', q, reward, score)
  return per * weight[..., None] / weight.sum()


def test_gradient_of_tvd_is_a_policy_gradient():
  log_p, logits = laws(6)
  weight = mask()
  reward = (log_p > jax.nn.log_softmax(logits)).astype(jnp.float32)
  np.testing.assert_allclose(
      gradient('tvd', log_p, logits, weight),
      policy_gradient(log_p, logits, weight, reward), atol=1e-7)


def sigma(log_p, logits, weight) -> float:
  q = jax.nn.softmax(logits)
  q = np.float64(q) * np.float64(weight)[..., None] / np.float64(weight).sum()
  reward = np.asarray(log_p > jax.nn.log_softmax(logits))
  mu = np.sum(q * reward)
  return math.sqrt(np.sum(q * (reward - mu) ** 2) + 1e-6)


def test_gradient_of_tvd_pp_is_that_of_tvd_over_sigma():
  log_p, logits = laws(7)
  weight = mask()
  expected = gradient('tvd', log_p, logits, weight) / sigma(
      log_p, logits, weight)
  assert jnp.abs(expected).max() > 0.01
  np.testing.assert_allclose(
      gradient('tvd_pp', log_p, logits, weight), expected, atol=1e-6)


def test_sampled_tvd_pp_is_unbiased():
  log_p, logits = laws(8)
  weight = mask()
  exact = gradient('tvd_pp', log_p, logits, weight)
  keys = jax.random.split(jax.random.key(0), 1000)
  drawn = np.asarray(jax.jit(jax.vmap(
      lambda k: gradient('tvd_pp', log_p, logits, weight, 3, k)))(keys))
  error = drawn.std(0, ddof=1) / math.sqrt(len(keys))
  assert drawn.std(0).max() > 0.01  # it is sampled
  # 80 means within 4 standard errors: 0.5 % of seeds would fail.
  assert np.all(np.abs(drawn.mean(0) - exact) <= 4 * error + 1e-6)


def test_renormalising_overstates_acceptance():
  log_p, logits = laws(9)
  log_q = jax.nn.log_softmax(logits)
  exact = losses.acceptance(log_p, log_q)
  kept = losses.renormalise(log_p)
  np.testing.assert_allclose(jnp.exp(kept).sum(-1), 1, atol=1e-6)
  excess = losses.acceptance(kept, log_q) - exact
  assert jnp.all(excess > 0.003) and jnp.mean(excess) > 0.05
  # Its KL has the same gradient as the full one, mass aside.
  mass = jnp.exp(log_p).sum(-1)
  np.testing.assert_allclose(
      losses.pointwise('kl', log_p, log_q),
      mass * losses.pointwise('kl', kept, log_q) + mass * jnp.log(mass),
      atol=1e-6)
  nothing = losses.renormalise(jnp.full((3,), -jnp.inf))
  np.testing.assert_array_equal(nothing, np.full(3, -np.inf))


@pytest.mark.parametrize('name', losses.NAMES)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_zeros_and_bf16_are_finite(name, dtype):
  log_p, logits = laws(10)
  log_q = jax.nn.log_softmax(logits)
  log_p = log_p.at[..., 1].set(-jnp.inf).at[0, 0].set(-jnp.inf)
  log_q = log_q.at[..., 1:3].set(-jnp.inf).at[1, 1].set(-jnp.inf)
  log_p, log_q = log_p.astype(dtype), log_q.astype(dtype)
  value, (to_p, to_q) = jax.value_and_grad(losses.loss, argnums=(1, 2))(
      name, log_p, log_q, jnp.ones((B, T)))
  assert value.dtype == jnp.float32 and jnp.isfinite(value)
  assert to_q.dtype == dtype and jnp.isfinite(to_q).all()
  assert jnp.any(to_q != 0) and not jnp.any(to_p)


@pytest.mark.parametrize('name', losses.NAMES)
def test_bf16_is_near_float32(name):
  log_p, logits = laws(11)
  log_q = jax.nn.log_softmax(logits)
  weight = mask()
  exact = losses.loss(name, log_p, log_q, weight)
  found = losses.loss(name, log_p.astype(jnp.bfloat16),
                      log_q.astype(jnp.bfloat16), weight)
  # bf16 keeps 8 bits of logarithms of size 4: 1 % of a probability.
  np.testing.assert_allclose(found, exact, atol=0.03)


@pytest.mark.parametrize('name', losses.NAMES)
def test_masked_positions_do_not_matter(name):
  log_p, logits = laws(12)
  log_q = jax.nn.log_softmax(logits)
  weight = mask().at[0, :2].set(0)
  run = jax.value_and_grad(losses.loss, argnums=2)
  value, grad = run(name, log_p, log_q, weight)
  dirty_p = log_p.at[0, 0].set(jnp.nan)
  dirty_q = log_q.at[0, 0].set(jnp.nan).at[0, 1].set(jnp.inf)
  again, dirty = run(name, dirty_p, dirty_q, weight)
  assert value == again and value != 0
  np.testing.assert_array_equal(grad, dirty)
  nothing, zero = run(name, dirty_p, dirty_q, jnp.zeros((B, T)))
  assert nothing == 0 and not np.any(zero)


def test_means_in_parts_add_up():
  value = jnp.asarray([1.0, 2.0, jnp.nan, 4.0])
  weight = jnp.asarray([1.0, 0.5, 0.0, 0.5])
  assert losses.weighted_mean(value, weight) == 2.0
  parts = [losses.weighted_mean(value[i:i + 2], weight[i:i + 2], weight)
           for i in (0, 2)]
  assert sum(parts) == 2.0
  assert losses.weighted_mean(value, weight, jnp.ones(8)) == 0.5
  log_p, logits = laws(13)
  args = log_p, jax.nn.log_softmax(logits), jnp.full((B, T), 0.25)
  for name in losses.NAMES:
    np.testing.assert_allclose(
        losses.loss(name, *args, normaliser=jnp.ones((B, T))),
        0.25 * losses.loss(name, *args), rtol=1e-6, atol=1e-7)


def test_top_k_ce():
  log_p, logits = laws(14)
  log_q = jax.nn.log_softmax(logits)
  p, q = np.asarray(log_p), np.asarray(log_q)
  order = np.argsort(-p, -1)[..., :3]
  best = np.take_along_axis(p, order, -1)
  expected = -np.sum(np.exp(best) * np.take_along_axis(q, order, -1), -1)
  np.testing.assert_allclose(
      losses.top_k_ce(log_p, log_q, 3), expected, rtol=1e-6)
  whole = losses.top_k_ce(log_p, log_q, W)
  np.testing.assert_allclose(whole, -jnp.sum(jnp.exp(log_p) * log_q, -1),
                             rtol=1e-6)
  with pytest.raises(ValueError, match='k=9'):
    losses.top_k_ce(log_p, log_q, 9)


def test_smooth_l1():
  x = jnp.asarray([[0.0, 0.5, -3.0, 1.0], [1e30, 0.0, 0.0, 0.0]])
  value = losses.smooth_l1(x, jnp.zeros_like(x))
  np.testing.assert_allclose(value, [(0.125 + 2.5 + 0.5) / 4, 2.5e29])
  to_x, to_target = jax.grad(
      lambda *a: losses.smooth_l1(*a).sum(), argnums=(0, 1))(
          x, jnp.zeros_like(x))
  np.testing.assert_allclose(
      to_x, np.array([[0, 0.5, -1, 1], [1, 0, 0, 0]]) / 4)
  assert not np.any(to_target)


def test_bce():
  logit = jnp.asarray([0.0, 2.0, -2.0, 1e4])
  label = jnp.asarray([0.3, 0.9, 0.0, 1.0])
  s = 1 / (1 + np.exp(-np.float64(logit[:3])))
  expected = -(label[:3] * np.log(s) + (1 - label[:3]) * np.log(1 - s))
  found = losses.bce(logit, label)
  np.testing.assert_allclose(found[:3], expected, rtol=1e-5)
  assert found[3] == 0
  to_logit, to_label = jax.grad(
      lambda *a: losses.bce(*a).sum(), argnums=(0, 1))(logit, label)
  np.testing.assert_allclose(to_logit[:3], s - label[:3], atol=1e-6)
  assert not np.any(to_label)


def test_errors():
  log_p, logits = laws(15)
  weight = jnp.ones((B, T))
  with pytest.raises(ValueError, match='tvd_pp'):
    losses.pointwise('tvd_pp', log_p, logits)
  with pytest.raises(ValueError, match="'kld'"):
    losses.loss('kld', log_p, logits, weight)
  with pytest.raises(ValueError, match='beta=1'):
    losses.pointwise('jsd', log_p, logits, beta=1.0)
  with pytest.raises(ValueError, match='eps=0'):
    losses.pointwise('nla', log_p, logits, eps=0.0)
  with pytest.raises(ValueError, match='both'):
    losses.tvd_pp(log_p, logits, weight, n_samples=2)
  with pytest.raises(ValueError, match='n_samples=0'):
    losses.tvd_pp(log_p, logits, weight, n_samples=0, key=jax.random.key(0))
  with pytest.raises(AssertionError):
    losses.loss('kl', log_p, logits, weight[..., None])
  with pytest.raises(AssertionError):
    losses.acceptance(log_p, logits[..., :1])
