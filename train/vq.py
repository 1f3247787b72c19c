"""Trains an image tokenizer: `python -m train.vq --config configs/...`.

Writes the tokenizer (moving average of the weights), its scores and a figure
of reconstructions to `--out`. A run that is interrupted, started again with
the same config, goes on exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np

from specjax.data.image_batches import Batches
from specjax.eval import pictures
from specjax.fit.vq import VQObjective
from specjax.host import cli, images
from specjax.models.vq import VQConfig
from train import fit_run, image_data, log, loop

_FLAGS = cli.define_flags('out/vq')
# Images of the figure.
_SHOWN = 8


def main() -> int:
  """Runs the program; returns the exit code."""
  config, out, stop, mesh, quiet = loop.begin(_FLAGS)
  data = image_data.read(config.data, config.seed)
  cli.note(f'{len(data.train)} images to learn from, {len(data.test)} to be '
           f'tested on, of {data.train.size[0]} x {data.train.size[1]}', quiet)
  run = Run(config, data, mesh, out)
  state, metrics, code = loop.complete(
      run, out, data.digest, mesh, stop, quiet, time.monotonic())
  if code or jax.process_index():
    return code
  last = {k: v for k, v in metrics.of('eval')[-1].items() if k != 'kind'}
  folder = images.save_tokenizer(
      out / 'tokenizer', run.objective.config, state.average, {
          'metrics': last, 'config': config.to_dict(), 'data': data.facts},
      config.save.form)
  saved = run.scores(images.load_tokenizer(folder))
  cli.note(f'{saved["psnr"]:.2f} dB, {saved["use"]:.1%} of the codes used '
           f'as saved ({config.save.form}); wrote {folder}', quiet)
  return 0


class Run(fit_run.Run):
  """A tokenizer in training."""

  def __init__(
      self, config: Any, data: image_data.Data,
      mesh: jax.sharding.Mesh | None, out: Path,
  ):
    """Prepares a run; nothing is compiled yet."""
    self.data, self.out = data, out
    model = config.model.to_dict()
    shape = VQConfig(**{**model, 'multipliers': tuple(model['multipliers'])})
    for side in data.train.size:
      if side % shape.factor:
        raise ValueError(
            f'config.model.multipliers={shape.multipliers}: images of '
            f'{side} pixels do not divide by {shape.factor}')
    self.objective = VQObjective(shape, **config.loss.to_dict())
    super().__init__(config, self.objective, mesh)
    self.batches = Batches(data.train, config.batch_size, config.seed)

  def step(self, state: Any, step: int) -> tuple[Any, Any, int]:
    """Returns `(state, report, images)` after step number `step`."""
    state, report = self.take(
        state, {'image': self.batches.batch(step)['image']}, step)
    return state, report, self.config.batch_size

  def evaluate(self, state: Any, step: int, minutes: float) -> dict[str, Any]:
    """Returns scores on test images, and draws some of them."""
    made = images.Tokenizer(self.objective.config, state.average)
    return {'step': step, 'minutes': minutes, **self.scores(made)}

  def scores(self, made: images.Tokenizer) -> dict[str, Any]:
    """Returns PSNR (mean over images, dB) and the use of the codes."""
    real = self.data.test.images[:self.config.eval.num_images]
    ids = made.encode(real)
    again = made.decode(ids)
    gap = np.mean(np.square(real.astype(float) - again), axis=(1, 2, 3))
    share = np.bincount(ids.reshape(-1), minlength=made.config.num_codes)
    share = share[share > 0] / ids.size
    if jax.process_index() == 0:
      shown = np.stack([real[:_SHOWN], again[:_SHOWN]])
      pictures.grid(
          shown.reshape(-1, *real.shape[1:]), self.out / 'images.png',
          columns=len(real[:_SHOWN]), rows=('image', 'decoded'))
    return {
        'psnr': float(np.mean(-10 * np.log10(np.maximum(gap, 1e-3) / 255**2))),
        'use': len(share) / made.config.num_codes,
        'perplexity': float(np.exp(-np.sum(share * np.log(share)))),
        'images': len(real)}

  def train_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of training."""
    return (f'step {row["step"]}/{self.num_steps}, loss '
            f'{row.get("loss", 0):.4f}, {row.get("psnr", 0):.2f} dB, '
            f'{row.get("used", 0):.0%} of the codes alive, '
            f'{row["tokens_per_s"]:.0f} images/s, '
            f'{log.clock(row["left_s"])} left')

  def eval_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of a test."""
    return (f'step {row["step"]}, {row["minutes"]:.1f} min: '
            f'{row["psnr"]:.2f} dB, {row["use"]:.1%} of the codes used, '
            f'perplexity {row["perplexity"]:.0f}')


if __name__ == '__main__':
  cli.run(main)
