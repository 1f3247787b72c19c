"""Trains a decoder of continuous tokens: `python -m train.mar --config ...`.

Images are encoded once by an autoencoder of `train.vae`, as they are and
mirrored; the decoder learns to take the noise off each token, given others
and the class. With `config.teacher` it becomes a drafter of that decoder:
it learns the target's own steps. Writes the decoder (moving average of the
weights), its scores and a figure of samples to `--out`. A run that is
interrupted, started again with the same config, goes on exactly where it
stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specjax.drafters.chain_density import ChainDensity
from specjax.fit.mar import DistilledMAR, MARObjective, Masks
from specjax.host import cli, latent_sampling, latents, mar
from specjax.host.generate import generate
from specjax.host.load import Model
from specjax.host.results import Results
from specjax.io.options import Sampling
from specjax.models.causal_images import CausalImages
from specjax.models.diffusion import Diffusion
from specjax.models.diffusion_head import DenoisingMLP
from specjax.models.mar import MAR
from specjax.models.masked_images import MaskedImages
from specjax.models.transformer_config import TransformerConfig
from train import decoder_run, image_data

_FLAGS = cli.define_flags('out/mar')


def main() -> int:
  """Runs the program; returns the exit code."""
  return decoder_run.main(
      _FLAGS, Run, latents.load_autoencoder, 'an autoencoder of train.vae')


class Run(decoder_run.Run):
  """A decoder in training."""

  unit, format = 'tokens', mar.FORMAT

  def __init__(
      self, config: Any, data: image_data.Data,
      autoencoder: latents.Autoencoder, mesh: jax.sharding.Mesh | None,
      out: Path,
  ):
    """Encodes the images; nothing else is compiled yet."""
    self.autoencoder = autoencoder
    found = decoder_run.encode(
        functools.partial(autoencoder.encode, seed=config.seed), data,
        autoencoder.config.factor, mirrored=config.flip)
    lm = decoder(config, found.num_tokens, found.train.codes.shape[2],
                 len(found.classes))
    masks, repeats = Masks(**config.masks.to_dict()), config.repeats
    self.teacher: Model | None = None
    if config.teacher is None:
      objective = MARObjective(lm, masks, repeats)
    else:
      self.teacher, _ = mar.load(config.teacher, dtype=config.teacher_dtype)
      taught: Any = mar.draft_lm(self.teacher, Model('drafter', lm, None))
      objective = DistilledMAR(
          taught, masks, repeats, teacher=self.teacher.lm,
          **config.distil.to_dict())
    self.objective: MARObjective = objective
    super().__init__(config, objective, found, mesh, out)

  def place(self, batch: Any) -> Any:
    """Puts a batch on the devices, with the teacher's parameters."""
    placed = super().place(batch)
    if self.teacher is not None:
      placed['teacher'] = self.teacher.params
    return placed

  def save(self, net: Any, facts: Mapping[str, Any]) -> Path:
    """Writes the decoder that some weights make; returns its folder."""
    return mar.save(self.out / 'model', self.objective.lm, net, facts,
                    self.config.save.form)

  def draw(self, net: Any, step: int) -> dict[str, float]:
    """Shows samples; returns how many tokens a drafter makes a round."""
    results, orders = self.samples(net)
    if jax.process_index() == 0:
      shown = latent_sampling.Pictures(
          self.autoencoder, self.grid, orders, self.classes,
          decoder_run.SHOWN)
      self.figure(shown.pixels(results.results), f'after {step} steps')
    if self.teacher is None:
      return {}
    return {'tokens_per_round': results.summary()['mean_acceptance_length']}

  def samples(self, net: Any) -> tuple[Results, np.ndarray]:
    """Returns a few samples of every class, and the orders they came in.

    Of a drafter's target, drafted by it.
    """
    model: Any = Model('decoder', self.objective.lm, net)
    drafter: Any = None
    if self.teacher is not None:
      drafter = ChainDensity(self.config.eval.num_draft, model.lm)
      model = self.teacher
    labels = self.labels()
    orders = latent_sampling.orders_of(
        'random', len(labels), self.length, self.config.seed)
    scales = latent_sampling.scales(
        self.length, self.config.eval.guidance, 'constant')
    if scales is not None:
      model = dataclasses.replace(model, lm=mar.guided(model.lm))
      drafter = drafter and dataclasses.replace(
          drafter, model=mar.guided(drafter.model))
    return generate(
        model, drafter,
        latent_sampling.begin(model.lm, labels, orders, scales),
        Sampling(temperature=1.0, max_new_tokens=self.length),
        drafter_params=net if drafter else None,
        batch_size=len(labels), seed=self.config.seed), orders

  def learnt(self, row: Mapping[str, Any]) -> str:
    """Returns the error of the noise, and of a drafter its divergence."""
    more = f', {row["nats"]:.1f} nats a token' if 'nats' in row else ''
    return f'noise {row["noise"]:.4f}{more}'

  def tested(self, row: Mapping[str, Any]) -> str:
    """Returns errors on test images, and of a drafter what it is good for."""
    more = ''
    if 'nats' in row:
      more = (f', {row["nats"]:.1f} nats a token, '
              f'{row["tokens_per_round"]:.2f} tokens a round')
    return (f'held-out loss {row["held_out_loss"]:.4f}, noise '
            f'{row["noise"]:.4f}{more}')


def decoder(
    config: Any, num_tokens: int, channels: int, num_classes: int
) -> MaskedImages | CausalImages:
  """Returns the decoder that a config describes.

  Raises:
    ValueError: an unknown kind, or shapes that do not fit.
  """
  shape = config.model.to_dict()
  kind, width = shape['kind'], shape['width']
  process = Diffusion(
      DenoisingMLP(channels, width, **config.head.to_dict()), channels,
      **config.diffusion.to_dict())
  if kind == 'masked':
    return MaskedImages(MAR(
        num_tokens=num_tokens, channels=channels, num_classes=num_classes,
        width=width, num_encoder=shape['num_layers'] // 2,
        num_decoder=shape['num_layers'] - shape['num_layers'] // 2,
        num_heads=shape['num_heads'], buffer=shape['buffer'],
        dtype=shape['dtype']), process)
  if kind != 'causal':
    raise ValueError(f'config.model.kind={kind!r}: known are '
                     f'{", ".join(mar.KINDS)}')
  heads = shape['num_heads']
  if width % heads:
    raise ValueError(f'config.model.width={width} is not a multiple of '
                     f'num_heads={heads}')
  return CausalImages(
      TransformerConfig(
          vocab_size=1, num_conditions=num_classes + 1,
          num_layers=shape['num_layers'], embed_dim=width,
          mlp_dim=-(-8 * width // 192) * 64, num_heads=heads,
          num_kv_heads=heads, head_dim=width // heads, dtype=shape['dtype']),
      num_tokens=num_tokens, channels=channels, num_classes=num_classes,
      process=process)


if __name__ == '__main__':
  cli.run(main)
