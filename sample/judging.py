"""How good samples of images are: distances, precision, classes.

What both sweeps (`sample.lantern_sweep`, `sample.latents_sweep`) say of the
images that a point decodes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import config_dict
import numpy as np

from sample import sweeps
from specjax.eval import classifier, distances, diversity, features, neighbours
from specjax.eval.features import LAYERS
from specjax.eval.statistics import Statistics
from specjax.models.classifier import Classifier
from train import image_data

# Samples of either side whose neighbours are looked at, and of a subset of
# the kernel distance: numbers are comparable at equal sizes only.
_NEAR, _SUBSET, _SUBSETS = 2000, 1000, 20


# Columns of tables; the first is called what the distance is.
HEADS = ('distance', 'precision, recall', 'of their class')


class Judge:
  """Samples beside the test images."""

  def __init__(
      self, extract: features.FeatureExtractor, real: np.ndarray,
      classes: classifier.TrainedClassifier | None = None,
  ):
    """Takes the features of the real images once; `classes` tells classes."""
    self.extract, self.classes = extract, classes
    self.name = features.names(extract).frechet
    self.real = extract(real)
    self.reference = Statistics.of(self.real, extractor=extract.name)

  def score(
      self, pixels: np.ndarray, labels: np.ndarray | None = None
  ) -> dict[str, Any]:
    """Returns scores of uint8[N,H,W,3], and of the classes asked for.

    'distance' is Fréchet's, 'half_width' two standard errors of it, 'kernel'
    the unbiased squared MMD with its standard error, 'precision' and 'recall'
    are of balls around 3 neighbours. With labels and a classifier
    'class_accuracy', also by class. What takes more samples is left out.
    """
    found = self.extract(pixels)
    distance = distances.frechet_estimate(self.reference, found)
    out: dict[str, Any] = {
        'distance': distance.value,
        'half_width': 2 * distance.standard_error}
    least = min(len(found), len(self.real))
    if least >= _SUBSET:
      kernel = distances.kernel_distance(
          self.real, found, subsets=_SUBSETS, size=_SUBSET)
      out['kernel'] = [kernel.mean, kernel.standard_error]
    if least > 3:
      near = min(least, _NEAR)
      out['precision'], out['recall'] = neighbours.precision_recall(
          _some(self.real, near), _some(found, near))
    if self.classes is not None and labels is not None:
      right = diversity.per_class_accuracy(
          self.classes.logits(pixels), labels)
      out['class_accuracy'] = right.mean
      out['class_accuracies'] = right.by_class.tolist()
    return out

  def context(self, made_again: np.ndarray) -> dict[str, Any]:
    """Returns what the scores of samples are to be compared with.

    Args:
      made_again: the real images, encoded and decoded.
    """
    return {'name': self.name, 'real_images': len(self.real),
            'tokenizer': distances.frechet_estimate(
                self.reference, self.extract(made_again)).value,
            'floor': distances.floor(self.real, len(self.real) // 2)}


def cells(row: Mapping[str, Any]) -> list[str]:
  """Returns what a table says of a row's scores, one for each of `HEADS`."""
  out = [''] * len(HEADS)
  if 'distance' in row:
    out[0] = f'{row["distance"]:.3f} ± {row["half_width"]:.3f}'
  if 'precision' in row:
    out[1] = f'{row["precision"]:.2f}, {row["recall"]:.2f}'
  if 'class_accuracy' in row:
    out[2] = f'{row["class_accuracy"]:.1%}'
  return out


def _some(found: np.ndarray, num: int) -> np.ndarray:
  """Returns `num` rows, evenly: labels go in turn or in blocks."""
  return found[np.linspace(0, len(found) - 1, num).astype(int)]


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `judge_of`."""
  parser.add_argument('--data', default='', help='the test images')
  parser.add_argument('--features', default='lite0',
                      help="'lite0', a classifier's folder, or 'none'")
  parser.add_argument('--layer', default='pool', choices=LAYERS)
  parser.add_argument('--classifier', default='',
                      help='a folder of train.classifier: how often samples '
                      'are of the class asked for')


def judge_of(
    args: argparse.Namespace, record: sweeps.Record,
    again: Callable[[np.ndarray], np.ndarray],
) -> Judge | None:
  """Returns the judge; None without `--features`, or where none is needed.

  What scores are compared with is added to the record, if it is not there.

  Args:
    args: options. record: of the sweep.
    again: encodes and decodes images.

  Raises:
    ValueError: no images are named.
  """
  if 'quality' not in args.parts or args.features == 'none':
    return None
  if not args.data:
    raise ValueError("--data: give the test images, or --features none")
  section = config_dict.ConfigDict(dict(
      path=args.data, test=None, held_out=0.1))
  real = image_data.read(section, args.seed).test.images
  extract: Any = (
      features.Lite0.load(quiet=True, layer=args.layer)
      if args.features == 'lite0'
      else classifier.load(args.features, Classifier.of))
  classes = args.classifier and classifier.load(
      args.classifier, Classifier.of)
  with args.turns.work():
    judge = Judge(extract, real, classes or None)
    if 'reference' not in record.data:
      record.data['reference'] = judge.context(again(real))
  return judge
