"""Trains an autoencoder of images: `python -m train.vae --config configs/...`.

Its latents are continuous tokens. Writes the autoencoder (moving average of
the weights, and the scale that gives its tokens a deviation of 1), its scores
and a figure of reconstructions to `--out`. A run that is interrupted, started
again with the same config, goes on exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.data.image_batches import Batches
from specjax.eval import diversity, pictures
from specjax.fit.vae import VAEObjective
from specjax.host import cli, latents
from specjax.models.vae import VAEConfig
from train import fit_run, image_data, log, loop

_FLAGS = cli.define_flags('out/vae')
# Images of the figure.
_SHOWN = 8
# Most images that the deviation of tokens is measured on.
_MEASURED = 10_000
# What an image without a difference counts as, dB: infinity has no mean.
_MOST = 78.0


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
  made = run.scaled(state)
  folder = latents.save_autoencoder(
      out / 'autoencoder', made.config, made.params, {
          'metrics': last, 'config': config.to_dict(), 'data': data.facts},
      config.save.form)
  saved = run.scores(latents.load_autoencoder(folder))
  cli.note(f'{saved["psnr"]:.2f} dB, tokens of deviation {saved["std"]:.3f} '
           f'with scale {made.config.scale:.4g} as saved '
           f'({config.save.form}); wrote {folder}', quiet)
  return 0


class Run(fit_run.Run):
  """An autoencoder in training; its tokens are latents as they are."""

  def __init__(
      self, config: Any, data: image_data.Data,
      mesh: jax.sharding.Mesh | None, out: Path,
  ):
    """Prepares a run; nothing is compiled yet."""
    self.data, self.out = data, out
    model = config.model.to_dict()
    shape = VAEConfig(**{
        **model, 'multipliers': tuple(model['multipliers']), 'scale': 1.0})
    for side in data.train.size:
      if side % shape.factor:
        raise ValueError(
            f'config.model.multipliers={shape.multipliers}: images of '
            f'{side} pixels do not divide by {shape.factor}')
    self.objective = VAEObjective(shape, **config.loss.to_dict())
    super().__init__(config, self.objective, mesh)
    self.batches = Batches(data.train, config.batch_size, config.seed)

  def step(self, state: Any, step: int) -> tuple[Any, Any, int]:
    """Returns `(state, report, images)` after step number `step`."""
    state, report = self.take(
        state, {'image': self.batches.batch(step)['image']}, step)
    return state, report, self.config.batch_size

  def evaluate(self, state: Any, step: int, minutes: float) -> dict[str, Any]:
    """Returns scores on test images, and draws some of them."""
    made = latents.Autoencoder(self.objective.config, state.average)
    return {'step': step, 'minutes': minutes, **self.scores(made)}

  def scores(self, made: latents.Autoencoder) -> dict[str, Any]:
    """Returns PSNR (mean over images, dB) and deviation of drawn tokens."""
    real = self.data.test.images[:self.config.eval.num_images]
    tokens = made.encode(real, seed=self.config.seed)
    again = made.decode(tokens)
    if jax.process_index() == 0:
      shown = np.stack([real[:_SHOWN], again[:_SHOWN]])
      pictures.grid(
          shown.reshape(-1, *real.shape[1:]), self.out / 'images.png',
          columns=len(real[:_SHOWN]), rows=('image', 'decoded'))
    return {
        'psnr': float(np.mean(np.minimum(diversity.psnr(again, real), _MOST))),
        'std': float(np.std(tokens, dtype=np.float64)), 'images': len(real)}

  def scaled(self, state: Any) -> latents.Autoencoder:
    """Returns what is kept: drawn tokens have deviation 1.

    It is measured on training images, over all places and channels together.
    This process works alone.
    """
    params = jax.tree.map(jnp.asarray, jax.device_get(state.average))
    made = latents.Autoencoder(self.objective.config, params)
    # Files may be in order of class.
    order = np.random.default_rng(self.config.seed).permutation(
        len(self.data.train))
    some = self.data.train.images[np.sort(order[:_MEASURED])]
    tokens = made.encode(some, seed=self.config.seed)
    scale = 1 / float(np.std(tokens, dtype=np.float64))
    return dataclasses.replace(
        made, config=dataclasses.replace(made.config, scale=scale))

  def train_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of training."""
    return (f'step {row["step"]}/{self.num_steps}, loss '
            f'{row.get("loss", 0):.4f}, {row.get("psnr", 0):.2f} dB, '
            f'{row.get("kl", 0):.0f} nats an image, latents of deviation '
            f'{row.get("std", 0):.2f}, {row["tokens_per_s"]:.0f} images/s, '
            f'{log.clock(row["left_s"])} left')

  def eval_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of a test."""
    return (f'step {row["step"]}, {row["minutes"]:.1f} min: '
            f'{row["psnr"]:.2f} dB, latents of deviation {row["std"]:.3f}')


if __name__ == '__main__':
  cli.run(main)
