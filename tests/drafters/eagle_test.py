"""EAGLE drafters: decoding is what training saw, whatever was rejected."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specjax.core import control, loop, topologies
from specjax.core.round import Engine
from specjax.core.round import round as one_round
from specjax.core.types import Models
from specjax.distill import measure, teacher
from specjax.distill import task as task_lib
from specjax.distill.eagle import EagleTask
from specjax.distill.trainer import Trainer
from specjax.drafters import Adaptive, ChainLM, GrownLM, Null, TreeLM
from specjax.models.causal import CausalLM
from specjax.models.eagle import EagleConfig
from specjax.models.eagle_model import EagleModel
from specjax.models.transformer_config import TransformerConfig
from specjax.verify import Greedy, Speculative
from tests import tiny

CONFIG = tiny.CONFIGS['llama']
LM = CausalLM(CONFIG, chunk=24)
VOCAB, SIZE, NUM = CONFIG.vocab_size, 40, 4
IDS = np.setdiff1d(np.arange(VOCAB), [3, 11])
DECODER = TransformerConfig(
    vocab_size=VOCAB, num_layers=1, embed_dim=16, mlp_dim=24, num_heads=4,
    num_kv_heads=2, head_dim=8)
VARIANTS = {
    'eagle': EagleConfig(DECODER, len(IDS), '1', fuse_bias=True),
    'eagle3': EagleConfig(DECODER, len(IDS), taps=(0, 1, 2), own_head=True),
    'two layers': EagleConfig(
        dataclasses.replace(DECODER, num_layers=2, qk_norm=True), len(IDS),
        taps=(1, 2))}
PROMPTS = [[1], [2, 0, 5], [9] * 7, [4, 1, 0, 2, 5, 30, 8]]


@functools.cache
def made(name: str):
  """Returns (source, Models) with weights that matter."""
  task = EagleTask(EagleModel(VARIANTS[name]), steps=NUM)
  target = tiny.params(CONFIG)
  net = jax.tree.map(
      lambda x: x + 0.3 * tiny.noise(x.shape, x.size),
      task.init(jax.random.key(0), target))
  return task.source(), Models(
      target=target, drafter=task.attach(net, target, IDS))


def start(engine, params, **kwargs):
  context = measure.context(PROMPTS, 16, size=SIZE, **kwargs)
  state = loop.empty(engine, context)
  return loop.start(engine, params, state, jnp.ones((4,), bool), chunk=5)


def forced(source, params, tokens):
  """Returns the laws f32[B,K,S,V] that training sees on texts: step s of row
  t is for the token t + 2 + s.
  """
  size = tokens.shape[1]
  batch = teacher.Batch(
      tokens=tokens, document=jnp.ones_like(tokens),
      position=jnp.broadcast_to(jnp.arange(size), tokens.shape),
      supervised=jnp.ones(tokens.shape, bool))
  seen = teacher.observe(LM, params.target, batch, source.taps)
  hidden = EagleTask(source.model, steps=NUM)._unroll(
      params.drafter, params.target, batch, seen, jax.random.key(0))
  logits = source.model.logits(params.drafter, hidden)
  return jax.nn.log_softmax(
      source.model.spread(params.drafter, logits), axis=-1)


def paths(draft, b: int):
  """Yields each slot of a static draft's row and the tokens above it."""
  parents = draft.topology.parents
  for slot in range(draft.topology.num_nodes):
    above, row = [], parents[slot]
    while row:
      above.append(int(draft.tokens[b, row - 1]))
      row = parents[row - 1]
    yield slot, above[::-1]


SAMPLED = {
    'chain': lambda source: ChainLM(NUM, source),
    'tree': lambda source: TreeLM(
        topologies.branching((2, 2, 1, 1)), source, 'iid')}


@pytest.mark.parametrize('name,shape', [
    ('eagle', 'chain'), ('eagle3', 'chain'), ('two layers', 'tree')])
def test_drafts_come_from_the_laws_that_training_saw(name, shape):
  """Every node's law, after rejections too: true states, own outputs."""
  source, params = made(name)
  engine = Engine(LM, SAMPLED[shape](source), Speculative())
  state = start(engine, params, temperature=1.0)
  draft_of = jax.jit(lambda s: engine.drafter.propose(params, s)[0])
  step = jax.jit(lambda s: one_round(engine, params, s))
  laws_of = jax.jit(lambda x: forced(source, params, x))
  accepted, checked = [], 0
  for _ in range(4):
    draft = draft_of(state)
    length = np.asarray(state.context.length)
    nodes = [(b, slot, above) for b in range(4) if length[b] > 1
             for slot, above in paths(draft, b)]
    texts = np.array(state.context.tokens)[[b for b, _, _ in nodes]]
    for text, (b, _, above) in zip(texts, nodes, strict=True):
      text[length[b]:length[b] + len(above)] = above
    pad = np.zeros((80 - len(texts), SIZE), np.int32)
    want = np.asarray(laws_of(jnp.concatenate([texts, pad])))
    got = np.asarray(jax.nn.log_softmax(draft.draft_law.logits, axis=-1))
    rows = (np.arange(NUM) if draft.law_row is None
            else np.asarray(draft.law_row))
    for i, (b, slot, above) in enumerate(nodes):
      law = want[i, len(above), length[b] - 2]
      largest = np.abs(np.where(np.isfinite(law), law, 0)).max()
      np.testing.assert_allclose(
          got[b, rows[slot]], law, rtol=0, atol=1e-5 * max(1, largest))
      checked += 1
    state = step(state)
    accepted.append(np.asarray(state.context.length) - length - 1)
  assert len(np.unique(accepted)) > 1 and checked > 40


def shapes(source):
  return {
      'chain': ChainLM(NUM, source),
      'tree': TreeLM(topologies.branching((2, 2, 1)), source, 'top_k'),
      'grown': GrownLM(9, source, 4, 3),
      'switched': Adaptive(
          ChainLM(NUM, source),
          control.Tracking(draft_cost=0.3, decay=0.5, probe_every=3),
          exact_shape=False, widths=(0, 2))}


@functools.cache
def plain(eos: tuple[int, ...]):
  """Returns the target's own greedy texts, and their lengths."""
  engine, params = Engine(LM, Null(0), Greedy()), made('eagle')[1]
  state = start(engine, params, eos=eos)
  state = jax.jit(
      lambda s: loop.run(engine, params, s, jnp.int32(SIZE)))(state)
  return np.asarray(state.context.tokens), np.asarray(state.context.length)


@pytest.mark.parametrize('name,shape', [
    ('eagle3', 'chain'), ('two layers', 'tree'), ('eagle', 'grown'),
    ('eagle3', 'switched')])
def test_greedy_text_is_plain_text_and_the_memory_is_kept(name, shape):
  """After every round: true states only, as from scratch; done rows rest."""
  source, params = made(name)
  tokens, _ = plain(())
  eos = (int(tokens[2, 12]),)  # ends a row in the middle
  tokens, lengths = plain(eos)
  engine = Engine(LM, shapes(source)[shape], Greedy())
  state = start(engine, params, eos=eos)
  step = jax.jit(lambda s: loop.step(engine, params, s))
  audit(engine, params, state)
  for _ in range(17):
    new = step(state)
    _untouched(state, new)
    state = new
    audit(engine, params, state)
  np.testing.assert_array_equal(state.context.length, lengths)
  live = np.arange(SIZE) < lengths[:, None]
  np.testing.assert_array_equal(
      np.where(live, state.context.tokens, 0), np.where(live, tokens, 0))
  assert lengths[2] < 23 and (np.asarray(state.context.done)).all()
  if shape == 'switched':
    drafted = np.asarray(state.metrics.drafted)[:, 0]
    assert (drafted < np.asarray(state.context.rounds)).any()


def memory_of(state):
  return state.drafter.get('inner', state.drafter)


def audit(engine, params, state):
  """Compares with what `init` makes of the text, for rows that go on."""
  got = memory_of(state)
  want = memory_of(FRESH(engine, params, loop.empty(engine, state.context)))
  going = ~np.asarray(state.context.done)
  live = np.arange(got['cache'][0]['k'].shape[2]) < np.asarray(
      state.context.root)[:, None]
  live = (live & going[:, None])[:, None, :, None]
  for a, b in zip(got['cache'], want['cache'], strict=True):
    for k in 'kv':
      np.testing.assert_allclose(
          np.where(live, a[k], 0), np.where(live, b[k], 0), atol=1e-4)
  np.testing.assert_allclose(
      got['hidden'][going], want['hidden'][going], atol=1e-4)


def _untouched(old, new):
  """A done row keeps its rows and its last output, bit for bit."""
  done = np.asarray(old.context.done)
  a, b = memory_of(old), memory_of(new)
  np.testing.assert_array_equal(a['hidden'][done], b['hidden'][done])
  for row in np.flatnonzero(done):
    root = int(old.context.root[row])
    for x, y in zip(a['cache'], b['cache'], strict=True):
      np.testing.assert_array_equal(x['k'][row, :, :root],
                                    y['k'][row, :, :root])


FRESH = jax.jit(
    lambda engine, params, state: loop.start(
        engine, params, state, jnp.ones((4,), bool), chunk=20),
    static_argnums=0)


def test_the_audit_sees_guesses_that_were_kept():
  """Planted fault: accepted rows keep the keys that drafting stored."""
  source, params = made('eagle3')

  class KeepsGuesses(type(source)):
    def sync(self, params, state, draft, scores, verdict, *, own):
      new = super().sync(params, state, draft, scores, verdict, own=own)
      return {**new, 'cache': state.drafter['cache']}

  engine = Engine(LM, ChainLM(NUM, KeepsGuesses(source.model)), Greedy())
  state = start(engine, params)
  audit(engine, params, state)
  state = jax.jit(lambda s: loop.step(engine, params, s))(state)
  with pytest.raises(AssertionError):
    audit(engine, params, state)


def test_the_compiled_loop_copies_no_cache():
  source, params = made('two layers')
  engine = Engine(LM, ChainLM(NUM, source), Speculative())
  state = loop.empty(engine, measure.context(PROMPTS, 16, size=SIZE,
                                             temperature=1.0))
  run, _ = loop.compiled()
  text = run.lower(engine, params, state, np.int32(3)).compile().as_text()
  shape = ','.join(str(n) for n in state.drafter['cache'][0]['k'].shape)
  body = text[:text.index('ENTRY')]
  assert f'f32[{shape}]' in body
  assert not re.findall(rf'f32\[{shape}\]\S* copy\(', body)


@pytest.mark.parametrize('name', VARIANTS)
def test_half_precision_stays_half(name):
  """A round and a training step keep every dtype; sums are float32."""
  half = lambda c: dataclasses.replace(c, dtype='bfloat16')  # noqa: E731
  config = dataclasses.replace(
      VARIANTS[name], decoder=half(VARIANTS[name].decoder))
  lm, task = CausalLM(half(CONFIG), chunk=24), EagleTask(EagleModel(config))
  _, params = made(name)
  cast = lambda x: task_lib.cast(x, jnp.bfloat16)  # noqa: E731
  params = params.replace(
      target=cast(params.target),
      drafter={**params.drafter, 'net': cast(params.drafter['net'])})
  engine = Engine(lm, ChainLM(NUM, task.source()), Speculative())
  state = loop.empty(engine, measure.context(PROMPTS, 16, temperature=1.0))
  new = jax.eval_shape(lambda s: loop.step(engine, params, loop.start(
      engine, params, s, jnp.ones((4,), bool), chunk=5)), state)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
  net = task.init(jax.random.key(0), params.target)
  one = jnp.ones((2, 8), jnp.int32)
  batch = teacher.Batch(tokens=one, document=one, position=one,
                        supervised=one > 0)
  loss, sums = jax.eval_shape(
      lambda net: Trainer(task, lm, optax.sgd(1.0)).loss(
          net, params.target,
          {k: v for k, v in params.drafter.items() if k != 'net'}, batch,
          jax.random.key(0), jnp.float32(0)), net)
  assert {x.dtype for x in [loss, *sums.values()]} == {jnp.dtype('float32')}
