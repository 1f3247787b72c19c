"""How often several drafts for one position can be accepted at best.

Notation: p is the target's law, q the draft's, n the number of drafts. The
token that is emitted follows p and may be any of the drafts; "accepted" means
that it is one of them. `transport_plan` has couplings that attain the bound.
"""

from __future__ import annotations

import math
import numbers

import jax
from jax import lax
import jax.numpy as jnp

from specjax.core import numerics

Array = jax.Array

MODES = ('iid', 'without_replacement', 'top_plus_one', 'top')
RULES = ('speculative', 'kseq', 'top_plus_one', 'top')

# Below this a draft probability counts as zero, so that p / q stays finite.
_TINY = 1e-30
# The integral over time: trapezoid in log t. Its integrand is analytic and
# decays at both ends, so the error falls as exp(-const / step).
_LOG_STEP = 0.3
_CUT_OFF = 1e-9


def acceptance_upper_bound(
    p: Array, q: Array, num_drafts: int, mode: str
) -> Array:
  """Returns the best acceptance that any lossless rule can reach.

  That is the optimum of the transport problem with membership cost, in its
  dual form: `1 + min_H p(H) - Pr[all drafts fall in H]`. The best H is a
  prefix of the tokens sorted by p / q, so one sort does.

  Args:
    p: float[..., V], target probabilities.
    q: float[..., V], draft probabilities; zeros are allowed in both.
    num_drafts: n >= 1, static.
    mode: how the drafts are chosen, static. 'iid': n draws from q;
      'without_replacement': n draws from q, each renormalised over the rest;
      'top_plus_one': the n - 1 likeliest tokens of q (lowest id first on
      ties) and one draw from the rest; 'top': the n likeliest tokens. Where
      q supports too few tokens, 'without_replacement' drafts all of them,
      'top_plus_one' draws none, and the likeliest still count n.

  Returns:
    [...] in [0, 1], float64 if an input is, else float32. Exact up to
    rounding, but for three or more drafts without replacement: there an
    integral over time is within 1e-9 (float64; 1e-6 in float32; measured for
    n = 3..5), at O(n^2 V log V) for each of some 35 points, more where n - 1
    tokens have nearly all of q. It takes O(n V) of memory.

  Raises:
    ValueError: for an unknown mode, n < 1, or shapes that differ.

  References: Sun et al. 2023, arXiv:2310.15141 (the primal); Hu et al. 2025,
  arXiv:2502.18779 (the dual and its cases).
  """
  _check_choice('mode', mode, MODES)
  _check_num_drafts(num_drafts)
  p, q = _as_laws(p, q)
  if mode == 'top':
    return jnp.where(_is_top(q, num_drafts), p, 0).sum(-1).clip(0, 1)
  if mode == 'top_plus_one':
    return _top_plus_one(p, q, num_drafts)
  support = q > _TINY
  q = jnp.where(support, q, 0)
  key = jnp.where(support, p / jnp.where(support, q, 1), jnp.inf)
  _, p_sorted, q_sorted = lax.sort((key, p, q), num_keys=1)
  inside = jnp.minimum(jnp.cumsum(q_sorted, axis=-1), 1)
  distinct = min(num_drafts, q.shape[-1])
  if mode == 'iid' or distinct == 1:
    all_in = inside ** num_drafts
  else:
    all_in = _all_in_prefix(q_sorted, distinct)
  slack = jnp.cumsum(p_sorted, axis=-1) - all_in
  return (1 + slack.min(-1)).clip(0, 1)


def expected_acceptance(
    p: Array, q: Array, num_drafts: int | Array, rule: str
) -> Array:
  """Returns how often a rule accepts, where that has a closed form.

  Args:
    p: float[..., V], target probabilities.
    q: float[..., V], draft probabilities.
    num_drafts: n >= 1, static; for 'kseq' also int[...].
    rule: 'speculative' (n = 1 only): `sum min(p, q)`; 'kseq': n independent
      drafts, see `kseq_rho`; 'top_plus_one' and 'top': as in
      `acceptance_upper_bound`, which these two attain.

  Returns:
    [...] in [0, 1], float64 if an input is, else float32.

  Raises:
    ValueError: for an unknown rule, n < 1, n > 1 with 'speculative', or
      shapes that differ.

  References: Leviathan et al. 2023, arXiv:2211.17192; Sun et al. 2023,
  arXiv:2310.15141; Hu et al. 2025, arXiv:2502.18779.
  """
  _check_choice('rule', rule, RULES)
  if rule == 'kseq':
    _, beta = kseq_rho(p, q, num_drafts)
    return kseq_acceptance(beta, num_drafts)
  if not isinstance(num_drafts, numbers.Integral):
    raise ValueError(f'rule={rule!r} needs a static num_drafts')
  if rule == 'speculative':
    if num_drafts != 1:
      raise ValueError(f"num_drafts={num_drafts}: 'speculative' takes one")
    p, q = _as_laws(p, q)
    return jnp.minimum(p, q).sum(-1).clip(0, 1)
  return acceptance_upper_bound(p, q, num_drafts, rule)


def kseq_rho(
    p: Array, q: Array, num_drafts: int | Array
) -> tuple[Array, Array]:
  """Returns the best division factor of k-SEQ and its acceptance per test.

  k-SEQ tests n independent drafts in turn, each with probability
  `min(1, p / (rho q))`, which passes with `beta(rho) = sum min(q, p / rho)`.
  It is lossless where `1 - (1 - beta)^n <= rho beta`; acceptance is largest
  at the least such rho in [1, n]. It is found by bisection, but for GPUs and
  TPUs, where each pass over p and q cuts the interval into 16 parts.

  Args:
    p: float[..., V], target probabilities.
    q: float[..., V], draft probabilities.
    num_drafts: n, an int or int[...] (may be traced; below 1 counts as 1).

  Returns:
    `(rho, beta)`, both [...]. rho is the valid end of an interval of width
    (n - 1) / 2^24 (2^48 in float64); it is 1 where n = 1. beta is in [0, 1].

  Raises:
    ValueError: if an int n is below 1, or for shapes that differ.

  Reference: Sun et al. 2023 (SpecTr), arXiv:2310.15141.
  """
  if isinstance(num_drafts, numbers.Integral):
    _check_num_drafts(num_drafts)
  p, q = _as_laws(p, q)
  count = jnp.maximum(jnp.asarray(num_drafts, p.dtype), 1)
  count = jnp.broadcast_to(count, p.shape[:-1])

  def beta_of(*rho):
    passed = numerics.sums(
        [jnp.minimum(q, p / value[..., None]) for value in rho])
    return [jnp.minimum(beta, 1) for beta in passed]

  # The interval shrinks to 1 / parts in each pass over p and q.
  parts = 2 if numerics.on_cpu() else 16
  bits = 24 if p.dtype == jnp.float32 else 48

  def narrow(_, interval):
    low, high = interval
    rho = [low + (high - low) * (k / parts) for k in range(1, parts)]
    upper, lower = high, low
    for value, beta in zip(rho[::-1], beta_of(*rho)[::-1], strict=True):
      valid = kseq_acceptance(beta, count) <= value * beta
      upper = jnp.where(valid, value, upper)
      lower = jnp.where(valid, low, jnp.maximum(value, lower))
    return lower, upper

  _, rho = lax.fori_loop(
      0, bits // (parts.bit_length() - 1), narrow,
      (jnp.ones_like(count), count), unroll=not numerics.on_cpu())
  return rho, beta_of(rho)[0]


def kseq_acceptance(beta: Array, num_drafts: int | Array) -> Array:
  """Returns `1 - (1 - beta)^n`: some of n tests pass. Precise for small beta.

  Args:
    beta: float[...] in [0, 1].
    num_drafts: n >= 1, an int or an array that broadcasts.

  Returns:
    [...] in [0, 1].
  """
  return -jnp.expm1(num_drafts * jnp.log1p(-beta))


def _top_plus_one(p: Array, q: Array, num_drafts: int) -> Array:
  """Top tokens keep all of p; the drawn one is plain speculative sampling."""
  top = _is_top(q, num_drafts - 1)
  rest = jnp.where(top, 0, q)
  mass = rest.sum(-1, keepdims=True)  # not 1 - q(top): that cancels
  drawn = jnp.where(mass > 0, rest / jnp.where(mass > 0, mass, 1), 0)
  return jnp.where(top, p, jnp.minimum(p, drawn)).sum(-1).clip(0, 1)


def _is_top(q: Array, count: int) -> Array:
  """Returns bool[..., V]: among the `count` largest."""
  count = min(count, q.shape[-1])
  _, index = lax.top_k(q, count)
  return jnp.put_along_axis(
      jnp.zeros(q.shape, bool), index, True, axis=-1, inplace=False)


def _all_in_prefix(q: Array, num_drafts: int) -> Array:
  """Returns [..., V]: all n >= 2 draws without replacement are in q[:i + 1].

  If q supports fewer than n tokens, all of them are drafts.
  """
  outside = _exclusive_suffix(q)
  if num_drafts == 2:
    before = jnp.flip(_exclusive_suffix(jnp.flip(q, -1)), -1)
    others = before + outside  # 1 - q without cancellation
    odds = q / jnp.where(others > 0, others, 1)
    all_in = 1 - outside * (1 + jnp.cumsum(odds, axis=-1))
  else:
    all_in = _race(q, outside, num_drafts)
  supported = jnp.cumsum(q > 0, axis=-1)
  all_in = jnp.where(supported < num_drafts, 0, all_in)
  return jnp.where(outside > 0, all_in, 1).clip(0, 1)


def _race(q: Array, outside: Array, num_drafts: int) -> Array:
  """Returns [..., V]: n arrivals within the prefix before one outside it.

  Token i arrives at an Exp(q_i) time; the order of arrival is that of draws
  without replacement. With R = outside and N(t) the prefix's arrivals until
  t, the probability is `1 - int R e^{-R t} Pr[N(t) < n] dt`. Subtracting a
  Poisson count of rate 1, whose integral is `1 - (1 + R)^-n`, makes the
  integrand vanish like t^n at 0 and saves half of the points.
  """
  n = num_drafts
  start = (math.log(_CUT_OFF) + math.lgamma(n + 1)) / (n + 1)
  _, heavy = lax.top_k(q, n - 1)
  rest = jnp.put_along_axis(q, heavy, 0, axis=-1, inplace=False).sum(-1)
  # Whatever the prefix, little happens once n of all tokens have arrived.
  end = jnp.log(-math.log(_CUT_OFF) / jnp.where(rest > 0, rest, 1)).max()
  steps = jnp.ceil((end - start) / _LOG_STEP).astype(jnp.int32) + 1

  def add(i, total):
    log_t = start + _LOG_STEP * i.astype(q.dtype)
    t = jnp.exp(log_t)
    poisson = sum(
        jnp.exp(k * log_t - t - math.lgamma(k + 1)) for k in range(n))
    early = _fewer_than(n, q * t)
    return total + t * jnp.exp(-outside * t) * (early - poisson)

  integral = lax.fori_loop(0, steps, add, jnp.zeros_like(q))
  return (1 + outside) ** -n - _LOG_STEP * outside * integral


def _fewer_than(num: int, rate: Array) -> Array:
  """Returns [..., V]: fewer than `num` of the first i + 1 tokens arrived.

  Prefix products of the generating functions `miss + z hit`, cut at z^num,
  by doubling. `lax.associative_scan` does less work but compiles for seconds.
  """
  vocab_size = rate.shape[-1]
  index = jnp.arange(vocab_size)
  zero = jnp.zeros_like(rate)
  start = [jnp.exp(-rate), -jnp.expm1(-rate)] + [zero] * (num - 2)

  def double(level, late):
    shift = jnp.left_shift(1, level)
    one = [1.0] + [0.0] * (num - 1)
    early = [
        jnp.where(index < shift, unit, jnp.roll(x, shift, axis=-1))
        for unit, x in zip(one, late)]
    return [
        sum(early[j] * late[k - j] for j in range(k + 1)) for k in range(num)]

  levels = max(vocab_size - 1, 0).bit_length()
  return sum(lax.fori_loop(0, levels, double, start))


def _exclusive_suffix(x: Array) -> Array:
  """Returns [..., V]: the sum of what comes after each entry."""
  after = lax.cumsum(x[..., 1:], axis=x.ndim - 1, reverse=True)
  return jnp.pad(after, [(0, 0)] * (x.ndim - 1) + [(0, 1)])


def _as_laws(p: Array, q: Array) -> tuple[Array, Array]:
  """Returns both in one float type of 32 or 64 bits; checks the shapes."""
  p, q = jnp.asarray(p), jnp.asarray(q)
  if p.shape != q.shape or p.ndim < 1:
    raise ValueError(
        f'p {p.shape} and q {q.shape}: must both be [..., V]')
  dtype = jnp.promote_types(jnp.result_type(p, q), jnp.float32)
  return p.astype(dtype), q.astype(dtype)


def _check_num_drafts(num_drafts: int) -> None:
  if num_drafts < 1:
    raise ValueError(f'num_drafts={num_drafts}: must be >= 1')


def _check_choice(what: str, given: str, known: tuple[str, ...]) -> None:
  if given not in known:
    raise ValueError(f'{what}={given!r}: known are {", ".join(known)}')
