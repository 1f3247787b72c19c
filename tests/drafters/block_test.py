"""Block drafters: decoding is what training saw, whatever was rejected."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.core import control, loop, topologies
from specjax.core.round import Engine
from specjax.core.round import round as one_round
from specjax.core.types import Models
from specjax.distill import measure, teacher
from specjax.distill.blocks import BlockTask
from specjax.distill.places import block_slots
from specjax.drafters import (
  Adaptive,
  ChainLM,
  GrownLattice,
  GrownLM,
  Lattice,
  Null,
  TreeLM,
)
from specjax.drafters.copying import Copying
from specjax.models.block_drafter import BlockConfig
from specjax.models.block_model import BlockModel
from specjax.models.causal import CausalLM
from specjax.models.transformer_config import TransformerConfig
from specjax.verify import Greedy, Speculative
from tests import tiny

CONFIG = tiny.CONFIGS['llama']
LM = CausalLM(CONFIG, chunk=24)
VOCAB = CONFIG.vocab_size
IDS = np.setdiff1d(np.arange(VOCAB), [3, 11])
DECODER = TransformerConfig(
    vocab_size=VOCAB, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=4,
    num_kv_heads=2, head_dim=8, qk_norm=True)
BASE = BlockConfig(
    decoder=DECODER, taps=(1, 2), draft_vocab_size=len(IDS), num_slots=4,
    markov_rank=6)
VARIANTS = {
    'dspark': BASE,
    'gated': dataclasses.replace(
        BASE, markov='gated', markov_input='embedding'),
    'dflash': dataclasses.replace(
        BASE, layout='mask', markov='none', confidence=False, mask_token=3)}
COPYING = Copying((0.9,))
PROMPTS = [[1], [2, 0, 5], [9] * 7, [4, 1, 0, 2, 5, 30, 8]]


@functools.cache
def made(config: BlockConfig):
  """Returns (source, Models) with weights that matter."""
  task = BlockTask(BlockModel(config))
  target = tiny.params(CONFIG)
  net = jax.tree.map(
      lambda x: x + 0.3 * tiny.noise(x.shape, x.size),
      task.init(jax.random.key(0), target))
  return task.source(), Models(
      target=target, drafter=task.attach(net, target, IDS))


def start(engine, params, **kwargs):
  context = measure.context(PROMPTS, 16, size=40, **kwargs)
  state = loop.empty(engine, context)
  return loop.start(engine, params, state, jnp.ones((4,), bool), chunk=5)


def everything(source, params, tokens):
  """Returns the teacher-forced laws f32[B,S,G,V] with a block at every
  position: what training computes.
  """
  model = source.model
  batch = teacher.Batch(
      tokens=tokens, document=jnp.ones_like(tokens),
      position=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
      supervised=jnp.ones(tokens.shape, bool))
  seen = teacher.observe(LM, params.target, batch, model.taps)
  task = BlockTask(model)
  anchors = batch.position
  hidden = task._blocks(params.drafter, params.target, batch, seen, anchors)
  rows = block_slots(
      batch, seen, anchors, anchors >= 0, params.drafter['inverse'],
      model.num_slots, len(IDS))
  logits, _ = task._logits(
      params.drafter, params.target, {**rows, 'hidden': hidden})
  return jax.nn.log_softmax(model.spread(params.drafter, logits), axis=-1)


@pytest.mark.parametrize('name', VARIANTS)
def test_decoding_is_what_training_saw(name):
  """Laws that drafts come from equal the trainer's, after rejections too."""
  source, params = made(VARIANTS[name])
  engine = Engine(LM, ChainLM(4, source), Speculative())
  state = start(engine, params, temperature=1.0)
  draft_of = jax.jit(lambda s: engine.drafter.propose(params, s)[0])
  step = jax.jit(lambda s: one_round(engine, params, s))
  forced = jax.jit(lambda x: everything(source, params, x))
  accepted = []
  for _ in range(4):
    draft = draft_of(state)
    length = np.asarray(state.context.length)
    text = np.array(state.context.tokens)
    for row, n, new in zip(text, length, draft.tokens, strict=True):
      row[n:n + 4] = new
    want = np.asarray(forced(jnp.asarray(text)))
    got = np.asarray(jax.nn.log_softmax(draft.draft_law.logits, axis=-1))
    for b, n in enumerate(length):
      np.testing.assert_allclose(got[b], want[b, n - 1], atol=2e-4)
    state = step(state)
    accepted.append(np.asarray(state.context.length) - length - 1)
  assert len(np.unique(accepted)) > 1


@pytest.mark.parametrize('name', VARIANTS)
def test_a_block_sees_nothing_behind_its_anchor(name):
  """Later tokens and other documents change nothing; the past does."""
  source, params = made(VARIANTS[name])
  tokens = jnp.asarray(tiny.tokens(1, 20))
  base = everything(source, params, tokens)
  for at, changes in ((12, False), (10, True)):
    other = everything(
        source, params, tokens.at[0, at].set((tokens[0, at] + 1) % VOCAB))
    # Anchor 11, first slot: its law knows tokens up to 11 only.
    moved = np.abs(np.asarray(other - base))[0, 11, 0]
    moved = np.nanmax(np.where(np.isfinite(moved), moved, 0))
    assert (moved > 1e-3) == changes


def shapes(source):
  return {
      'chain': ChainLM(4, source),
      'tree': TreeLM(topologies.branching((2, 2, 1)), source, 'top_k'),
      'grown': GrownLM(9, source, 4, 3),
      'lattice': Lattice(source, 6),
      'lattice tree': Lattice(source, 6, topologies.branching((3, 2, 1))),
      'grown lattice': GrownLattice(source, 6, 10, 4, 3),
      'copying lattice': Lattice(source, 6, copying=COPYING),
      'copying grown lattice': GrownLattice(
          source, 6, 10, 4, 3, copying=COPYING),
      'switched': Adaptive(ChainLM(4, source), control.Heuristic(),
                           exact_shape=False, widths=(0, 2)),
      'switched lattice': Adaptive(
          Lattice(source, 6), control.Tracking(draft_cost=0.3),
          exact_shape=False, widths=(0, 2))}


@pytest.mark.parametrize('shape', [
    'chain', 'tree', 'grown', 'switched', 'lattice', 'lattice tree',
    'grown lattice', 'copying lattice', 'copying grown lattice',
    'switched lattice'])
def test_greedy_text_is_plain_text_and_the_cache_is_kept(shape):
  source, params = made(BASE)
  drafter = shapes(source)[shape]
  engine = Engine(LM, drafter, Greedy())
  state = start(engine, params)
  step = jax.jit(lambda s: loop.step(engine, params, s))
  plain = Engine(LM, Null(0), Greedy())
  want = start(plain, params)
  want = jax.jit(lambda s: loop.run(plain, params, s, jnp.int32(40)))(want)
  for _ in range(16):
    state = step(state)
    _audit(engine, source, params, state)
  np.testing.assert_array_equal(state.context.length, want.context.length)
  np.testing.assert_array_equal(
      np.where(np.arange(40) < np.asarray(want.context.length)[:, None],
               state.context.tokens, 0),
      np.where(np.arange(40) < np.asarray(want.context.length)[:, None],
               want.context.tokens, 0))


def _audit(engine, source, params, state):
  """Compares the cached context with one computed from scratch."""
  memory = state.drafter
  memory = memory.get('inner', memory)['cache']
  fresh = loop.empty(engine, state.context)
  fresh = FRESH(engine, params, fresh).drafter
  fresh = fresh.get('inner', fresh)['cache']
  root = np.asarray(state.context.length) - 1
  for done, b, n in zip(state.context.done, range(4), root, strict=True):
    for got, want in zip(memory, fresh, strict=True):
      for k in 'kv':
        if not done:
          np.testing.assert_allclose(
              got[k][b, :, :n], want[k][b, :, :n], atol=2e-4)


FRESH = jax.jit(
    lambda engine, params, state: loop.start(
        engine, params, state, jnp.ones((4,), bool), chunk=20),
    static_argnums=0)


def test_bad_configurations_are_named():
  for change in ({'layout': 'x'}, {'markov': 'x'}, {'taps': (2, 1)},
                 {'taps': ()}, {'num_slots': 0}, {'markov_rank': 0},
                 {'draft_vocab_size': 99}, {'markov_input': 'x'}):
    with pytest.raises(ValueError, match=next(iter(change))):
      dataclasses.replace(BASE, **change)
