"""Medusa's heads as others store them: the authors' files, vLLM's.

The authors' files hold a whole head over all tokens for each position. vLLM
has names of its own, and `token_map int64[W]` for part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from specjax.io.errors import FormatError
from specjax.models import weight_table
from specjax.models.interchange import shared
from specjax.models.interchange.shared import File, Target
from specjax.models.medusa import HeadsConfig

FORMS = ('medusa', 'vllm_medusa')
_MAP = 'token_map'


def read_config(form: str, file: File, target: Target) -> HeadsConfig:
  """Returns the shape that a file describes.

  Raises:
    FormatError: see `interchange.load`.
  """
  values, t = file.values, target.config
  ours = form == 'vllm_medusa'
  num = shared.need(values, 'num_heads' if ours else 'medusa_num_heads')
  layers = shared.need(
      values, 'num_hidden_layers' if ours else 'medusa_num_layers')
  for key, have, known in (
      ('hidden_size', values.get('hidden_size'), t.embed_dim),
      ('vocab_size', values.get('vocab_size'), t.vocab_size)):
    if have is not None and have != known:
      raise FormatError(f'{key}={have}: the target has {known}')
  if ours and not values.get('medusa_fc_bias'):
    raise FormatError('medusa_fc_bias: residual blocks without a bias are '
                      'not supported')
  if (values.get('logit_scale') or 1.0) != 1.0:
    raise FormatError(f'logit_scale={values["logit_scale"]}: not supported')
  return HeadsConfig(
      embed_dim=t.embed_dim, vocab_size=t.vocab_size,
      draft_vocab_size=values.get('truncated_vocab_size') or t.vocab_size,
      num_heads=num, num_layers=layers, dtype=t.dtype,
      head='target' if ours and values.get('original_lm_head') else 'own')


def read_ids(config: HeadsConfig, file: File) -> Any:
  """Returns the draft vocabulary int64[W].

  Raises:
    FormatError: `token_map` is missing though W < V, or not ascending.
  """
  if config.draft_vocab_size == config.vocab_size:
    return np.arange(config.vocab_size)
  if _MAP not in file.shapes:
    raise FormatError(f"tensor '{_MAP}' is missing, but truncated_vocab_size="
                      f'{config.draft_vocab_size}')
  ids = np.rint(file.read(_MAP)).astype(np.int64)
  if ids.shape != (config.draft_vocab_size,) or (np.diff(ids) <= 0).any() or (
      ids[0] < 0 or ids[-1] >= config.vocab_size):
    raise FormatError(f"tensor '{_MAP}': {ids.size} tokens, must be "
                      f'{config.draft_vocab_size}, ascending and in '
                      f'[0, {config.vocab_size})')
  return ids


def parts(
    form: str, config: HeadsConfig, ids: Any, target: Target,
    file: File | None = None, mask_token: int | None = None,
) -> shared.Parts:
  """Yields how each trained weight is stored; 'linear' is in M tensors."""
  c = config
  names = [[_block(form, i, j) for i in range(c.num_heads)]
           for j in range(c.num_layers)]
  square = (c.embed_dim, c.embed_dim)
  yield _stacked('linear', [f'{n}.weight' for n in names[0]], square)
  yield _stacked('bias', [f'{n}.bias' for n in names[0]], square[:1])
  if c.num_layers > 1:
    more = sum(names[1:], [])
    lead = (c.num_layers - 1, c.num_heads)
    yield _stacked(
        'more_linear', [f'{n}.weight' for n in more], square, lead)
    yield _stacked('more_bias', [f'{n}.bias' for n in more], square[:1], lead)
  if c.head == 'own':
    yield _heads(form, c, ids, target)


def _block(form: str, head: int, layer: int) -> str:
  if form == 'medusa':
    return f'{head}.{layer}.linear'
  return f'blocks.{head}.layers.{layer}'


def _head(form: str, c: HeadsConfig, head: int) -> str:
  if form == 'medusa':
    return f'{head}.{c.num_layers}.weight'
  return f'lm_heads.{head}.weight'


def _stacked(
    ours: str, names: list[str], shape: tuple[int, ...],
    lead: tuple[int, ...] | None = None,
) -> weight_table.Part:
  """Returns the part of a stack of matrices (turned) or vectors."""
  lead = (len(names),) if lead is None else lead
  return weight_table.Part(
      (ours,), tuple((name, shape) for name in names),
      lambda *w: np.stack([x.T for x in w]).reshape(lead + shape),
      lambda w: tuple(x.T for x in w.reshape((-1, *shape))))


def _heads(form: str, c: HeadsConfig, ids: Any, target: Target):
  """Returns the part of the heads, ours without the target's rows."""
  shape = (c.draft_vocab_size, c.embed_dim)

  def rows():
    why = 'a head is trained as its difference from it'
    return target.matrix('head', why)[np.asarray(ids)]

  names = [_head(form, c, i) for i in range(c.num_heads)]
  return weight_table.Part(
      ('head',), tuple((name, shape) for name in names),
      lambda *w: np.stack(w) - rows(),
      lambda w: tuple(w.astype(np.float32) + rows()))


def borrowed(form: str, config: HeadsConfig, ids: Any, target: Target
             ) -> dict[str, Any]:
  """Returns what is stored of the target, and the draft vocabulary."""
  c = config
  out: dict[str, Any] = {}
  if c.draft_vocab_size != c.vocab_size:
    out[_MAP] = np.asarray(ids, np.int64)
  if c.head == 'target':
    rows = target.matrix('head', f'{form} stores it')[np.asarray(ids)]
    num = 1 if form == 'vllm_medusa' else c.num_heads
    out.update({_head(form, c, i): rows for i in range(num)})
  return out


def check_writable(
    form: str, config: HeadsConfig, mask_token: int | None
) -> None:
  """Raises ValueError for what a format cannot hold."""
  c = config
  if c.kind != 'medusa':
    raise ValueError(f'kind={c.kind!r}: no published format holds its heads')
  if form == 'medusa' and c.draft_vocab_size != c.vocab_size:
    raise ValueError(
        f'medusa has no reduced vocabulary: draft_vocab_size='
        f"{c.draft_vocab_size} of {c.vocab_size}; 'vllm_medusa' has one")
  if c.final_softcap is not None:
    raise ValueError(f'{form} cannot hold final_softcap={c.final_softcap}')


def write_values(
    form: str, config: HeadsConfig, target: Target, dtype: str
) -> dict[str, Any]:
  """Returns the content of `config.json`."""
  c = config
  if form == 'medusa':
    return {
        'medusa_num_heads': c.num_heads, 'medusa_num_layers': c.num_layers,
        'base_model_name_or_path': target.name, 'hidden_size': c.embed_dim,
        'vocab_size': c.vocab_size, 'torch_dtype': dtype}
  return {
      'architectures': ['MedusaModel'], 'model_type': 'medusa',
      'num_heads': c.num_heads, 'num_hidden_layers': c.num_layers,
      'hidden_size': c.embed_dim, 'vocab_size': c.vocab_size,
      'truncated_vocab_size': c.draft_vocab_size, 'medusa_fc_bias': True,
      'original_lm_head': c.head == 'target',
      'max_seq_len': target.max_length, 'torch_dtype': dtype}
