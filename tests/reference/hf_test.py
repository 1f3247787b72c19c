"""Logits against the transformers library, in float32.

Tiny random models of every family are created there, saved as a user's model
folder would be, and read by our own reader. The real checkpoint goes the other
way: read by us, exported, and run there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.io import gguf, safetensors
from specjax.io.tokenizer import Tokenizer
from specjax.models import config as config_lib
from specjax.models import transformer, weights
from specjax.models.attention import Block

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.reference

LENGTH = 64
# Both sides sum float32 products in orders of their own. Logits here are of
# size 1 to 20; observed differences are below 1e-4.
TOLERANCE = 2e-3

SMALL = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
    initializer_range=0.2)
ROPE = dict(rope_theta=10000.0)
LLAMA3 = dict(ROPE, rope_type='llama3', factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(ROPE, rope_type='yarn', factor=8.0,
            original_max_position_embeddings=32)
GEMMA = dict(SMALL, num_hidden_layers=7, head_dim=16, sliding_window=9,
             query_pre_attn_scalar=24)


def _llama(**options):
  return transformers.LlamaForCausalLM(
      transformers.LlamaConfig(**{**SMALL, **options}))


def _qwen2(**options):
  return transformers.Qwen2ForCausalLM(
      transformers.Qwen2Config(**{**SMALL, **options}))


def _qwen3(**options):
  return transformers.Qwen3ForCausalLM(
      transformers.Qwen3Config(head_dim=16, **{**SMALL, **options}))


def _gemma3(**options):
  return transformers.Gemma3ForCausalLM(
      transformers.Gemma3TextConfig(**{**GEMMA, **options}))


def _gemma3_multimodal():
  vision = dict(
      hidden_size=16, intermediate_size=16, num_hidden_layers=1,
      num_attention_heads=2, image_size=28, patch_size=14)
  text = transformers.Gemma3TextConfig(**GEMMA)
  return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
      text_config=text, vision_config=vision, mm_tokens_per_image=4,
      image_token_index=96, boi_token_index=94, eoi_token_index=95))


MODELS = {
    'llama': lambda: _llama(rope_parameters=ROPE),
    'llama_tied': lambda: _llama(tie_word_embeddings=True, head_dim=16),
    'llama_llama3': lambda: _llama(rope_parameters=LLAMA3),
    'llama_yarn': lambda: _llama(rope_parameters=YARN),
    'llama_yarn_options': lambda: _llama(rope_parameters=dict(
        YARN, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3,
        truncate=False)),
    'llama_linear': lambda: _llama(rope_parameters=dict(
        ROPE, rope_type='linear', factor=4.0)),
    'qwen2': _qwen2,
    'qwen2_window': lambda: _qwen2(
        use_sliding_window=True, max_window_layers=1, sliding_window=11,
        tie_word_embeddings=True),
    'qwen3': _qwen3,
    'gemma3': _gemma3,
    'gemma3_scaled': lambda: _gemma3(
        final_logit_softcapping=5.0,
        rope_parameters=dict(
            full_attention=dict(rope_theta=1e6, rope_type='linear',
                                factor=8.0),
            sliding_attention=dict(rope_theta=1e4, rope_type='default'))),
    'gemma3_multimodal': _gemma3_multimodal,
}


def _create(name):
  """Returns a model whose norms and biases are no longer trivial."""
  torch.manual_seed(0)
  model = MODELS[name]().eval()
  model.set_attn_implementation('eager')
  with torch.no_grad():
    for key, value in model.named_parameters():
      if 'norm' in key or key.endswith('bias'):
        value.add_(0.3 * torch.randn_like(value))
  return model


def _torch_logits(model, tokens):
  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


def _tokens(vocab_size, batch=2):
  return np.random.default_rng(0).integers(0, vocab_size, (batch, LENGTH))


def _logits(config, params, tokens, chunk):
  """Returns logits [B,T,V] of our decoder, fed `chunk` tokens at a time."""
  batch, length = tokens.shape
  cache = transformer.empty_cache(config, batch, length, chunk=chunk)
  model = transformer.Transformer(config)

  @jax.jit
  def step(params, cache, block_tokens, base):
    position = base + jnp.arange(block_tokens.shape[1])
    block = Block(base=jnp.full((batch,), base),
                  position=jnp.broadcast_to(position, block_tokens.shape))
    logits, _, cache = model.apply(
        {'params': params}, block_tokens, cache, block)
    return logits, cache

  out = []
  for base in range(0, length, chunk):
    fed = jnp.asarray(tokens[:, base:base + chunk], jnp.int32)
    logits, cache = step(params, cache, fed, jnp.int32(base))
    out.append(np.asarray(logits))
  return np.concatenate(out, axis=1)


@pytest.mark.parametrize('name', MODELS)
def test_logits_equal(name, tmp_path):
  model = _create(name)
  model.save_pretrained(tmp_path)
  tensors = safetensors.read(tmp_path)
  config = config_lib.from_hf(safetensors.read_config(tmp_path), 'float32')
  params = weights.load(config, lambda n: tensors[n].read(), tensors,
                        scheme='hf')
  tokens = _tokens(90)  # below the ids that a multimodal model reserves
  expected = _torch_logits(model, tokens)
  worst = {}
  for chunk in (LENGTH, 7, 1):
    got = _logits(config, params, tokens, chunk)
    worst[chunk] = float(np.abs(got - expected).max())
  print(name, worst)  # shown by `pytest -rP`
  assert max(worst.values()) < TOLERANCE, worst
  assert np.abs(expected).max() > 0.5  # not a comparison of zeros


@pytest.mark.parametrize('name', ['llama', 'qwen2', 'qwen3', 'gemma3'])
def test_export_is_a_checkpoint(name, tmp_path):
  model = _create(name)
  model.save_pretrained(tmp_path)
  tensors = safetensors.read(tmp_path)
  config = config_lib.from_hf(safetensors.read_config(tmp_path), 'float32')
  params = weights.load(config, lambda n: tensors[n].read(), tensors,
                        scheme='hf')
  exported = weights.export(config, params)
  assert sorted(exported) == sorted(tensors)
  for key, value in exported.items():
    # 1e-6: Gemma's norms are stored less one, which rounds.
    np.testing.assert_allclose(value, tensors[key].read(), atol=1e-6)


TEXT = (
    'The library of Alexandria was one of the largest of the ancient world. '
    'It was part of a research institution that was dedicated to the Muses, '
    'the nine goddesses of the arts. The idea of a universal library may '
    'have been proposed by Demetrius of Phalerum, an exiled statesman, to '
    'the king, who may have laid plans for it; but it was built later.')


@pytest.mark.weights
def test_real_checkpoint_equal(smollm2_path):
  file = gguf.read(smollm2_path)
  read = lambda n: file.tensors[n].read()  # noqa: E731
  config = config_lib.from_gguf(file.metadata, file.tensors, read=read)
  params = weights.load(config, read, file.tensors, scheme='gguf')
  text = Tokenizer.from_gguf(file.metadata)
  tokens = np.asarray(text.encode(TEXT))[None, :LENGTH]
  assert tokens.shape == (1, LENGTH)

  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=49152, hidden_size=576, intermediate_size=1536,
      num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
      rms_norm_eps=1e-5, tie_word_embeddings=True,
      rope_parameters=dict(rope_theta=100000.0))).eval()
  exported = weights.export(config, params)
  state = {key: torch.from_numpy(np.array(value))
           for key, value in exported.items()}
  state['lm_head.weight'] = state['model.embed_tokens.weight']
  model.load_state_dict(state, strict=True)
  expected = _torch_logits(model, tokens)
  got = _logits(config, params, tokens, LENGTH)
  worst = float(np.abs(got - expected).max())
  assert worst < TOLERANCE
  # It reads English: the weights are where they belong on both sides.
  log_probs = np.asarray(jax.nn.log_softmax(got[0, :-1]))
  loss = -log_probs[np.arange(LENGTH - 1), tokens[0, 1:]].mean()
  print(f'{worst=} {loss=}')
  assert loss < 3.5
