"""A causal decoder of images, round by round: caches, drafts, whole texts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_images import (
  CLASSES,
  NEAR,
  NUM,
  PARAMS,
  ROWS,
  begin,
  context,
  drafted,
  jit,
  model,
  step,
  weights,
  whole,
)

from specjax import verify
from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters import Null
from specjax.drafters.chain_density import ChainDensity


@jit
def run(engine, params, start):
  return loop.run(engine, params, loop.start(
      engine, params, loop.empty(engine, start), ~start.done, chunk=4),
                  jnp.int32(100))


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
