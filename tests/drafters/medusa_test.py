"""Medusa and Hydra: decoding is what training saw, on every shape."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.core import control, loop, topologies
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.distill import measure, teacher
from specjax.distill.medusa import HeadsTask
from specjax.drafters import Adaptive, ChainLM, GrownLM, Null, TreeLM
from specjax.drafters.medusa import HeadsSource
from specjax.drafters.source import Source
from specjax.models import medusa
from specjax.models.causal import CausalLM
from specjax.models.medusa import HeadsModel
from specjax.verify import Greedy, Speculative
from tests import tiny

CONFIG = tiny.CONFIGS['llama']
LM = CausalLM(CONFIG, chunk=72)
VOCAB = CONFIG.vocab_size
IDS = np.setdiff1d(np.arange(VOCAB), [3, 11])
NUM = 3
MEDUSA = medusa.for_target(CONFIG, len(IDS), num_heads=NUM)
VARIANTS = {
    'medusa': MEDUSA,
    'hydra': dataclasses.replace(MEDUSA, kind='hydra', num_layers=2),
    'shared': dataclasses.replace(MEDUSA, kind='hydra', head='target')}
# One more token than there are heads: the last one is used again.
CHAIN = NUM + 1
PROMPTS = [[1], [2, 0, 5], [9] * 7, [4, 1, 0, 2, 5, 30, 8]]
END = 20  # of the texts below, some say it and others do not
SIZE = 40


@functools.cache
def made(config):
  """Returns (source, Models) with weights that matter."""
  task = HeadsTask(HeadsModel(config))
  target = tiny.params(CONFIG)
  net = {k: x + 0.15 * tiny.noise(x.shape, len(k)) for k, x in
         task.init(jax.random.key(0), target).items()}
  return task.source(), Models(
      target=target, drafter=task.attach(net, target, IDS))


def start(engine, params, **kwargs):
  context = measure.context(PROMPTS, 16, size=SIZE, **kwargs)
  state = loop.empty(engine, context)
  return loop.start(engine, params, state, jnp.ones((4,), bool), chunk=5)


@functools.partial(jax.jit, static_argnums=0)
def everything(source, params, tokens):
  """Returns laws f32[B,S,M,V] after a pending token at every position.

  As in training: the target runs over the whole text.
  """
  model = source.model
  batch = teacher.Batch(
      tokens=tokens, document=jnp.ones_like(tokens),
      position=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
      supervised=jnp.ones(tokens.shape, bool))
  seen = teacher.observe(LM, params.target, batch, ())
  anchors = batch.position
  rows = HeadsTask(model).rows(
      batch, seen, anchors, anchors >= 0, params.drafter['inverse'])
  hidden = model.hidden(
      params.drafter, params.target, rows['state'], rows['before'])
  logits = model.logits(params.drafter, hidden)
  return jax.nn.log_softmax(model.spread(params.drafter, logits), axis=-1)


@pytest.mark.parametrize('name', VARIANTS)
def test_decoding_is_what_training_saw(name):
  """Laws that drafts come from equal the trainer's, after rejections too."""
  source, params = made(VARIANTS[name])
  assert isinstance(source, Source) and source == HeadsSource(source.model)
  engine = Engine(LM, ChainLM(CHAIN, source), Speculative())
  state = start(engine, params, temperature=1.0)
  draft_of = jax.jit(lambda s: engine.drafter.propose(params, s)[0])
  step = jax.jit(lambda s: loop.step(engine, params, s))
  accepted = []
  for _ in range(4):
    draft = draft_of(state)
    length = np.asarray(state.context.length)
    text = np.array(state.context.tokens)
    for row, n, new in zip(text, length, draft.tokens, strict=True):
      row[n:n + CHAIN] = new
    want = np.asarray(everything(source, params, jnp.asarray(text)))
    got = np.asarray(jax.nn.log_softmax(draft.draft_law.logits, axis=-1))
    for b, n in enumerate(length):
      if n > 1:  # else there is no state yet
        np.testing.assert_allclose(got[b, :NUM], want[b, n - 1], atol=1e-5)
      np.testing.assert_array_equal(got[b, NUM], got[b, NUM - 1])
    state = step(state)
    accepted.append(np.asarray(state.context.length) - length - 1)
  assert len(np.unique(accepted)) > 1


def shapes(source):
  return {
      'chain': ChainLM(CHAIN, source),
      'tree': TreeLM(topologies.branching((2, 2, 1)), source, 'top_k'),
      'medusa-63': TreeLM(topologies.preset('medusa-63'), source, 'top_k'),
      'grown': GrownLM(9, source, 4, 3),
      'switched': Adaptive(
          ChainLM(CHAIN, source), control.Tracking(
              draft_cost=0.25, decay=0.5, probe_every=3),
          exact_shape=False, widths=(0, 2))}


def text_of(state) -> np.ndarray:
  live = np.arange(SIZE) < np.asarray(state.context.length)[:, None]
  return np.where(live, state.context.tokens, -1)


@functools.cache
def plain() -> np.ndarray:
  """Returns the target's own greedy texts."""
  _, params = made(MEDUSA)
  engine = Engine(LM, Null(0), Greedy())
  state = start(engine, params, eos=(END,))
  return text_of(jax.jit(
      lambda s: loop.run(engine, params, s, jnp.int32(SIZE)))(state))


@pytest.mark.parametrize('name,shape', [
    ('medusa', 'chain'), ('hydra', 'chain'), ('hydra', 'tree'),
    ('medusa', 'medusa-63'), ('hydra', 'grown'), ('shared', 'switched')])
def test_greedy_text_is_plain_text_and_the_state_is_kept(name, shape):
  """The memory after every round is that of the text fed from scratch."""
  source, params = made(VARIANTS[name])
  engine = Engine(LM, shapes(source)[shape], Greedy())
  state = start(engine, params, eos=(END,))
  step = jax.jit(lambda s: loop.step(engine, params, s))
  idle, seen = 0, []
  for _ in range(16):
    before = np.asarray(state.metrics.drafted[:, 0])
    _audit(engine, params, state)
    state = step(state)
    idle += int((np.asarray(state.metrics.drafted[:, 0]) == before).all())
    seen.append(np.asarray(state.context.done).sum())
  assert seen[-1] == 4 and 0 < min(x for x in seen if x) < 4
  if shape == 'switched':
    assert idle > seen.count(4)
  np.testing.assert_array_equal(text_of(state), plain())


def _audit(engine, params, state):
  """Compares the state in memory with one computed from scratch."""
  inner = lambda s: s.drafter.get('inner', s.drafter)['state']  # noqa: E731
  fresh = FRESH(engine, params, loop.empty(engine, state.context))
  got, want = np.asarray(inner(state)), np.asarray(inner(fresh))
  live = ~np.asarray(state.context.done)
  np.testing.assert_allclose(got[live], want[live], atol=2e-4)


FRESH = jax.jit(
    lambda engine, params, state: loop.start(
        engine, params, state, jnp.ones((4,), bool), chunk=20),
    static_argnums=0)


@pytest.mark.parametrize('name', ['medusa', 'hydra'])
def test_tree_nodes_follow_their_own_paths(name):
  """Every node's children are the likeliest of its head, given its path."""
  source, params = made(VARIANTS[name])
  topology = topologies.branching((3, 2, 2))
  engine = Engine(LM, TreeLM(topology, source, 'top_k'), Greedy())
  state = start(engine, params)
  draft = jax.jit(lambda s: engine.drafter.propose(params, s)[0])(state)
  paths: list[list[int]] = [[]]
  given = np.asarray(draft.tokens)[3]
  for slot, up in enumerate(topology.parents):
    paths.append(paths[up] + [int(given[slot])])
  prompt = PROMPTS[3]
  inner = [(row, kids) for row, kids in enumerate(topology.children) if kids]
  rows = np.zeros((len(inner), SIZE), np.int32)
  for row, (node, _) in zip(rows, inner, strict=True):
    row[:len(prompt) + len(paths[node])] = prompt + paths[node]
  law = np.asarray(everything(source, params, jnp.asarray(rows)))
  for i, (node, kids) in enumerate(inner):
    best = np.argsort(-law[i, len(prompt) - 1, len(paths[node])])
    np.testing.assert_array_equal(given[list(kids)], best[:len(kids)])
