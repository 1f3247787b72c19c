"""Trains an image tokenizer: `python -m train.vq --config configs/...`.

Writes the tokenizer (moving average of the weights), its scores and a figure
of reconstructions to `--out`. A run that is interrupted, started again with
the same config, goes on exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specjax.fit.vq import VQObjective
from specjax.host import cli, images
from specjax.models.vq import VQConfig
from train import image_data, tokenizer_run

_FLAGS = cli.define_flags('out/vq')


def main() -> int:
  """Runs the program; returns the exit code."""
  return tokenizer_run.main(_FLAGS, Run)


class Run(tokenizer_run.Run):
  """A tokenizer in training."""

  def __init__(
      self, config: Any, data: image_data.Data,
      mesh: jax.sharding.Mesh | None, out: Path,
  ):
    """Prepares a run; nothing is compiled yet."""
    self.objective = VQObjective(
        tokenizer_run.shape(VQConfig, config, data), **config.loss.to_dict())
    super().__init__(config, self.objective, data, mesh, out)

  def made(self, params: Any) -> images.Tokenizer:
    """Returns the tokenizer that some weights make."""
    return images.Tokenizer(self.objective.config, params)

  def save(self, state: Any, facts: Mapping[str, Any]) -> Path:
    """Writes the tokenizer of a state; returns its folder."""
    return images.save_tokenizer(
        self.out / 'tokenizer', self.objective.config, state.average, facts,
        self.config.save.form)

  def load(self, folder: Path) -> images.Tokenizer:
    """Returns the tokenizer that `save` wrote."""
    return images.load_tokenizer(folder)

  def measured(self, tokens: np.ndarray) -> dict[str, float]:
    """Returns the use of the codes, and the perplexity of their shares."""
    num_codes = self.objective.config.num_codes
    count = np.bincount(tokens.reshape(-1), minlength=num_codes)
    share = count[count > 0] / tokens.size
    return {'use': len(share) / num_codes,
            'perplexity': float(np.exp(-np.sum(share * np.log(share))))}

  def told(self, made: images.Tokenizer, scores: Mapping[str, Any]) -> str:
    """Returns what is said of a tokenizer and its scores in the end."""
    return f'{scores["psnr"]:.2f} dB, {scores["use"]:.1%} of the codes used'

  def learnt(self, row: Mapping[str, Any]) -> str:
    """Returns how well it reconstructs, with how many codes."""
    return (f'{row["psnr"]:.2f} dB, {row["used"]:.0%} of the '
            'codes alive')

  def tested(self, row: Mapping[str, Any]) -> str:
    """Returns how well it reconstructs, and how codes are used."""
    return (f'{row["psnr"]:.2f} dB, {row["use"]:.1%} of the codes used, '
            f'perplexity {row["perplexity"]:.0f}')


if __name__ == '__main__':
  cli.run(main)
