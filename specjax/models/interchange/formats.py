"""Trained drafters in the formats of other projects, both ways.

One table a family (`block`, `eagle`, `heads`) says for each trained weight
which stored tensors it is made of and how. Files are no concern of this
module: it sees the values of `config.json` and tensors by name.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from specjax.io.errors import FormatError
from specjax.models import trained, weight_table
from specjax.models.block_drafter import BlockConfig
from specjax.models.block_model import BlockModel
from specjax.models.eagle import EagleConfig
from specjax.models.eagle_model import EagleModel
from specjax.models.interchange import block, eagle, heads, shared
from specjax.models.interchange.shared import EMBEDDING, HEAD, File, Target
from specjax.models.medusa import HeadsConfig, HeadsModel

# Name -> families that it holds.
FORMATS: dict[str, tuple[str, ...]] = {
    'zlab': ('block',), 'deepspec': ('block',),
    'speculators': ('block', 'eagle'), 'eagle': ('eagle',),
    'medusa': ('heads',), 'vllm_medusa': ('heads',)}
_MODULES: dict[str, Any] = {'block': block, 'eagle': eagle, 'heads': heads}
_MODELS: dict[Any, tuple[str, Any]] = {
    BlockConfig: ('block', BlockModel), EagleConfig: ('eagle', EagleModel),
    HeadsConfig: ('heads', HeadsModel)}
# Buffers, and what a trainer keeps of the target.
_IGNORED = re.compile(r'rotary_emb\.inv_freq$|^verifier_(lm_head|norm)\.')
_DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16,
           'float16': np.float16}


class Drafter(NamedTuple):
  """A trained drafter.

  Attributes:
    config: `BlockConfig`, `EagleConfig` or `HeadsConfig`.
    net: trained weights, as the models initialise them.
    ids: int[W], the draft vocabulary, ascending.
  """

  config: Any
  net: Any
  ids: Any

  @property
  def model(self) -> Any:
    """Its pure functions (`BlockModel`, `EagleModel`, `HeadsModel`)."""
    return _MODELS[type(self.config)][1](self.config)


def detect(file: File) -> str:
  """Returns the format of a checkpoint, one of FORMATS.

  Raises:
    FormatError: none of them.
  """
  values, names = file.values, file.shapes
  named = (values.get('architectures') or [None])[0]
  kind = values.get('speculators_model_type')
  if kind is not None:
    if kind not in ('dflash', 'dspark', 'eagle3'):
      raise FormatError(f'speculators_model_type={kind!r}: known are dflash, '
                        'dspark, eagle3')
    return 'speculators'
  if values.get('model_type') == 'medusa':
    return 'vllm_medusa'
  if 'medusa_num_heads' in values:
    return 'medusa'
  if 'dflash_config' in values:
    return 'zlab'
  if named == 'Qwen3DSparkModel':
    return 'deepspec'
  if 'fc.weight' in names and (
      any(name.startswith('midlayer.') for name in names)
      or not any('hidden_norm' in name for name in names)):
    return 'eagle'
  raise FormatError(
      f'architecture {named!r}: no drafter of a known format '
      f'({", ".join(FORMATS)})')


def load(file: File, target: Target) -> Drafter:
  """Reads a drafter for a target.

  Args:
    file: the checkpoint.
    target: the model that it is for. With its parameters, copies of its
      embedding and head in the file are compared with them, and shared where
      they agree. Files of Medusa need them.

  Returns:
    The drafter: matrices in the target's dtype, norms in float32.

  Raises:
    FormatError: an unknown architecture or option, a tensor that is missing,
      unknown or of a wrong shape, another width or vocabulary than the
      target's, layers that it does not have, an embedding of its own.
  """
  form = detect(file)
  family = _family_of(form, file)
  module = _MODULES[family]
  try:
    config = module.read_config(form, file, target)
  except FormatError:
    raise
  except (ValueError, TypeError) as error:
    raise FormatError(f'config.json: {error}') from error
  if family == 'heads':
    ids = heads.read_ids(config, file)
  else:
    ids = shared.draft_ids(
        file, config.decoder.vocab_size, config.draft_vocab_size)
  token = block.mask_row(form, file) if family == 'block' else None
  parts = list(module.parts(form, config, ids, target, file, token))
  _check_names(form, file, parts, config)
  config = _share(file, config, ids, target)
  return Drafter(config, _assemble(file, parts, config), ids)


def export(
    drafter: Drafter, form: str, target: Target, *,
    dtype: str | None = None, mask_token: int | None = None,
    num_draft: int | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns `config.json` and the tensors of a drafter; inverts `load`.

  Args:
    drafter: what is stored.
    form: one of FORMATS.
    target: the model that it is for. Its parameters are needed where the
      format stores its embedding or rows of its head.
    dtype: of the tensors: 'float32', 'bfloat16' or 'float16'; None is the
      drafter's.
    mask_token: an unused token, for a drafter with a trained mask vector.
    num_draft: tokens a round that engines will draft; None is the number of
      slots of a block drafter, and 3.

  Raises:
    ValueError: the format cannot hold this drafter, weights that do not fit
      its config or are not finite, or a target of another shape.
  """
  config, net, ids = drafter
  family, _ = _MODELS[type(config)]
  if family not in FORMATS.get(form, ()):
    fit = [name for name, known in FORMATS.items() if family in known]
    raise ValueError(f'format={form!r}: for this drafter known are '
                     f'{", ".join(fit)}')
  module = _MODULES[family]
  inner = getattr(config, 'decoder', config)
  dtype = dtype or inner.dtype
  if dtype not in _DTYPES:
    raise ValueError(f'dtype={dtype!r}: known are {", ".join(_DTYPES)}')
  ids = np.asarray(ids, np.int64)
  _check_target(config, ids, target)
  module.check_writable(form, config, mask_token)
  if family == 'block':
    values = block.write_values(form, config, target, dtype, mask_token)
  elif family == 'eagle':
    values = eagle.write_values(form, config, target, dtype, num_draft)
  else:
    values = heads.write_values(form, config, target, dtype)
  values['specjax'] = {'format': form, 'target': target.name,
                       'revision': target.revision}
  tensors = dict(module.borrowed(form, config, ids, target))
  if family != 'heads':
    tensors.update(shared.id_tensors(ids, inner.vocab_size))
  parts = module.parts(form, config, ids, target, None, mask_token)
  tensors.update(_split(list(parts), net, drafter.model))
  return values, {name: _cast(x, dtype) for name, x in tensors.items()}


def _family_of(form: str, file: File) -> str:
  if form == 'speculators':
    kind = file.values['speculators_model_type']
    return 'eagle' if kind == 'eagle3' else 'block'
  return FORMATS[form][0]


def _check_target(config: Any, ids: np.ndarray, target: Target) -> None:
  """Raises ValueError where a drafter does not fit its target."""
  inner = getattr(config, 'decoder', config)
  for what, have, need in (
      ('width', inner.embed_dim, target.config.embed_dim),
      ('vocabulary', inner.vocab_size, target.config.vocab_size)):
    if have != need:
      raise ValueError(f'the drafter is for a target of {what} {have}, '
                       f'{target.name} has {need}')
  if ids.shape != (config.draft_vocab_size,):
    raise ValueError(f'draft vocabulary of {ids.size} ids, but '
                     f'draft_vocab_size={config.draft_vocab_size}')
  shared.check_taps(
      getattr(config, 'taps', ()), target.config.num_layers, 'taps')


def _check_names(form: str, file: File, parts: list, config: Any) -> None:
  """Raises FormatError for tensors that are missing or have no place."""
  used = {name for part in parts for name, _ in part.stored}
  names = set(file.shapes)
  missing = sorted(used - names)
  if missing:
    raise FormatError(
        f'{form}: {len(missing)} tensors are missing: '
        f'{", ".join(missing[:20])}')
  known = {EMBEDDING, HEAD, 'd2t', 't2d', 'token_map'}
  if isinstance(config, HeadsConfig):
    known |= {'lm_heads.0.weight'}
  spare = sorted(n for n in names - used - known if not _IGNORED.search(n))
  if spare:
    raise FormatError(
        f'{form}: {len(spare)} tensors have no place in a drafter that is '
        f'supported: {", ".join(spare[:20])}')


def _share(file: File, config: Any, ids: np.ndarray, target: Target) -> Any:
  """Checks copies of the target's matrices; returns the config to use.

  Raises:
    FormatError: a shape is wrong, or a matrix is not the target's though
      there is no place for another.
  """
  inner = getattr(config, 'decoder', config)
  for name, rows in ((EMBEDDING, inner.vocab_size), (HEAD, len(ids))):
    shape = (rows, inner.embed_dim)
    if name in file.shapes and file.shapes[name] != shape:
      raise FormatError(f'tensor {name!r} has shape {file.shapes[name]}, but '
                        f'the configuration asks for {shape}')
  if target.params is None or isinstance(config, HeadsConfig):
    return config
  if EMBEDDING in file.shapes and not file.is_target(
      EMBEDDING, target.matrix('embedding', '')):
    raise FormatError(f'tensor {EMBEDDING!r} is not the embedding of '
                      f'{target.name}: one of its own is not supported')
  if HEAD not in file.shapes or getattr(config, 'own_head', False):
    return config
  if not file.is_target(HEAD, target.matrix('head', '')[ids]):
    raise FormatError(f'tensor {HEAD!r} is not the head of {target.name}: '
                      'one of its own is not supported here')
  return config


def _assemble(file: File, parts: list, config: Any) -> Any:
  """Reads, checks and joins all weights."""
  expected = traverse_util.flatten_dict(
      trained.abstract(_MODELS[type(config)][1](config)))
  net = {}
  for part in parts:
    like = expected[part.path]
    value = weight_table.assemble(part, file.read)
    assert value.shape == like.shape, part.path  # or the table is at fault
    net[part.path] = jnp.asarray(value, like.dtype)
  assert set(net) == set(expected), set(net) ^ set(expected)
  return traverse_util.unflatten_dict(net)


def _split(parts: list, net: Any, model: Any) -> dict[str, np.ndarray]:
  """Returns the stored tensors of a tree of weights."""
  flat = traverse_util.flatten_dict(net)
  expected = traverse_util.flatten_dict(trained.abstract(model))
  if set(flat) != set(expected):
    odd = sorted('.'.join(path) for path in set(flat) ^ set(expected))
    raise ValueError(f'weights do not fit the config: {", ".join(odd)}')
  out: dict[str, np.ndarray] = {}
  for part in parts:
    name = '.'.join(part.path)
    value = np.asarray(jax.device_get(flat[part.path]))
    if value.shape != expected[part.path].shape:
      raise ValueError(f'{name} has shape {value.shape}, the config asks for '
                       f'{expected[part.path].shape}')
    if not np.isfinite(value.astype(np.float32)).all():
      raise ValueError(f'{name}: holds values that are not finite')
    for (stored, shape), x in zip(part.stored, part.split(value),
                                  strict=True):
      out[stored] = x.reshape(shape)
  return out


def _cast(x: np.ndarray, dtype: str) -> np.ndarray:
  """Returns a contiguous array; whole numbers and bools keep their type."""
  if x.dtype.kind in 'iub':
    return np.ascontiguousarray(x)
  return np.ascontiguousarray(x, _DTYPES[dtype])
