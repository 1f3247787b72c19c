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
import numpy as np
import numpy.typing as npt

from specjax.eval.features import check_images, in_batches
from specjax.io import model_folder
from specjax.io.errors import FormatError

_FORMAT = 'specjax-classifier'


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
  for name, array in sorted(model_folder.flat(params).items()):
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
  return model_folder.save(folder, _FORMAT, classifier.params, {
      'name': classifier.name, 'classes': list(classifier.classes),
      'options': classifier.network.options, 'facts': classifier.facts})


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
  values, arrays = model_folder.load(folder, _FORMAT)
  try:
    network = build(values['options'])
    wanted = jax.eval_shape(network.init, jax.random.key(0))
    found = TrainedClassifier(
        network, model_folder.fitted(folder, arrays, wanted), batch=batch,
        classes=tuple(values['classes']), facts=values['facts'])
  except FormatError:
    raise
  except (KeyError, TypeError, ValueError) as error:
    raise FormatError(f'{folder}: damaged: {error}') from error
  if found.name != values.get('name'):
    raise FormatError(
        f'{folder}: weights of {found.name}, config.json tells of '
        f'{values.get("name")}: one of the files was replaced')
  return found
