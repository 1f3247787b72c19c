"""Codes by an image decoder: `python -m train.image_rollout --config ...`.

Decodes images of all classes in turn, under guidance, and writes their codes as
a dataset that `train.drafter` learns from: `rollouts.npz` and
`rollouts-held_out.npz` in `--out`, and `rollout.json`. Minutes; an interrupted
run begins again.
"""

from __future__ import annotations

import time

import numpy as np

from specjax.data import filters, store
from specjax.data.store import Record
from specjax.distill import rollout
from specjax.host import cli, image_sampling
from specjax.host import drafter as drafter_lib
from specjax.io import output
from train import answers

_FLAGS = cli.define_flags('out/codes')


def main() -> int:
  """Runs the program; returns the exit code."""
  config, quiet = _FLAGS.config.value, _FLAGS.quiet.value
  check(config)
  out = output.prepare(_FLAGS.out.value)
  if (out / 'rollouts.npz').exists():
    raise ValueError(f'{out}/rollouts.npz exists: give another --out')
  cli.start(_FLAGS.distributed.value)
  target, facts = image_sampling.load_target(
      config.target, dtype=config.dtype, guidance=config.guidance)
  classes, grid = facts['data']['classes'], facts['grid']
  prompts = [np.asarray([target.vocab_size + i % len(classes)], np.int32)
             for i in range(config.num_images)]
  status, begin = answers.Status(quiet), time.monotonic()
  status.begin('images')
  records: list[Record] = []
  for record in rollout.generate(
      target.lm, target.params, prompts, eos=(), settings=rollout.Settings(
          max_new=grid[0] * grid[1], temperatures=(config.temperature,),
          batch=config.batch_size, buckets=(1,), seed=config.seed),
      on_progress=status):
    records.append(record)
  status.end()
  seconds = time.monotonic() - begin
  # In order of the prompts: all classes are on both sides.
  records.sort(key=lambda r: r.prompt_index)
  train, held_out = filters.cut(records, config.held_out)
  about = {
      'target': target.name, 'revision': drafter_lib.fingerprint(target),
      'guidance': config.guidance, 'temperature': config.temperature,
      'grid': list(grid), 'classes': list(classes),
      'texts': {'train': len(train), 'held_out': len(held_out)},
      'tokens_per_s': sum(len(r.answer) for r in records) / seconds}
  store.save_npz(out / 'rollouts-held_out.npz', held_out, about)
  store.save_npz(out / 'rollouts.npz', train, about)
  output.write_json(out / 'rollout.json', about)
  cli.note(f'{len(train)} images to learn from, {len(held_out)} held out, '
           f'{about["tokens_per_s"]:.0f} codes/s; wrote {out}', quiet)
  return 0


def check(config) -> None:
  """Raises ValueError for values that cannot be run."""
  if config.target is None:
    raise ValueError('config.target: give the folder that train.image_ar '
                     'wrote')
  for name, least in (('num_images', 2), ('batch_size', 1)):
    if config[name] < least:
      raise ValueError(f'config.{name}={config[name]}: must be >= {least}')
  if not 0 < config.held_out < 1:
    raise ValueError(f'config.held_out={config.held_out}: must be in (0, 1)')
  if not 0 <= config.temperature < float('inf'):
    raise ValueError(f'config.temperature={config.temperature}: must be >= 0')


if __name__ == '__main__':
  cli.run(main)
