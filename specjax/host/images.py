"""Folders of image models: `config.json` and `model.safetensors`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specjax.host.load import Model, default_dtype
from specjax.io import model_folder, pth
from specjax.models import image_lm, vq, vq_weights, weights
from specjax.models.image_lm import ImageLM
from specjax.models.transformer_config import TransformerConfig
from specjax.models.vq import VQ, ConvConfig, VQConfig

Array = jax.Array

_VQ, LM = 'specjax-vq', 'specjax-image-lm'


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """An image tokenizer ready to use.

  Attributes:
    config: its shape. params: float32. facts: what `config.json` says.
  """

  config: VQConfig
  params: Any
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def encode(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Returns int32[N,h,w] of uint8[N,H,W,3].

    Raises:
      ValueError: other images, or sides that `config.factor` does not divide.
    """
    check(images, self.config)
    return self._batched('tokens', images, batch_size)

  def decode(self, ids: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Returns uint8[N,H,W,3] of int32[N,h,w].

    Raises:
      ValueError: ids out of range.
    """
    ids = np.asarray(ids, np.int32)
    if ids.ndim != 3 or ids.min(initial=0) < 0 or (
        ids.max(initial=0) >= self.config.num_codes):
      raise ValueError(
          f'codes int{list(ids.shape)} in [{ids.min(initial=0)}, '
          f'{ids.max(initial=0)}]: must be [N,h,w] in '
          f'[0, {self.config.num_codes})')
    return self._batched('decode', ids, batch_size)

  def _batched(self, method: str, x: np.ndarray, size: int) -> np.ndarray:
    return in_batches(
        lambda part: _apply(self.config, method, self.params, part), size, x)


def check(images: np.ndarray, config: ConvConfig) -> None:
  """Raises ValueError for images that `config` cannot encode.

  They are uint8[N,H,W,3], of sides that `config.factor` divides.
  """
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
    raise ValueError(f'images are {images.dtype}{list(images.shape)}: must '
                     'be uint8[N,H,W,3]')
  factor = config.factor
  if images.shape[1] % factor or images.shape[2] % factor:
    raise ValueError(
        f'images of {images.shape[1]} x {images.shape[2]} pixels: this '
        f'tokenizer takes multiples of {factor}')


def in_batches(
    fn: Callable[..., Array], size: int, *arrays: np.ndarray) -> np.ndarray:
  """Returns `fn(*arrays)`, worked out on some rows at a time.

  Args:
    fn: gives an array of as many rows as it is given, row by row. It is
      called with one shape only: the last rows are padded with zeros.
    size: most rows of a call, >= 1. arrays: of equally many rows, >= 1.

  Raises:
    ValueError: another size, or no rows.
  """
  num = len(arrays[0])
  if size < 1 or not num:
    raise ValueError(f'{num} rows in batches of {size}: both must be >= 1')
  size = min(size, num)
  out = []
  for start in range(0, num, size):
    parts = [x[start:start + size] for x in arrays]
    rows = len(parts[0])
    found = fn(*(np.pad(x, [(0, size - rows)] + [(0, 0)] * (x.ndim - 1))
                 for x in parts))
    out.append(np.asarray(found)[:rows])
  return np.concatenate(out)


@jax.jit(static_argnums=(0, 1))
def _apply(config: VQConfig, method: str, params: Any, x: Array) -> Array:
  if method == 'tokens':
    x = vq.to_float(x)
  model: Any = VQ(config)
  out = model.apply({'params': params}, x, method=method)
  return vq.to_bytes(out) if method == 'decode' else out


def save_tokenizer(
    folder: str | Path, config: VQConfig, params: Any,
    facts: Mapping[str, Any], form: str = 'bfloat16',
) -> Path:
  """Writes a tokenizer; see `io.forms` for `form`."""
  return model_folder.save(folder, _VQ, params, {
      'model': dataclasses.asdict(config), **facts}, form)


def load_tokenizer(folder: str | Path) -> Tokenizer:
  """Reads what `save_tokenizer` wrote, or LlamaGen's VQ-16 or VQ-8 (.pt).

  Raises:
    FormatError: something else, or a tensor of another size; names it.
  """
  if Path(folder).is_file():
    tensors = pth.read(folder)
    # The coarser one has a level more.
    deep = any(n.startswith('encoder.conv_blocks.4.') for n in tensors)
    published = vq.VQ16 if deep else vq.VQ8
    return Tokenizer(
        published, vq_weights.from_llamagen(published, tensors),
        {'source': str(folder)})
  facts, arrays = model_folder.load(folder, _VQ)
  config = VQConfig.of(facts['model'])
  params = model_folder.fitted(folder, arrays, vq.abstract(config))
  return Tokenizer(config, params, facts)


def save_lm(
    folder: str | Path, config: TransformerConfig, params: Any,
    facts: Mapping[str, Any], form: str = 'bfloat16',
) -> Path:
  """Writes an image decoder; see `io.forms` for `form`."""
  return model_folder.save(folder, LM, params, {
      'model': dataclasses.asdict(config), **facts}, form)


def load_lm(
    folder: str | Path, *, dtype: str | None = None, chunk: int = 256
) -> tuple[Model, dict[str, Any]]:
  """Reads what `save_lm` wrote, or LlamaGen's (.pt): `(model, facts)`.

  Args:
    folder: of the decoder, or a published file. That does not tell its grid:
      16 cells wide (images of 256 pixels).
    dtype: 'float32' or 'bfloat16'; None decides by the backend.
    chunk: most tokens fed in one call.

  Raises:
    FormatError: something else, or a tensor of another size; names it.
  """
  if Path(folder).is_file():
    return _published_lm(folder, dtype or default_dtype(), chunk)
  facts, arrays = model_folder.load(folder, LM)
  config = TransformerConfig.of({
      **facts['model'], 'dtype': dtype or default_dtype()})
  params = model_folder.fitted(folder, arrays, weights.abstract(config))
  model = Model(name=str(folder), lm=ImageLM(config, chunk=chunk),
                params=params)
  return model, facts


def _published_lm(path, dtype, chunk) -> tuple[Model, dict[str, Any]]:
  tensors = pth.read(path)
  config = image_lm.from_llamagen(tensors, dtype=dtype)
  # Buffers of some files.
  tensors = {k: v for k, v in tensors.items() if k != 'freqs_cis'}
  params = weights.load(
      config, tensors.__getitem__, tensors, scheme='llamagen')
  width = config.grid_width or 0
  classes = [str(i) for i in range(config.num_conditions - 1)]
  return (Model(name=str(path), lm=ImageLM(config, chunk=chunk),
                params=params),
          {'grid': [width, width], 'data': {'classes': classes}})
