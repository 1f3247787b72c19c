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
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np

from specjax.data.image_batches import Batches, Codes
from specjax.data.images import Images
from specjax.drafters.chain_density import ChainDensity
from specjax.eval import pictures
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
from train import fit_run, image_data, log, loop

_FLAGS = cli.define_flags('out/mar')
# Samples of the figure: of every class.
_SHOWN = 4


def main() -> int:
  """Runs the program; returns the exit code."""
  config, out, stop, mesh, quiet = loop.begin(_FLAGS)
  if config.tokenizer is None:
    raise ValueError('config.tokenizer: give the folder of an autoencoder of '
                     'train.vae')
  autoencoder = latents.load_autoencoder(config.tokenizer)
  data = image_data.read(config.data, config.seed, labels=True)
  begin = time.monotonic()
  run = Run(config, data, autoencoder, mesh, out)
  cli.note(f'{len(data.train)} images of {run.length} tokens, encoded in '
           f'{time.monotonic() - begin:.0f} s', quiet)
  state, metrics, code = loop.complete(
      run, out, data.digest, mesh, stop, quiet, begin)
  if code or jax.process_index():
    return code
  last = {k: v for k, v in metrics.of('eval')[-1].items() if k != 'kind'}
  folder = mar.save(
      out / 'model', run.objective.lm, state.average, {
          'metrics': last, 'config': config.to_dict(), 'data': data.facts,
          'grid': list(run.grid)}, config.save.form)
  cli.note(f'held-out loss {last["held_out_loss"]:.4f}; wrote {folder}', quiet)
  return 0


class Run(fit_run.Run):
  """A decoder in training."""

  def __init__(
      self, config: Any, data: image_data.Data,
      autoencoder: latents.Autoencoder, mesh: jax.sharding.Mesh | None,
      out: Path,
  ):
    """Encodes the images; nothing else is compiled yet."""
    self.autoencoder, self.out = autoencoder, out
    self.classes = data.train.classes
    train = encoded(
        autoencoder, data.train, config.seed, mirrored=config.flip)
    factor = autoencoder.config.factor
    self.grid = tuple(side // factor for side in data.train.size)
    self.length = train.codes.shape[1]
    lm = decoder(config, self.length, train.codes.shape[2],
                 len(self.classes))
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
    super().__init__(config, objective, mesh)
    shared: Any = dict(num_classes=len(self.classes))
    self.batches = Batches(
        train, config.batch_size, config.seed, flip=config.flip,
        class_dropout=config.class_dropout, **shared)
    self.tests = Batches(
        encoded(autoencoder, data.test, config.seed), config.batch_size,
        flip=False, **shared)

  def place(self, batch: Any) -> Any:
    """Puts a batch on the devices, with the teacher's parameters."""
    placed = super().place(batch)
    if self.teacher is not None:
      placed['teacher'] = self.teacher.params
    return placed

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
    results, orders = self.samples(state.average)
    if self.teacher is not None:
      row['tokens_per_round'] = results.summary()['mean_acceptance_length']
    if jax.process_index() == 0:
      shown = latent_sampling.Pictures(
          self.autoencoder, self.grid, orders, self.classes, _SHOWN)
      pictures.grid(
          shown.pixels(results.results), self.out / 'samples.png',
          columns=_SHOWN, rows=self.classes, title=f'after {step} steps')
    return row

  def samples(self, net: Any) -> tuple[Results, np.ndarray]:
    """Returns a few samples of every class, and the orders they came in.

    Of a drafter's target, drafted by it.
    """
    model: Any = Model('decoder', self.objective.lm, net)
    drafter: Any = None
    if self.teacher is not None:
      drafter = ChainDensity(self.config.eval.num_draft, model.lm)
      model = self.teacher
    labels = np.repeat(np.arange(len(self.classes)), _SHOWN)
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

  def train_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of training."""
    more = f', {row["nats"]:.1f} nats a token' if 'nats' in row else ''
    return (f'step {row["step"]}/{self.num_steps}, loss '
            f'{row.get("loss", 0):.4f}, noise {row.get("noise", 0):.4f}{more}'
            f', {row["tokens_per_s"]:.0f} tokens/s, '
            f'{log.clock(row["left_s"])} left')

  def eval_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of a test."""
    more = ''
    if 'nats' in row:
      more = (f', {row["nats"]:.1f} nats a token, '
              f'{row["tokens_per_round"]:.2f} tokens a round')
    return (f'step {row["step"]}, {row["minutes"]:.1f} min: held-out loss '
            f'{row["held_out_loss"]:.4f}, noise {row["noise"]:.4f}{more}')


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


def encoded(
    autoencoder: latents.Autoencoder, found: Images, seed: int,
    mirrored: bool = False,
) -> Codes:
  """Returns drawn tokens of images, in raster order."""
  def codes(x: np.ndarray) -> np.ndarray:
    made = autoencoder.encode(x, seed=seed)
    return made.reshape(len(x), -1, made.shape[-1])
  return Codes(
      codes(found.images), found.labels,
      codes(np.ascontiguousarray(found.images[:, :, ::-1]))
      if mirrored else None)


if __name__ == '__main__':
  cli.run(main)
