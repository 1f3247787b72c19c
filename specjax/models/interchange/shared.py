"""What the formats of published drafters share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from specjax.io.errors import FormatError
from specjax.models import config as config_lib
from specjax.models import rope, weight_table
from specjax.models.transformer_config import TransformerConfig

Parts = Iterator[weight_table.Part]
Array = npt.NDArray[Any]

EMBEDDING, HEAD = 'embed_tokens.weight', 'lm_head.weight'
# Of a file's copy of a matrix of the target: up to this relative distance of
# most rows (of so many looked at) one of both may be rounded or quantised,
# beyond it they are different matrices.
_SAME, _LOOK = 0.15, 4096
_ARCHITECTURES = {
    'qwen3': 'Qwen3ForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
    'llama': 'LlamaForCausalLM'}
# Fields of a decoder that a drafter's network does not look at.
_UNUSED = ('tied', 'dtype')


class Target(NamedTuple):
  """The model that a drafter is for.

  Attributes:
    name: as others find it ('Qwen/Qwen3-4B', a folder).
    config: its shape.
    params: its parameters, or None where nothing of them is needed.
    revision: of its weights, or ''.
    max_length: positions that it supports.
  """

  name: str
  config: TransformerConfig
  params: Any = None
  revision: str = ''
  max_length: int = 32768

  @property
  def architecture(self) -> str:
    """Name of its class in transformers."""
    c = self.config
    if c.post_norms:
      return 'Gemma3ForCausalLM'
    return _ARCHITECTURES[family_of(c)]

  def matrix(self, name: str, why: str) -> Array:
    """Returns 'embedding' or 'head' [V,D] in float32.

    Raises:
      ValueError: there are no parameters; says what needs them.
    """
    if self.params is None:
      raise ValueError(f"the target's parameters are needed: {why}")
    tied = name == 'head' and 'head' not in self.params
    return np.asarray(
        self.params['embedding' if tied else name]).astype(np.float32)


class File(NamedTuple):
  """A checkpoint that is read.

  Attributes:
    values: `config.json`.
    shapes: of all tensors, by name; matrices (out, in).
    read: returns a tensor by name.
  """

  values: Mapping[str, Any]
  shapes: Mapping[str, tuple[int, ...]]
  read: Callable[[str], Array]

  def is_target(self, name: str, expected: Array) -> bool:
    """Whether a tensor is a copy of a matrix of the target."""
    found = self.read(name)
    if found.shape != expected.shape:
      return False
    step = max(len(expected) // _LOOK, 1)
    found, expected = found[::step], expected[::step]
    distance = np.linalg.norm(found - expected, axis=1)
    size = np.linalg.norm(expected, axis=1)
    return bool(np.median(distance / np.maximum(size, 1e-9)) <= _SAME)


def family_of(decoder: TransformerConfig) -> str:
  """Returns the family whose layers a drafter's are: 'qwen3', ..."""
  if decoder.qk_norm:
    return 'qwen3'
  return 'qwen2' if decoder.qkv_bias else 'llama'


def layer_values(
    decoder: TransformerConfig, dtype: str, max_length: int
) -> dict[str, Any]:
  """Returns the keys of `config.json` that describe the layers."""
  d = decoder
  activations = {'silu': 'silu', 'gelu_tanh': 'gelu_pytorch_tanh'}
  return {
      'model_type': family_of(d), 'vocab_size': d.vocab_size,
      'hidden_size': d.embed_dim, 'intermediate_size': d.mlp_dim,
      'num_hidden_layers': d.num_layers, 'num_attention_heads': d.num_heads,
      'num_key_value_heads': d.num_kv_heads, 'head_dim': d.head_dim,
      'hidden_act': activations[d.activation], 'rms_norm_eps': d.norm_eps,
      'rope_theta': d.rope_base, 'rope_scaling': _scaling(d.rope_scaling),
      'max_position_embeddings': max_length, 'attention_bias': False,
      'attention_dropout': 0.0, 'tie_word_embeddings': False,
      'use_cache': True, 'torch_dtype': dtype}


def decoder_of(
    values: Mapping[str, Any], family: str, target: TransformerConfig
) -> TransformerConfig:
  """Returns the layers that `config.json` describes.

  Raises:
    FormatError: a key is missing, an option is not supported, or the width
      or vocabulary is not the target's.
  """
  if 'sliding_attention' in (values.get('layer_types') or ()):
    raise FormatError('layer_types: sliding windows in a drafter are not '
                      'supported')
  decoder = config_lib.from_hf(
      {**values, 'architectures': [_ARCHITECTURES[family]]}, target.dtype)
  for what, key, have, need in (
      ('width', 'hidden_size', decoder.embed_dim, target.embed_dim),
      ('vocabulary', 'vocab_size', decoder.vocab_size, target.vocab_size)):
    if have != need:
      raise FormatError(f'{key}={have}: the target has a {what} of {need}')
  # The text is the target's, and so is its limit.
  return dataclasses.replace(decoder, tied=True, max_length=None)


def check_decoder(
    decoder: TransformerConfig, values: Mapping[str, Any], family: str,
    form: str,
) -> None:
  """Raises ValueError if `values` do not say all about the layers."""
  said = decoder_of(values, family, decoder)
  for field in dataclasses.fields(decoder):
    have, read = getattr(decoder, field.name), getattr(said, field.name)
    if field.name not in _UNUSED and have != read:
      raise ValueError(
          f'{form} cannot hold decoder.{field.name}={have!r}; what loads it '
          f'would compute with {read!r}')


def draft_ids(file: File, vocab_size: int, width: int) -> Array:
  """Returns the draft vocabulary int64[W], ascending.

  `d2t` holds offsets: token = draft id + d2t[draft id].

  Raises:
    FormatError: `d2t` is missing though W < V, has another size, or does
      not name ascending tokens of the target.
  """
  if 'd2t' not in file.shapes:
    if width != vocab_size:
      raise FormatError(f"tensor 'd2t' is missing, but draft_vocab_size="
                        f'{width} and vocab_size={vocab_size}')
    return np.arange(vocab_size)
  offsets = np.rint(file.read('d2t')).astype(np.int64)
  if offsets.shape != (width,):
    raise FormatError(f"tensor 'd2t' has shape {offsets.shape}, but "
                      f'draft_vocab_size={width}')
  ids = np.arange(width) + offsets
  if (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= vocab_size:
    raise FormatError("tensor 'd2t': tokens must ascend and be in "
                      f'[0, {vocab_size})')
  if 't2d' in file.shapes:
    kept = file.read('t2d') != 0
    if kept.shape != (vocab_size,) or not np.array_equal(
        np.flatnonzero(kept), ids):
      raise FormatError("tensors 't2d' and 'd2t' name different tokens")
  return ids


def id_tensors(ids: Array, vocab_size: int) -> dict[str, Array]:
  """Returns `d2t int64[W]` and `t2d bool[V]`; nothing if W = V."""
  if len(ids) == vocab_size:
    return {}
  kept = np.zeros((vocab_size,), np.bool_)
  kept[ids] = True
  return {'d2t': (ids - np.arange(len(ids))).astype(np.int64), 't2d': kept}


def check_taps(taps: tuple[int, ...], num_layers: int, key: str) -> None:
  """Raises FormatError for streams that the target does not have."""
  wrong = [i for i in taps if not 0 <= i <= num_layers]
  if wrong or list(taps) != sorted(set(taps)):
    raise FormatError(
        f'{key}: the streams entering the layers {list(taps)} would be read; '
        f'they must ascend and be in [0, {num_layers}], those of the target')


def whole_vocabulary(width: int, vocab_size: int, form: str) -> None:
  """Raises ValueError if a format lacks the reduced vocabulary asked for."""
  if width != vocab_size:
    raise ValueError(
        f'{form} has no reduced vocabulary: draft_vocab_size={width}, but '
        f"the target has {vocab_size} tokens; 'speculators' has one")


def norm(path: weight_table.Path, name: str, size: int) -> weight_table.Part:
  """Returns the part of a norm's scale."""
  return weight_table.norm(path, name, size, 0.0)


def transposed(
    ours: str, name: str, shape: tuple[int, int]
) -> weight_table.Part:
  """Returns the part of a matrix; `shape` is the stored one."""
  return weight_table.Part(
      (ours,), ((name, shape),), lambda w: w.T, lambda w: (w.T,))


def as_is(ours: str, name: str, shape: tuple[int, ...]) -> weight_table.Part:
  """Returns the part of an array that is stored as it is."""
  return weight_table.Part(
      (ours,), ((name, shape),), lambda w: w, lambda w: (w,))


def need(values: Mapping[str, Any], key: str, where: str = '') -> Any:
  """Returns a value; raises FormatError naming a missing key."""
  if values.get(key) is None:
    raise FormatError(f'config.json: {where}{key} is missing')
  return values[key]


def speculators(
    kind: str, layers: dict[str, Any], target: Target, num_draft: int
) -> dict[str, Any]:
  """Returns the keys that all files of speculators have."""
  names = {'dflash': 'DFlashSpeculator', 'dspark': 'DSparkSpeculator',
           'eagle3': 'Eagle3Speculator'}
  return {
      'architectures': [names[kind]], 'speculators_model_type': kind,
      'speculators_version': '0.9.0', 'torch_dtype': layers['torch_dtype'],
      'tie_word_embeddings': False,
      'speculators_config': {
          'algorithm': kind, 'default_proposal_method': 'greedy',
          'proposal_methods': [{
              'proposal_type': 'greedy', 'speculative_tokens': num_draft,
              'verifier_accept_k': 1, 'accept_tolerance': 0.0}],
          'verifier': {'name_or_path': target.name,
                       'architectures': [target.architecture]}},
      'transformer_layer_config': layers}


def _scaling(scaling: rope.RopeScaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  out: dict[str, Any] = {
      'rope_type': scaling.kind, 'factor': scaling.factor,
      'original_max_position_embeddings': scaling.original_length}
  names = {'llama3': ('low_freq_factor', 'high_freq_factor'),
           'yarn': ('beta_fast', 'beta_slow', 'attention_factor', 'truncate')}
  for name in names.get(scaling.kind, ()):
    if getattr(scaling, name) is not None:
      out[name] = getattr(scaling, name)
  return out
