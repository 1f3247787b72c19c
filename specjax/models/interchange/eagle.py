"""EAGLE drafters as others store them: the authors' files, speculators.

The authors' files hold EAGLE-1 (`layers.0`, with the embedding, for the
target's head) or EAGLE-3 (`midlayer`, with a head over part of the
vocabulary); those of speculators EAGLE-3 (`layers.0`).

Layers that are read are named by the stream entering them. Only the nested
`eagle_config` names the layers left: SGLang reads that one, vLLM the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from specjax.io.errors import FormatError
from specjax.models import eagle as eagle_lib
from specjax.models import weight_table
from specjax.models.eagle import EagleConfig
from specjax.models.interchange import shared
from specjax.models.interchange.shared import EMBEDDING, HEAD, File, Target

FORMS = ('eagle', 'speculators')
_TAPS = 'eagle_aux_hidden_state_layer_ids'
_THIRD = 'LlamaForCausalLMEagle3'
# Options of others that change what is computed.
_REFUSED = ('norm_before_residual', 'norm_before_fc', 'fc_norm',
            'norm_output')


def read_config(form: str, file: File, target: Target) -> EagleConfig:
  """Returns the shape that a file describes.

  Raises:
    FormatError: see `interchange.load`.
  """
  values = layers = file.values
  if form == 'speculators':
    layers = shared.need(values, 'transformer_layer_config')
  for key in _REFUSED:
    if values.get(key):
      raise FormatError(f'{key}={values[key]!r}: not supported')
  third = form == 'speculators' or any(
      name.endswith('hidden_norm.weight') for name in file.shapes)
  at = _prefix(form) if third else 'layers.0.'
  family = 'llama'
  if f'{at}self_attn.q_norm.weight' in file.shapes:
    family = 'qwen3'
  elif f'{at}self_attn.q_proj.bias' in file.shapes:
    family = 'qwen2'
  decoder = shared.decoder_of(layers, family, target.config)
  if not third:
    # The target's own head and embedding.
    decoder = dataclasses.replace(
        decoder, embed_scale=target.config.embed_scale,
        final_softcap=target.config.final_softcap)
    return EagleConfig(
        decoder, decoder.vocab_size, version='1',
        fuse_bias='fc.bias' in file.shapes)
  if decoder.num_layers != 1:
    raise FormatError(f'num_hidden_layers={decoder.num_layers}: EAGLE-3 of '
                      'more than one layer is not supported')
  width = values.get('draft_vocab_size') or decoder.vocab_size
  return EagleConfig(
      decoder, width, version='3', taps=_read_taps(file, target),
      own_head=HEAD in file.shapes, fuse_bias='fc.bias' in file.shapes)


def _read_taps(file: File, target: Target) -> tuple[int, ...]:
  num = target.config.num_layers
  taps, key = file.values.get(_TAPS), _TAPS
  if taps is None:
    nested = file.values.get('eagle_config') or {}
    taps = nested.get(_TAPS)
    if taps is not None:
      key, taps = f'eagle_config.{_TAPS}', [i + 1 for i in taps]
  if taps is None:
    taps = eagle_lib.default_taps(num)
  taps = tuple(taps)
  shared.check_taps(taps, num, key)
  return taps


def _prefix(form: str) -> str:
  return 'midlayer.' if form == 'eagle' else 'layers.0.'


def parts(
    form: str, config: EagleConfig, ids: Any, target: Target,
    file: File | None = None, mask_token: int | None = None,
) -> shared.Parts:
  """Yields how each trained weight is stored."""
  c, d = config, config.decoder
  size, third = d.embed_dim, config.version == '3'
  inputs = len(c.taps) if third else 2
  yield shared.transposed('fuse', 'fc.weight', (size, inputs * size))
  if c.fuse_bias:
    yield shared.as_is('fuse_bias', 'fc.bias', (size,))
  # Queries, keys and values are made of twice the width in EAGLE-3.
  wide = dataclasses.replace(d, embed_dim=size * (2 if third else 1))
  for i in range(d.num_layers):
    at, layer = f'layers.{i}.', f'layer_{i}'
    if third:
      at = _prefix(form)
      yield shared.norm(
          (layer, 'embedding_norm'), at + 'input_layernorm', size)
      yield shared.norm((layer, 'attention_norm'), at + 'hidden_norm', size)
    elif i:
      yield shared.norm(
          (layer, 'attention_norm'), at + 'input_layernorm', size)
    yield shared.norm(
        (layer, 'mlp_norm'), at + 'post_attention_layernorm', size)
    for shape in (wide, d):
      for part in weight_table.attention(
          shape, (layer, 'attention'), at, 'hf', 0.0):
        if (part.path[-1] == 'out') == (shape is d):
          yield part
    yield from weight_table.mlp(d, (layer, 'mlp'), at + 'mlp.', True)
  if third:
    yield shared.norm(('final_norm',), 'norm', size)
  if c.own_head:
    yield shared.as_is('head', HEAD, (c.draft_vocab_size, size))


def borrowed(form: str, config: EagleConfig, ids: Any, target: Target
             ) -> dict[str, Any]:
  """Returns what is stored of the target: embedding or head."""
  if config.version == '1':
    return {EMBEDDING: target.matrix(
        'embedding', 'files of EAGLE-1 hold the embedding')}
  if config.own_head:
    return {}
  why = 'files of EAGLE-3 hold the head'
  return {HEAD: target.matrix('head', why)[np.asarray(ids)]}


def check_writable(
    form: str, config: EagleConfig, mask_token: int | None
) -> None:
  """Raises ValueError for what a format cannot hold."""
  c, d = config, config.decoder
  if c.version == '1':
    if form == 'speculators':
      raise ValueError("speculators has EAGLE-3 alone; 'eagle' has version 1")
    shared.whole_vocabulary(c.draft_vocab_size, d.vocab_size, 'EAGLE-1')
    return
  if d.num_layers != 1:
    raise ValueError(f'decoder.num_layers={d.num_layers}: files of EAGLE-3 '
                     'hold one layer')
  if form == 'eagle' and d.qk_norm:
    raise ValueError("eagle has no norms of heads (decoder.qk_norm); "
                     "'speculators' has")
  if c.fuse_bias:
    raise ValueError('fuse_bias: not in files of EAGLE-3')


def write_values(
    form: str, config: EagleConfig, target: Target, dtype: str,
    num_draft: int | None,
) -> dict[str, Any]:
  """Returns the content of `config.json`."""
  c, d = config, config.decoder
  bare = d
  if c.version == '1':  # the target's own embedding and head are used
    bare = dataclasses.replace(d, embed_scale=None, final_softcap=None)
  elif c.own_head:
    bare = dataclasses.replace(d, final_softcap=None)
  layers = shared.layer_values(d, dtype, target.max_length)
  shared.check_decoder(bare, layers, shared.family_of(d), form)
  if c.version == '1':
    return {'architectures': ['LlamaForCausalLMEagle'], **layers,
            'bias': c.fuse_bias, 'qkv_bias': d.qkv_bias}
  if d.qkv_bias:
    raise ValueError('decoder.qkv_bias: not in files of EAGLE-3')
  if form == 'eagle':
    return {
        'architectures': [_THIRD], **layers,
        'draft_vocab_size': c.draft_vocab_size, _TAPS: list(c.taps),
        'target_hidden_size': d.embed_dim,
        'eagle_config': {'use_aux_hidden_state': True,
                         _TAPS: [i - 1 for i in c.taps]}}
  return {
      **shared.speculators('eagle3', layers, target, num_draft or 3),
      'draft_vocab_size': c.draft_vocab_size, _TAPS: list(c.taps),
      'target_hidden_size': d.embed_dim, 'norm_before_residual': False,
      'norm_before_fc': False, 'fc_norm': False, 'norm_output': False,
      'embed_requires_grad': False}
