"""Published configurations, as transformers 4 and 5 and GGUF write them."""

import dataclasses
import json

import numpy as np
import pytest

from specjax.models import config as config_lib
from specjax.models import rope
from specjax.models.rope import RopeScaling
from specjax.models.transformer_config import TransformerConfig

LLAMA = dict(  # SmolLM2-135M
    architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=49152,
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, hidden_act='silu',
    rms_norm_eps=1e-5, rope_theta=100000, rope_scaling=None,
    attention_bias=False, mlp_bias=False, tie_word_embeddings=True,
    max_position_embeddings=8192, torch_dtype='bfloat16')
QWEN2 = dict(  # Qwen2.5-0.5B
    architectures=['Qwen2ForCausalLM'], vocab_size=151936, hidden_size=896,
    intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, hidden_act='silu', rms_norm_eps=1e-6,
    rope_theta=1e6, max_position_embeddings=32768, max_window_layers=21,
    sliding_window=32768, use_sliding_window=False, tie_word_embeddings=True)
QWEN3 = dict(
    QWEN2, architectures=['Qwen3ForCausalLM'], head_dim=128,
    attention_bias=False, sliding_window=None)
GEMMA = dict(  # Gemma-3-270M, transformers 4
    architectures=['Gemma3ForCausalLM'], model_type='gemma3_text',
    vocab_size=262144, hidden_size=640, intermediate_size=2048,
    num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
    head_dim=256, hidden_activation='gelu_pytorch_tanh', rms_norm_eps=1e-6,
    query_pre_attn_scalar=256, sliding_window=512, sliding_window_pattern=6,
    rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=None,
    attn_logit_softcapping=None, final_logit_softcapping=None)
GEMMA_LOCAL = tuple(i % 6 != 5 for i in range(18))


def test_llama():
  got = config_lib.from_hf(LLAMA, 'bfloat16')
  assert (got.vocab_size, got.num_layers, got.embed_dim) == (49152, 30, 576)
  assert (got.num_heads, got.num_kv_heads, got.head_dim) == (9, 3, 64)
  assert (got.rope_base, got.rope_scaling) == (1e5, None)
  assert got.tied and not (got.qkv_bias or got.qk_norm or got.post_norms)
  assert got.local_layers == () and got.window is None
  assert got.num_params == 134_515_008  # as published
  assert got.dtype == 'bfloat16' and got.max_length == 8192
  hash(got)


def test_absent_keys_mean_what_they_mean_upstream():
  bare = {k: v for k, v in LLAMA.items() if k not in (
      'num_key_value_heads', 'tie_word_embeddings', 'rope_theta',
      'rms_norm_eps', 'hidden_act')}
  got = config_lib.from_hf(bare)
  assert got.num_kv_heads == 9 and not got.tied
  assert got.rope_base == 1e4 and got.norm_eps == 1e-6


OLD = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
           original_max_position_embeddings=8192)


@pytest.mark.parametrize('keys,expected', [
    (dict(rope_scaling=dict(OLD, rope_type='llama3')),
     RopeScaling('llama3', 32.0, 8192)),
    (dict(rope_parameters=dict(OLD, rope_type='llama3', rope_theta=1e5)),
     RopeScaling('llama3', 32.0, 8192)),
    (dict(rope_scaling=dict(type='linear', factor=2)),
     RopeScaling('linear', 2.0, 8192)),
    (dict(rope_scaling=dict(
        type='yarn', factor=4.0, original_max_position_embeddings=2048)),
     RopeScaling('yarn', 4.0, 2048)),
    (dict(rope_scaling=dict(  # the factor follows from the lengths
        rope_type='yarn', original_max_position_embeddings=2048)),
     RopeScaling('yarn', 4.0, 2048)),
    (dict(rope_scaling=dict(
        rope_type='yarn', factor=np.e, mscale=1.0, mscale_all_dim=2.0,
        beta_fast=16, original_max_position_embeddings=2048)),
     RopeScaling('yarn', np.e, 2048, beta_fast=16,
                 attention_factor=pytest.approx(1.1 / 1.2))),
    (dict(rope_parameters=dict(rope_type='default', rope_theta=1e5)), None),
])
def test_rope_scaling(keys, expected):
  got = config_lib.from_hf({**LLAMA, **keys})
  assert got.rope_scaling == expected
  assert got.rope_base == 1e5


def test_qwen():
  got = config_lib.from_hf(QWEN2)
  assert got.qkv_bias and not got.qk_norm and got.window is None
  assert got.head_dim == 64 and got.num_params == 494_032_768
  got = config_lib.from_hf(QWEN3)
  assert got.qk_norm and not got.qkv_bias and got.head_dim == 128


def test_qwen_windows():
  windowed = dict(QWEN2, use_sliding_window=True, sliding_window=64)
  got = config_lib.from_hf(windowed)
  assert got.window == 64
  assert got.local_layers == (False,) * 21 + (True,) * 3
  assert got.local_rope_base is None
  kinds = ['sliding_attention'] + ['full_attention'] * 23
  got = config_lib.from_hf(dict(windowed, layer_types=kinds))
  assert got.local_layers == (True,) + (False,) * 23
  got = config_lib.from_hf(dict(windowed, max_window_layers=24))
  assert got.window is None and got.local_layers == ()
  with pytest.raises(ValueError, match='sliding_window=None'):
    config_lib.from_hf(dict(windowed, sliding_window=None))


def test_gemma():
  got = config_lib.from_hf(GEMMA)
  assert got.local_layers == GEMMA_LOCAL and got.window == 512
  assert (got.rope_base, got.local_rope_base) == (1e6, 1e4)
  assert got.embed_scale == pytest.approx(640 ** 0.5)
  assert got.post_norms and got.qk_norm and got.tied
  assert got.activation == 'gelu_tanh' and got.query_scale is None
  assert got.num_params == 268_098_176
  wide = config_lib.from_hf(dict(GEMMA, query_pre_attn_scalar=168))
  assert wide.query_scale == pytest.approx(168 ** -0.5)


def test_gemma_in_newer_form():
  newer = {k: v for k, v in GEMMA.items() if k not in (
      'rope_theta', 'rope_local_base_freq', 'rope_scaling',
      'sliding_window_pattern')}
  newer['layer_types'] = [
      'sliding_attention' if x else 'full_attention' for x in GEMMA_LOCAL]
  newer['rope_parameters'] = dict(
      full_attention=dict(rope_type='default', rope_theta=1e6),
      sliding_attention=dict(rope_type='default', rope_theta=1e4))
  assert config_lib.from_hf(newer) == config_lib.from_hf(GEMMA)
  scaled = dict(newer['rope_parameters'], full_attention=dict(
      rope_type='linear', factor=8.0, rope_theta=1e6))
  got = config_lib.from_hf(dict(newer, rope_parameters=scaled))
  assert got.rope_scaling.kind == 'linear' and got.local_rope_base == 1e4
  scaled['sliding_attention'] = dict(
      rope_type='linear', factor=2.0, rope_theta=1e4)
  with pytest.raises(ValueError, match='sliding'):
    config_lib.from_hf(dict(newer, rope_parameters=scaled))


def test_gemma_multimodal_lists_differences_only():
  got = config_lib.from_hf(dict(
      architectures=['Gemma3ForConditionalGeneration'], model_type='gemma3',
      vision_config={}, text_config=dict(
          model_type='gemma3_text', hidden_size=2560, intermediate_size=10240,
          num_hidden_layers=34, sliding_window=1024,
          rope_scaling=dict(factor=8.0, rope_type='linear'))))
  assert (got.num_heads, got.num_kv_heads, got.head_dim) == (8, 4, 256)
  assert got.window == 1024 and sum(got.local_layers) == 29
  assert got.rope_scaling.factor == 8.0 and got.vocab_size == 262208


@pytest.mark.parametrize('base,change,message', [
    (LLAMA, dict(architectures=['MambaForCausalLM']),
     "'MambaForCausalLM': known are Gemma3ForCausalLM, .*Qwen3ForCausalLM"),
    (LLAMA, dict(architectures=None, model_type='gpt2'), "'gpt2': known are"),
    (LLAMA, dict(attention_bias=True), 'attention_bias=True'),
    (LLAMA, dict(mlp_bias=True), 'mlp_bias=True'),
    (LLAMA, dict(hidden_act='relu'), "hidden_act='relu'.*silu"),
    (LLAMA, dict(hidden_size=None), "lacks 'hidden_size'"),
    (LLAMA, dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
    (LLAMA, dict(quantization_config=dict(bits=4)), 'unquantised'),
    (LLAMA, dict(rope_scaling=dict(type='dynamic', factor=2.0)),
     "'dynamic': known are"),
    (LLAMA, dict(rope_scaling=dict(type='linear')), 'lack a factor'),
    (GEMMA, dict(layer_types=['chunked_attention'] * 18), 'chunked'),
    (GEMMA, dict(layer_types=['full_attention']), '1 entries for 18'),
    (GEMMA, dict(use_bidirectional_attention=True), 'later tokens'),
    (GEMMA, dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping'),
])
def test_refused(base, change, message):
  with pytest.raises(ValueError, match=message):
    config_lib.from_hf({**base, **change})


@pytest.mark.parametrize('dropout', [-0.1, 0.001, 0.999, 1.0])
def test_shares_that_are_no_steps_of_a_byte(dropout):
  config = config_lib.from_hf(LLAMA)
  assert dataclasses.replace(config, dropout=0.996).dropout == 0.996
  with pytest.raises(ValueError, match=r'must be 0 or, in steps of 1/256'):
    dataclasses.replace(config, dropout=dropout)


def test_a_shape_is_read_from_json():
  config = dataclasses.replace(
      config_lib.from_hf(GEMMA), rope_scaling=rope.RopeScaling('linear', 2.0))
  values = json.loads(json.dumps(dataclasses.asdict(config)))
  assert TransformerConfig.of(values) == config
  for damaged, said in (
      ({**values, 'depth': 3}, "not the shape of a decoder: .*'depth'"),
      ({'vocab_size': 3}, 'not the shape of a decoder: .*num_layers'),
      ({**values, 'rope_scaling': {'type': 'x'}}, 'not the shape'),
      ({**values, 'dropout': 2.0}, 'dropout=2.0')):
    with pytest.raises(ValueError, match=said):
      TransformerConfig.of(damaged)


def test_unknown_dtype():
  with pytest.raises(ValueError, match="'int8': known are float32"):
    config_lib.from_hf(LLAMA, 'int8')


def _gguf(arch, **keys):
  """Returns metadata; `__` stands for a dot."""
  base = dict(
      block_count=18, embedding_length=64, feed_forward_length=128,
      context_length=4096, attention__head_count=4,
      attention__head_count_kv=2,
      attention__layer_norm_rms_epsilon=1e-6, rope__freq_base=5e5)
  found = {f'{arch}.{k.replace("__", ".")}': v
           for k, v in {**base, **keys}.items() if v is not None}
  return {**found, 'general.architecture': arch,
          'tokenizer.ggml.tokens': ['x'] * 32}


NAMES = ('token_embd.weight', 'output_norm.weight')


@pytest.mark.parametrize('arch', ['llama', 'qwen2', 'qwen3', 'gemma3'])
def test_gguf(arch):
  got = config_lib.from_gguf(_gguf(arch), NAMES, dtype='bfloat16')
  assert (got.vocab_size, got.head_dim, got.rope_base) == (32, 16, 5e5)
  assert got.qkv_bias == (arch == 'qwen2') and got.tied
  assert got.qk_norm == (arch in ('qwen3', 'gemma3'))
  assert got.post_norms == (arch == 'gemma3') and got.dtype == 'bfloat16'


def test_gguf_equals_hf():
  keys = dict(
      embedding_length=640, feed_forward_length=2048,
      attention__head_count_kv=1, attention__key_length=256,
      attention__value_length=256, attention__sliding_window=512,
      rope__freq_base=1e6, vocab_size=262144)
  got = config_lib.from_gguf(_gguf('gemma3', **keys), NAMES)
  assert got == config_lib.from_hf({**GEMMA, 'max_position_embeddings': 4096})
  big = config_lib.from_gguf(
      _gguf('gemma3', **{**keys, 'block_count': 62}), NAMES)
  assert big.query_scale == pytest.approx(160 ** -0.5)
  pattern = [True, False] * 9
  got = config_lib.from_gguf(_gguf(
      'gemma3', **keys, attention__sliding_window_pattern=pattern,
      rope__freq_base_swa=2e4, final_logit_softcapping=30.0), NAMES)
  assert got.local_layers == tuple(pattern) and got.local_rope_base == 2e4
  assert got.final_softcap == 30.0


@pytest.mark.parametrize('keys,expected', [
    (dict(rope__scaling__type='none', rope__scaling__factor=4.0), None),
    (dict(rope__scaling__factor=4.0), RopeScaling('linear', 4.0, 4096)),
    (dict(rope__scale_linear=2.0), RopeScaling('linear', 2.0, 4096)),
    (dict(rope__scaling__type='yarn', rope__scaling__factor=np.e,
          rope__scaling__original_context_length=1024),
     RopeScaling('yarn', np.e, 1024, attention_factor=pytest.approx(1.1))),
])
def test_gguf_rope_scaling(keys, expected):
  got = config_lib.from_gguf(_gguf('qwen2', **keys), NAMES)
  assert got.rope_scaling == expected
  is_linear = expected is not None and expected.kind == 'linear'
  assert got.max_length == 4096 * (expected.factor if is_linear else 1)


def scaled(**values):
  return {'rope_scaling': dict(values)}


@pytest.mark.parametrize('base, given, expected', [
    (LLAMA, {}, 8192), (GEMMA, {}, None),
    (LLAMA, {'max_position_embeddings': None}, None),
    (LLAMA, scaled(type='linear', factor=2.0), 16384),
    (LLAMA, scaled(rope_type='llama3', **OLD), 8192),  # counts it in
    # Qwen's files say the length before YaRN; others say the one after it.
    (QWEN2, scaled(type='yarn', factor=4.0), 131072),
    (QWEN2, {**scaled(type='yarn', factor=4.0,
                      original_max_position_embeddings=32768),
             'max_position_embeddings': 131072}, 131072),
    (GEMMA, {**scaled(rope_type='linear', factor=8.0),
             'max_position_embeddings': 131072}, 131072)])
def test_context_length(base, given, expected):
  assert config_lib.from_hf({**base, **given}).max_length == expected


def test_gguf_context_length():
  assert config_lib.from_gguf(_gguf('llama'), NAMES).max_length == 4096
  bare = _gguf('llama', context_length=None)
  assert config_lib.from_gguf(bare, NAMES).max_length is None


def _divisors(scaling):
  plain, _ = rope.frequencies(64, 5e5, None)
  return (plain / rope.frequencies(64, 5e5, scaling)[0]).astype(np.float32)


def test_gguf_llama3():
  metadata = _gguf('llama', rope__dimension_count=64,
                   attention__key_length=64, attention__value_length=64)
  names = (*NAMES, 'rope_freqs.weight')
  scaling = RopeScaling('llama3', 32.0, 8192)
  got = config_lib.from_gguf(
      metadata, names, read=lambda name: _divisors(scaling))
  assert got.rope_scaling == scaling
  with pytest.raises(ValueError, match='rope_freqs.weight.*read'):
    config_lib.from_gguf(metadata, names)
  other = dataclasses.replace(scaling, original_length=4096)
  with pytest.raises(ValueError, match='other than Llama'):
    config_lib.from_gguf(metadata, names, read=lambda name: _divisors(other))


def test_gguf_tied():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 32, 64))
  names = (*NAMES, 'output.weight')

  def tied(head):
    tensors = {'token_embd.weight': a, 'output.weight': head}
    return config_lib.from_gguf(
        _gguf('qwen2'), names, read=tensors.__getitem__).tied

  assert tied(a + 0.05 * b)  # one matrix, quantised twice
  assert not tied(b)
  assert not config_lib.from_gguf(_gguf('qwen2'), names).tied


@pytest.mark.parametrize('metadata,names,message', [
    (_gguf('mamba'), NAMES, "'mamba': known are llama, qwen2, qwen3, gemma3"),
    ({}, NAMES, 'None: known are'),
    (_gguf('llama', block_count=None), NAMES, "lacks 'block_count'"),
    (_gguf('llama', expert_count=8), NAMES, '8 experts'),
    (_gguf('llama'), (*NAMES, 'blk.0.attn_q.bias'), 'blk.0.attn_q.bias'),
    (_gguf('llama', attention__head_count_kv=[1, 2]), NAMES, 'head_count_kv'),
    (_gguf('llama', rope__dimension_count=8), NAMES, 'rotated 8'),
    (_gguf('llama', rope__scaling__type='longrope',
           rope__scaling__factor=2.0), NAMES, "'longrope'"),
    ({**_gguf('llama'), 'tokenizer.ggml.tokens': []}, NAMES, 'vocabulary'),
])
def test_gguf_refused(metadata, names, message):
  with pytest.raises(ValueError, match=message):
    config_lib.from_gguf(metadata, names)
