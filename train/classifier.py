"""Trains a classifier of images: `python -m train.classifier --config ...`.

Writes the classifier, with its accuracy on images it was not trained on, to
`--out`; `specjax.eval.classifier.load` reads it. A run takes minutes and is
not resumed: interrupted, it leaves its metrics and no classifier.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from pathlib import Path
import time
from typing import Any, NamedTuple
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from specjax.distill import optimizer as optimizer_lib
from specjax.eval import classifier as classifier_lib
from specjax.eval import diversity
from specjax.eval.features import check_images, in_batches
from specjax.host import cli
from specjax.io import output
from specjax.models.classifier import Classifier
from train import log

Array = jax.Array

_FLAGS = cli.define_flags('out/classifier')
_TEST_BATCH = 500


class Labelled(NamedTuple):
  """Images uint8[N,H,W,3] and labels int32[N]."""

  images: npt.NDArray[np.uint8]
  labels: npt.NDArray[np.int32]


class Data(NamedTuple):
  """What is learnt from, what is tested on, and the classes' names."""

  train: Labelled
  test: Labelled
  classes: tuple[str, ...]


def main() -> int:
  """Runs the program; returns the exit code."""
  config, quiet = _FLAGS.config.value, _FLAGS.quiet.value
  check(config)
  out = output.prepare(_FLAGS.out.value)
  cli.start(_FLAGS.distributed.value)
  data = read(config.data, config.seed)
  cli.note(f'{len(data.train.images)} images to learn from, '
           f'{len(data.test.images)} to test on, {len(data.classes)} classes',
           quiet)
  network = Classifier.of({
      'num_classes': len(data.classes), **config.model.to_dict()})
  metrics, status = log.Metrics(out), log.Status(quiet)
  try:
    params = fit(network, data, config, metrics, status)
  finally:
    metrics.close()
  last = metrics.of('eval')[-1]
  trained = classifier_lib.TrainedClassifier(
      network, params, classes=data.classes, facts={
          'accuracy': last['accuracy'], 'by_class': last['by_class'],
          'num_train': len(data.train.images),
          'num_test': len(data.test.images), 'config': config.to_dict()})
  classifier_lib.save(out / 'classifier', trained)
  cli.note(f'accuracy {last["accuracy"]:.2%}; wrote {out / "classifier"} '
           f'({trained.name})', quiet)
  return 0


def read(options: Any, seed: int) -> Data:
  """Reads the images that `config.data` names.

  Raises:
    ValueError: no file, a file of another kind, or labels without images.
  """
  if not options.path:
    raise ValueError('config.data.path: give an .npz file of images')
  if not 0 < options.held_out < 1:
    raise ValueError(f'config.data.held_out={options.held_out}: must be in '
                     '(0, 1)')
  train, test, classes = _parts(options.path, seed)
  if options.test:
    with _open(options.test) as file:
      test = _stored(options.test, file)
  if test is None:
    order = np.random.default_rng(seed).permutation(len(train.images))
    cut = max(1, round(options.held_out * len(order)))
    test = _rows(train, order[:cut])
    train = _rows(train, order[cut:])
  return data_of(train, test, classes)


def data_of(
    train: Labelled, test: Labelled, classes: tuple[str, ...] = ()) -> Data:
  """Returns checked data; classes without names are numbered.

  Raises:
    ValueError: images or labels of other forms, sizes that differ, or labels
      that are no class.
  """
  checked = [labelled(*part) for part in (train, test)]
  if checked[0].images.shape[1:] != checked[1].images.shape[1:]:
    raise ValueError('images to train and to test on differ in size')
  top = max(int(x.labels.max()) for x in checked) + 1
  classes = classes or tuple(map(str, range(max(top, 2))))
  if min(int(x.labels.min()) for x in checked) < 0 or top > len(classes):
    raise ValueError(f'labels are not in [0, {len(classes)})')
  return Data(checked[0], checked[1], classes)


def labelled(images: Any, labels: Any) -> Labelled:
  """Returns checked images and labels; raises ValueError for other forms."""
  images, labels = check_images(images), np.asarray(labels)
  if labels.shape != (len(images),) or labels.dtype.kind not in 'iu':
    raise ValueError(f'labels: {labels.dtype}{list(labels.shape)}; expected '
                     f'int[{len(images)}]')
  return Labelled(images, labels.astype(np.int32))


def synthetic(num: int, seed: int) -> Labelled:
  """Returns 16x16 images of 4 classes: two hues, striped across or along."""
  rng = np.random.default_rng(seed)
  labels = np.arange(num, dtype=np.int32) % 4
  wave = np.sin(np.arange(16) * np.pi / 2 + rng.uniform(0, 6, (num, 1)))
  stripes = np.where((labels % 2 == 0)[:, None, None],
                     wave[:, None, :], wave[:, :, None])
  hue = np.array([[60.0, 20.0, 0.0], [0.0, 20.0, 60.0]])[labels // 2]
  images = 100 + (1 + stripes[..., None]) * hue[:, None, None]
  images += rng.normal(0, 12, images.shape)
  return Labelled(np.clip(images, 0, 255).astype(np.uint8), labels)


def augment(key: Array, images: Array, *, flip: bool, padding: int) -> Array:
  """Returns uint8[N,H,W,3]: each image mirrored at random, and a random crop.

  The crop is of the image with `padding` black pixels on each side.
  """
  mirror, place = jax.random.split(key)
  n, height, width, _ = images.shape
  if flip:
    flipped = jax.random.bernoulli(mirror, shape=(n, 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)
  if padding:
    padded = jnp.pad(
        images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    starts = jax.random.randint(place, (n, 2), 0, 2 * padding + 1)
    images = jax.vmap(lambda x, at: jax.lax.dynamic_slice(
        x, (at[0], at[1], 0), (height, width, 3)))(padded, starts)
  return images


def fit(
    network: Classifier, data: Data, config: Any, metrics: log.Metrics,
    status: Callable[..., None],
) -> Any:
  """Returns trained parameters.

  Writes a 'train' row each epoch, and an 'eval' row each `eval_every` of them
  and after the last.

  Raises:
    ValueError: fewer images than `config.batch_size`.
    FloatingPointError: the loss is not finite.
  """
  num, size = len(data.train.images), config.batch_size
  if num < size:
    raise ValueError(f'config.batch_size={size}: more than the {num} images')
  steps = (num // size) * config.epochs
  values = config.optimizer.to_dict()
  warmup = int(values.pop('warmup') * steps)
  tx = optimizer_lib.make(steps=steps, warmup=warmup, **values)
  init_key, key = jax.random.split(jax.random.key(config.seed))
  params = jax.jit(network.init)(init_key)
  state = jax.jit(tx.init)(params)
  step = functools.partial(
      _step, network, tx, flip=config.flip, padding=config.padding,
      smoothing=config.label_smoothing)
  images, labels = map(jnp.asarray, data.train)
  rng = np.random.default_rng(config.seed)
  begin = time.monotonic()
  for epoch in range(1, config.epochs + 1):
    order = rng.permutation(num)[:num // size * size].reshape(-1, size)
    losses = []
    for rows in order:
      params, state, key, loss = step(params, state, key, images, labels, rows)
      losses.append(loss)
    loss = float(np.mean(jax.device_get(losses)))
    if not np.isfinite(loss):
      raise FloatingPointError(
          f'loss not finite in epoch {epoch}; lower '
          'config.optimizer.learning_rate')
    number, minutes = epoch * len(order), (time.monotonic() - begin) / 60
    metrics.write('train', {'step': number, 'epoch': epoch, 'loss': loss,
                            'minutes': minutes})
    line = f'epoch {epoch}/{config.epochs}, loss {loss:.4f}'
    if epoch % config.eval_every == 0 or epoch == config.epochs:
      found = accuracy(network, params, data.test)
      metrics.write('eval', {
          'step': number, 'epoch': epoch, 'minutes': minutes,
          'accuracy': found.mean, 'by_class': [
              None if np.isnan(x) else float(x) for x in found.by_class]})
      line += f', accuracy {found.mean:.2%}'
    status(line, last=epoch == config.epochs)
  return params


def accuracy(
    network: Classifier, params: Any, data: Labelled) -> diversity.Accuracy:
  """Returns how often a classifier is right, in all and by class."""
  logits = in_batches(
      lambda x: _logits(network, params, x), data.images, _TEST_BATCH)
  return diversity.per_class_accuracy(logits, data.labels)


@functools.partial(jax.jit, static_argnums=0)
def _logits(network: Classifier, params: Any, images: Array) -> Array:
  return network.apply(params, images)[1]


@functools.partial(
    jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3),
    static_argnames=('flip', 'padding', 'smoothing'))
def _step(
    network: Classifier, tx: optax.GradientTransformation, params: Any,
    state: Any, key: Array, images: Array, labels: Array, rows: Array, *,
    flip: bool, padding: int, smoothing: float,
) -> tuple[Any, Any, Array, Array]:
  """Returns `(params, state, key, loss)` after a step on some rows."""
  key, own = jax.random.split(key)
  x = augment(own, images[rows], flip=flip, padding=padding)
  wanted = optax.smooth_labels(
      jax.nn.one_hot(labels[rows], network.config.num_classes), smoothing)

  def objective(params: Any) -> Array:
    logits = network.apply(params, x)[1]
    return optax.softmax_cross_entropy(logits, wanted).mean()
  loss, grads = jax.value_and_grad(objective)(params)
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state, key, loss


def check(config: Any) -> None:
  """Raises ValueError for values that cannot be run."""
  for name in ('epochs', 'batch_size', 'eval_every'):
    if not config[name] > 0:
      raise ValueError(f'config.{name}={config[name]}: must be > 0')
  if config.padding < 0:
    raise ValueError(f'config.padding={config.padding}: must be >= 0')
  for name, value in (('label_smoothing', config.label_smoothing),
                      ('optimizer.warmup', config.optimizer.warmup)):
    if not 0 <= value < 1:
      raise ValueError(f'config.{name}={value}: must be in [0, 1)')


def _parts(
    path: str, seed: int) -> tuple[Labelled, Labelled | None, tuple[str, ...]]:
  """Returns images, the test's own if there are such, and classes' names."""
  if path == 'synthetic':
    return synthetic(256, seed), None, ()
  with _open(path) as file:
    if 'blob' not in file:
      names = file['classes'] if 'classes' in file else ()
      return _stored(path, file), None, tuple(map(str, names))
  from specjax.data import images
  train, test = (images.read_cifar10(path, s) for s in ('train', 'test'))
  return (labelled(train.images, train.labels),
          labelled(test.images, test.labels), tuple(train.classes))


def _rows(data: Labelled, rows: npt.NDArray) -> Labelled:
  return Labelled(data.images[rows], data.labels[rows])


def _open(path: str) -> Any:
  try:
    found = np.load(Path(path).expanduser(), allow_pickle=False)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f'{path}: cannot be read as .npz: {error}') from error
  if not isinstance(found, np.lib.npyio.NpzFile):
    raise ValueError(f'{path}: a single array, expected an .npz')
  return found


def _stored(path: str, file: Any) -> Labelled:
  missing = [n for n in ('images', 'labels') if n not in file]
  if missing:
    raise ValueError(f'{path}: no array {missing[0]!r}; found '
                     f'{", ".join(file.files) or "none"}')
  try:
    return labelled(file['images'], file['labels'])
  except (ValueError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f'{path}: {error}') from error


if __name__ == '__main__':
  cli.run(main)
