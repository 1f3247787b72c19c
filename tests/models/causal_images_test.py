"""A causal decoder of images in the loop: passes, caches, guidance, laws."""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import verify
from specjax.certificates import walks
from specjax.core import loop, tree
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters import Null
from specjax.drafters.chain_density import ChainDensity
from specjax.drafters.source import Level, Source
from specjax.models.attention import Block
from specjax.models.causal_images import CausalImages
from specjax.models.diffusion import Diffusion
from specjax.models.diffusion_head import DenoisingMLP, GuidedHead
from specjax.models.transformer import Transformer, TransformerConfig

NUM, CHANNELS, CLASSES, WIDTH, ROWS = 6, 2, 3, 16, 8
_HEAD = DenoisingMLP(CHANNELS, WIDTH, 12, 1)
# Compiling takes longer than running.
_jit = functools.partial(jax.jit, static_argnums=0, compiler_options={
    'xla_backend_optimization_level': 0})


def model(guided=False, layers=2, chunk=4, variance='lower', window=None,
          dtype='float32'):
  """Returns a tiny model, from a level where untrained heads behave."""
  config = TransformerConfig(
      vocab_size=1, num_conditions=CLASSES + 1, num_layers=layers,
      embed_dim=WIDTH, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8,
      window=window, dtype=dtype,
      local_layers=(True, False)[:layers] if window else ())
  return CausalImages(config, NUM, CHANNELS, CLASSES, Diffusion(
      GuidedHead(_HEAD) if guided else _HEAD, CHANNELS, num_levels=4,
      num_base=4, first=2, variance=variance), chunk)


@functools.cache
def weights(layers=2, seed=0):
  """Returns parameters that matter; smaller models share those they have."""
  def draw(path, x):
    name = f'{seed} {jax.tree_util.keystr(path)}'
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(
        0, 0.25 if x.ndim > 1 else 0.1, x.shape)
    return jnp.asarray(values + ('scale' in name or 'ln.weight' in name),
                       jnp.float32)
  return jax.tree_util.tree_map_with_path(
      draw, jax.eval_shape(model(layers=layers).random, jax.random.key(0)))


# A drafter that lacks a layer of the target's, and is off in the other.
NEAR = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, weights(1), weights(1, 1))
PARAMS = Models(target=weights(), drafter=NEAR)


def context(guidance=None, begun=True):
  """Returns images of all classes and several orders; some are begun."""
  rng = np.random.default_rng(0)
  have = np.arange(ROWS) % 3 * begun
  condition = {
      'order': jnp.asarray(np.stack(
          [rng.permutation(NUM) for _ in range(ROWS)]), jnp.int32),
      'label': jnp.asarray(np.arange(ROWS) % (CLASSES + 1), jnp.int32)}
  if guidance is not None:
    condition['guidance'] = jnp.broadcast_to(jnp.asarray(
        guidance, jnp.float32).reshape(ROWS, -1), (ROWS, NUM))
  return walks.context(
      rng.normal(size=(ROWS, 3, CHANNELS)), 1 + have, NUM - have,
      np.linspace(0.8, 1.0, ROWS), jax.random.split(jax.random.key(0), ROWS),
      room=NUM + 1, condition=condition)


class Spy:
  """Leaves behind what was proposed and scored, within one trace."""

  def __init__(self, inner):
    self.inner = inner

  def __getattr__(self, name):
    return getattr(self.inner, name)

  def propose(self, *args):
    self.caught, state = self.inner.propose(*args)
    return self.caught, state

  def score(self, *args):
    self.caught, state = self.inner.score(*args)
    return self.caught, state


@_jit
def begin(engine, params, start):
  return loop.start(engine, params, loop.empty(engine, start),
                    ~start.done, chunk=2)


@_jit
def step(engine, params, state):
  """Returns a round's draft, its scores, and the state after it."""
  spies = Spy(engine.drafter), Spy(engine.target)
  state = loop.step(
      engine._replace(drafter=spies[0], target=spies[1]), params, state)
  return spies[0].caught, spies[1].caught, state


@_jit
def run(engine, params, start):
  return loop.run(engine, params, loop.start(
      engine, params, loop.empty(engine, start), ~start.done, chunk=4),
                  jnp.int32(100))


@_jit
def whole(lm, params, image, c, label):
  """Returns what is said, f32[ROWS,NUM,WIDTH], in one pass."""
  return lm.whole(params['mar'], image, c.condition['order'], label)


@_jit
def score(lm, params, state, draft):
  return lm.score(params, state, draft, ())


@_jit
def moments(lm, params, context, told, x):
  """Returns mean and log std after the second step of the chain."""
  return lm.law(params, context, told).moments(x, jnp.int32(1))


def drafted(context, draft):
  """Returns texts with their drafts behind, and all places of images."""
  text = np.asarray(context.tokens).copy()
  image = np.full((ROWS, NUM, CHANNELS), 5.0, np.float32)
  for b, places in enumerate(np.asarray(context.condition['order'])):
    end = int(context.length[b]) + draft.tokens.shape[1]
    text[b, int(context.length[b]):end] = draft.tokens[b]
    made = text[b, 1:end][:NUM]
    image[b, places[:len(made)]] = made
  return text, image


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


@pytest.mark.parametrize('kind', ['plain', 'guided', 'window'])
def test_caches_say_what_a_whole_pass_says(kind):
  """In every round, at ragged places, of target and drafter."""
  guided, window = kind == 'guided', 3 if kind == 'window' else None
  lm, small = (model(guided, n, window=window) for n in (2, 1))
  engine = Engine(lm, ChainDensity(3, small), verify.PathExact())
  c = context(np.linspace(0, 1.5, ROWS) if guided else None)
  label = c.condition['label']
  views = {'with': label, 'without': jnp.full_like(label, CLASSES)}
  state, seen, moved = begin(engine, PARAMS, c), 0, []
  while not np.asarray(state.context.done).all():
    draft, scores, new = step(engine, PARAMS, state)
    assert np.asarray(scores.finite).all()
    root = np.asarray(state.context.root)
    _, image = drafted(state.context, draft)
    for one, params, law in ((lm, PARAMS.target, scores.target_law),
                             (small, PARAMS.drafter, draft.draft_law)):
      told = law.condition if guided else {'with': law.condition}
      for name in told.keys() - {'scale'}:
        want = whole(one, params, image, c, views[name])
        for b in np.flatnonzero(~np.asarray(state.context.done)):
          rows = min(told[name].shape[1], NUM - root[b])
          np.testing.assert_allclose(
              told[name][b, :rows], want[b, root[b]:root[b] + rows],
              atol=1e-5)
          seen += rows
      if guided:
        scale = np.asarray(c.condition['guidance'])
        at = root[:, None] + np.arange(told['scale'].shape[1])
        np.testing.assert_array_equal(
            told['scale'], np.take_along_axis(
                scale, np.minimum(at, NUM - 1), axis=1))
    moved.append(np.asarray(new.context.length - state.context.length))
    state = new
  # Among the rounds: nothing kept, something, everything; rows are apart.
  assert {1, 2, 4} <= set(np.concatenate(moved)) and seen > 100
  assert len(set(np.sum(moved[:2], axis=0))) > 2


def test_a_model_accepts_its_own_drafts_and_scale_one_is_no_guidance():
  params = Models(target=weights(1), drafter=weights(1))
  texts = []
  for scale in (None, 1.0, 2.0):
    lm = model(scale is not None, 1)
    state = run(Engine(lm, ChainDensity(2, lm), verify.PathExact()), params,
                context(scale and np.full(ROWS, scale), begun=False))
    # Two rounds of two drafts and one more: every image is done.
    np.testing.assert_array_equal(state.context.rounds, 2)
    np.testing.assert_array_equal(
        state.metrics.accepted, state.metrics.drafted)
    texts.append(np.asarray(state.context.tokens)[:, :NUM + 1])
  np.testing.assert_allclose(texts[0], texts[1], atol=1e-4)
  apart = np.abs(texts[0] - texts[2]).max(axis=(1, 2))
  # Images of any class have nothing to guide.
  np.testing.assert_array_equal(apart > 1e-3, np.arange(ROWS) % 4 != 3)


def test_padded_blocks_and_rows_alone_and_counts():
  """Texts without drafts do not depend on the block, nor any on neighbours.

  (Texts with drafts differ from them under the same keys: ratios are drawn.)
  """
  lm, c = model(layers=1), context()
  params = Models(target=weights(1), drafter=NEAR)
  engine = Engine(lm, ChainDensity(3, lm), verify.PathExact())
  plain, wide, state = (
      run(engine._replace(drafter=drafter), params, c)
      for drafter in (Null(0), Null(3), engine.drafter))
  np.testing.assert_allclose(
      plain.context.tokens, wide.context.tokens, atol=1e-4)
  slot = np.arange(c.tokens.shape[1])
  given = slot < np.asarray(c.length)[:, None]
  made = ~given & (slot <= NUM)
  for one in (plain, state):
    tokens = np.asarray(one.context.tokens)
    assert np.isfinite(tokens).all() and (tokens[made] != 0).all()
    np.testing.assert_array_equal(tokens[given], c.tokens[given])
    np.testing.assert_array_equal(one.context.length, NUM + 1)
  m, rounds = state.metrics, np.asarray(state.context.rounds)
  kept = np.asarray(m.accepted).sum(axis=1)
  np.testing.assert_array_equal(np.asarray(m.histogram).sum(axis=1), rounds)
  np.testing.assert_array_equal(np.asarray(m.histogram) @ np.arange(4), kept)
  # The limit may cut off the token behind the last drafts.
  assert set(rounds + kept - made.sum(axis=1)) <= {0, 1}
  assert 0 < kept.sum() < np.asarray(m.drafted).sum()
  assert (np.asarray(m.bad_round) < 0).all() and not np.any(m.gave_up)
  for b in (1, 5):
    alone = run(engine, params, jax.tree.map(lambda x, b=b: x[b:b + 1], c))
    np.testing.assert_allclose(alone.context.tokens[0], tokens[b], atol=1e-4)
    assert alone.context.rounds[0] == rounds[b]


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
    noise, _ = _HEAD(PARAMS.target['head'], x, time, said)
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
