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
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from specjax.data.image_batches import Batches
from specjax.eval import pictures
from specjax.fit.step import Fitter
from specjax.fit.vq import VQObjective
from specjax.host import cli, images
from specjax.io import output
from specjax.models.vq import VQConfig
from specjax.parallel import rules
from train import image_data, log, loop

_FLAGS = cli.define_flags('out/vq')
# Images of the figure.
_SHOWN = 8


def main() -> int:
  """Runs the program; returns the exit code."""
  config, quiet = _FLAGS.config.value, _FLAGS.quiet.value
  loop.check(config)
  out = output.prepare(_FLAGS.out.value)
  stop = loop.Stop()
  cli.start(_FLAGS.distributed.value)
  mesh = cli.mesh(config.mesh)
  quiet = quiet or jax.process_index() > 0
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


class Run(loop.Run):
  """A tokenizer in training."""

  def __init__(
      self, config: Any, data: image_data.Data,
      mesh: jax.sharding.Mesh | None, out: Path,
  ):
    """Prepares a run; nothing is compiled yet."""
    super().__init__(config)
    self.data, self.mesh, self.out = data, mesh, out
    model = config.model.to_dict()
    shape = VQConfig(**{**model, 'multipliers': tuple(model['multipliers'])})
    for side in data.train.size:
      if side % shape.factor:
        raise ValueError(
            f'config.model.multipliers={shape.multipliers}: images of '
            f'{side} pixels do not divide by {shape.factor}')
    self.objective = VQObjective(shape, **config.loss.to_dict())
    self.fitter = Fitter(self.objective, loop.optimiser(config.optimizer),
                         config.decay)
    self.batches = Batches(data.train, config.batch_size, config.seed)
    self._key = jax.random.key(config.seed)

  def fresh(self) -> Any:
    """Returns the state before the first step."""
    state = jax.jit(self.fitter.init)(self._key)
    return state if self.mesh is None else rules.on_mesh(state, self.mesh)

  def abstract(self) -> Any:
    """Returns the shapes of `fresh`."""
    return jax.eval_shape(self.fitter.init, self._key)

  def step(self, state: Any, step: int) -> tuple[Any, Any, int]:
    """Returns `(state, report, images)` after step number `step`."""
    batch = place({'image': self.batches.batch(step)['image']}, self.mesh)
    state, report = self.fitter.step(
        state, batch, self._key, self.rates[step])
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

  def batch_name(self, step: int) -> str:
    """Returns which batch step number `step` saw."""
    return f'batch {step} of seed {self.config.seed}'


def place(batch: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """Puts a batch on the devices, rows over 'data'."""
  if mesh is None:
    return jax.device_put(batch)
  by_rows = NamedSharding(mesh, PartitionSpec('data'))
  return rules.put(batch, jax.tree.map(lambda _: by_rows, batch))


if __name__ == '__main__':
  cli.run(main)
