"""Features of images, and whose distances a metric's name has to tell.

A Fréchet distance is a number of the extractor as much as of the images: it
is called FID for one network only, and is compared within one extractor only.
`Lite0` (EfficientNet-Lite0, ImageNet) is small and free to use:

    extractor = Lite0.load(size=112)
    x = extractor(images)  # uint8[N,H,W,3] -> f32[N,1280]

Whoever has other weights passes an object of their own (`FeatureExtractor`).

Reference: Tan and Le 2019, arXiv:1905.11946; the Lite variants are those of
github.com/tensorflow/tpu (no squeeze-and-excite, ReLU6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specjax.io import hub, pth, wheels
from specjax.io.errors import FormatError

Array = jax.Array
Params = dict[str, dict[str, Array]]

LAYERS = ('pool', 'trunk')
SOURCE = 'efficientnet-lite0'
NUM_CLASSES = 1000

_INCEPTION_DIM = 2048
_EPSILON = 1e-3  # of the batch norms
_STEM, _HEAD = 32, 1280


class FeatureExtractor(Protocol):
  """What the metrics ask of a network.

  Attributes:
    name: of network, weights, layer and input size: equal names promise equal
      features. Statistics of different names are never compared.
    dim: D.
    fid_name: of the Fréchet distance: 'FID' for the pooled features (2048) of
      the Inception network of the published scores, else 'FD-...'.
  """

  @property
  def name(self) -> str: ...

  @property
  def dim(self) -> int: ...

  @property
  def fid_name(self) -> str: ...

  def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray:
    """Returns features f32[N,D] of images uint8[N,H,W,3]."""
    ...


class Names(NamedTuple):
  """How the metrics of an extractor are called in a report."""

  frechet: str
  kernel: str
  inception: str


def names(extractor: FeatureExtractor) -> Names:
  """Returns ('FID', 'KID', 'IS') or, for example, ('FD-X', 'KD-X', 'IS-X').

  Raises:
    ValueError: FID is claimed for features that are not Inception's, or the
      name is not of these forms.
  """
  name = extractor.fid_name
  if name == 'FID':
    if extractor.dim != _INCEPTION_DIM:
      raise ValueError(
          f"{extractor.name}: fid_name='FID' with {extractor.dim} features; "
          f'FID is of the {_INCEPTION_DIM} of Inception')
    return Names('FID', 'KID', 'IS')
  if not name.startswith('FD-') or name == 'FD-':
    raise ValueError(f"fid_name={name!r}: 'FID' or 'FD-...'")
  rest = name.removeprefix('FD')
  return Names(name, f'KD{rest}', f'IS{rest}')


def check_images(images: Any, least: int = 1) -> npt.NDArray[np.uint8]:
  """Returns the images, if they are uint8[N,H,W,3] with N >= `least`.

  Raises:
    ValueError: another dtype or shape, or too few.
  """
  images = np.asarray(images)
  if images.dtype != np.uint8:
    raise ValueError(f'images are {images.dtype}; they must be uint8, 0..255')
  if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
    raise ValueError(f'images have shape {images.shape}; expected [N,H,W,3]')
  if len(images) < least:
    raise ValueError(f'{len(images)} images; at least {least} are needed')
  return images


def in_batches(
    function: Callable[[npt.NDArray], Any], images: npt.NDArray[np.uint8],
    batch: int,
) -> Any:
  """Returns host arrays of `function` over all images, batch by batch.

  The last batch is filled up with zeros, so that one program serves all.
  `function` returns an array, or a tree of them, of the batch's length.
  """
  batch = min(batch, len(images))
  parts = []
  for start in range(0, len(images), batch):
    rows = images[start:start + batch]
    left = batch - len(rows)
    padded = np.pad(rows, [(0, left)] + [(0, 0)] * 3)
    parts.append(jax.device_get(function(padded)))
  return jax.tree.map(
      lambda *x: np.concatenate(x)[:len(images)], *parts)


class Lite0:
  """EfficientNet-Lite0: pooled features, or the trunk's, and logits."""

  def __init__(
      self, params: Params, *, size: int = 112, batch: int = 64,
      layer: str = 'pool', name: str = SOURCE,
  ):
    """Makes an extractor of weights that `convert` returned.

    Args:
      params: of the network.
      size: side in pixels that images are resized to; 224 is that of the
        training, 112 costs a quarter.
      batch: images in one call of the device.
      layer: 'pool', 1280 features after the head; 'trunk', the 320 before
        it, for when there are too few images for 1280.
      name: of the weights; the size and the layer are appended.

    Raises:
      ValueError: on other values.
    """
    if size < 32 or batch < 1:
      raise ValueError(f'size={size}, batch={batch}: >= 32, >= 1')
    if layer not in LAYERS:
      raise ValueError(f'layer={layer!r}: must be one of {LAYERS}')
    self.size, self.batch, self.layer = size, batch, layer
    self.name = f'{name}-{size}-{layer}'
    self.dim = 1280 if layer == 'pool' else 320
    self.fid_name = 'FD-EffLite0' + ('' if layer == 'pool' else '-trunk')
    self._params = params

  @classmethod
  def load(
      cls, path: str | Path | None = None, *, cache: str | Path | None = None,
      quiet: bool = False, offline: bool = False, **options: Any,
  ) -> Lite0:
    """Returns the extractor with the published weights.

    Args:
      path: of a `.pth` file; another than the published one gets the hash of
        its bytes into its name, unless a `name` is given. None fetches the
        published file once, its sha256 checked.
      cache: cache root of `specjax.io.hub`. quiet: no progress.
      offline: never use the network. **options: of `__init__`.

    Raises:
      HubError: the file cannot be had. FormatError: it is another network.
    """
    if path is None:
      path = hub.resolve(SOURCE, cache=cache, quiet=quiet, offline=offline)
    params = convert(pth.read(path))
    found = wheels.sha256_of(Path(path), quiet=True)
    if found != hub.REGISTRY[SOURCE].sha256:
      options.setdefault('name', f'{SOURCE}-{found[:12]}')
    return cls(params, **options)

  def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray:
    """Returns f32[N,dim]; see `features`."""
    return self.features(images)

  def features(self, images: npt.NDArray[np.uint8]) -> npt.NDArray:
    """Returns f32[N,dim] of uint8[N,H,W,3], any H and W (made square)."""
    return self.outputs(images)[self.layer]

  def logits(self, images: npt.NDArray[np.uint8]) -> npt.NDArray:
    """Returns f32[N,1000], the classes of ImageNet in their usual order."""
    return self.outputs(images)['logits']

  def outputs(self, images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray]:
    """Returns 'trunk' f32[N,320], 'pool' f32[N,1280], 'logits' f32[N,1000].

    Raises:
      ValueError: images that are not uint8[N,H,W,3], N >= 1.
    """
    return in_batches(
        lambda x: _forward(self._params, x, size=self.size),
        check_images(images), self.batch)


class _Layer(NamedTuple):
  """One convolution: its names in the file, and its shape."""

  conv: str
  norm: str
  kernel: int
  inputs: int
  outputs: int
  stride: int = 1
  depthwise: bool = False
  bounded: bool = True  # ReLU6


@functools.cache
def layers() -> tuple[tuple[_Layer, ...], ...]:
  """Returns the stem, the 16 blocks, and the head."""
  found: list[tuple[_Layer, ...]] = [
      (_Layer('_conv_stem', '_bn0', 3, 3, _STEM, 2),)]
  inputs = _STEM
  for repeats, kernel, stride, expand, outputs in (
      (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
      (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)):
    for repeat in range(repeats):
      place, wide = f'_blocks.{len(found) - 1}.', inputs * expand
      block = [] if expand == 1 else [
          _Layer(f'{place}_expand_conv', f'{place}_bn0', 1, inputs, wide)]
      found.append((*block, _Layer(
          f'{place}_depthwise_conv', f'{place}_bn1', kernel, wide, wide,
          1 if repeat else stride, depthwise=True), _Layer(
              f'{place}_project_conv', f'{place}_bn2', 1, wide, outputs,
              bounded=False)))
      inputs = outputs
  return (*found, (_Layer('_conv_head', '_bn1', 1, inputs, _HEAD),))


def convert(state: Mapping[str, npt.NDArray]) -> Params:
  """Returns the network's parameters, batch norms folded in, in float32.

  Args:
    state: a state dict of efficientnet-lite0-pytorch (`pth.read`).

  Returns:
    Layer to {'kernel': f32[k,k,in,out], 'bias': f32[out]}; `_fc` is
    f32[1280,1000].

  Raises:
    FormatError: a tensor is missing, unknown, or of another shape.
  """
  left = {k: v for k, v in state.items()
          if not k.endswith('.num_batches_tracked')}

  def take(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    if name not in left:
      raise FormatError(f'EfficientNet-Lite0: tensor {name!r} is missing')
    array = np.asarray(left.pop(name), np.float64)
    if array.shape != shape or not np.isfinite(array).all():
      raise FormatError(
          f'EfficientNet-Lite0: tensor {name!r} has shape {array.shape}, '
          f'expected {shape} and finite values')
    return array

  params: Params = {}
  for layer in (one for block in layers() for one in block):
    kernel = take(f'{layer.conv}.weight', (
        layer.outputs, 1 if layer.depthwise else layer.inputs,
        layer.kernel, layer.kernel))
    weight, bias, mean, variance = (
        take(f'{layer.norm}.{part}', (layer.outputs,))
        for part in ('weight', 'bias', 'running_mean', 'running_var'))
    if (variance < 0).any():
      raise FormatError(f'EfficientNet-Lite0: {layer.norm}: variance < 0')
    scale = weight / np.sqrt(variance + _EPSILON)
    params[layer.conv] = {
        'kernel': jnp.asarray(
            kernel.transpose(2, 3, 1, 0) * scale, jnp.float32),
        'bias': jnp.asarray(bias - mean * scale, jnp.float32)}
  params['_fc'] = {
      'kernel': jnp.asarray(
          take('_fc.weight', (NUM_CLASSES, _HEAD)).T, jnp.float32),
      'bias': jnp.asarray(take('_fc.bias', (NUM_CLASSES,)), jnp.float32)}
  if left:
    raise FormatError(f'EfficientNet-Lite0: unknown tensor {min(left)!r}')
  return params


@functools.partial(jax.jit, static_argnames='size')
def _forward(params: Params, images: Array, *, size: int) -> dict[str, Array]:
  """Returns the outputs of uint8[N,H,W,3]; all products in float32."""
  x = images.astype(jnp.float32)
  if x.shape[1:3] != (size, size):
    x = jax.image.resize(
        x, (len(x), size, size, 3), 'bilinear', antialias=True,
        precision=jax.lax.Precision.HIGHEST)
  x = (x - 127.0) / 128.0
  stem, *blocks, head = layers()
  x = _apply(params, stem, x)
  for block in blocks:
    y = _apply(params, block, x)
    x = x + y if x.shape == y.shape else y
  trunk = x.mean((1, 2))
  pool = _apply(params, head, x).mean((1, 2))
  fc = params['_fc']
  logits = jnp.dot(
      pool, fc['kernel'], precision=jax.lax.Precision.HIGHEST) + fc['bias']
  return {'trunk': trunk, 'pool': pool, 'logits': logits}


def _apply(params: Params, block: tuple[_Layer, ...], x: Array) -> Array:
  for layer in block:
    x = jax.lax.conv_general_dilated(
        x, params[layer.conv]['kernel'], (layer.stride, layer.stride), 'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=layer.inputs if layer.depthwise else 1,
        precision=jax.lax.Precision.HIGHEST) + params[layer.conv]['bias']
    x = jnp.clip(x, 0.0, 6.0) if layer.bounded else x
  return x
