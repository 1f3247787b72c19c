"""Steps drafted by what the head said last: exact, and what that saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from specjax import verify
from specjax.certificates import sampled, walks
from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters.held import Held
from specjax.models.denoising import Denoising


def begun(process, rows, seed=0):
  key = jax.random.key(seed)
  start = jax.random.normal(jax.random.fold_in(key, 1), (rows, 1, 1))
  return walks.context(
      np.asarray(start), np.ones(rows), np.full(rows, process.num_steps),
      np.linspace(1.0, 1.0, rows), jax.random.split(key, rows),
      room=process.num_steps + 10, condition=jnp.full((rows, 1), 0.2))


def engine(process, rule, **kwargs):
  return Engine(Denoising(process), Held(process=process, **kwargs), rule)


PARAMS = Models(target=walks.params('target'))


@pytest.mark.parametrize(('rule', 'variance', 'hold'), [
    (verify.Reflection(), 'lower', 'token'),
    (verify.Reflection(), 'lower', 'noise'),
    (verify.PathExact(), 'learned', 'token')])
def test_the_law_is_the_targets(rule, variance, hold):
  process = walks.diffusion(variance=variance)
  state = sampled.decode(
      engine(process, rule, hold=hold), PARAMS, begun(process, 16_384))
  found = np.asarray(state.context.tokens)[:, process.num_steps, 0]
  prompt = np.asarray([[0.2 / walks.PULL[0]]])
  own = walks.reference(
      np.random.default_rng(5), prompt, 2 * len(found), 1, 1.0,
      process)[:, 0, 0]
  assert stats.ks_2samp(found, own).pvalue > 1e-3
  rounds = np.asarray(state.context.rounds)
  assert rounds.max() <= process.num_steps
  # The first round drafts nothing: nothing was said yet.
  by = np.asarray(state.context.token_round)
  assert np.all((by == 0).sum(axis=1) == 1)
  assert rounds.mean() < process.num_steps - 0.5


def test_long_chains_need_few_calls():
  """Small steps change little: what was said last is nearly right."""
  calls = []
  for levels in (16, 64):
    process = walks.diffusion(
        variance='lower', num_levels=levels, num_base=levels)
    state = sampled.decode(
        engine(process, verify.Reflection(), num_speculative_tokens=8),
        PARAMS, begun(process, 512))
    calls.append(np.asarray(state.context.rounds).mean() / levels)
  assert calls[1] < 0.5 and calls[1] < calls[0]


@pytest.mark.parametrize('hold', ['token', 'noise'])
def test_what_is_held(hold):
  """By hand, over two rounds: the head's word at the last state kept."""
  process = walks.diffusion(variance='lower')
  one = engine(process, verify.Reflection(), hold=hold,
               num_speculative_tokens=3)
  state = jax.jit(lambda c: loop.run(
      one, PARAMS, loop.empty(one, c), jnp.int32(2)))(begun(process, 64))
  context = state.context
  last = np.asarray(context.root) - 1  # the state that was scored last
  x = np.asarray(context.tokens)[np.arange(64), last]
  level = np.asarray(process.level(last))
  noise, _ = process.head(
      walks.params('target'), jnp.asarray(x), process.time(jnp.asarray(level)),
      context.condition)
  want = np.asarray(noise)
  if hold == 'token':
    t = process.tables
    want = t['scale'][level][:, None] * (
        x - t['spread'][level][:, None] * want)
  np.testing.assert_allclose(state.drafter['held'], want, atol=2e-4)


def test_a_head_that_says_one_token_is_held_for_ever():
  """Then drafts are the target's own law, and all are kept."""
  def head(params, x, time, condition):
    del params, condition
    signal = time.signal[..., None]
    token = 0.7
    return (x - jnp.sqrt(signal) * token) / jnp.sqrt(1 - signal), (
        jnp.zeros_like(x))
  process = walks.diffusion(variance='lower', head=head)
  state = sampled.decode(
      engine(process, verify.Reflection(), num_speculative_tokens=7), PARAMS,
      begun(process, 256))
  assert np.all(np.asarray(state.context.rounds) == 2)


@pytest.mark.parametrize(('options', 'message'), [
    ({'hold': 'mean'}, "hold='mean'"), ({'process': None}, 'process: give'),
    ({'num_speculative_tokens': 0}, 'num_speculative_tokens=0')])
def test_options_out_of_range(options, message):
  with pytest.raises(ValueError, match=message):
    Held(**{'process': walks.diffusion(), **options})
