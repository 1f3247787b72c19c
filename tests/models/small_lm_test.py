"""Small causal drafters, and any model with a trimmed head."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.core import loop, topologies
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.distill import measure
from specjax.drafters import ChainLM, GrownLM, Null, TreeLM
from specjax.drafters.source import LanguageModel
from specjax.models import trained, trimmed
from specjax.models.causal import CausalLM
from specjax.models.small_lm import SmallLMConfig, SmallLMModel
from specjax.models.trimmed import TrimmedLM
from specjax.verify import Greedy, Speculative
from tests import tiny

CONFIG = tiny.CONFIGS['llama']
LM, TARGET = CausalLM(CONFIG, chunk=24), tiny.params(CONFIG)
VOCAB = CONFIG.vocab_size
TREE = topologies.parse([(0,), (1,), (0, 0), (0, 1), (0, 0, 0)])
ALL, IDS = np.arange(VOCAB), np.setdiff1d(np.arange(VOCAB), [0, 3, 11, 30])


def shape(**kwargs):
  return dataclasses.replace(CONFIG, **{
      'num_layers': 1, 'embed_dim': 8, 'mlp_dim': 16, 'tied': True, **kwargs})


@functools.cache
def small(ids: tuple[int, ...], embedding: str = 'own', tied: bool = True):
  """Returns a small model and its parameters."""
  wide = {'embed_dim': CONFIG.embed_dim} if embedding == 'target' else {}
  model = SmallLMModel(SmallLMConfig(
      shape(tied=tied, **wide), len(ids), embedding))
  net = jax.tree.map(lambda x: x + 0.3 * tiny.noise(x.shape, x.size),
                     model.init(jax.random.key(0)))
  return model, model.attach(net, TARGET, np.asarray(ids))


@functools.partial(jax.jit, static_argnums=0)
def calls(lm, params):
  """Returns logits of `extend`, and of a level of a tree after it."""
  tokens = jnp.asarray(tiny.tokens(2, 7))
  base, fed = jnp.zeros(2, jnp.int32), jnp.ones((2, 7), bool)
  first, _ = lm.extend(params, lm.empty(2, 24), tokens, base, fed)
  cache = lm.feed(params, lm.empty(2, 24), tokens, base, fed)
  base = jnp.full(2, 7)
  position = jnp.full((2, 3), 7)
  grown, _ = lm.grow(params, cache, tokens[:, :3], base, position,
                     jnp.eye(3, dtype=bool), position, 0)
  return first, grown


@pytest.mark.parametrize('family', ['llama', 'qwen2', 'gemma3'])
def test_a_whole_vocabulary_changes_no_bit(family):
  config = tiny.CONFIGS[family]
  lm, params = CausalLM(config, chunk=24), tiny.params(config)
  whole = trimmed.trim(lm, params, ALL)
  for want, got in zip(calls(lm, params), calls(*whole), strict=True):
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(want).all()


@pytest.mark.parametrize('family', ['llama', 'gemma3'])
def test_a_trimmed_head_scores_what_is_kept(family):
  config = tiny.CONFIGS[family]
  lm, params = CausalLM(config, chunk=24), tiny.params(config)
  less, kept = trimmed.trim(lm, params, IDS)
  for want, got in zip(calls(lm, params), calls(less, kept), strict=True):
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got[..., IDS], want[..., IDS], rtol=1e-5,
                               atol=1e-5)
    others = np.delete(got, IDS, axis=-1)
    assert others.shape[-1] == 4 and np.isneginf(others).all()


def test_a_small_model_is_a_causal_model():
  """All ways to a head give the logits of `CausalLM` with these weights."""
  model, params = small(tuple(ALL))
  bare = CausalLM(model.config.decoder, chunk=24)
  for want, got in zip(calls(bare, params['net']), calls(model, params),
                       strict=True):
    np.testing.assert_array_equal(got, want)
  less, kept = small(tuple(IDS))
  slow = {k: v for k, v in kept.items() if k != 'head'}
  assert 'head' in kept  # a copy, which changes nothing
  for want, got, same in zip(calls(bare, kept['net']), calls(less, kept),
                             calls(less, slow), strict=True):
    np.testing.assert_allclose(got[..., IDS], want[..., IDS], rtol=1e-5)
    np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize('tied', [True, False])
def test_the_embedding_can_be_the_targets(tied):
  model, params = small(tuple(IDS), 'target', tied)
  assert 'embedding' not in params['net']
  assert params['embedding'] is TARGET['embedding']
  head = np.asarray(params['net']['head'] if not tied else
                    TARGET['head'][IDS])
  assert ('head' in params['net']) is not tied
  inner = {k: v for k, v in params['net'].items() if k != 'head'}
  whole = np.zeros((VOCAB, CONFIG.embed_dim), np.float32)
  whole[IDS] = head
  bare = CausalLM(dataclasses.replace(
      model.config.decoder, tied=False), chunk=24)
  inner |= {'embedding': TARGET['embedding'], 'head': jnp.asarray(whole)}
  for want, got in zip(calls(bare, inner), calls(model, params), strict=True):
    np.testing.assert_allclose(got[..., IDS], want[..., IDS], rtol=1e-5,
                               atol=1e-6)


def test_states_of_packed_texts_do_not_mix():
  model, params = small(tuple(ALL))
  extend, states_of = jax.jit(model.extend), jax.jit(model.states)
  tokens = jnp.asarray(tiny.tokens(1, 10))
  document = np.asarray([1] * 4 + [2] * 6)
  position = jnp.asarray([[*range(4), *range(6)]])
  seen = jnp.asarray((document[:, None] == document)
                     & np.tri(10, dtype=bool))[None]
  states = states_of(params, tokens, position, seen)
  logits = model.logits(model.lm_params(params)['head'], states)
  for start, end in ((0, 4), (4, 10)):
    size = end - start
    want, _ = extend(
        params, model.empty(1, 12), tokens[:, start:end], jnp.zeros(1, int),
        jnp.ones((1, size), bool))
    np.testing.assert_allclose(logits[:, end - 1], want, atol=1e-4)


@functools.partial(jax.jit, static_argnums=0)
def decode(engine, params, context):
  state = loop.empty(engine, context)
  state = loop.start(engine, params, state,
                     jnp.ones(context.length.shape, bool), chunk=8)
  return loop.run(engine, params, state, jnp.int32(99))


@pytest.mark.parametrize('make', [
    lambda model: ChainLM(3, model=model),
    lambda model: TreeLM(tree=TREE, model=model,
                         draft_sample_method='top_k'),
    lambda model: GrownLM(5, model=model, tree_depth=3, tree_top_k=2)])
def test_every_shape_decodes_with_it(make):
  """Greedy text is the target's, and the target as drafter is accepted."""
  prompts = [tiny.tokens(1, n, seed=n)[0] for n in (3, 5, 8)]
  context = measure.context(prompts, 10)
  plain = decode(Engine(LM, Null(0), Greedy()), Models(target=TARGET),
                 context)
  model, params = small(tuple(IDS))
  drafters = [(LanguageModel(model), params),
              (LanguageModel(trimmed.trim(LM, TARGET, ALL)[0]),
               trimmed.trim(LM, TARGET, ALL)[1])]
  for number, (source, weights) in enumerate(drafters):
    state = decode(Engine(LM, make(source), Greedy()),
                   Models(target=TARGET, drafter=weights), context)
    np.testing.assert_array_equal(
        np.asarray(state.context.tokens)[:, :13],
        np.asarray(plain.context.tokens)[:, :13])
    if number:
      assert np.asarray(state.context.rounds).max() <= 5


def test_the_law_is_exact_when_a_likely_token_is_trimmed():
  rows, prompt = 2000, [4, 9, 2]
  raw = tiny.full(CONFIG, np.asarray([prompt]))[0, -1] / 3.0
  law = np.exp(raw - raw.max()) / np.exp(raw - raw.max()).sum()
  ids = np.delete(ALL, np.argmax(law))
  lm, params = trimmed.trim(LM, TARGET, ids)
  engine = Engine(LM, ChainLM(2, model=lm), Speculative())
  context = measure.context([prompt] * rows, 3, temperature=3.0, seed=5)
  state = decode(engine, Models(target=TARGET, drafter=params), context)
  first = np.asarray(state.context.tokens)[:, 3]
  count = np.bincount(first, minlength=VOCAB)
  assert count[np.argmax(law)] > 0.05 * rows
  expected = law * rows
  seen = expected > 5
  chi = np.sum((count - expected)[seen] ** 2 / expected[seen])
  assert chi < seen.sum() + 4 * np.sqrt(2 * seen.sum())
  assert np.asarray(state.metrics.accepted).sum() > 0


def test_values_survive_json():
  model, params = small(tuple(IDS), 'target', False)
  assert trained.from_values(trained.to_values(model)) == model
  shapes = jax.tree.map(lambda x: x.shape, trained.abstract(model))
  assert shapes == jax.tree.map(lambda x: x.shape, params['net'])
  assert trained.sizes(model) == (16, VOCAB, len(IDS))
  assert trained.sizes(small(tuple(IDS))[0]) == (None, VOCAB, len(IDS))


def test_what_cannot_be():
  with pytest.raises(ValueError, match="embedding='both'"):
    SmallLMConfig(shape(), 5, 'both')
  with pytest.raises(ValueError, match='draft_vocab_size=32'):
    SmallLMConfig(shape(), 32)
  with pytest.raises(ValueError, match='local_layers'):
    SmallLMConfig(shape(local_layers=(True,), window=4), 5)
  model, params = small(tuple(IDS))
  with pytest.raises(ValueError, match='31 ids for draft_vocab_size=27'):
    model.attach(params['net'], TARGET, ALL)
  narrow = SmallLMModel(SmallLMConfig(shape(), VOCAB, 'target'))
  with pytest.raises(ValueError, match="the target's is"):
    narrow.attach({}, TARGET, ALL)
  with pytest.raises(ValueError, match='ascending'):
    trimmed.trim(LM, TARGET, [3, 2])
  assert isinstance(model.lm, TrimmedLM)
