"""Block drafters as others store them: z-lab, DeepSpec, speculators.

All three keep the layers under the same names. z-lab's files (DFlash) have
neither embedding nor head, and slots that predict their own position.
DeepSpec's (DFlash, DSpark) have copies of both, and slots that predict the
next token. The files of speculators may draft from part of the vocabulary,
and say which slots predict. The first two name the layers whose *output* is
read, the last the layers *entered* by it, as we do.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any
import warnings

import numpy as np

from specjax.io.errors import FormatError
from specjax.models import weight_table
from specjax.models.block_drafter import BlockConfig
from specjax.models.interchange import shared
from specjax.models.interchange.shared import EMBEDDING, HEAD, File, Target

FORMS = ('zlab', 'deepspec', 'speculators')
_DSPARK = 'Qwen3DSparkModel'
_MARKOV = 'markov_head.markov_w1.weight'


def read_config(form: str, file: File, target: Target) -> BlockConfig:
  """Returns the shape that a file describes.

  A mask token whose embedding the file changes becomes a trained vector.

  Raises:
    FormatError: see `interchange.load`.
  """
  values = file.values
  layers, where = values, values
  if form == 'zlab':
    where = {**values, **shared.need(values, 'dflash_config')}
    if (where.get('output_multiplier') or 1.0) != 1.0:
      raise FormatError('output_multiplier: not supported')
  elif form == 'speculators':
    layers = shared.need(values, 'transformer_layer_config')
  decoder = shared.decoder_of(layers, 'qwen3', target.config)
  if form == 'zlab':
    decoder = dataclasses.replace(
        decoder, embed_scale=where.get('input_embedding_scale'))
  return BlockConfig(
      decoder=decoder, taps=_read_taps(form, where, target),
      draft_vocab_size=(
          values.get('draft_vocab_size') or decoder.vocab_size
          if form == 'speculators' else decoder.vocab_size),
      mask_token=_read_mask(where, file, decoder, target),
      **_read_slots(form, where), **_read_heads(form, where))


def _read_taps(
    form: str, values: Mapping[str, Any], target: Target
) -> tuple[int, ...]:
  num = target.config.num_layers
  if form == 'speculators':
    key, shift = 'aux_hidden_state_layer_ids', 0
  else:
    key, shift = 'target_layer_ids', 1
    told = values.get('num_target_layers')
    if told is not None and told != num:
      raise FormatError(
          f'num_target_layers={told}: the target has {num} layers')
  taps = tuple(i + shift for i in shared.need(values, key))
  shared.check_taps(taps, num, key)
  return taps


def _read_slots(form: str, values: Mapping[str, Any]) -> dict[str, Any]:
  size = shared.need(values, 'block_size')
  anchor = form == 'deepspec' or values.get(
      'sample_from_anchor', values.get('speculators_model_type') == 'dspark')
  if size < 2 - bool(anchor):
    raise FormatError(f'block_size={size}: nothing is predicted')
  if anchor:
    return {'layout': 'anchor', 'num_slots': size}
  return {'layout': 'mask', 'num_slots': size - 1}


def _read_heads(form: str, values: Mapping[str, Any]) -> dict[str, Any]:
  kind = values.get('speculators_model_type', 'dspark')
  if form == 'zlab' or kind == 'dflash':
    return {'markov': 'none', 'confidence': False}
  rank = shared.need(values, 'markov_rank')
  name = values.get('markov_head_type') or 'vanilla'
  if rank and name not in ('vanilla', 'gated'):
    raise FormatError(
        f'markov_head_type={name!r}: known are vanilla, gated')
  heads = {'confidence': bool(values.get('enable_confidence_head'))}
  if not rank:
    return {**heads, 'markov': 'none'}
  return {**heads, 'markov': name, 'markov_rank': rank}


def _read_mask(values, file: File, decoder, target: Target) -> int | None:
  """Returns the mask token, None if its vector is not the target's."""
  token = shared.need(values, 'mask_token_id')
  if not 0 <= token < decoder.vocab_size:
    raise FormatError(f'mask_token_id={token}: must be in '
                      f'[0, {decoder.vocab_size})')
  if EMBEDDING not in file.shapes:
    return token
  if target.params is None:
    return None  # right whatever the target has there
  own = target.matrix('embedding', '')
  row = file.read(EMBEDDING)[token]
  same = np.linalg.norm(row - own[token]) <= 1e-2 * np.linalg.norm(own[token])
  return token if same else None


def parts(
    form: str, config: BlockConfig, ids: Any, target: Target,
    file: File | None = None, mask_token: int | None = None,
) -> shared.Parts:
  """Yields how each trained weight is stored.

  Args:
    ids: int[W], the draft vocabulary.
    file: what is read, None if it is written.
    mask_token: row of the embedding that a trained mask vector takes.
  """
  c, d = config, config.decoder
  size = d.embed_dim
  yield shared.transposed('fuse', 'fc.weight', (size, len(c.taps) * size))
  yield shared.norm(('context_norm',), 'hidden_norm', size)
  yield shared.norm(('final_norm',), 'norm', size)
  for i in range(d.num_layers):
    at, layer = f'layers.{i}.', f'layer_{i}'
    yield shared.norm((layer, 'attention_norm'), at + 'input_layernorm', size)
    yield shared.norm(
        (layer, 'mlp_norm'), at + 'post_attention_layernorm', size)
    yield from weight_table.attention(d, (layer, 'attention'), at, 'hf', 0.0)
    yield from weight_table.mlp(d, (layer, 'mlp'), at + 'mlp.', True)
  if c.mask_token is None:
    yield _mask(c, target, mask_token)
  if c.markov != 'none':
    yield from _markov(c, ids, target)
  if c.confidence:
    yield from _confidence(c, file)


def _mask(c: BlockConfig, target: Target, token: int | None):
  scale = c.decoder.embed_scale or 1.0
  shape = (c.decoder.vocab_size, c.decoder.embed_dim)

  def split(vector):
    table = target.matrix(
        'embedding', 'the mask vector is stored as a row of the embedding')
    table = table.copy()
    table[token] = vector / scale
    return (table,)

  return weight_table.Part(
      ('mask',), ((EMBEDDING, shape),), lambda w: w[token] * scale, split)


def _markov(c: BlockConfig, ids: Any, target: Target) -> shared.Parts:
  """Yields the Markov head; its table is stored for all tokens."""
  size, rank, width = c.decoder.embed_dim, c.markov_rank, c.draft_vocab_size
  vocab = c.decoder.vocab_size
  ids = np.asarray(ids, np.int64)
  rest = np.setdiff1d(np.arange(vocab), ids)

  def join(table):
    others = table[rest]
    if not rest.size:
      others = np.zeros((1, rank), table.dtype)
    elif not np.ptp(others, axis=0).any():
      others = others[:1]
    else:
      warnings.warn(
          f'{_MARKOV}: the rows of the {rest.size} tokens outside the draft '
          'vocabulary become their mean; drafts after such a token change, '
          'the decoded text does not', stacklevel=2)
    return np.concatenate([table[ids], others.mean(axis=0, keepdims=True)])

  def split(table):
    if c.markov_input == 'embedding':
      rows = target.matrix(
          'embedding', 'the Markov head is stored as a table of all tokens')
      scale = c.decoder.embed_scale or 1.0
      return ((rows * np.float32(scale)) @ table.astype(np.float32),)
    inverse = np.full((vocab,), width)
    inverse[ids] = np.arange(width)
    return (table[inverse],)

  yield weight_table.Part(
      ('markov_in',), ((_MARKOV, (vocab, rank)),), join, split)
  yield shared.transposed(
      'markov_out', 'markov_head.markov_w2.weight', (width, rank))
  if c.markov == 'gated':
    at = 'markov_head.gate_proj.'
    yield shared.transposed('markov_gate', at + 'weight', (rank, size + rank))
    yield shared.as_is('markov_gate_bias', at + 'bias', (rank,))


def _confidence(c: BlockConfig, file: File | None) -> shared.Parts:
  """Yields the confidence head; ours reads what the Markov head reads."""
  size = c.decoder.embed_dim
  wide = size + (c.markov_rank if c.markov != 'none' else 0)
  stored = wide
  if file is not None and not file.values.get(
      'confidence_head_with_markov', True):
    stored = size
  at = 'confidence_head.proj.'
  yield weight_table.Part(
      ('confidence_out',), ((at + 'weight', (1, stored)),),
      lambda w: np.pad(w[0], (0, wide - stored)), lambda w: (w[None],))
  yield weight_table.Part(
      ('confidence_bias',), ((at + 'bias', (1,)),),
      lambda w: w.reshape(()), lambda w: (w.reshape(1),))


def mask_row(form: str, file: File) -> int:
  """Returns the mask token that a file names."""
  values = file.values
  if form == 'zlab':
    values = {**values, **values['dflash_config']}
  return values['mask_token_id']


def borrowed(form: str, config: BlockConfig, ids: Any, target: Target
             ) -> dict[str, Any]:
  """Returns what is stored of the target: embedding and head."""
  out: dict[str, Any] = {}
  why = f'{form} stores its head'
  reduced = config.draft_vocab_size != config.decoder.vocab_size
  if form == 'deepspec' or (form == 'speculators' and reduced):
    out[HEAD] = target.matrix('head', why)[np.asarray(ids)]
  if form == 'deepspec':
    out[EMBEDDING] = target.matrix('embedding', why)
  return out


def check_writable(
    form: str, config: BlockConfig, mask_token: int | None
) -> None:
  """Raises ValueError for what a format cannot hold."""
  c = config
  if form != 'speculators':
    shared.whole_vocabulary(c.draft_vocab_size, c.decoder.vocab_size, form)
  layout = {'zlab': 'mask', 'deepspec': 'anchor'}.get(form, c.layout)
  if c.layout != layout:
    raise ValueError(
        f"{form} has the layout {layout!r} alone, not {c.layout!r}; "
        "'speculators' has both")
  if form == 'zlab' and (c.markov != 'none' or c.confidence):
    raise ValueError("zlab has neither a Markov nor a confidence head; "
                     "'deepspec' and 'speculators' have both")
  if c.mask_token is not None:
    return
  if form == 'zlab':
    raise ValueError('zlab has no embedding, hence no trained mask vector: '
                     'mask_token must be a token of the target')
  if mask_token is None or not 0 <= mask_token < c.decoder.vocab_size:
    raise ValueError(
        f'mask_token={mask_token}: give an unused token; its row of the '
        'stored embedding becomes the trained mask vector')


def write_values(
    form: str, config: BlockConfig, target: Target, dtype: str,
    mask_token: int | None,
) -> dict[str, Any]:
  """Returns the content of `config.json`."""
  c, d = config, config.decoder
  if c.temperatures:
    warnings.warn(f'{form} has no place for the temperatures of a confidence '
                  'head: they are left out', stacklevel=2)
  layers = shared.layer_values(d, dtype, target.max_length)
  layers['layer_types'] = ['full_attention'] * d.num_layers
  said = dict(layers)
  if form == 'zlab' and d.final_softcap is not None:
    layers['final_logit_softcapping'] = d.final_softcap
    said['final_logit_softcapping'] = d.final_softcap
  bare = d
  if form == 'zlab' and d.embed_scale is not None:
    layers['input_embedding_scale'] = d.embed_scale
    bare = dataclasses.replace(d, embed_scale=None)
  shared.check_decoder(bare, said, 'qwen3', form)
  token = c.mask_token if c.mask_token is not None else mask_token
  leaving = [i - 1 for i in c.taps]
  if form == 'zlab':
    return {
        'architectures': ['DFlashDraftModel'], **layers,
        'block_size': c.width, 'num_target_layers': target.config.num_layers,
        'dflash_config': {
            'mask_token_id': token, 'target_layer_ids': leaving}}
  heads = {
      'markov_rank': c.markov_rank if c.markov != 'none' else 0,
      'markov_head_type': c.markov if c.markov != 'none' else 'vanilla',
      'enable_confidence_head': c.confidence,
      'confidence_head_with_markov': c.confidence and c.markov != 'none'}
  if form == 'deepspec':
    return {
        'architectures': [_DSPARK], **layers, 'block_size': c.width,
        'num_target_layers': target.config.num_layers, 'num_anchors': 512,
        'mask_token_id': token, 'target_layer_ids': leaving, **heads}
  plain = c.markov == 'none' and not c.confidence
  return {
      **shared.speculators(
          'dflash' if plain else 'dspark', layers, target, c.num_slots),
      'draft_vocab_size': c.draft_vocab_size, 'block_size': c.width,
      'aux_hidden_state_layer_ids': list(c.taps), 'mask_token_id': token,
      'sample_from_anchor': c.layout == 'anchor',
      **({} if plain else heads)}
