"""What `train.image_ar` and `train.mar` share: decoders of images in training.

Images are encoded once, before the first step.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from specjax.data.image_batches import Batches, Codes
from specjax.data.images import Images
from specjax.eval import pictures
from specjax.fit.step import Objective
from specjax.host import cli
from specjax.io import model_folder
from specjax.io.errors import FormatError
from train import fit_run, image_data, loop

# Samples of the figure: of every class.
SHOWN = 4


def main(
    flags: cli.Flags, kind: Callable[..., Run],
    load: Callable[[str], Any], needs: str,
) -> int:
  """Trains a decoder and saves it; returns the exit code.

  Args:
    flags: of the program.
    kind: called with the config, its data, the tokenizer, the mesh and
      `--out`.
    load: reads the tokenizer of `config.tokenizer`. needs: what that is.

  Raises:
    ValueError: no tokenizer is named.
  """
  config, out, stop, mesh, quiet = loop.begin(flags)
  if config.tokenizer is None:
    raise ValueError(f'config.tokenizer: give the folder of {needs}')
  tokenizer = load(config.tokenizer)
  data = image_data.read(config.data, config.seed, labels=True)
  begin = time.monotonic()
  run = kind(config, data, tokenizer, mesh, out)
  cli.note(f'{len(data.train)} images of {run.length} {run.unit}, encoded in '
           f'{time.monotonic() - begin:.0f} s', quiet)
  state, metrics, code = loop.complete(
      run, out, data.digest, mesh, stop, quiet)
  if code or jax.process_index():
    return code
  facts = run.facts(metrics, data.facts)
  folder = run.save(state.average, {**facts, 'grid': list(run.grid)})
  cli.note(f'held-out loss {facts["metrics"]["held_out_loss"]:.4f}; wrote '
           f'{folder}', quiet)
  return 0


class Encoded(NamedTuple):
  """Images as tokens in raster order, [N,T] or [N,T,C].

  Attributes:
    train, test: tokens. grid: T of an image, high and wide.
    classes: names.
  """

  train: Codes
  test: Codes
  grid: tuple[int, int]
  classes: tuple[str, ...]

  @property
  def num_tokens(self) -> int:
    """T, tokens of an image."""
    return self.train.codes.shape[1]


def encode(
    encoder: Callable[[np.ndarray], np.ndarray], data: image_data.Data,
    factor: int, *, mirrored: bool,
) -> Encoded:
  """Returns the tokens of all images.

  Args:
    encoder: returns [N,h,w,...] of uint8[N,H,W,3].
    factor: pixels a token is wide and high.
    mirrored: encode images to learn from mirrored as well.
  """
  def codes(x: np.ndarray) -> np.ndarray:
    made = encoder(x)
    return made.reshape(len(x), -1, *made.shape[3:])

  def part(found: Images, mirrored: bool) -> Codes:
    return Codes(
        codes(found.images), found.labels,
        codes(np.ascontiguousarray(found.images[:, :, ::-1]))
        if mirrored else None)

  height, width = data.train.size
  return Encoded(
      part(data.train, mirrored), part(data.test, False),
      (height // factor, width // factor), data.train.classes)


class Run(fit_run.Run):
  """A decoder in training.

  Attributes:
    classes: names. grid: tokens of an image, high and wide. length: in all.
    out: the folder of its figure. batches, tests: of tokens and labels.
    format: of the folders of its decoders.
  """

  format: str

  def __init__(
      self, config: Any, objective: Objective, images: Encoded,
      mesh: jax.sharding.Mesh | None, out: Path,
  ):
    """Prepares a run; nothing is compiled yet."""
    super().__init__(config, objective, mesh)
    self.classes, self.grid = images.classes, images.grid
    self.length, self.out = images.num_tokens, out
    self.batches = Batches(
        images.train, config.batch_size, config.seed, flip=config.flip,
        class_dropout=config.class_dropout, num_classes=len(self.classes))
    self.tests = Batches(
        images.test, config.batch_size, flip=False,
        num_classes=len(self.classes))

  def begun(self, net: Any) -> Any:
    """Returns the weights of `config.init_from`, or those given.

    Raises:
      ValueError: a folder of something else, or of another shape.
    """
    folder = self.config.init_from
    if not folder:
      return net
    try:
      return model_folder.fitted(
          folder, model_folder.load(folder, self.format)[1], net)
    except FormatError as error:
      raise ValueError(f'config.init_from: {error}') from error

  @abc.abstractmethod
  def draw(self, net: Any, step: int) -> dict[str, float]:
    """Draws samples, shows them by `figure`; returns scores of them."""

  @abc.abstractmethod
  def save(self, net: Any, facts: Mapping[str, Any]) -> Path:
    """Writes the decoder that some weights make; returns its folder."""

  def step(self, state: Any, step: int) -> tuple[Any, Any, int]:
    """Returns `(state, report, tokens)` after step number `step`."""
    state, report = self.take(state, self.batches.batch(step), step)
    return state, report, self.config.batch_size * self.length

  def evaluate(self, state: Any, step: int, minutes: float) -> dict[str, Any]:
    """Returns scores on test images, and draws samples."""
    found = [jax.device_get(self.fitter.evaluate(
        state.average, None, self.place(self.tests.batch(i)),
        jax.random.fold_in(self.key, i)))
             for i in range(self.config.eval.batches)]
    row = {'step': step, 'minutes': minutes,
           'held_out_loss': float(np.mean([loss for loss, _ in found]))}
    for name in found[0][1]:
      row[name] = float(np.mean([s[name] for _, s in found]))
    return {**row, **self.draw(state.average, step)}

  def figure(self, pixels: np.ndarray, title: str) -> None:
    """Writes `SHOWN` images of each class, uint8[N,H,W,3], to `out`."""
    pictures.grid(pixels, self.out / 'samples.png', columns=SHOWN,
                  rows=self.classes, title=title)

  def labels(self) -> np.ndarray:
    """Returns the class of each sample of the figure, int[N]."""
    return np.repeat(np.arange(len(self.classes)), SHOWN)
