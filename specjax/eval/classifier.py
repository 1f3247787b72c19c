"""Features and judgements of a classifier that was trained here.

The network is an object of `specjax.models.classifier`, handed in: two pure
functions, and options that make it again. Distances of its features are
called 'FD-self', and its name holds a hash of its weights: two trainings give
two metrics.

    judge = load('out/classifier/classifier', Classifier.of)
    found = diversity.per_class_accuracy(judge.logits(samples), labels)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specjax.eval.features import check_images, in_batches
from specjax.io import output, safetensors
from specjax.io.errors import FormatError

_FORMAT = 'specjax-classifier'
_CONFIG, _ARRAYS = 'config.json', 'model.safetensors'


class Network(Protocol):
  """A classifier without its weights."""

  @property
  def num_features(self) -> int: ...

  @property
  def options(self) -> dict[str, Any]: ...

  def init(self, key: jax.Array) -> Any: ...

  def apply(
      self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (features f32[N,F], logits f32[N,C]) of uint8[N,H,W,3]."""
    ...


class TrainedClassifier:
  """A classifier with weights; a `features.FeatureExtractor`.

  Attributes:
    network, params: what it is made of.
    classes: names of the classes, or empty.
    facts: what was recorded of its training.
    name: 'classifier-' and the hash of options and weights.
    dim: F. fid_name: 'FD-self'.
  """

  fid_name = 'FD-self'

  def __init__(
      self, network: Network, params: Any, *, batch: int = 256,
      classes: tuple[str, ...] = (), facts: Mapping[str, Any] | None = None,
  ):
    """Compiles nothing yet; `batch` images make one call of the device.

    Raises:
      ValueError: batch < 1, or weights that are not finite.
    """
    if batch < 1:
      raise ValueError(f'batch={batch}: must be >= 1')
    self.network, self.params, self.batch = network, params, batch
    self.classes, self.facts = tuple(classes), dict(facts or {})
    self.dim = network.num_features
    self.name = f'classifier-{digest(network, params)[:12]}'
    self._apply = jax.jit(network.apply)

  def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray:
    """Returns features f32[N,F] of uint8[N,H,W,3]."""
    return self.outputs(images)[0]

  def logits(self, images: npt.NDArray[np.uint8]) -> npt.NDArray:
    """Returns f32[N,C]."""
    return self.outputs(images)[1]

  def outputs(
      self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray, npt.NDArray]:
    """Returns (features f32[N,F], logits f32[N,C]).

    Raises:
      ValueError: images that are not uint8[N,H,W,3], N >= 1.
    """
    return in_batches(lambda x: self._apply(self.params, x),
                      check_images(images), self.batch)


def digest(network: Network, params: Any) -> str:
  """Returns the sha256 of a network's options and weights, hexadecimal.

  Raises:
    ValueError: weights that are not finite.
  """
  found = hashlib.sha256(json.dumps(network.options, sort_keys=True).encode())
  for name, array in sorted(_flat(params).items()):
    if not np.isfinite(array).all():
      raise ValueError(f'{name}: holds values that are not finite')
    found.update(f'{name}{array.shape}'.encode())
    found.update(array.astype('<f4').tobytes())
  return found.hexdigest()


def save(folder: str | Path, classifier: TrainedClassifier) -> Path:
  """Writes a folder of `model.safetensors` and `config.json`.

  It appears whole, or stays what it was.

  Raises:
    OutputError: the folder holds something else, or cannot be written.
  """
  folder = Path(folder).expanduser()
  with output.folder(folder, replaces=_is_own) as new:
    safetensors.write(
        new / _ARRAYS, _flat(classifier.params), {'format': _FORMAT})
    output.write_json(new / _CONFIG, {
        'format': _FORMAT, 'name': classifier.name,
        'classes': list(classifier.classes),
        'options': classifier.network.options, 'facts': classifier.facts})
  return folder


def load(
    folder: str | Path, build: Callable[[Mapping[str, Any]], Network], *,
    batch: int = 256,
) -> TrainedClassifier:
  """Reads what `save` wrote.

  Args:
    folder: of `save`.
    build: options to network: `specjax.models.classifier.Classifier.of`.
    batch: images in one call of the device.

  Raises:
    FormatError: no such folder, damaged, or weights that are not those that
      were saved.
  """
  folder = Path(folder).expanduser()
  if not (folder / _CONFIG).is_file():
    raise FormatError(f'{folder}: no {_CONFIG}; is it a classifier?')
  values = safetensors.read_json(folder / _CONFIG)
  if values.get('format') != _FORMAT:
    raise FormatError(f'{folder / _CONFIG}: format='
                      f'{values.get("format")!r}, expected {_FORMAT!r}')
  try:
    network = build(values['options'])
    wanted = jax.eval_shape(network.init, jax.random.key(0))
    params = _filled(wanted, {
        k: v.read() for k, v in safetensors.read(folder / _ARRAYS).items()})
    found = TrainedClassifier(
        network, params, batch=batch, classes=tuple(values['classes']),
        facts=values['facts'])
  except FormatError:
    raise
  except (KeyError, TypeError, ValueError) as error:
    raise FormatError(f'{folder}: damaged: {error}') from error
  if found.name != values.get('name'):
    raise FormatError(
        f'{folder}: weights of {found.name}, {_CONFIG} tells of '
        f'{values.get("name")}: one of the files was replaced')
  return found


def _is_own(folder: Path) -> bool:
  try:
    return safetensors.read_json(folder / _CONFIG).get('format') == _FORMAT
  except FormatError:
    return False


def _flat(params: Any) -> dict[str, npt.NDArray[np.float32]]:
  found = jax.tree_util.tree_flatten_with_path(params)[0]
  return {_name(path): np.asarray(x, np.float32) for path, x in found}


def _filled(wanted: Any, arrays: Mapping[str, npt.NDArray]) -> Any:
  """Returns the tree `wanted` with the arrays of its leaves' names."""
  leaves, tree = jax.tree_util.tree_flatten_with_path(wanted)
  names = [_name(path) for path, _ in leaves]
  if set(names) != set(arrays):
    raise ValueError(f'tensors {sorted(set(names) ^ set(arrays))[:3]} are '
                     'missing or unknown')
  for name, (_, leaf) in zip(names, leaves, strict=True):
    if arrays[name].shape != leaf.shape:
      raise ValueError(f'tensor {name!r} has shape {arrays[name].shape}, '
                       f'expected {leaf.shape}')
  return jax.tree_util.tree_unflatten(
      tree, [jnp.asarray(arrays[name]) for name in names])


def _name(path: Any) -> str:
  return '.'.join(str(part.key) for part in path)
