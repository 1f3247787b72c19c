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
from typing import Any

import jax
import numpy as np

from specjax import verify
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.distill import measure
from specjax.drafters import Null
from specjax.fit.image_lm import ImageObjective
from specjax.host import cli, images
from specjax.models import image_lm
from specjax.models.guided import Guided
from specjax.models.image_lm import ImageLM
from train import decoder_run, image_data

_FLAGS = cli.define_flags('out/image_ar')


def main() -> int:
  """Runs the program; returns the exit code."""
  return decoder_run.main(
      _FLAGS, Run, images.load_tokenizer, 'a tokenizer of train.vq')


class Run(decoder_run.Run):
  """An image decoder in training."""

  unit, format = 'codes', images.LM

  def __init__(
      self, config: Any, data: image_data.Data, tokenizer: images.Tokenizer,
      mesh: jax.sharding.Mesh | None, out: Path,
  ):
    """Encodes the images; nothing else is compiled yet."""
    self.tokenizer = tokenizer
    found = decoder_run.encode(
        tokenizer.encode, data, tokenizer.config.factor, mirrored=config.flip)
    model = config.model.to_dict()
    shape = image_lm.shape(
        model['num_layers'], model['num_heads'], model['embed_dim'],
        grid_width=found.grid[1], vocab_size=tokenizer.config.num_codes,
        num_classes=len(found.classes), dropout=model['dropout'])
    self.objective = ImageObjective(shape, model['dtype'])
    super().__init__(config, self.objective, found, mesh, out)

  def save(self, net: Any, facts: Mapping[str, Any]) -> Path:
    """Writes the decoder that some weights make; returns its folder."""
    return images.save_lm(self.out / 'model', self.objective.config, net,
                          facts, self.config.save.form)

  def draw(self, net: Any, step: int) -> dict[str, float]:
    """Shows samples; one process does."""
    if jax.process_index() == 0:
      self.figure(self.tokenizer.decode(self.samples(net)),
                  f'after {step} steps, guidance '
                  f'{self.config.eval.guidance:g}')
    return {}

  def samples(self, net: Any) -> np.ndarray:
    """Returns codes int32[N,h,w]: a few samples of every class."""
    config = dataclasses.replace(
        self.objective.config, dtype=self.objective.dtype)
    params = jax.tree.map(
        lambda x: x if x.ndim == 1 else x.astype(config.dtype), net)
    target: Any = ImageLM(config, chunk=8)
    if self.config.eval.guidance != 1:
      target = Guided(target, self.config.eval.guidance)
    context = measure.context(
        config.vocab_size + self.labels()[:, None], self.length,
        temperature=1.0)
    found = measure.acceptance(
        Engine(target, Null(0), verify.get('speculative')),
        Models(target=params), context, chunk=1)
    return np.stack([t[1:] for t in found.texts]).reshape(-1, *self.grid)

  def learnt(self, row: Mapping[str, Any]) -> str:
    """Returns how sure it is."""
    return f'entropy {row["entropy"]:.3f}'

  def tested(self, row: Mapping[str, Any]) -> str:
    """Returns how well it does on test images, and how sure it is."""
    return (f'held-out loss {row["held_out_loss"]:.4f}, entropy '
            f'{row["entropy"]:.3f} nats, accuracy {row["accuracy"]:.1%}')


if __name__ == '__main__':
  cli.run(main)
