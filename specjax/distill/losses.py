"""What a drafter is trained on: losses between its law and the target's.

`W` is the number of tokens that the drafter can propose: the vocabulary, or
the kept part of it. `log_p f32|bf16[...,W]` are the target's (teacher's) log
probabilities of those tokens, normalised over the *full* vocabulary, so that
`sum p <= 1`; what is missing is mass that the drafter can never match, and is
counted as rejected. `log_q f32|bf16[...,W]` are the drafter's, normalised
over the W tokens. -inf is a probability of 0.

    weight = mask * objective.decay(num_slots, gamma=4.0)
    value = loss('kl', log_p, log_q, weight)

All arithmetic is float32, and no gradient flows to the teacher. Values and
gradients are finite wherever no input is NaN or +inf; positions of weight 0
change neither, whatever they hold. A -inf inside a logarithm counts as -104,
below which float32 has no probability.

References: Leviathan et al. 2023, arXiv:2211.17192 (acceptance); Zhou et al.
2024, arXiv:2310.08461 (divergences); Goel et al. 2024, arXiv:2403.00858
(TVD++); Zhang et al. 2025, arXiv:2408.15766 (top-K); Li et al. 2025,
arXiv:2503.01840 (EAGLE-3).
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

Array = jax.Array

NAMES = ('ce', 'kl', 'reverse_kl', 'jsd', 'tvd', 'l1', 'tvd_pp', 'nla', 'lk')

_LOG_LEAST = -104.0  # exp(-104) is 0 in float32, denormal numbers included


def acceptance(log_p: Array, log_q: Array) -> Array:
  """Returns f32[...] in [0, 1], up to rounding: the chance of acceptance.

  `alpha = sum_v min(p_v, q_v)` over the W tokens, which is exact for reduced
  vocabularies, as q is 0 elsewhere. Inputs as in the module's docstring.
  """
  log_p, log_q = _checked(log_p, log_q)
  return _acceptance(log_p, log_q)


def pointwise(
    name: str, log_p: Array, log_q: Array, *, label: Array | None = None,
    beta: float = 0.5, eps: float = 1e-5,
) -> Array:
  """Returns f32[...], a loss at each position, in nats where it has a unit.

  * `ce`: `-log q(label)`.
  * `kl`: `sum_v p_v log(p_v / q_v)`. With a reduced vocabulary of teacher
    mass s this is s times the divergence from the renormalised teacher, plus
    the constant `s log s`, and may be negative (>= -1/e).
  * `reverse_kl`: `sum_v q_v log(q_v / p_v)`; exact for reduced vocabularies.
  * `jsd`: `beta KL(p || m) + (1 - beta) KL(q || m)`, `m = beta p +
    (1 - beta) q`, the teacher's missing mass as one more token: exact.
  * `tvd`: `1 - alpha`, in [0, 1], the chance of a rejection: exact.
  * `l1`: `sum_v |p_v - q_v|` over the full vocabulary, which is `2 tvd` (and
    so computed): a weight of 0.9 on it is a weight of 1.8 on `tvd`.
  * `nla`: `-log max(alpha, eps)`: the gradient of `tvd` over alpha.
  * `lk`: `lam kl + (1 - lam) tvd`, `lam = exp(-3 alpha)` without gradient.

  Args:
    name: one of NAMES but 'tvd_pp', which has no value by position.
    log_p: [...,W], teacher.
    log_q: [...,W], drafter.
    label: int32[...] index into the W tokens, for 'ce': -1 for a token that
      is not among them, which contributes 0. None: the teacher's most
      probable one of the W.
    beta: weight of the teacher in 'jsd', in (0, 1).
    eps: > 0, the least acceptance in 'nla'; below it there is no gradient.

  Raises:
    ValueError: on another name, or beta or eps out of range.
    AssertionError: the shapes of log_p and log_q, or of label, do not fit.
  """
  log_p, log_q = _checked(log_p, log_q)
  if name == 'ce':
    return _cross_entropy(log_p, log_q, label)
  if name == 'kl':
    return _kl(log_p, log_q)
  if name == 'reverse_kl':
    return _kl(log_q, log_p)
  if name == 'jsd':
    return _jsd(log_p, log_q, beta)
  if name not in NAMES or name == 'tvd_pp':
    raise ValueError(f'name={name!r}: must be one of '
                     f'{[n for n in NAMES if n != "tvd_pp"]}')
  alpha = _acceptance(log_p, log_q)
  if name == 'nla':
    if not eps > 0:
      raise ValueError(f'eps={eps}: must be > 0')
    return -jnp.log(jnp.maximum(alpha, eps))
  if name == 'lk':
    share = jax.lax.stop_gradient(jnp.exp(-3.0 * alpha))
    return share * _kl(log_p, log_q) + (1.0 - share) * (1.0 - alpha)
  return (1.0 - alpha) * (2.0 if name == 'l1' else 1.0)


def tvd_pp(
    log_p: Array, log_q: Array, weight: Array, *,
    normaliser: Array | None = None, n_samples: int | None = None,
    key: Array | None = None,
) -> Array:
  """Returns f32[] whose *gradient* is that of the mean `tvd` over sigma.

  The policy gradient of the total variation distance with a normalised
  reward, `r(x) = 1[p(x) > q(x)]`:

      -E_{x ~ q}[(r(x) - mu) / sigma * log q(x)]

  where mu and sigma^2 are mean and variance of r under q over all weighted
  positions of this call. With the expectation taken exactly, mu cancels and
  the gradient is that of `tvd` divided by sigma; sampled, it is unbiased for
  that, as mu and sigma are taken exactly in both modes. The value means
  nothing: log `tvd` beside it.

  Args:
    log_p: [...,W], teacher.
    log_q: [...,W], drafter.
    weight: f32[...] >= 0, and `normaliser`, as in `weighted_mean`.
    n_samples: tokens drawn from q at each position, >= 1; needs noise of
      n_samples times the size of log_q. None: the exact expectation.
    key: typed key, consumed; given exactly if n_samples is.

  Raises:
    ValueError: n_samples without key or the reverse, or n_samples < 1.
    AssertionError: the shapes do not fit.

  References: Goel et al. 2024, arXiv:2403.00858.
  """
  if (n_samples is None) != (key is None):
    raise ValueError('give both of n_samples and key, or neither')
  if n_samples is not None and n_samples < 1:
    raise ValueError(f'n_samples={n_samples}: must be >= 1')
  log_p, log_q = _without_ignored(log_p, log_q, weight)
  constant = jax.lax.stop_gradient(log_q)
  reward = (log_p > constant).astype(jnp.float32)
  q = jnp.exp(constant)
  mu = weighted_mean(jnp.sum(q * reward, axis=-1), weight)
  spread = jnp.sum(q * jnp.square(reward - mu), axis=-1)
  sigma = jnp.sqrt(weighted_mean(spread, weight) + 1e-6)
  gain = (reward - mu) / sigma
  if n_samples is None or key is None:
    value = jnp.sum(q * gain * _finite(log_q), axis=-1)
  else:
    drawn = jnp.moveaxis(jax.random.categorical(
        key, constant, shape=(n_samples, *weight.shape)), 0, -1)
    taken = jnp.take_along_axis(gain, drawn, -1) * jnp.take_along_axis(
        _finite(log_q), drawn, -1)
    value = jnp.mean(taken, axis=-1)
  return -weighted_mean(value, weight, normaliser)


def weighted_mean(
    value: Array, weight: Array, normaliser: Array | None = None,
) -> Array:
  """Returns f32[]: `sum(value * weight) / max(sum(weight), 1e-6)`.

  Positions of weight 0 do not count, whatever their value; no position, no
  loss: 0.

  Args:
    value: [...]. weight: [...] >= 0, the mask times the weight of a position.
    normaliser: of any shape; its sum is divided by in place of `sum(weight)`.
      The mask for weights that must change the size of a gradient (D-PACE);
      the weights of all parts where the positions are taken in parts, whose
      results then add up to the whole.
  """
  chex.assert_equal_shape([value, weight])
  weight = jnp.asarray(weight, jnp.float32)
  value = jnp.where(weight > 0, jnp.asarray(value, jnp.float32), 0.0)
  total = jnp.sum(jnp.asarray(
      weight if normaliser is None else normaliser, jnp.float32))
  return jnp.sum(value * weight) / jnp.maximum(total, 1e-6)


def loss(
    name: str, log_p: Array, log_q: Array, weight: Array, *,
    normaliser: Array | None = None, label: Array | None = None,
    beta: float = 0.5, eps: float = 1e-5, n_samples: int | None = None,
    key: Array | None = None,
) -> Array:
  """Returns f32[]: the weighted mean of a loss over positions.

  Args:
    name: one of NAMES.
    log_p: [...,W], teacher.
    log_q: [...,W], drafter.
    weight: f32[...] >= 0, and `normaliser`, as in `weighted_mean`.
    label, beta, eps: of `pointwise`; n_samples, key: of `tvd_pp`. Each is
      read by the losses that have it only.

  Raises:
    ValueError, AssertionError: as those two do.
  """
  if name == 'tvd_pp':
    return tvd_pp(log_p, log_q, weight, normaliser=normaliser,
                  n_samples=n_samples, key=key)
  log_p, log_q = _without_ignored(log_p, log_q, weight)
  value = pointwise(name, log_p, log_q, label=label, beta=beta, eps=eps)
  return weighted_mean(value, weight, normaliser)


def renormalise(log_p: Array) -> Array:
  """Returns f32[...,W]: the teacher's law given that the token is kept.

  EAGLE-3's form of a reduced vocabulary: its loss is `ce` against a soft
  label, hence `pointwise('kl', renormalise(log_p), log_q)` but for a term
  without gradient. It overstates acceptance. A row of -inf stays one.
  """
  log_p = _teacher(log_p)
  total = jax.nn.logsumexp(log_p, axis=-1, keepdims=True)
  return log_p - jnp.where(jnp.isneginf(total), 0.0, total)


def top_k_ce(log_p: Array, log_q: Array, k: int = 10) -> Array:
  """Returns f32[...]: `-sum p_v log q_v` over the teacher's k best tokens.

  p is not renormalised. ValueError unless 1 <= k <= W.

  References: HASS, arXiv:2408.15766.
  """
  log_p, log_q = _checked(log_p, log_q)
  if not 1 <= k <= log_p.shape[-1]:
    raise ValueError(f'k={k}: must be in [1, {log_p.shape[-1]}]')
  best, token = jax.lax.top_k(log_p, k)
  taken = jnp.take_along_axis(_finite(log_q), token, axis=-1)
  return -jnp.sum(jnp.exp(best) * taken, axis=-1)


def smooth_l1(prediction: Array, target: Array) -> Array:
  """Returns f32[...]: the Huber loss of threshold 1, mean over the last axis.

  Args:
    prediction: [...,D]. target: [...,D], without gradient.

  References: EAGLE, arXiv:2401.15077 (regression on features).
  """
  chex.assert_equal_shape([prediction, target])
  target = jax.lax.stop_gradient(jnp.asarray(target, jnp.float32))
  size = jnp.abs(jnp.asarray(prediction, jnp.float32) - target)
  inner = jnp.minimum(size, 1.0)  # so that a huge one is not squared
  return jnp.mean(0.5 * jnp.square(inner) + size - inner, axis=-1)


def bce(logit: Array, probability: Array) -> Array:
  """Returns f32[...]: binary cross-entropy in nats, of a confidence head.

  Args:
    logit: [...]. probability: [...] in [0, 1], what `sigmoid(logit)` should
      be (`acceptance`), without gradient.
  """
  chex.assert_equal_shape([logit, probability])
  logit = jnp.asarray(logit, jnp.float32)
  label = jax.lax.stop_gradient(jnp.asarray(probability, jnp.float32))
  return -(label * jax.nn.log_sigmoid(logit)
           + (1.0 - label) * jax.nn.log_sigmoid(-logit))


def _checked(log_p: Array, log_q: Array) -> tuple[Array, Array]:
  """Returns both in float32, the teacher without gradient."""
  chex.assert_equal_shape([log_p, log_q])
  return _teacher(log_p), jnp.asarray(log_q, jnp.float32)


def _teacher(log_p: Array) -> Array:
  return jax.lax.stop_gradient(jnp.asarray(log_p, jnp.float32))


def _without_ignored(log_p: Array, log_q: Array, weight: Array):
  """Returns both in float32, 0 in positions of weight 0.

  A mask after the loss would let a NaN through: its gradient is 0 * NaN.
  """
  log_p, log_q = _checked(log_p, log_q)
  chex.assert_shape(weight, log_p.shape[:-1])
  counts = jnp.asarray(weight)[..., None] > 0
  return jnp.where(counts, log_p, 0.0), jnp.where(counts, log_q, 0.0)


def _finite(log_x: Array) -> Array:
  # Not a maximum: finite values below keep their gradient.
  return jnp.where(jnp.isneginf(log_x), _LOG_LEAST, log_x)


def _acceptance(log_p: Array, log_q: Array) -> Array:
  # The lesser logarithm first: one exponential instead of two.
  return jnp.sum(jnp.exp(jnp.minimum(log_p, log_q)), axis=-1)


def _cross_entropy(log_p: Array, log_q: Array, label: Array | None) -> Array:
  if label is None:
    label = jnp.argmax(log_p, axis=-1)
  chex.assert_shape(label, log_q.shape[:-1])
  index = jnp.maximum(label, 0)[..., None]
  taken = jnp.take_along_axis(_finite(log_q), index, axis=-1)[..., 0]
  return jnp.where(label >= 0, -taken, 0.0)


def _kl(log_a: Array, log_b: Array) -> Array:
  """Returns sum a log(a / b)."""
  ratio = _finite(log_a) - _finite(log_b)
  return jnp.sum(jnp.exp(log_a) * ratio, axis=-1)


def _jsd(log_p: Array, log_q: Array, beta: float) -> Array:
  if not 0 < beta < 1:
    raise ValueError(f'beta={beta}: must be in (0, 1)')
  log_m = jnp.logaddexp(math.log(beta) + _finite(log_p),
                        math.log1p(-beta) + _finite(log_q))
  # q is 0 in the tail, where m is beta p.
  tail = jnp.maximum(1.0 - jnp.sum(jnp.exp(log_p), axis=-1), 0.0)
  from_teacher = _kl(log_p, log_m) - tail * math.log(beta)
  return beta * from_teacher + (1.0 - beta) * _kl(log_q, log_m)
