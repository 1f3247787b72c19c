"""Decoder shapes from checkpoints: Hugging Face configs and GGUF metadata.

Both are read strictly: an option that changes what the network computes and
that `TransformerConfig` cannot express is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

from specjax.io.errors import FormatError
from specjax.models import rope
from specjax.models.config_gguf import (
  DTYPES,
  check_dtype,
  from_gguf,
  max_length,
  need,
)
from specjax.models.transformer_config import TransformerConfig

__all__ = ('DTYPES', 'from_gguf', 'from_hf')

_HF_FAMILIES = {
    'LlamaForCausalLM': 'llama',
    'Qwen2ForCausalLM': 'qwen2',
    'Qwen3ForCausalLM': 'qwen3',
    'Gemma3ForCausalLM': 'gemma3',
    'Gemma3ForConditionalGeneration': 'gemma3',  # its text part
}
_MODEL_TYPES = {
    'llama': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3',
    'gemma3_text': 'gemma3', 'gemma3': 'gemma3',
}

# What upstream assumes when a key is absent. Published Gemma 3 configs of the
# multimodal sizes list only what differs from these values.
_DEFAULTS: dict[str, dict[str, Any]] = {
    'llama': {'rope_theta': 1e4, 'hidden_act': 'silu'},
    'qwen2': {'rope_theta': 1e4, 'hidden_act': 'silu'},
    'qwen3': {'rope_theta': 1e4, 'hidden_act': 'silu', 'head_dim': 128},
    'gemma3': {
        'vocab_size': 262208, 'hidden_size': 2304, 'intermediate_size': 9216,
        'num_hidden_layers': 26, 'num_attention_heads': 8,
        'num_key_value_heads': 4, 'head_dim': 256,
        'hidden_activation': 'gelu_pytorch_tanh', 'sliding_window': 4096,
        'query_pre_attn_scalar': 256, 'tie_word_embeddings': True,
        'rope_theta': 1e6, 'rope_local_base_freq': 1e4},
}
_ACTIVATIONS = {
    'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh'}
# Keys that must be absent, None, False or 0: key -> what they would need.
_REFUSED = {
    'attention_bias': 'a bias on the attention output',
    'mlp_bias': 'biases in the MLP',
    'use_bidirectional_attention': 'attention to later tokens',
    # Gemma 3 checkpoints have null; some engines would apply it, others not.
    'attn_logit_softcapping': 'a decision that the architecture leaves open',
    'quantization_config': 'weights packed by a quantiser; take the '
                           'unquantised checkpoint, or a GGUF file',
}


def from_hf(
    config: Mapping[str, Any], dtype: str = 'float32'
) -> TransformerConfig:
  """Reads the content of a `config.json`, of transformers 4 or 5.

  Args:
    config: the parsed file. Of a multimodal Gemma 3, the text part is read.
    dtype: of matrices, activations and cache, one of `DTYPES`; what the file
      says about dtypes is not consulted.

  Returns:
    The decoder's shape.

  Raises:
    FormatError: if the architecture is unknown, a key is missing, or an
      option is set that the decoder does not have.
  """
  family, text = _hf_family(config)
  text = {**_DEFAULTS[family], **text}
  for key, what in _REFUSED.items():
    if text.get(key):
      raise FormatError(f'config.json has {key}={text[key]!r}, which needs '
                        f'{what}: not supported')
  is_gemma = family == 'gemma3'
  num_layers = need(text, 'num_hidden_layers')
  num_heads = need(text, 'num_attention_heads')
  embed_dim = need(text, 'hidden_size')
  head_dim = text.get('head_dim') or embed_dim // num_heads
  local = _hf_local_layers(text, family, num_layers)
  window = text.get('sliding_window') if any(local) else None
  if any(local) and not window:
    raise FormatError('config.json has sliding-window layers, but '
                      f'sliding_window={window!r}')
  base, scaling = _hf_rope(text, 'full_attention')
  scalar = text.get('query_pre_attn_scalar') if is_gemma else None
  return TransformerConfig(
      vocab_size=need(text, 'vocab_size'), num_layers=num_layers,
      embed_dim=embed_dim, mlp_dim=need(text, 'intermediate_size'),
      num_heads=num_heads,
      num_kv_heads=text.get('num_key_value_heads') or num_heads,
      head_dim=head_dim, norm_eps=text.get('rms_norm_eps', 1e-6),
      rope_base=base, rope_scaling=scaling,
      local_rope_base=_hf_local_base(text, is_gemma, base, scaling, local),
      window=window, local_layers=local if any(local) else (),
      qkv_bias=family == 'qwen2', qk_norm=family in ('qwen3', 'gemma3'),
      post_norms=is_gemma,
      embed_scale=math.sqrt(embed_dim) if is_gemma else None,
      activation=_activation(text, is_gemma),
      query_scale=scalar ** -0.5 if scalar and scalar != head_dim else None,
      final_softcap=text.get('final_logit_softcapping') or None,
      tied=bool(text.get('tie_word_embeddings', False)),
      dtype=check_dtype(dtype),
      max_length=max_length(
          text.get('max_position_embeddings'), scaling, is_gemma))


def _hf_family(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
  """Returns the family and the keys of the text decoder."""
  named = (config.get('architectures') or [None])[0]
  kind = config.get('model_type') or ''
  family = _HF_FAMILIES.get(named) if named else _MODEL_TYPES.get(kind)
  if family is None:
    raise FormatError(
        f'architecture {named or kind!r}: known are '
        f'{", ".join(sorted(_HF_FAMILIES))}')
  if family == 'gemma3' and 'text_config' in config:
    shared = ('tie_word_embeddings', 'quantization_config')
    outer = {k: config[k] for k in shared if k in config}
    return family, {**outer, **config['text_config']}
  return family, dict(config)


def _activation(text: Mapping[str, Any], is_gemma: bool) -> str:
  key = 'hidden_activation' if is_gemma else 'hidden_act'
  name = text.get(key)
  if name not in _ACTIVATIONS:
    raise FormatError(f'{key}={name!r}: known are '
                      f'{", ".join(sorted(_ACTIVATIONS))}')
  return _ACTIVATIONS[name]


def _hf_local_layers(
    text: Mapping[str, Any], family: str, num_layers: int
) -> tuple[bool, ...]:
  if family == 'llama' or (
      family != 'gemma3' and not text.get('use_sliding_window')):
    return (False,) * num_layers
  kinds = text.get('layer_types')
  if kinds is not None:
    unknown = set(kinds) - {'full_attention', 'sliding_attention'}
    if unknown or len(kinds) != num_layers:
      raise FormatError(
          f'layer_types: {len(kinds)} entries for {num_layers} layers, '
          f'unknown {sorted(unknown)}; known are full_attention, '
          'sliding_attention')
    return tuple(kind == 'sliding_attention' for kind in kinds)
  if family == 'gemma3':
    pattern = text.get('sliding_window_pattern') or text.get(
        '_sliding_window_pattern') or 6
    return tuple((i + 1) % pattern != 0 for i in range(num_layers))
  first = text.get('max_window_layers', 28)
  return tuple(i >= first for i in range(num_layers))


def _hf_rope(
    text: Mapping[str, Any], kind: str
) -> tuple[float, rope.RopeScaling | None]:
  """Returns base and scaling of layers of a kind, as in `layer_types`."""
  found = text.get('rope_parameters')
  if found is None:  # transformers 4
    found = text.get('rope_scaling') or {}
  if any(isinstance(value, Mapping) for value in found.values()):
    found = found.get(kind) or {}
  share = found.get('partial_rotary_factor', text.get(
      'partial_rotary_factor')) or 1.0
  if share != 1.0:
    raise FormatError(f'partial_rotary_factor={share}: only 1.0 is supported')
  base = float(found.get('rope_theta') or text['rope_theta'])
  name = found.get('rope_type') or found.get('type') or 'default'
  if name == 'default':
    return base, None
  if name not in ('linear', 'llama3', 'yarn'):
    raise FormatError(f'rope_type={name!r}: known are default, linear, '
                      'llama3, yarn')
  length = found.get('original_max_position_embeddings') or text.get(
      'max_position_embeddings')
  factor = found.get('factor')
  if name == 'yarn' and factor is None and length:
    factor = need(text, 'max_position_embeddings') / length
  if factor is None or (length is None and name != 'linear'):
    raise FormatError(f'rope parameters {dict(found)} lack a factor or the '
                      'original length')
  options: dict[str, Any] = {}
  for key in ('low_freq_factor', 'high_freq_factor', 'beta_fast', 'beta_slow',
              'attention_factor', 'truncate'):
    if found.get(key) is not None:
      options[key] = found[key]
  wide, whole = found.get('mscale'), found.get('mscale_all_dim')
  if name == 'yarn' and 'attention_factor' not in options and wide and whole:
    log = 0.1 * math.log(max(factor, 1.0))
    options['attention_factor'] = (wide * log + 1) / (whole * log + 1)
  return base, rope.RopeScaling(
      kind=name, factor=float(factor), original_length=int(length or 8192),
      **options)


def _hf_local_base(
    text: Mapping[str, Any], is_gemma: bool, base: float,
    scaling: rope.RopeScaling | None, local: tuple[bool, ...],
) -> float | None:
  """Returns the rotary base of sliding layers, None if as in the others."""
  nested = text.get('rope_parameters') or {}
  if isinstance(nested.get('sliding_attention'), Mapping):
    local_base, local_scaling = _hf_rope(text, 'sliding_attention')
  elif is_gemma:
    local_base, local_scaling = float(text['rope_local_base_freq']), None
  else:
    return None
  if not any(local) or (local_base, local_scaling) == (base, scaling):
    return None
  if local_scaling is not None:
    raise FormatError(f'rotary scaling {local_scaling.kind!r} of sliding '
                      'layers differs from the other layers: not supported')
  return local_base
