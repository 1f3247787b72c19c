"""What models of drafters share: layers, fresh weights, the target's ends."""

from __future__ import annotations

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.models import draft_layers, draft_vocab, trained
from specjax.models.block_drafter import BlockConfig
from specjax.models.block_model import BlockModel
from specjax.models.draft_layers import DraftAttention
from specjax.models.eagle import EagleConfig
from specjax.models.eagle_model import EagleModel
from specjax.models.medusa import HeadsModel, for_target
from specjax.models.small_lm import SmallLMConfig, SmallLMModel
from specjax.models.transformer_config import TransformerConfig
from tests import tiny

VOCAB = tiny.VOCAB
DECODER = TransformerConfig(
    vocab_size=VOCAB, num_layers=1, embed_dim=16, mlp_dim=24, num_heads=4,
    num_kv_heads=2, head_dim=8, dtype='bfloat16')
IDS = np.setdiff1d(np.arange(VOCAB), [3, 11])
MODELS = {
    'block': BlockModel(BlockConfig(DECODER, (1,), len(IDS), markov_rank=4)),
    'eagle': EagleModel(EagleConfig(DECODER, len(IDS), taps=(1,))),
    'heads': HeadsModel(for_target(DECODER, len(IDS))),
    'small_lm': SmallLMModel(SmallLMConfig(DECODER, len(IDS)))}


def options(**kwargs):
  return dataclasses.replace(DECODER, dtype='float32', **kwargs)


@pytest.mark.parametrize('family', MODELS)
def test_fresh_weights_are_plain_float32(family):
  model = MODELS[family]
  net = model.init(jax.random.key(0))
  like = trained.abstract(model)
  assert jax.tree.structure(net) == jax.tree.structure(like)
  for x, y in zip(jax.tree.leaves(net), jax.tree.leaves(like), strict=True):
    assert isinstance(x, jax.Array)
    assert (x.shape, x.dtype) == (y.shape, jnp.float32)
  other = model.init(jax.random.key(1))
  same = [np.array_equal(x, y) for x, y in zip(
      jax.tree.leaves(net), jax.tree.leaves(other), strict=True)]
  # Heads begin as the target's own, whatever the key.
  assert all(same) == (family == 'heads')


@pytest.mark.parametrize('family', MODELS)
def test_vocabularies_of_another_size_are_refused(family):
  model, target = MODELS[family], tiny.params(tiny.CONFIGS['llama'])
  net = model.init(jax.random.key(0))
  assert model.attach(net, target, IDS)['ids'].shape == IDS.shape
  with pytest.raises(ValueError, match='28 ids for draft_vocab_size=29'):
    model.attach(net, target, IDS[1:])


@pytest.mark.parametrize('kwargs', [
    {}, {'qk_norm': True}, {'qkv_bias': True},
    {'qk_norm': True, 'qkv_bias': True}])
def test_keys_of_context_are_those_of_rows_with_queries(kwargs):
  layer = DraftAttention(options(**kwargs), 16)
  table = draft_layers.tables(layer.config, jnp.arange(3)[None])
  x = jnp.asarray(tiny.noise((1, 3, 16), 0), jnp.float32)
  params = nn.unbox(layer.init(jax.random.key(0), x, table, method='project'))
  params = jax.tree.map(
      lambda p: p + 0.3 * tiny.noise(p.shape, p.size), params)
  q, k, v = layer.apply(params, x, table, method='project')
  assert q.shape == (1, 3, 2, 2, 8)
  alone = layer.apply(params, x, table, method='keys')
  np.testing.assert_allclose(alone[0], k, atol=1e-6)
  np.testing.assert_allclose(alone[1], v, atol=1e-6)
  weights = params['params']
  expected = jnp.einsum('btd,dgh->btgh', x, weights['qkv'][:, :, 3])
  if 'qkv_bias' in kwargs:
    expected += weights['qkv_bias'][:, 3]
  np.testing.assert_allclose(v, expected, atol=1e-5)


@pytest.mark.parametrize('make', [
    lambda d: BlockConfig(d, (1,), 4),
    lambda d: EagleConfig(d, 4, taps=(1,))])
@pytest.mark.parametrize('kwargs', [
    {'local_layers': (True,), 'window': 4}, {'post_norms': True},
    {'attention_softcap': 5.0}])
def test_options_that_layers_lack_are_refused(make, kwargs):
  make(options())
  with pytest.raises(ValueError, match=f'decoder.{next(iter(kwargs))}='):
    make(options(**kwargs))


def test_a_block_drafter_takes_biases_and_the_scale_of_queries():
  """What it computes while training is what it drafts with."""
  model = BlockModel(BlockConfig(
      options(qkv_bias=True, query_scale=0.9), (1,), VOCAB, num_slots=3,
      markov='none', confidence=False))
  target = tiny.params(tiny.CONFIGS['llama'])
  net = jax.tree.map(lambda x: x + 0.3 * tiny.noise(x.shape, x.size),
                     model.init(jax.random.key(0)))
  params = model.attach(net, target, np.arange(VOCAB))
  tokens, size = jnp.asarray(tiny.tokens(1, 6)), 5
  features = jnp.asarray(tiny.noise((1, size, 16), 1), jnp.float32)
  position = jnp.arange(size)[None]

  def both(model, params):
    whole = model.blocks(
        params, features, position, model.embed(target, tokens[:, size:]),
        jnp.full((1, 1), size), jnp.ones((1, 1, size), bool))
    cache = model.absorb(params, model.empty(1, 8), features,
                         jnp.zeros((1,), jnp.int32), position >= 0)
    drafted, _ = model.draft(
        params, target, cache, tokens[:, size], jnp.full((1,), size))
    return np.asarray(whole[:, 0]), np.asarray(drafted)

  whole, drafted = both(model, params)
  np.testing.assert_allclose(whole, drafted, atol=1e-4)
  plain = BlockModel(dataclasses.replace(
      model.config, decoder=options(qkv_bias=True)))
  assert np.abs(both(plain, params)[1] - drafted).max() > 1e-2
  layer = net['layer_0']
  less = {**layer, 'attention': {
      **layer['attention'],
      'qkv_bias': 0 * layer['attention']['qkv_bias']}}
  unbiased = {**params, 'net': {**net, 'layer_0': less}}
  assert np.abs(both(model, unbiased)[1] - drafted).max() > 1e-2


def test_ends_of_the_target():
  config = options(embed_scale=3.0, final_softcap=2.0)
  target = {'embedding': jnp.asarray(tiny.noise((VOCAB, 16), 0), jnp.float32)}
  table = np.asarray(target['embedding'])
  found = draft_vocab.embed(config, target, jnp.asarray([4, VOCAB + 9]))
  np.testing.assert_allclose(found, 3 * table[[4, VOCAB - 1]], rtol=1e-6)
  assert draft_vocab.rows(
      target, jnp.arange(VOCAB)) is target['embedding']
  head = draft_vocab.rows(target, jnp.asarray(IDS))
  np.testing.assert_array_equal(head, table[IDS])
  x = tiny.noise((2, 16), 1).astype(np.float32)
  scores = draft_vocab.scores(config, head, jnp.asarray(x))
  np.testing.assert_allclose(
      scores, 2 * np.tanh(x @ table[IDS].T / 2), atol=1e-5)
  wide = np.asarray(draft_vocab.spread(
      scores, draft_vocab.table(IDS, VOCAB, len(IDS))['inverse']))
  np.testing.assert_array_equal(wide[:, IDS], scores)
  assert (wide[:, [3, 11]] == -np.inf).all()
  whole = jnp.asarray(tiny.noise((2, VOCAB), 2))
  every = draft_vocab.table(np.arange(VOCAB), VOCAB)['inverse']
  assert draft_vocab.spread(whole, every) is whole
