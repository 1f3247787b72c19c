"""Trains a classifier of images: `python -m train.classifier --config ...`.

Writes the classifier (moving average of the weights), with its accuracy on
images it was not trained on, to `--out`; `specjax.eval.classifier.load` reads
it. A run that is interrupted, started again with the same config, goes on
exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from specjax.data.image_batches import Batches
from specjax.eval import classifier, diversity
from specjax.eval.classifier import TrainedClassifier
from specjax.fit.classifier import ClassifierObjective
from specjax.host import cli
from specjax.models.classifier import Classifier
from train import fit_run, image_data, loop

_FLAGS = cli.define_flags('out/classifier')
# Images in one call of the device, in tests.
_TEST_BATCH = 500


def main() -> int:
  """Runs the program; returns the exit code."""
  config, out, stop, mesh, quiet = loop.begin(_FLAGS)
  data = image_data.read(config.data, config.seed, labels=True)
  cli.note(f'{len(data.train)} images to learn from, {len(data.test)} to be '
           f'tested on, {data.train.num_classes} classes', quiet)
  run = Run(config, data, mesh)
  state, metrics, code = loop.complete(
      run, out, data.digest, mesh, stop, quiet)
  if code or jax.process_index():
    return code
  facts = run.facts(metrics, data.facts)
  trained = run.judge(state.average, facts)
  folder = classifier.save(out / 'classifier', trained)
  cli.note(f'accuracy {facts["metrics"]["accuracy"]:.2%}; wrote {folder} '
           f'({trained.name})', quiet)
  return 0


class Run(fit_run.Run):
  """A classifier in training."""

  def __init__(
      self, config: Any, data: image_data.Data,
      mesh: jax.sharding.Mesh | None,
  ):
    """Prepares a run; nothing is compiled yet."""
    self.data = data
    self.network = Classifier.of({
        'num_classes': data.train.num_classes, **config.model.to_dict()})
    super().__init__(config, ClassifierObjective(
        self.network, config.label_smoothing, config.flip, config.padding),
                     mesh)
    # Mirrored on the device, by the objective.
    self.batches = Batches(
        data.train, config.batch_size, config.seed, flip=False)

  def plan(self) -> int:
    """Returns the steps of `config.epochs` passes over the images."""
    return max(1, int(
        self.config.epochs * len(self.data.train) / self.config.batch_size))

  def step(self, state: Any, step: int) -> tuple[Any, Any, int]:
    """Returns `(state, report, images)` after step number `step`."""
    state, report = self.take(state, self.batches.batch(step), step)
    return state, report, self.config.batch_size

  def judge(
      self, params: Any, facts: Mapping[str, Any] | None = None
  ) -> TrainedClassifier:
    """Returns the classifier that some weights make."""
    return TrainedClassifier(
        self.network, params, batch=_TEST_BATCH,
        classes=self.data.train.classes, facts=facts)

  def evaluate(self, state: Any, step: int, minutes: float) -> dict[str, Any]:
    """Returns the accuracy on test images, in all and by class."""
    test = self.data.test
    assert test.labels is not None  # by `image_data.read`
    found = diversity.per_class_accuracy(
        self.judge(state.average).logits(test.images), test.labels)
    return {'step': step, 'minutes': minutes, 'accuracy': found.mean,
            'by_class': [None if np.isnan(x) else float(x)
                         for x in found.by_class],
            'images': len(test)}

  def learnt(self, row: Mapping[str, Any]) -> str:
    """Returns how often it is right on what it learns from."""
    return f'accuracy {row["accuracy"]:.1%}'

  def tested(self, row: Mapping[str, Any]) -> str:
    """Returns how often it is right."""
    return f'accuracy {row["accuracy"]:.2%} of {row["images"]} images'


if __name__ == '__main__':
  cli.run(main)
