"""Folders of decoders of continuous tokens; MAR's published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import Any
import warnings

import jax
import numpy as np

from specjax.host.load import Model
from specjax.io import model_folder, pth
from specjax.io.errors import FormatError
from specjax.models import mar as mar_lib
from specjax.models import named
from specjax.models.ahead import Ahead
from specjax.models.causal_images import CausalImages
from specjax.models.diffusion import Diffusion
from specjax.models.diffusion_head import DenoisingMLP, GuidedHead, bare
from specjax.models.mar import MAR
from specjax.models.masked_images import MaskedImages
from specjax.models.transformer_config import TransformerConfig

Decoder = MaskedImages | CausalImages

FORMAT = 'specjax-mar'
KINDS = ('masked', 'causal')
# Of the published sizes by width: heads of attention.
_HEADS = {768: 12, 1024: 16, 1280: 16}


def save(
    folder: str | Path, lm: Decoder, params: Any, facts: Mapping[str, Any],
    form: str = 'bfloat16',
) -> Path:
  """Writes a decoder; see `io.forms` for `form`."""
  return model_folder.save(folder, FORMAT, params, {
      'model': described(lm), **facts}, form)


def load(
    source: str | Path, *, dtype: str | None = None, **process: Any
) -> tuple[Model, dict[str, Any]]:
  """Reads what `save` wrote, or a published MAR checkpoint.

  Args:
    source: a folder, or a file (.pth: its moving average).
    dtype: of the decoder's blocks; None keeps what it was trained in on
      accelerators and is float32 on CPUs. Heads are float32.
    **process: see `changed`.

  Returns:
    `(model, facts)`.

  Raises:
    FormatError: something else, or a tensor of another size; names it.
    ValueError: fields that do not fit.
  """
  if Path(source).expanduser().is_file():
    lm: Any
    lm, params = published(pth.read(source))
    facts: dict[str, Any] = {'source': str(source), 'data': {
        'classes': [str(i) for i in range(lm.num_classes)]}}
  else:
    facts, arrays = model_folder.load(source, FORMAT)
    lm = built(facts['model'])
    like = jax.eval_shape(lm.random, jax.random.key(0))
    params = model_folder.fitted(source, arrays, like)
  if dtype is None and jax.default_backend() == 'cpu':
    dtype = 'float32'
  if dtype is not None:
    lm = _in(lm, dtype)
  return Model(
      name=str(source), lm=changed(lm, **process), params=params), facts


def changed(lm: Decoder, *, ahead: int = 0, **process: Any) -> Decoder:
  """Returns a decoder that takes its denoising steps otherwise.

  Args:
    ahead: how many states are guessed, at what the head said last, and then
      checked in one call of it; 0: one step a call. The law stays.
    **process: fields of `Diffusion`: `num_levels`, `first`, `last_noise`.

  Raises:
    ValueError: fields that do not fit.
  """
  if ahead < 0:
    raise ValueError(f'ahead={ahead}: must be >= 0')
  new = dataclasses.replace(
      lm.process, ahead=Ahead(ahead) if ahead else None, **process)
  return dataclasses.replace(lm, process=new)


def guided(lm: Decoder) -> Decoder:
  """Returns a decoder that reads `condition['guidance']`."""
  head = GuidedHead(bare(lm.process.head))
  return dataclasses.replace(
      lm, process=dataclasses.replace(lm.process, head=head))


def tiny() -> Model:
  """Returns a tiny decoder of random weights: 16 tokens of 2 channels."""
  decoder = MAR(num_tokens=16, channels=2, num_classes=2, width=8,
                num_encoder=1, num_decoder=1, num_heads=2, buffer=2)
  lm: Any = MaskedImages(decoder, Diffusion(
      DenoisingMLP(2, 8, 8, 1), 2, num_levels=8, first=6))
  return Model(name='random', lm=lm, params=lm.random(jax.random.key(0)))


def draft_lm(target: Model, drafter: Model) -> Any:
  """Returns the functions of a decoder that is to draft for `target`.

  It takes the target's steps, under the target's guidance.

  Raises:
    ValueError: other tokens, classes or steps.
  """
  mine: Any = target.lm
  other: Any = drafter.lm
  if not isinstance(other, Decoder):
    raise ValueError(f"{target.name}'s tokens are real numbers, and "
                     f"{drafter.name} does not draft such")
  for name in ('num_tokens', 'num_classes'):
    if getattr(mine, name) != getattr(other, name):
      raise ValueError(f'{name}: {getattr(mine, name)} of {target.name}, '
                       f'{getattr(other, name)} of {drafter.name}')
  for name in ('channels', 'num_base', 'variance'):
    a, b = getattr(mine.process, name), getattr(other.process, name)
    if a != b:
      raise ValueError(f'{name} of the denoising steps: {a} of '
                       f'{target.name}, {b} of {drafter.name}')
  for name in ('num_levels', 'first'):
    a, b = getattr(mine.process, name), getattr(other.process, name)
    if a != b:
      warnings.warn(f'{name} of the denoising steps: {a} of {target.name} is '
                    f'taken, {drafter.name} was made for {b}', stacklevel=3)
  process = dataclasses.replace(
      mine.process, head=bare(other.process.head))
  other = dataclasses.replace(other, process=process)
  is_guided = mine.process.head is not bare(mine.process.head)
  return guided(other) if is_guided else other


def described(lm: Decoder) -> dict[str, Any]:
  """Returns the shape of a decoder as JSON values; `built` reads them."""
  inner = lm.mar if isinstance(lm, MaskedImages) else lm.config
  out = {
      'kind': KINDS[isinstance(lm, CausalImages)], 'decoder': _fields(inner),
      'head': _fields(bare(lm.process.head)),
      'diffusion': _fields(lm.process)}
  if isinstance(lm, CausalImages):
    out['tokens'] = {name: getattr(lm, name) for name in (
        'num_tokens', 'channels', 'num_classes')}
  return out


def built(values: Mapping[str, Any]) -> Decoder:
  """Returns the decoder that `described` told of.

  Raises:
    FormatError: an unknown kind.
  """
  if values.get('kind') not in KINDS:
    raise FormatError(f"decoder of kind {values.get('kind')!r}: known are "
                      f'{", ".join(KINDS)}')
  process = Diffusion(DenoisingMLP(**values['head']), **values['diffusion'])
  inner = dict(values['decoder'])
  if values['kind'] == 'masked':
    return MaskedImages(MAR(**inner), process)
  return CausalImages(
      TransformerConfig.of(inner), process=process, **values['tokens'])


def published(
    tensors: Mapping[str, np.ndarray]
) -> tuple[MaskedImages, dict[str, Any]]:
  """Returns the decoder and the parameters of MAR's checkpoint.

  Args:
    tensors: of the moving average, by published name.

  Raises:
    FormatError: not such a checkpoint. ValueError: a tensor is missing,
      unknown or of another shape; names it.
  """
  try:
    classes, width = tensors['class_emb.weight'].shape
    num, channels = (tensors['diffusion_pos_embed_learned'].shape[1],
                     tensors['z_proj.weight'].shape[1])
    behind = tensors['encoder_pos_embed_learned'].shape[1]
    inner = tensors['diffloss.net.input_proj.weight'].shape[0]
  except (KeyError, ValueError, IndexError) as error:
    raise FormatError(f'not a MAR checkpoint: {error}') from error
  shape = MAR(
      num_tokens=num, channels=channels, num_classes=classes, width=width,
      num_encoder=_count(tensors, 'encoder_blocks.'),
      num_decoder=_count(tensors, 'decoder_blocks.'),
      num_heads=_HEADS.get(width, max(width // 64, 1)), buffer=behind - num)
  head = DenoisingMLP(
      channels, width, inner, _count(tensors, 'diffloss.net.res_blocks.'))
  rest = {n: x for n, x in tensors.items() if not n.startswith('diffloss.')}
  return MaskedImages(shape, Diffusion(head, channels)), {
      'mar': named.load(rest, shape.shapes, tables=mar_lib.TABLES, of='MAR'),
      'head': named.load(tensors, head.shapes, prefix='diffloss.net.',
                         of="MAR's head")}


def to_published(
    lm: MaskedImages, params: Any
) -> dict[str, np.ndarray]:
  """Returns tensors by published name, the inverse of `published`."""
  return {
      **named.save(params['mar'], tables=mar_lib.TABLES),
      **named.save(params['head'], prefix='diffloss.net.')}


def _count(tensors: Mapping[str, Any], prefix: str) -> int:
  return len({n[len(prefix):].split('.')[0] for n in tensors
              if n.startswith(prefix)})


def _fields(x: Any) -> dict[str, Any]:
  return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)
          if f.metadata.get('saved', True)}


def _in(lm: Decoder, dtype: str) -> Decoder:
  """Returns a decoder whose blocks are of another dtype."""
  if isinstance(lm, MaskedImages):
    return dataclasses.replace(
        lm, mar=dataclasses.replace(lm.mar, dtype=dtype))
  return dataclasses.replace(
      lm, config=dataclasses.replace(lm.config, dtype=dtype))
