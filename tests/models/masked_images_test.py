"""MAR in the loop: passes, orders, guidance, the law of whole images."""

from __future__ import annotations

import dataclasses

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
from specjax.drafters import Null
from specjax.drafters.chain_density import ChainDensity
from specjax.models.diffusion import Diffusion
from specjax.models.diffusion_head import DenoisingMLP, GuidedHead
from specjax.models.mar import MAR
from specjax.models.masked_images import MaskedImages

NUM, CHANNELS = 4, 2
_MAR = MAR(num_tokens=NUM, channels=CHANNELS, num_classes=3, width=8,
           num_encoder=1, num_decoder=1, num_heads=2, buffer=2)
_HEAD = DenoisingMLP(CHANNELS, 8, 12, 1)


def model(guided=False):
  """Returns a tiny model, from a level where untrained heads behave."""
  head = GuidedHead(_HEAD) if guided else _HEAD
  return MaskedImages(_MAR, Diffusion(
      head, CHANNELS, num_levels=8, num_base=8, first=5, variance='lower'))


def weights(seed, noise=0.0):
  """Returns random parameters; `noise` is how far others are from them."""
  def draw(shapes, seed):
    rng, other = (np.random.default_rng(s) for s in (seed, seed + 100))
    return {name: jnp.asarray(
        ('norm' in name and 'weight' in name) + rng.normal(0, 0.3, shape)
        + noise * other.normal(0, 0.3, shape), jnp.float32)
            for name, shape in shapes.items()}
  return {'mar': draw(_MAR.shapes, seed), 'head': draw(_HEAD.shapes, seed + 1)}


def context(rows, seed=0, guided=False):
  """Returns images that are not begun, of several classes and orders."""
  rng = np.random.default_rng(seed)
  condition = {
      'order': jnp.asarray(np.stack(
          [rng.permutation(NUM) for _ in range(4)])[np.arange(rows) % 4]),
      'label': jnp.asarray(np.arange(rows) % 3)}
  if guided:
    condition['guidance'] = jnp.full((rows, NUM), 2.0)
  return walks.context(
      np.zeros((rows, 1, CHANNELS)), np.ones(rows), np.full(rows, NUM),
      np.ones(rows), jax.random.split(jax.random.key(seed), rows), room=NUM,
      condition=condition)


PARAMS = Models(target=weights(0), drafter=weights(0, 0.02))


@pytest.mark.parametrize('guided', [False, True])
def test_each_draft_is_scored_given_those_before_it(guided):
  """Rows of the block equal passes over images that are really so far."""
  lm, start = model(guided), context(6, guided=guided)
  drafter = ChainDensity(3, lm)
  engine = Engine(lm, drafter, verify.PathExact())
  draft, state = drafter.propose(PARAMS, loop.empty(engine, start))
  scores, _ = lm.score(PARAMS, state, draft, ())
  order, label = (np.asarray(start.condition[k]) for k in ('order', 'label'))
  for known in range(4):
    image = np.full((6, NUM, CHANNELS), np.nan, np.float32)
    masked = np.ones((6, NUM), bool)
    for b in range(6):
      for k in range(known):
        image[b, order[b, k]] = draft.tokens[b, k]
        masked[b, order[b, k]] = False
    place = order[:, known]
    for who, law in (('target', scores.target_law),
                     ('drafter', draft.draft_law)):
      if who == 'drafter' and known == 3:
        continue  # it drafts three
      for name, classes in (('with', label), ('without', np.full(6, 3))):
        if name == 'without' and not guided:
          continue
        want = _MAR(getattr(PARAMS, who)['mar'], jnp.asarray(image),
                    jnp.asarray(masked), jnp.asarray(classes))
        found = law.condition[name] if guided else law.condition
        np.testing.assert_allclose(
            found[:, known], want[np.arange(6), place], atol=2e-5)


@pytest.mark.parametrize(('rule', 'guided'), [
    (verify.PathExact(), False), (verify.PathExact(2), True)])
def test_images_have_the_targets_law(rule, guided):
  """Two samples: drafted, and plain; each place, each class."""
  lm, rows = model(guided), 6144
  def images(drafter, seed):
    state = sampled.decode(
        Engine(lm, drafter, rule), PARAMS, context(
            rows, guided=guided).replace(keys=jax.random.split(
                jax.random.key(seed), rows)))
    assert np.all(np.asarray(state.context.done))
    return np.asarray(state.context.tokens)[:, 1:NUM + 1], np.asarray(
        state.context.rounds)
  drafted, rounds = images(ChainDensity(2, lm), 1)
  plain, steps = images(Null(0), 2)
  assert np.all(steps == NUM) and rounds.mean() < 0.9 * NUM
  kinds = np.arange(rows) % 12  # class and order
  p_values = []
  for kind in range(12):
    one, other = (x[kinds == kind].reshape(-1, NUM * CHANNELS)
                  for x in (drafted, plain))
    for a, b in zip(one.T, other.T, strict=True):
      p_values.append(stats.ks_2samp(a, b).pvalue)
    p_values.append(stats.ks_2samp(one @ np.arange(1, 9), other @ np.arange(
        1, 9)).pvalue)
  assert min(p_values) * len(p_values) > 1e-3
  # And the classes differ, so that the test means something.
  both = np.concatenate([drafted, plain]).reshape(-1, NUM * CHANNELS)
  label = np.tile(kinds, 2) % 3
  assert min(stats.ks_2samp(a, b).pvalue for a, b in zip(
      both[label == 0].T, both[label == 1].T, strict=True)) < 1e-4


def test_channels_must_agree():
  with pytest.raises(ValueError, match='2 channels, and a head of 3'):
    MaskedImages(_MAR, Diffusion(_HEAD, 3))


# --- Several tokens at a time -----------------------------------------------


def attentive(seed, noise=0.0):
  """Returns `weights` of a decoder that looks hard at the other tokens."""
  out = weights(seed, noise)
  for part, name, by in (('mar', 'z_proj.weight', 6.0),
                         ('mar', 'class_emb.weight', 0.3),
                         ('head', 'cond_embed.weight', 3.0)):
    out[part][name] = by * out[part][name]
  return out


CLOSE = Models(target=attentive(0), drafter=attentive(0, 0.01))


def by_hand(lm, start, seed):
  """Returns images f32[B,N,C] in the order made, iteration by iteration."""
  rows = len(start.length)
  order, label = start.condition['order'], start.condition['label']
  made = jnp.zeros((rows, NUM, CHANNELS))
  for index, begin in enumerate(np.unique(lm.iterations)):
    image = jnp.zeros_like(made).at[jnp.arange(rows)[:, None], order].set(made)
    masked = jnp.argsort(order, axis=1) >= begin
    z = lm.mar(CLOSE.target['mar'], image, masked, label)
    now = np.flatnonzero(lm.iterations == begin)
    x = jax.random.normal(
        jax.random.key(seed + 100 * index), (rows, len(now), CHANNELS))
    for step in range(lm.process.num_steps):
      mean, log_std = lm.process.step(
          CLOSE.target['head'], x, jnp.full(x.shape[:2], step),
          jnp.take_along_axis(z, order[:, now][..., None], axis=1))
      x = mean + jnp.exp(log_std) * jax.random.normal(
          jax.random.key(seed + 100 * index + step + 1), x.shape)
    made = made.at[:, now].set(x)
  return np.asarray(made)


def alike(one, other):
  """Returns the p-value of all tests that two samples have one law.

  Of each number, and of each correlation, within a class and order.
  """
  found = []
  for kind in range(12):
    a, b = (x[np.arange(len(x)) % 12 == kind].reshape(-1, NUM * CHANNELS)
            for x in (one, other))
    found += [stats.ks_2samp(x, y).pvalue for x, y in zip(a.T, b.T)]
    r, s = (np.corrcoef(x.T)[np.triu_indices(NUM * CHANNELS, 1)]
            for x in (a, b))
    z = (np.arctanh(r) - np.arctanh(s)) / np.sqrt(2 / (len(a) - 3))
    found += list(2 * stats.norm.sf(np.abs(z)))
  return min(found) * len(found)


@pytest.mark.parametrize(('iterations', 'passes', 'width'), [
    (2, None, 0), (3, 1, 0), (2, None, 3), (3, None, 3), (3, 2, 3),
    (2, 1, 2)])
def test_the_law_of_few_iterations(iterations, passes, width):
  """Drafted images, and plain ones, against iterations done by hand."""
  rows, start = 6144, context(6144)
  lm = dataclasses.replace(
      model(), num_iterations=iterations, num_passes=passes)
  drafter = ChainDensity(width, model()) if width else Null(lm.largest - 1)
  state = sampled.decode(
      Engine(lm, drafter, verify.PathExact()), CLOSE, start)
  assert np.all(np.asarray(state.context.length) == NUM + 1)
  drafted = np.asarray(state.context.tokens)[:, 1:NUM + 1]
  rounds = np.asarray(state.context.rounds)
  if width:
    assert rounds.mean() < iterations + (passes == 1)
    assert 0 < np.asarray(state.context.token_kept)[:, 1:NUM + 1].mean() < 1
  else:
    assert np.all(rounds == iterations)
    # A round is an iteration.
    np.testing.assert_array_equal(
        state.context.token_round[:, 1:NUM + 1],
        np.tile(np.unique(lm.iterations, return_inverse=True)[1], (rows, 1)))
  assert alike(drafted, by_hand(lm, start, 7)) > 1e-3


@pytest.mark.parametrize('rule', [
    verify.PathExact(2), verify.PathExact(1, max_tries=3), verify.CSpD(),
    verify.CSpD(align=False)], ids=str)
def test_other_rules_take_iterations_too(rule):
  """Every token is made once, by rules of all shapes; capped ones say so."""
  lm = dataclasses.replace(model(), num_iterations=2)
  state = sampled.decode(
      Engine(lm, ChainDensity(3, model()), rule), CLOSE, context(384))
  made = np.asarray(state.context.tokens)[:, 1:NUM + 1]
  assert np.isfinite(made).all()
  assert len(np.unique(made.reshape(-1, CHANNELS), axis=0)) == 384 * NUM
  kept = np.asarray(state.context.token_kept)[:, 1:NUM + 1]
  assert 0 < kept.mean() < 1
  np.testing.assert_array_equal(
      kept.sum(axis=1), np.asarray(state.metrics.accepted).sum(axis=1))
  assert (np.asarray(state.metrics.excess) > 0).any() == rule.lossy


def test_iterations_are_another_law():
  """What the test above could not tell apart, it could not test."""
  start = context(6144)
  two, three, one_by_one = (by_hand(dataclasses.replace(
      model(), num_iterations=n), start, 7) for n in (2, 3, None))
  assert alike(two, one_by_one) < 1e-6
  assert alike(three, one_by_one) < 1e-6


def test_tokens_drawn_inside_a_set_are_told_apart():
  """Each token is drawn once: with noise of its own."""
  lm = dataclasses.replace(model(), num_iterations=1)
  state = sampled.decode(
      Engine(lm, Null(NUM - 1), verify.PathExact()), CLOSE, context(256))
  made = np.asarray(state.context.tokens)[:, 1:NUM + 1]
  assert np.all(np.asarray(state.context.rounds) == 1)
  assert len(np.unique(made.reshape(-1, CHANNELS), axis=0)) == 256 * NUM


@pytest.mark.parametrize(('options', 'message'), [
    ({'num_iterations': 0}, 'num_iterations=0'),
    ({'num_iterations': 5}, r'num_iterations=5.*num_tokens=4'),
    ({'schedule': 'linear'}, "schedule='linear'"),
    ({'num_passes': 0}, 'num_passes=0')])
def test_iterations_out_of_range(options, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(model(), **options)
