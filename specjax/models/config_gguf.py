"""Decoder shapes from GGUF metadata; see `specjax.models.config`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import math
from typing import Any

import numpy as np

from specjax.io.errors import FormatError
from specjax.models import rope
from specjax.models.transformer_config import TransformerConfig

DTYPES = ('float32', 'bfloat16', 'float16')

_FAMILIES = ('llama', 'qwen2', 'qwen3', 'gemma3')


def from_gguf(
    metadata: Mapping[str, Any], tensor_names: Iterable[str], *,
    dtype: str = 'float32',
    read: Callable[[str], np.ndarray] | None = None,
) -> TransformerConfig:
  """Reads GGUF metadata.

  Two facts are not in the metadata but in tensors. A file with a head beside
  its embedding may come from a model that ties them (Qwen, up to 4B): `read`
  lets both be compared, and without it they are taken as two. Llama 3's
  rotary scaling is a tensor, which is recognised with `read` only.

  Args:
    metadata: all keys of the file.
    tensor_names: names of all its tensors.
    dtype: of matrices, activations and cache, one of `DTYPES`.
    read: returns a tensor by name, float32, matrices as (out, in).

  Returns:
    The decoder's shape.

  Raises:
    FormatError: if the architecture is unknown, a key is missing, or an
      option is set that the decoder does not have.
  """
  family = metadata.get('general.architecture')
  if family not in _FAMILIES:
    raise FormatError(f'GGUF architecture {family!r}: known are '
                      f'{", ".join(_FAMILIES)}')
  keys = {k.removeprefix(f'{family}.'): v for k, v in metadata.items()
          if k.startswith(f'{family}.')}
  names = frozenset(tensor_names)
  num_heads = _same(keys, 'attention.head_count')
  num_layers, embed_dim = need(keys, 'block_count'), need(
      keys, 'embedding_length')
  head_dim = _head_dim(keys, embed_dim // num_heads)
  _refuse(keys, names, family)
  is_gemma = family == 'gemma3'
  base = float(keys.get('rope.freq_base', 1e4))
  vocab = keys.get('vocab_size') or len(
      metadata.get('tokenizer.ggml.tokens', ()))
  if not vocab:
    raise FormatError('the vocabulary size is in none of '
                      f'{family}.vocab_size, tokenizer.ggml.tokens')
  local = _local_layers(keys, num_layers) if is_gemma else ()
  scaling = _rope(keys, names, read, head_dim, base)
  return TransformerConfig(
      vocab_size=vocab, num_layers=num_layers, embed_dim=embed_dim,
      mlp_dim=_same(keys, 'feed_forward_length'), num_heads=num_heads,
      num_kv_heads=_same(keys, 'attention.head_count_kv', num_heads),
      head_dim=head_dim,
      norm_eps=need(keys, 'attention.layer_norm_rms_epsilon'),
      rope_base=base, rope_scaling=scaling,
      # Gemma's second base is usually not written down.
      local_rope_base=(
          float(keys.get('rope.freq_base_swa', 1e4)) if is_gemma else None),
      window=need(keys, 'attention.sliding_window') if any(local) else None,
      local_layers=local if any(local) else (),
      qkv_bias=family == 'qwen2', qk_norm=family in ('qwen3', 'gemma3'),
      post_norms=is_gemma,
      embed_scale=math.sqrt(embed_dim) if is_gemma else None,
      activation='gelu_tanh' if is_gemma else 'silu',
      query_scale=_query_scale(keys, family, num_layers,
                                    embed_dim // num_heads),
      attention_softcap=keys.get('attn_logit_softcapping') or None,
      final_softcap=keys.get('final_logit_softcapping') or None,
      tied=_tied(names, read), dtype=check_dtype(dtype),
      max_length=max_length(keys.get('context_length'), scaling, is_gemma))


def max_length(
    said: int | None, scaling: rope.RopeScaling | None, is_gemma: bool
) -> int | None:
  """Returns the tokens of context that a model has.

  Args:
    said: what its file says, or None.
    scaling: of its rotary embedding.
    is_gemma: Gemma 3 counts its scaling in; so does Llama 3.
  """
  if not said or scaling is None or is_gemma or scaling.kind == 'llama3':
    return int(said) if said else None
  if scaling.kind == 'linear':
    return int(said * scaling.factor)
  # Files with YaRN say the length before the scaling, or the one after it.
  return max(int(said), int(scaling.original_length * scaling.factor))


def need(keys: Mapping[str, Any], key: str) -> Any:
  """Returns `keys[key]`; raises FormatError if it is absent or None."""
  if keys.get(key) is None:
    raise FormatError(f'the model configuration lacks {key!r}')
  return keys[key]


def check_dtype(dtype: str) -> str:
  """Returns `dtype` if it is one of `DTYPES`, else raises ValueError."""
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r}: known are {", ".join(DTYPES)}')
  return dtype


def _same(keys: Mapping[str, Any], key: str, default: int | None = None):
  """Returns a size that GGUF may give per layer, if layers agree."""
  value = keys.get(key, default)
  values = set(value) if isinstance(value, (list, tuple)) else {value}
  if len(values) != 1:
    raise FormatError(f'{key}={value}: layers of different sizes are not '
                      'supported')
  return need({key: values.pop()}, key)


def _head_dim(keys: Mapping[str, Any], default: int) -> int:
  """Returns the one size that keys, values and rotation have."""
  key = keys.get('attention.key_length', default)
  value = keys.get('attention.value_length', default)
  turned = keys.get('rope.dimension_count', key)
  if not key == value == turned:
    raise FormatError(f'head sizes key {key}, value {value}, rotated '
                      f'{turned}: only equal ones are supported')
  return key


def _refuse(
    keys: Mapping[str, Any], names: frozenset[str], family: str
) -> None:
  if keys.get('expert_count'):
    raise FormatError(f'{keys["expert_count"]} experts: mixtures are not '
                      'supported')
  biased = sorted(n for n in names if n.endswith('.bias'))
  if family != 'qwen2' and biased:
    raise FormatError(f'{family} files with biases are not supported: found '
                      f'{biased[0]} and {len(biased) - 1} more')


def _local_layers(
    keys: Mapping[str, Any], num_layers: int
) -> tuple[bool, ...]:
  if not keys.get('attention.sliding_window'):
    return ()
  pattern = keys.get('attention.sliding_window_pattern', 6)
  if isinstance(pattern, (list, tuple)):
    return tuple(bool(x) for x in pattern[:num_layers])
  return tuple((i + 1) % pattern != 0 for i in range(num_layers))


def _query_scale(
    keys: Mapping[str, Any], family: str, num_layers: int, share: int
) -> float | None:
  if keys.get('attention.scale'):
    return float(keys['attention.scale'])
  # The 27B Gemma 3 scales by width / heads; files say so only by their depth.
  if family == 'gemma3' and num_layers == 62:
    return share ** -0.5
  return None


def _rope(
    keys: Mapping[str, Any], names: frozenset[str],
    read: Callable[[str], np.ndarray] | None, head_dim: int, base: float,
) -> rope.RopeScaling | None:
  """Returns the scaling that metadata or a factor tensor describe."""
  factor = float(keys.get('rope.scaling.factor') or keys.get(
      'rope.scale_linear') or 1.0)
  kind = keys.get('rope.scaling.type', 'linear')  # llama.cpp's default
  if 'rope_freqs.weight' in names:
    if read is None:
      raise FormatError('the rotary scaling is in tensor rope_freqs.weight: '
                        'pass `read` to recognise it')
    return _llama3(read('rope_freqs.weight'), head_dim, base)
  if kind == 'none' or factor == 1.0:
    return None
  length = keys.get('rope.scaling.original_context_length') or keys.get(
      'context_length') or 8192
  if kind == 'linear':
    return rope.RopeScaling('linear', factor, int(length))
  if kind != 'yarn':
    raise FormatError(f'rope.scaling.type={kind!r}: known are none, linear, '
                      'yarn')
  extra = float(keys.get('rope.scaling.attn_factor') or keys.get(
      'rope.scaling.yarn_attn_factor') or 1.0)
  return rope.RopeScaling(
      'yarn', factor, int(length),
      beta_fast=float(keys.get('rope.scaling.yarn_beta_fast', 32.0)),
      beta_slow=float(keys.get('rope.scaling.yarn_beta_slow', 1.0)),
      attention_factor=extra * (0.1 * math.log(factor) + 1.0))


def _llama3(
    divisors: np.ndarray, head_dim: int, base: float
) -> rope.RopeScaling:
  """Recognises the frequency divisors of Llama 3.1, 3.2 and 3.3."""
  guess = rope.RopeScaling('llama3', float(np.max(divisors)), 8192)
  plain, _ = rope.frequencies(head_dim, base, None)
  scaled, _ = rope.frequencies(head_dim, base, guess)
  if divisors.shape != plain.shape or not np.allclose(
      plain / scaled, divisors, rtol=1e-3):
    raise FormatError(
        'tensor rope_freqs.weight holds rotary divisors other than Llama '
        "3's (8192 tokens, band 1 to 4): not supported")
  return guess


def _tied(
    names: frozenset[str], read: Callable[[str], np.ndarray] | None
) -> bool:
  """Whether head and embedding are one matrix, quantised alike or not."""
  if 'output.weight' not in names:
    return True
  if read is None:
    return False
  embedding, head = read('token_embd.weight'), read('output.weight')
  if embedding.shape != head.shape:
    return False
  # 4-bit quantisation moves a matrix by under a tenth of its norm; two
  # trained matrices are about sqrt(2) norms apart.
  rows = slice(None, None, max(1, len(head) // 1024))
  gap = np.linalg.norm(embedding[rows] - head[rows])
  return bool(gap < 0.3 * np.linalg.norm(head[rows]))
