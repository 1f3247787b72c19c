"""The denoising chain: its schedule, its steps, denoising as a text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from specjax import verify
from specjax.certificates import sampled, walks
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters import Null
from specjax.drafters.chain_density import ChainDensity
from specjax.models.denoising import Denoising
from specjax.models.diffusion import Diffusion, Time
from specjax.models.mixture import MixtureHead


def test_schedule_of_mar():
  """Published facts of 1,000 cosine steps respaced to 100."""
  process = Diffusion(None, 16)
  table = process.tables
  assert table['number'][:4].tolist() == [0, 10, 20, 30]
  assert table['number'][-2:].tolist() == [989, 999]
  low, high = (np.exp(0.5 * table[n]) for n in ('log_posterior', 'log_beta'))
  np.testing.assert_allclose(low[:3], (0.0062, 0.0062, 0.0211), atol=6e-5)
  np.testing.assert_allclose(high[:3], (0.0064, 0.0261, 0.0341), atol=6e-5)
  assert table['signal'][-1] == pytest.approx(2.4e-9, rel=0.02)
  for variance, rest in (('lower', 37.4), ('learned', 23.4), ('upper', 19.3)):
    cost = Diffusion(None, 16, variance=variance).sensitivity()
    assert cost[1:].sum() == pytest.approx(rest, abs=0.05)
    assert cost[0] == pytest.approx(1e5, rel=0.01)
  # One level less: the costly step is gone, and the others are as they were.
  shorter = Diffusion(None, 16, first=98)
  assert shorter.num_steps == 99
  np.testing.assert_array_equal(
      shorter.sensitivity(), Diffusion(None, 16).sensitivity()[1:])


def test_step_is_bayes_rule():
  """Mean and variance of a state given the next noisier one and the token."""
  head = lambda params, x, time, condition: (params, x)  # noqa: E731
  process = Diffusion(head, 1, num_levels=6, num_base=60, variance='lower')
  signal = process.tables['signal']
  x, eps = 0.7, -0.3
  for index in range(5):
    level = 5 - index
    mean, log_std = process.step(
        jnp.full((1,), eps), jnp.full((1,), x), jnp.int32(index), None)
    token = (x - np.sqrt(1 - signal[level]) * eps) / np.sqrt(signal[level])
    a, b = signal[level - 1], signal[level]
    alpha = b / a
    # N(state; sqrt(a) token, 1 - a) times N(x; sqrt(alpha) state, 1 - alpha).
    precision = 1 / (1 - a) + alpha / (1 - alpha)
    want = (np.sqrt(a) * token / (1 - a)
            + np.sqrt(alpha) * x / (1 - alpha)) / precision
    assert float(mean[0]) == pytest.approx(want, abs=2e-5)
    assert float(jnp.exp(log_std[0])) == pytest.approx(
        precision**-0.5, rel=1e-4)


def test_heads_are_told_the_step_of_the_schedule_they_learned():
  seen = {}

  def head(params, x, time, condition):
    seen['number'] = time.number
    return x, x

  process = Diffusion(head, 1, num_levels=5, num_base=100, first=3)
  process.step(None, jnp.zeros((4, 1)), jnp.arange(4), None)
  assert seen['number'].tolist() == [74, 50, 25, 0]


def test_mixture_head_is_the_posterior_mean():
  params, shift, signal = walks.params('target'), 0.4, 0.3
  x = np.linspace(-2, 2, 7)
  token = np.linspace(-6, 6, 4001)
  prior = sum(w * stats.norm.pdf(token, shift + m, s) for w, m, s in zip(
      *(walks.MIXTURES['target'][k] for k in ('weight', 'mean', 'std')),
      strict=True))
  noise = (x[:, None] - np.sqrt(signal) * token) / np.sqrt(1 - signal)
  weight = prior * stats.norm.pdf(noise)
  want = (weight * noise).sum(axis=1) / weight.sum(axis=1)
  found, _ = MixtureHead()(
      params, jnp.asarray(x[:, None]), Time(
          jnp.zeros(7, jnp.int32), jnp.full(7, signal)),
      jnp.full((7, 1), shift))
  np.testing.assert_allclose(found[:, 0], want, atol=1e-4)


@pytest.mark.parametrize(('values', 'text'), [
    ({'num_levels': 1}, 'num_levels=1'), ({'num_levels': 2000}, 'num_base'),
    ({'variance': 'fixed'}, 'known are learned'), ({'first': 100}, 'first')])
def test_bad_chains_are_refused(values, text):
  with pytest.raises(ValueError, match=text):
    Diffusion(None, 16, **values)


# --- Denoising as a text ---------------------------------------------------


def denoised(rule, drafter, *, variance, rows=16_384, seed=0):
  """Decodes states: `(results f[rows], texts, state)`."""
  process = walks.diffusion(variance=variance)
  key = jax.random.key(seed)
  start = jax.random.normal(jax.random.fold_in(key, 1), (rows, 1, 1))
  context = walks.context(
      np.asarray(start), np.ones(rows), np.full(rows, process.num_steps),
      np.ones(rows), jax.random.split(key, rows),
      room=process.num_steps + 5, condition=jnp.full((rows, 1), 0.2))
  params = {who: walks.params(who) for who in ('target', 'drafter')}
  state = sampled.decode(
      Engine(Denoising(process), drafter(process), rule),
      Models(**params), context)
  return np.asarray(state.context.tokens)[:, process.num_steps, 0], state


@pytest.mark.parametrize(('rule', 'variance'), [
    (verify.Reflection(), 'lower'), (verify.PathExact(), 'lower'),
    (verify.PathExact(), 'learned')])
def test_denoising_steps_are_speculated_exactly(rule, variance):
  process = walks.diffusion(variance=variance)
  found, state = denoised(
      rule, lambda p: ChainDensity(4, Denoising(p)), variance=variance)
  # The toy of the certificates, whose first token is shifted by the prompt.
  prompt = np.asarray([[0.2 / walks.PULL[0]]])
  own = walks.reference(
      np.random.default_rng(5), prompt, 2 * len(found), 1, 1.0,
      process)[:, 0, 0]
  assert stats.ks_2samp(found, own).pvalue > 1e-3
  rounds = np.asarray(state.context.rounds)
  assert rounds.mean() < 0.6 * process.num_steps  # and it pays
  plain, one = denoised(rule, lambda p: Null(0), variance=variance)
  assert np.all(np.asarray(one.context.rounds) == process.num_steps)
  assert stats.ks_2samp(plain, own).pvalue > 1e-3


def test_reflection_accepts_what_theory_says():
  """2 Phi(-d / 2) for the first state, averaged over where it starts."""
  _, state = denoised(
      verify.Reflection(), lambda p: ChainDensity(1, Denoising(p)),
      variance='lower')
  process = walks.diffusion(variance='lower')
  start = np.asarray(state.context.tokens)[:, :1]
  means = [process.step(
      walks.params(who), jnp.asarray(start[:, 0]), jnp.int32(0),
      jnp.full((len(start), 1), 0.2)) for who in ('target', 'drafter')]
  gap = np.abs(means[0][0] - means[1][0]) / np.exp(means[0][1])
  want = 2 * stats.norm.cdf(-gap / 2)
  by = np.asarray(state.context.token_round)
  kept = (by == 0).sum(axis=1) > 1
  assert abs(kept.mean() - want.mean()) < 4 * np.sqrt(
      0.25 / len(kept))


def test_denoising_needs_noise_in_every_step():
  with pytest.raises(ValueError, match='last_noise=True'):
    Denoising(walks.diffusion(last_noise=False))
