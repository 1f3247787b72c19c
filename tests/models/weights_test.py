"""Parameters from checkpoints, and back, and sharded."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest
import tiny

from specjax.models import weights
from specjax.parallel import mesh as mesh_lib
from specjax.parallel import rules

each_family = pytest.mark.parametrize(
    'config', tiny.CONFIGS.values(), ids=tiny.CONFIGS)


def _load(config, tensors, **kwargs):
  kwargs.setdefault('scheme', 'hf')
  return weights.load(config, tensors.__getitem__, tensors, **kwargs)


def _assert_equal(got, want, atol=0.0):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.asarray(a, np.float32),
                               np.asarray(b, np.float32), rtol=0, atol=atol)


@each_family
def test_round_trip(config):
  params = tiny.params(config)
  tensors = weights.export(config, params)
  assert ('lm_head.weight' in tensors) != config.tied
  # 1e-7: 1 + (scale - 1) rounds for Gemma's scales below 1/2.
  _assert_equal(_load(config, tensors), params, atol=1e-7)


def _gguf_tensors(config, params):
  """Writes a GGUF checkpoint by hand, rows in the order of llama.cpp."""
  heads, group = config.num_heads, config.num_heads // config.num_kv_heads
  is_llama = config == tiny.CONFIGS['llama']
  out = {'token_embd.weight': params['embedding'],
         'output_norm.weight': params['final_norm']['scale']}
  if not config.tied:
    out['output.weight'] = params['head']
  for i in range(config.num_layers):
    layer = params[f'layer_{i}']
    qkv = np.asarray(layer['attention']['qkv'])
    q, k, v = [], [], []
    for n in range(heads):
      q.append(qkv[:, n // group, n % group].T)
    for g in range(config.num_kv_heads):
      k.append(qkv[:, g, group].T)
      v.append(qkv[:, g, group + 1].T)
    half = config.head_dim // 2
    if is_llama:  # halves (i, i + half) become neighbours (2i, 2i + 1)
      order = [j // 2 + half * (j % 2) for j in range(config.head_dim)]
      q, k = [w[order] for w in q], [w[order] for w in k]
    mlp, at = layer['mlp'], f'blk.{i}.'
    kernel = np.asarray(layer['attention']['out'])
    out |= {
        at + 'attn_q.weight': np.concatenate(q),
        at + 'attn_k.weight': np.concatenate(k),
        at + 'attn_v.weight': np.concatenate(v),
        at + 'attn_output.weight': np.concatenate(
            [kernel[n // group, n % group] for n in range(heads)]).T,
        at + 'ffn_gate.weight': mlp['gate_up'][:, 0].T,
        at + 'ffn_up.weight': mlp['gate_up'][:, 1].T,
        at + 'ffn_down.weight': mlp['down'].T,
        at + 'attn_norm.weight': layer['attention_norm']['scale'],
        at + 'ffn_norm.weight': layer['mlp_norm']['scale']}
    if config.post_norms:
      out[at + 'post_attention_norm.weight'] = (
          layer['post_attention_norm']['scale'])
      out[at + 'post_ffw_norm.weight'] = layer['post_mlp_norm']['scale']
    if config.qk_norm:
      for x in 'qk':
        out[f'{at}attn_{x}_norm.weight'] = (
            layer['attention'][f'{x}_norm']['scale'])
    if config.qkv_bias:
      bias = np.asarray(layer['attention']['qkv_bias'])
      out[at + 'attn_q.bias'] = bias[:, :group].reshape(-1)
      out[at + 'attn_k.bias'] = bias[:, group].reshape(-1)
      out[at + 'attn_v.bias'] = bias[:, group + 1].reshape(-1)
  return {name: np.asarray(x) for name, x in out.items()}


@each_family
def test_gguf(config):
  params = tiny.params(config)
  tensors = _gguf_tensors(config, params)
  _assert_equal(_load(config, tensors, scheme='gguf'), params)


def test_gguf_tied_head_wins():
  """A tied matrix that is in the file twice: the head has more bits."""
  config = tiny.CONFIGS['qwen2']
  tensors = _gguf_tensors(config, tiny.params(config))
  tensors['output.weight'] = tensors['token_embd.weight'] + 1
  got = _load(config, tensors, scheme='gguf')
  np.testing.assert_array_equal(got['embedding'], tensors['output.weight'])


@pytest.mark.parametrize('prefix,head', [
    ('', 'lm_head.weight'),
    ('model.language_model.', 'lm_head.weight'),
    ('language_model.model.', 'language_model.lm_head.weight')])
def test_prefixes_and_bystanders(prefix, head):
  config = tiny.CONFIGS['llama']
  params = tiny.params(config)
  tensors = {
      (head if name == 'lm_head.weight'
       else prefix + name.removeprefix('model.')): x
      for name, x in weights.export(config, params).items()}
  none = np.zeros(3)
  tensors[f'{prefix}layers.0.self_attn.rotary_emb.inv_freq'] = none
  tensors['model.vision_tower.patch.weight'] = none
  tensors['multi_modal_projector.weight'] = none
  _assert_equal(_load(config, tensors), params)


def test_tied_head_is_ignored():
  config = tiny.CONFIGS['qwen3']
  params = tiny.params(config)
  tensors = weights.export(config, params)
  tensors['lm_head.weight'] = np.zeros(3)
  _assert_equal(_load(config, tensors), params)


def test_dtypes_and_progress():
  config = tiny.CONFIGS['gemma3']
  tensors = weights.export(config, tiny.params(config))
  half = dataclasses.replace(config, dtype='bfloat16')
  calls = []
  got = _load(half, tensors, progress=lambda *args: calls.append(args))
  assert got['layer_0']['mlp']['down'].dtype == jnp.bfloat16
  assert got['layer_0']['mlp_norm']['scale'].dtype == jnp.float32
  total = len(jax.tree.leaves(got))
  assert [c[:2] for c in calls] == [(i + 1, total) for i in range(total)]
  assert calls[0][2] == 'embedding'
  exported = weights.export(half, got)
  assert exported['model.embed_tokens.weight'].dtype == jnp.bfloat16


def test_checkpoint_is_not_aliased():
  config = tiny.CONFIGS['llama']
  tensors = weights.export(config, tiny.params(config))
  got = _load(config, tensors)
  before = np.array(got['embedding'])
  tensors['model.embed_tokens.weight'] = np.array(before)
  got = _load(config, tensors)
  tensors['model.embed_tokens.weight'][:] = 0
  np.testing.assert_array_equal(got['embedding'], before)


@pytest.mark.parametrize('change,message', [
    (lambda t: t.pop('model.layers.1.mlp.up_proj.weight'),
     '1 tensors are missing: model.layers.1.mlp.up_proj.weight;'),
    (lambda t: t.update({'model.norm.weight': np.zeros(5)}),
     r"'model.norm.weight' has shape \(5,\).*asks for \(16,\)"),
    (lambda t: t.update({'model.layers.0.self_attn.q_proj.bias': 0,
                         'model.layers.2.mlp.up_proj.weight': 0}),
     '2 tensors have no place.*layers.0.self_attn.q_proj.bias, '
     'model.layers.2.mlp'),
    (lambda t: t.clear(), 'tensors are missing.*and 1 more'),
])
def test_refused(change, message):
  config = tiny.CONFIGS['llama']
  tensors = weights.export(config, tiny.params(config))
  change(tensors)
  with pytest.raises(ValueError, match=message):
    _load(config, tensors)


def test_unknown_scheme():
  with pytest.raises(ValueError, match="'onnx': known are 'hf', 'gguf'"):
    _load(tiny.CONFIGS['llama'], {}, scheme='onnx')


@each_family
def test_logical_axes(config):
  axes, shapes = weights.logical_axes(config), weights.abstract(config)
  is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
  jax.tree.map(lambda s, a: None if len(a) == s.ndim else pytest.fail(str(a)),
               shapes, axes)
  assert axes['embedding'] == ('vocab', 'embed')
  assert axes['layer_0']['attention']['qkv'] == (
      'embed', 'kv_heads', None, None)
  assert axes['layer_1']['mlp']['down'] == ('mlp', 'embed')
  assert jax.tree.structure(axes, is_leaf=is_axes) == jax.tree.structure(
      shapes)


def _shardings(config):
  mesh = mesh_lib.make_mesh((4, 2))
  return mesh, rules.param_shardings(
      mesh, weights.logical_axes(config), weights.abstract(config))


@each_family
def test_sharded_load(config):
  assert len(jax.devices()) == 8
  _, shardings = _shardings(config)
  params = tiny.params(config)
  got = _load(config, weights.export(config, params), shardings=shardings)
  _assert_equal(got, params, atol=1e-7)
  for x, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(shardings),
                         strict=True):
    assert x.sharding == sharding
  kernel = got['layer_0']['attention']['qkv']
  assert kernel.sharding.spec[1] == 'model'
  assert {s.data.shape[1] for s in kernel.addressable_shards} == {1}
  # And back: shards are gathered.
  again = _load(config, weights.export(config, got))
  _assert_equal(again, params, atol=1e-7)


def test_random_params():
  config = tiny.CONFIGS['llama']
  plain = weights.random_params(config, jax.random.key(3))
  spec = lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)  # noqa: E731
  assert spec(plain) == spec(weights.abstract(config))
  down = [plain[f'layer_{i}']['mlp']['down'] for i in range(2)]
  assert not np.array_equal(*down)
  assert 0.01 < float(jnp.std(down[0])) < 0.03
  mesh, shardings = _shardings(config)
  with jax.set_mesh(mesh):
    spread = weights.random_params(config, jax.random.key(3), shardings)
  # Vectors of other lengths round the last bit of values of size 0.1.
  _assert_equal(spread, plain, atol=1e-7)
  assert spread['embedding'].sharding == shardings['embedding']
  assert spread['layer_1']['mlp']['down'].sharding == NamedSharding(
      mesh, PartitionSpec('model', None))
