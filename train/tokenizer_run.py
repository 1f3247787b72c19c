"""What `train.vq` and `train.vae` share: tokenizers of images in training."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from specjax.data.image_batches import Batches
from specjax.eval import diversity, pictures
from specjax.fit.step import Objective
from specjax.host import cli
from specjax.models.vq import ConvConfig
from train import fit_run, image_data, loop

_Shape = TypeVar('_Shape', bound=ConvConfig)
# Images of the figure.
_SHOWN = 8


def main(flags: cli.Flags, kind: Callable[..., Run]) -> int:
  """Trains a tokenizer and scores it as it was saved; returns the exit code.

  Args:
    flags: of the program.
    kind: called with the config, its data, the mesh and `--out`.
  """
  config, out, stop, mesh, quiet = loop.begin(flags)
  data = image_data.read(config.data, config.seed)
  cli.note(f'{len(data.train)} images to learn from, {len(data.test)} to be '
           f'tested on, of {data.train.size[0]} x {data.train.size[1]}', quiet)
  run = kind(config, data, mesh, out)
  state, metrics, code = loop.complete(
      run, out, data.digest, mesh, stop, quiet)
  if code or jax.process_index():
    return code
  folder = run.save(state, run.facts(metrics, data.facts))
  made = run.load(folder)
  cli.note(f'{run.told(made, run.scores(made))} as saved '
           f'({config.save.form}); wrote {folder}', quiet)
  return 0


def shape(
    kind: type[_Shape], config: Any, data: image_data.Data, **more: Any
) -> _Shape:
  """Returns the shape that `config.model` and `more` describe.

  Raises:
    ValueError: sizes that cannot be, or images that do not divide into its
      tokens.
  """
  found = kind.of({**config.model.to_dict(), **more})
  for side in data.train.size:
    if side % found.factor:
      raise ValueError(
          f'config.model.multipliers={found.multipliers}: images of '
          f'{side} pixels do not divide by {found.factor}')
  return found


class Run(fit_run.Run):
  """A tokenizer in training.

  What it makes, `made`, encodes images to tokens and decodes them.

  Attributes:
    data: of the run. out: the folder of its figure. batches: of `data.train`.
    most: what an image without a difference counts as, dB: infinity has no
      mean.
  """

  most = 78.0

  def __init__(
      self, config: Any, objective: Objective, data: image_data.Data,
      mesh: jax.sharding.Mesh | None, out: Path,
  ):
    """Prepares a run; nothing is compiled yet."""
    super().__init__(config, objective, mesh)
    self.data, self.out = data, out
    self.batches = Batches(data.train, config.batch_size, config.seed)

  @abc.abstractmethod
  def made(self, params: Any) -> Any:
    """Returns the tokenizer that some weights make."""

  @abc.abstractmethod
  def save(self, state: Any, facts: Mapping[str, Any]) -> Path:
    """Writes the tokenizer of a state; returns its folder."""

  @abc.abstractmethod
  def load(self, folder: Path) -> Any:
    """Returns the tokenizer that `save` wrote."""

  @abc.abstractmethod
  def measured(self, tokens: np.ndarray) -> dict[str, float]:
    """Returns scores of test images' tokens."""

  @abc.abstractmethod
  def told(self, made: Any, scores: Mapping[str, Any]) -> str:
    """Returns what is said of a tokenizer and its scores in the end."""

  def encoded(self, made: Any, images: np.ndarray) -> np.ndarray:
    """Returns the tokens of images."""
    return made.encode(images)

  def step(self, state: Any, step: int) -> tuple[Any, Any, int]:
    """Returns `(state, report, images)` after step number `step`."""
    state, report = self.take(
        state, {'image': self.batches.batch(step)['image']}, step)
    return state, report, self.config.batch_size

  def evaluate(self, state: Any, step: int, minutes: float) -> dict[str, Any]:
    """Returns scores on test images, and draws some of them."""
    return {'step': step, 'minutes': minutes,
            **self.scores(self.made(state.average))}

  def scores(self, made: Any) -> dict[str, Any]:
    """Returns PSNR (mean over images, dB) and what is `measured` of tokens.

    The first images and what is decoded of them are the run's figure.
    """
    real = self.data.test.images[:self.config.eval.num_images]
    tokens = self.encoded(made, real)
    again = made.decode(tokens)
    if jax.process_index() == 0:
      shown = np.stack([real[:_SHOWN], again[:_SHOWN]])
      pictures.grid(
          shown.reshape(-1, *real.shape[1:]), self.out / 'images.png',
          columns=len(real[:_SHOWN]), rows=('image', 'decoded'))
    found = np.minimum(diversity.psnr(again, real), self.most)
    return {'psnr': float(np.mean(found)), **self.measured(tokens),
            'images': len(real)}
