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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.fit.vae import VAEObjective
from specjax.host import cli, latents
from specjax.models.vae import VAEConfig
from train import image_data, tokenizer_run

_FLAGS = cli.define_flags('out/vae')
# Most images that the deviation of tokens is measured on.
_MEASURED = 10_000


def main() -> int:
  """Runs the program; returns the exit code."""
  return tokenizer_run.main(_FLAGS, Run)


class Run(tokenizer_run.Run):
  """An autoencoder in training; its tokens are latents as they are."""

  def __init__(
      self, config: Any, data: image_data.Data,
      mesh: jax.sharding.Mesh | None, out: Path,
  ):
    """Prepares a run; nothing is compiled yet."""
    self.objective = VAEObjective(
        tokenizer_run.shape(VAEConfig, config, data, scale=1.0),
        **config.loss.to_dict())
    super().__init__(config, self.objective, data, mesh, out)

  def made(self, params: Any) -> latents.Autoencoder:
    """Returns the autoencoder that some weights make."""
    return latents.Autoencoder(self.objective.config, params)

  def save(self, state: Any, facts: Mapping[str, Any]) -> Path:
    """Writes the `scaled` autoencoder of a state; returns its folder."""
    made = self.scaled(state)
    return latents.save_autoencoder(
        self.out / 'autoencoder', made.config, made.params, facts,
        self.config.save.form)

  def load(self, folder: Path) -> latents.Autoencoder:
    """Returns the autoencoder that `save` wrote."""
    return latents.load_autoencoder(folder)

  def encoded(
      self, made: latents.Autoencoder, images: np.ndarray
  ) -> np.ndarray:
    """Returns drawn tokens of images."""
    return made.encode(images, seed=self.config.seed)

  def measured(self, tokens: np.ndarray) -> dict[str, float]:
    """Returns the deviation of drawn tokens."""
    return {'std': float(np.std(tokens, dtype=np.float64))}

  def scaled(self, state: Any) -> latents.Autoencoder:
    """Returns what is kept: drawn tokens have deviation 1.

    It is measured on training images, over all places and channels together.
    This process works alone.
    """
    made = self.made(jax.tree.map(jnp.asarray, jax.device_get(state.average)))
    # Files may be in order of class.
    order = np.random.default_rng(self.config.seed).permutation(
        len(self.data.train))
    some = self.data.train.images[np.sort(order[:_MEASURED])]
    scale = 1 / self.measured(self.encoded(made, some))['std']
    return dataclasses.replace(
        made, config=dataclasses.replace(made.config, scale=scale))

  def told(self, made: latents.Autoencoder, scores: Mapping[str, Any]) -> str:
    """Returns what is said of an autoencoder and its scores in the end."""
    return (f'{scores["psnr"]:.2f} dB, tokens of deviation '
            f'{scores["std"]:.3f} with scale {made.config.scale:.4g}')

  def learnt(self, row: Mapping[str, Any]) -> str:
    """Returns how well it reconstructs, and what its latents are like."""
    return (f'{row["psnr"]:.2f} dB, {row["kl"]:.0f} nats an '
            f'image, latents of deviation {row["std"]:.2f}')

  def tested(self, row: Mapping[str, Any]) -> str:
    """Returns how well it reconstructs, and what its latents are like."""
    return f'{row["psnr"]:.2f} dB, latents of deviation {row["std"]:.3f}'


if __name__ == '__main__':
  cli.run(main)
