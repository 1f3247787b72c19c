"""Trains an image decoder: `python -m train.image_ar --config configs/...`.

Images are encoded once by a tokenizer of `train.vq`, as they are and
mirrored; the decoder learns their codes, given the class. Writes the decoder
(moving average of the weights), its scores and a figure of samples to
`--out`. A run that is interrupted, started again with the same config, goes
on exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np

from specjax import verify
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.data.image_batches import Batches, Codes
from specjax.data.images import Images
from specjax.distill import measure
from specjax.drafters import Null
from specjax.eval import pictures
from specjax.fit.image_lm import ImageObjective
from specjax.host import cli, images
from specjax.models import image_lm
from specjax.models.guided import Guided
from specjax.models.image_lm import ImageLM
from train import fit_run, image_data, log, loop

_FLAGS = cli.define_flags('out/image_ar')
# Samples of the figure: of every class.
_SHOWN = 4


def main() -> int:
  """Runs the program; returns the exit code."""
  config, out, stop, mesh, quiet = loop.begin(_FLAGS)
  if config.tokenizer is None:
    raise ValueError('config.tokenizer: give the folder of a tokenizer of '
                     'train.vq')
  tokenizer = images.load_tokenizer(config.tokenizer)
  data = image_data.read(config.data, config.seed, labels=True)
  begin = time.monotonic()
  run = Run(config, data, tokenizer, mesh, out)
  cli.note(f'{len(data.train)} images of {run.length} codes, encoded in '
           f'{time.monotonic() - begin:.0f} s', quiet)
  state, metrics, code = loop.complete(
      run, out, data.digest, mesh, stop, quiet, begin)
  if code or jax.process_index():
    return code
  last = {k: v for k, v in metrics.of('eval')[-1].items() if k != 'kind'}
  folder = images.save_lm(
      out / 'model', run.objective.config, state.average, {
          'metrics': last, 'config': config.to_dict(), 'data': data.facts,
          'grid': list(run.grid)}, config.save.form)
  cli.note(f'held-out loss {last["held_out_loss"]:.4f}; wrote {folder}', quiet)
  return 0


class Run(fit_run.Run):
  """An image decoder in training."""

  def __init__(
      self, config: Any, data: image_data.Data, tokenizer: images.Tokenizer,
      mesh: jax.sharding.Mesh | None, out: Path,
  ):
    """Encodes the images; nothing else is compiled yet."""
    self.tokenizer, self.out = tokenizer, out
    self.classes = data.train.classes
    train = encoded(tokenizer, data.train, mirrored=config.flip)
    factor = tokenizer.config.factor
    self.grid = tuple(side // factor for side in data.train.size)
    self.length = train.codes.shape[1]
    model = config.model.to_dict()
    shape = image_lm.shape(
        model['num_layers'], model['num_heads'], model['embed_dim'],
        grid_width=self.grid[1], vocab_size=tokenizer.config.num_codes,
        num_classes=len(self.classes))
    self.objective = ImageObjective(shape, model['dtype'])
    super().__init__(config, self.objective, mesh)
    self.batches = Batches(
        train, config.batch_size, config.seed, flip=config.flip,
        class_dropout=config.class_dropout, num_classes=len(self.classes))
    self.tests = Batches(
        encoded(tokenizer, data.test), config.batch_size, flip=False,
        num_classes=len(self.classes))

  def step(self, state: Any, step: int) -> tuple[Any, Any, int]:
    """Returns `(state, report, codes)` after step number `step`."""
    state, report = self.take(state, self.batches.batch(step), step)
    return state, report, self.config.batch_size * self.length

  def evaluate(self, state: Any, step: int, minutes: float) -> dict[str, Any]:
    """Returns scores on test images, and draws samples."""
    found = [jax.device_get(self.fitter.evaluate(
        state.average, None, self.place(self.tests.batch(i)), self.key))
             for i in range(self.config.eval.batches)]
    if jax.process_index() == 0:
      pictures.grid(
          self.tokenizer.decode(self.samples(state.average)),
          self.out / 'samples.png', columns=_SHOWN, rows=self.classes,
          title=f'after {step} steps, guidance '
                f'{self.config.eval.guidance:g}')
    mean = lambda name: float(np.mean([s[name] for _, s in found]))  # noqa: E731
    return {'step': step, 'minutes': minutes,
            'held_out_loss': float(np.mean([loss for loss, _ in found])),
            'accuracy': mean('accuracy'), 'entropy': mean('entropy')}

  def samples(self, net: Any) -> np.ndarray:
    """Returns codes int32[N,h,w]: a few samples of every class."""
    config = dataclasses.replace(
        self.objective.config, dtype=self.objective.dtype)
    params = jax.tree.map(
        lambda x: x if x.ndim == 1 else x.astype(config.dtype), net)
    target: Any = ImageLM(config, chunk=8)
    if self.config.eval.guidance != 1:
      target = Guided(target, self.config.eval.guidance)
    classes = np.repeat(np.arange(len(self.classes)), _SHOWN)
    context = measure.context(
        config.vocab_size + classes[:, None], self.length, temperature=1.0)
    found = measure.acceptance(
        Engine(target, Null(0), verify.get('speculative')),
        Models(target=params), context, chunk=1)
    return np.stack([t[1:] for t in found.texts]).reshape(-1, *self.grid)

  def train_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of training."""
    return (f'step {row["step"]}/{self.num_steps}, loss '
            f'{row.get("loss", 0):.4f}, entropy {row.get("entropy", 0):.3f}, '
            f'{row["tokens_per_s"]:.0f} codes/s, '
            f'{log.clock(row["left_s"])} left')

  def eval_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of a test."""
    return (f'step {row["step"]}, {row["minutes"]:.1f} min: held-out loss '
            f'{row["held_out_loss"]:.4f}, entropy {row["entropy"]:.3f} nats, '
            f'accuracy {row["accuracy"]:.1%}')


def encoded(
    tokenizer: images.Tokenizer, found: Images, mirrored: bool = False
) -> Codes:
  """Returns the codes of images, in raster order."""
  def codes(x: np.ndarray) -> np.ndarray:
    return tokenizer.encode(x).reshape(len(x), -1)
  return Codes(
      codes(found.images), found.labels,
      codes(np.ascontiguousarray(found.images[:, :, ::-1]))
      if mirrored else None)


if __name__ == '__main__':
  cli.run(main)
