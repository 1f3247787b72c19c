"""A causal decoder of images: its passes, guidance, laws, what it refuses."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_images import (
  CHANNELS,
  CLASSES,
  HEAD,
  NUM,
  PARAMS,
  ROWS,
  WIDTH,
  begin,
  context,
  drafted,
  jit,
  model,
  score,
  step,
  weights,
  whole,
)

from specjax import verify
from specjax.core import loop, tree
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters import Null
from specjax.drafters.chain_density import ChainDensity
from specjax.drafters.source import Level, Source
from specjax.models.attention import Block
from specjax.models.transformer import Transformer


@jit
def moments(lm, params, context, told, x):
  """Returns mean and log std after the second step of the chain."""
  return lm.law(params, context, told).moments(x, jnp.int32(1))


def test_inputs_are_class_tokens_and_two_places():
  """The definition, slot by slot."""
  lm, params, c = model(), weights(), context()
  order, label = (np.asarray(c.condition[x]) for x in ('order', 'label'))
  mar = jax.tree.map(np.asarray, params['mar'])
  image = np.random.default_rng(3).normal(size=(ROWS, NUM, CHANNELS))
  x = np.zeros((ROWS, NUM, WIDTH))
  for b, places in enumerate(order):
    x[b, 0] = mar['net']['embedding'][1 + label[b]]
    for k in range(NUM):
      if k:
        before = places[k - 1]
        x[b, k] = (image[b, before] @ mar['in']['kernel']
                   + mar['in']['bias'] + mar['place_in'][before])
      x[b, k] += mar['place_out'][places[k]]
  want = Transformer(lm.config).apply(  # over a cache, unlike `whole`
      {'params': params['mar']['net']}, jnp.asarray(x, jnp.float32),
      lm.empty(ROWS, NUM)['cache'], Block(
          base=jnp.zeros(ROWS, jnp.int32), position=jnp.broadcast_to(
              jnp.arange(NUM), (ROWS, NUM))),
      taps=('final',), with_head=False)[1]['final']
  found = whole(lm, params, image, c, label)
  assert found.shape == (ROWS, NUM, WIDTH) and found.dtype == jnp.float32
  np.testing.assert_allclose(found, want, atol=1e-5)
  # Places and classes matter in every slot.
  moved = c.replace(condition={'order': (order + 1) % NUM})
  for other in (whole(lm, params, image, moved, label),
                whole(lm, params, image, c, (label + 1) % 4)):
    assert np.abs(np.asarray(found - other)).max(axis=-1).min() > 1e-3


def test_later_tokens_are_not_seen():
  lm, c = model(), context()
  order, label = c.condition['order'], c.condition['label']
  image = np.random.default_rng(0).normal(size=(ROWS, NUM, CHANNELS))
  found = np.asarray(whole(lm, weights(), image, c, label))
  for k in range(NUM):
    other = image.copy()  # even a token that is no number
    other[np.arange(ROWS), order[:, k]] = (7.0, np.nan)
    apart = np.abs(np.asarray(
        whole(lm, weights(), other, c, label)) - found).max(axis=-1)
    np.testing.assert_allclose(apart[:, :k + 1], 0, atol=1e-6)
    # The token of `order[k]` is read in slot k + 1, and seen from there on.
    assert k == NUM - 1 or apart[:, k + 1:].min() > 1e-3


@pytest.mark.parametrize('guided', [False, True])
def test_what_is_not_fed_leaves_caches_alone(guided):
  """Of both roles: padding, pending tokens, rows that are mid-text."""
  lm, c = model(guided, 1), context(np.ones(ROWS) if guided else None)
  engine = Engine(lm, ChainDensity(2, lm), verify.PathExact())
  params = Models(target=weights(1), drafter=weights(1))
  state = loop.empty(engine, c)
  position = jnp.tile(jnp.arange(3), (ROWS, 1))
  fed = (position != 1) & (jnp.arange(ROWS) % 2 == 0)[:, None]
  after, _ = jax.jit(lm.init, static_argnums=4)(
      params, state, position, fed, ())
  own = jax.jit(lm.init)(params, state, position, fed, {})
  np.testing.assert_array_equal(own['held'], 3 * (np.arange(ROWS) % 2 == 0))
  for cache in (after.target['cache'], own['cache']):
    stored = np.asarray(cache[0]['k']).reshape(
        ROWS, -1, *cache[0]['k'].shape[-2:])
    found = (stored != 0).all(axis=(1, 3))
    np.testing.assert_array_equal(found[:, :3], fed)
    assert not stored[:, :, 3:].any() and not stored[:, :, 1].any()


def test_guidance_is_of_the_noise():
  """The loop's law lies between those of two whole passes."""
  free, lm = (model(guided, variance='learned') for guided in (False, True))
  scale = np.linspace(-1, 4, ROWS)[:, None] + 0.2 * np.arange(NUM)
  c = context(scale)
  label = c.condition['label']
  engine = Engine(lm, Null(2), verify.PathExact())
  state = begin(engine, PARAMS, c)
  draft, _ = engine.drafter.propose(PARAMS, state)
  rng = np.random.default_rng(2)
  draft = draft.replace(tokens=jnp.asarray(
      rng.normal(size=draft.tokens.shape), jnp.float32))
  told = score(lm, PARAMS, state, draft)[0].target_law.condition
  text, image = drafted(c, draft)
  known = c.root[:, None] + jnp.arange(3)
  x = jnp.asarray(rng.normal(size=(ROWS, 3, CHANNELS)))
  found = moments(lm, PARAMS.target, c, told, x)
  (ours, std), (bare, _) = (
      moments(free, PARAMS.target, c, tree.take_row(
          whole(free, PARAMS.target, image, c, classes), known), x)
      for classes in (label, jnp.full_like(label, CLASSES)))
  at = np.take_along_axis(scale, np.minimum(known, NUM - 1), axis=1)
  np.testing.assert_allclose(
      found[0], bare + at[..., None] * (ours - bare), atol=1e-4)
  np.testing.assert_allclose(found[1], std, atol=1e-4)
  assert np.abs(np.asarray(ours - bare))[:3].min(axis=1).max() > 1e-2
  said = jax.jit(lm.features)(PARAMS.target, c, text, known)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
               said, told)


def test_the_second_token_has_the_targets_law_given_the_first():
  """Out of the loop, against the head and its formula."""
  lm, c = model(), context(begun=False)
  engine = Engine(lm, ChainDensity(3, model(layers=1)), verify.PathExact())
  state = begin(engine, PARAMS, c)
  draft, scores, _ = step(engine, PARAMS, state)
  image = np.random.default_rng(5).normal(size=(ROWS, NUM, CHANNELS))
  image[np.arange(ROWS), c.condition['order'][:, 0]] = draft.tokens[:, 0]
  x = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, CHANNELS)))
  means = []
  for first in (image, image + 1):  # and it matters what the first is
    said = whole(lm, PARAMS.target, first, c, c.condition['label'])[:, 1]
    level = 1  # of three steps, the second
    time = lm.process.time(jnp.full((ROWS,), level))
    noise, _ = HEAD(PARAMS.target['head'], x, time, said)
    t = {name: values[level] for name, values in lm.process.tables.items()}
    token = t['scale'] * (x - t['spread'] * noise)
    means.append(t['of_token'] * token + t['of_state'] * x)
  mean, log_std = (found[:, 1] for found in moments(
      lm, PARAMS.target, c, scores.target_law.condition,
      jnp.tile(x[:, None], (1, 4, 1))))
  np.testing.assert_allclose(mean, means[0], atol=1e-4)
  assert np.abs(np.asarray(mean - means[1])).max(axis=1).min() > 1e-3
  std = np.exp(0.5 * t['log_posterior']) * c.options.temperature
  np.testing.assert_allclose(
      np.exp(log_std), np.tile(std[:, None], CHANNELS), rtol=1e-4)


def test_drafts_that_are_no_numbers_harm_nobody():
  lm = model()
  engine = Engine(lm, Null(3), verify.PathExact())
  state = begin(engine, PARAMS, context())
  draft, _ = engine.drafter.propose(PARAMS, state)
  bad = draft.replace(tokens=draft.tokens.at[:, 1, 0].set(jnp.nan))
  (fine, _), (found, after) = (
      score(lm, PARAMS, state, d) for d in (draft, bad))
  np.testing.assert_allclose(found.target_law.condition[:, :2],
                             fine.target_law.condition[:, :2], atol=1e-6)
  assert np.asarray(fine.finite).all()
  np.testing.assert_array_equal(
      found.finite, [[True, True, False, False]] * ROWS)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.target))


def test_bfloat16():
  """Of the decoder alone: weights may be float32, what comes out is."""
  lm, c = model(layers=1, dtype='bfloat16'), context()
  fresh = jax.tree.map(np.asarray, jax.jit(lm.random)(jax.random.key(0)))
  assert {x.dtype for x in jax.tree.leaves(fresh)} == {np.dtype('float32')}
  assert all(x.std() > 0 for x in jax.tree.leaves(fresh['mar'])
             if x.ndim > 1)
  params = Models(target=weights(1), drafter=weights(1))
  engine = Engine(lm, Null(3), verify.PathExact())
  state = begin(engine, params, c)
  assert state.target['cache'][0]['k'].dtype == jnp.bfloat16
  draft, _ = engine.drafter.propose(params, state)
  draft = draft.replace(tokens=draft.tokens + 0.5)
  said = score(lm, params, state, draft)[0].target_law.condition
  assert said.dtype == jnp.float32
  _, image = drafted(c, draft)
  want = tree.take_row(
      whole(model(layers=1), weights(1), image, c, c.condition['label']),
      c.root[:, None] + jnp.arange(4))
  assert 1e-3 < np.abs(np.asarray(said - want)).max() < 0.1  # eight bits
  # Matrices are cast where they are used: it does not matter how they lie.
  mar = weights(1)['mar']
  small = {'mar': {**mar, 'net': {**mar['net'], 'layer_0': jax.tree.map(
      lambda w: w if w.ndim == 1 else w.astype(jnp.bfloat16),
      mar['net']['layer_0'])}}}
  np.testing.assert_array_equal(*(
      whole(lm, w, image, c, c.condition['label'])
      for w in (weights(1), small)))
  # A round carries it: what goes in comes out, of the drafter's cache too.
  engine = engine._replace(drafter=ChainDensity(3, lm))
  state = jax.eval_shape(functools.partial(loop.empty, engine), c)
  after = jax.eval_shape(functools.partial(loop.step, engine), params, state)
  assert jax.tree.all(jax.tree.map(
      lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after))


def test_errors():
  lm = model()
  assert isinstance(lm, Source) and hash(lm) == hash(model())
  for change, text in (
      ({'channels': 3}, '3 channels, and a head of 2'),
      ({'num_classes': 4}, 'must be 1 and 5 for num_classes=4'),
      ({'num_tokens': 0}, 'num_tokens=0'), ({'chunk': 0}, 'chunk=0'),
      ({'config': dataclasses.replace(lm.config, vocab_size=2)},
       'vocab_size=2, num_conditions=4'),
      ({'config': dataclasses.replace(lm.config, grid_width=3)},
       'grid_width=3')):
    with pytest.raises(ValueError, match=text):
      dataclasses.replace(lm, **change)
  c, trees = context(), tree.from_parents((0, 0))
  for one, drafter, start, text in (
      (model(chunk=2), Null(2), c, '3 tokens in one call, but chunk=2'),
      (model(True), Null(0), c, 'no context.*that is a GuidedHead'),
      (lm, Null(0), context(np.ones(ROWS)), 'that is not a GuidedHead'),
      (lm, Null(tree=trees), c, 'this draft is a tree')):
    state = loop.empty(Engine(one, drafter, None), start)
    draft, _ = drafter.propose(PARAMS, state)
    with pytest.raises(ValueError, match=text):
      one.score(PARAMS, state, draft, ())
  with pytest.raises(ValueError, match='this draft is a tree'):
    lm.grow(PARAMS, c, {}, Level(
        tokens=c.tokens[:, :1], depth=1, base=c.length, parent=c.length[:1],
        position=c.length[:, None], ancestors=jnp.ones((1, 1), bool)))
  with pytest.raises(ValueError, match='refill'):
    lm.begin(PARAMS, state, behind=2, refill=True)
