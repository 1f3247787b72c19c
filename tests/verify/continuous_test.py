"""Rules of continuous tokens: ratios, identities, caps, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import verify
from specjax.certificates import sampled, walks
from specjax.core import tree
from specjax.core.round import Engine
from specjax.core.types import IID, POINT, Models
from specjax.drafters import Null
from specjax.drafters.chain_density import ChainDensity
from specjax.verify import CSpD, PathExact, Reflection


def decode(rule, *, process=None, rows=256, seed=0, num=3, mixed=True,
           who='drafter', order=None, prompt=0.3, drafter=None):
  """Decodes toy walks; the final state."""
  lm = walks.Walk(process, 1, mixed)
  keys = jax.random.split(jax.random.key(seed), rows)
  context = walks.context(
      np.full((rows, 1, 1), prompt), np.ones(rows), np.full(rows, 4),
      np.ones(rows), keys if order is None else keys[order], room=8)
  return sampled.decode(
      Engine(lm, drafter or ChainDensity(num, lm), rule),
      Models(target=walks.params('target'), drafter=walks.params(who)),
      context)


def proposed(process, who='drafter', rows=64):
  """Returns `(context, draft, target's laws)` of a first round."""
  lm = walks.Walk(process)
  drafter = ChainDensity(3, lm)
  params = Models(target=walks.params('target'), drafter=walks.params(who))
  context = walks.context(
      np.full((rows, 1, 1), 0.3), np.ones(rows), np.full(rows, 4),
      np.full(rows, 0.9), jax.random.split(jax.random.key(1), rows), room=8)
  from specjax.core import loop
  engine = Engine(lm, drafter, PathExact())
  draft, state = drafter.propose(params, loop.empty(engine, context))
  scores, _ = lm.score(params, state, draft, ())
  row = jnp.broadcast_to(jnp.arange(3), (rows, 3))
  return context, draft, scores.target_law.at(row)


@pytest.mark.parametrize('process', [None, walks.diffusion()],
                         ids=['mixture', 'denoised'])
def test_equal_models_accept_everything(process):
  state = decode(PathExact(), process=process, who='target')
  assert np.asarray(state.metrics.histogram).sum(axis=0)[:3].tolist() == [
      0, 0, 0]
  assert np.all(np.asarray(state.context.rounds) == 1)
  assert not np.any(state.metrics.gave_up)


def test_drafts_state_the_law_they_were_drawn_from():
  """The law of a whole chain is that of its tokens, step by step."""
  process = walks.diffusion()
  context, draft, _ = proposed(process)
  text = np.concatenate([np.zeros((64, 1)), np.full((64, 1), 0.3),
                         np.asarray(draft.tokens)[..., 0]], axis=1)
  shift = walks.PULL[0] * text[:, 1:4] + walks.PULL[1] * text[:, 0:3]
  np.testing.assert_allclose(
      draft.draft_law.condition[..., 0], shift, atol=1e-5)
  np.testing.assert_array_equal(
      draft.draft_law.token(draft.event), draft.tokens)
  del context


@pytest.mark.parametrize('last', [None, 1, 5])
def test_path_ratio_is_brute_force(last):
  """Sum of the log-densities of the compared steps, in numpy."""
  process = walks.diffusion()
  context, draft, p = proposed(process)
  ratio, extra, _ = PathExact(last).tests(context, draft, p, draft.draft_law)
  assert extra is None
  event = np.asarray(draft.event, float)
  shift = np.asarray(draft.draft_law.condition, float)
  total, levels = np.zeros(ratio.shape), process.num_levels
  mine = event[..., 0, :]
  for i in range(levels):
    j, before = levels - 1 - i, event[..., i, :]
    q_mean, q_std = walks._moments('drafter', *(
        x.reshape(-1, 1) for x in (shift, before)), j, process)
    p_mean, p_std = walks._moments('target', *(
        x.reshape(-1, 1) for x in (shift, mine)), j, process)
    now = event[..., i + 1, :].reshape(-1, 1)
    if last is None or j < last:
      for sign, mean, std in ((1, p_mean, p_std), (-1, q_mean, q_std)):
        away = (now - mean) / (0.9 * std)
        total += sign * np.reshape(
            -0.5 * away**2 - np.log(0.9 * std), ratio.shape)
      mine = event[..., i + 1, :]
    else:
      noise = (now - q_mean) / (0.9 * q_std)
      mine = (p_mean + 0.9 * p_std * noise).reshape(mine.shape)
  np.testing.assert_allclose(ratio, total, atol=2e-3)


def test_published_ratio_is_that_of_two_paths():
  """Shared noise cancels: brute force of both paths gives the short form."""
  process = walks.diffusion()
  context, draft, p = proposed(process)
  q, event = draft.draft_law, draft.event
  ratio, _, _ = CSpD().tests(context, draft, p, q)
  own = p.run(event[..., 0, :], q.noise(event, process.num_steps - 1))
  own = jnp.concatenate([own, event[..., -1:, :]], axis=-2)
  brute = (p.tail(event[..., 0, :], 0).log_prob(own)
           - q.tail(event[..., 0, :], 0).log_prob(event[..., 1:, :]))
  np.testing.assert_allclose(ratio, brute, atol=2e-3)
  assert np.abs(np.asarray(ratio)).max() > 0.5
  # The published code's sign, and its softer test.
  turned, _, _ = CSpD(inverted=True).tests(context, draft, p, q)
  last, _, _ = PathExact(1).tests(context, draft, p, q)
  np.testing.assert_allclose(ratio + turned, 2 * last, atol=2e-3)
  soft, _, _ = CSpD(inner_temperature=42.0).tests(context, draft, p, q)
  assert np.std(soft) < np.std(ratio)


def test_published_rule_is_exact_where_deviations_are_equal():
  """Then it is `PathExact` with one step: the factor is 1."""
  process = walks.diffusion(variance='lower')
  context, draft, p = proposed(process)
  ratio, extra, _ = CSpD().tests(context, draft, p, draft.draft_law)
  exact, _, _ = PathExact(1).tests(context, draft, p, draft.draft_law)
  np.testing.assert_allclose(ratio, exact, atol=1e-3)
  assert float(jnp.max(extra)) < 1e-3


def test_rows_do_not_see_their_neighbours():
  order = np.random.default_rng(0).permutation(256)
  for rule in (PathExact(), PathExact(2), CSpD()):
    first = decode(rule, process=walks.diffusion())
    other = decode(rule, process=walks.diffusion(), order=order)
    np.testing.assert_allclose(
        np.asarray(first.context.tokens)[order], other.context.tokens,
        atol=1e-5)


def test_cap_is_counted():
  state = decode(PathExact(max_tries=1), rows=512)
  gave_up = int(np.asarray(state.metrics.gave_up).sum())
  rejected = int(np.asarray(state.metrics.histogram)[:, :3].sum())
  assert 0 < gave_up < rejected


def test_lossy_rule_reports_what_it_changes():
  state = decode(CSpD(inner_temperature=42.0), process=walks.diffusion())
  assert float(np.asarray(state.metrics.excess).mean()) > 0.1
  state = decode(PathExact(), process=walks.diffusion())
  assert not np.any(state.metrics.excess)


def test_nothing_drafted_is_plain_sampling():
  for drafter in (Null(0), Null(2)):
    state = decode(PathExact(), process=walks.diffusion(), drafter=drafter)
    assert np.all(np.asarray(state.context.rounds) == 4)


def test_condition_that_is_no_number_stops_the_row():
  state = decode(PathExact(), process=walks.diffusion(), prompt=np.nan)
  assert np.all(np.asarray(state.metrics.bad_round) == 0)
  assert np.all(np.asarray(state.context.length) == 1)


def test_what_does_not_fit_is_refused():
  chain = tree.chain(2)
  for name in ('path_exact', 'exact_j', 'reflection', 'cspd'):
    rule = verify.get(name)
    rule.check(chain, (IID,), 0, None)
    with pytest.raises(ValueError, match='tokens of real numbers'):
      rule.check(chain, (IID,), 5, None)
    with pytest.raises(ValueError, match='drafts of kind iid'):
      rule.check(chain, (POINT,), 0, None)
    with pytest.raises(ValueError, match='is for chains'):
      rule.check(tree.from_parents((0, 0)), (IID,), 0, None)
  with pytest.raises(ValueError, match='tokens of a vocabulary'):
    verify.get('speculative').check(chain, (IID,), 0, None)
  with pytest.raises(ValueError, match='last_steps=9: there are 8'):
    decode(PathExact(9), process=walks.diffusion())
  with pytest.raises(ValueError, match='has none'):
    decode(CSpD())
  with pytest.raises(ValueError, match="use 'path_exact'"):
    decode(Reflection())
  longer = walks.Walk(walks.diffusion(num_levels=5))
  with pytest.raises(ValueError, match='8 denoising steps and the drafter 5'):
    decode(PathExact(), process=walks.diffusion(),
           drafter=ChainDensity(2, longer))
  for values in ({'max_tries': 0}, {'last_steps': 0}):
    with pytest.raises(ValueError, match='must be >= 1'):
      PathExact(**values)
  for values in ({'max_tries': 0}, {'inner_temperature': 0.0}):
    with pytest.raises(ValueError, match='must be'):
      CSpD(**values)
  with pytest.raises(ValueError, match='needs a model'):
    ChainDensity(2)
