"""Calibrates a confidence head: `python -m train.calibrate --config ...`.

    python -m train.calibrate --config configs/drafter_smollm2.py \\
        --config.data.rollouts=out/text --drafter out/dspark/drafter \\
        --out out/calibrated

For a drafter that exists; `train.drafter` ends with the same. Decodes held-out
prompts (`config.data`, `config.eval`) with the drafter, fits a temperature for
each slot, and writes a copy of the drafter with them to `--out`, in `drafter`.
Its weights stay what they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags
import jax

from specjax.core.types import Models
from specjax.distill import confidence, measure
from specjax.host import cli
from specjax.host import drafter as drafter_lib
from specjax.host.load import Model
from specjax.io import drafter_file, output
from specjax.models import trained
from train import text as text_lib
from train.run import load_target

_FLAGS = cli.define_flags('out/calibrated')
_DRAFTER = flags.DEFINE_string('drafter', None, 'Folder of the drafter.')


def main() -> int:
  """Runs the program; returns the exit code."""
  config, folder = _FLAGS.config.value, check(_DRAFTER.value)
  out = output.prepare(_FLAGS.out.value)
  cli.start(_FLAGS.distributed.value)
  mesh = cli.mesh(config.mesh)
  quiet = _FLAGS.quiet.value or jax.process_index() > 0
  target = load_target(config, mesh, quiet)
  loaded = drafter_lib.load_drafter(folder, target)
  text = text_lib.read(config, target, config.seed)
  found = calibrate(config, target, loaded, text)
  if jax.process_index() == 0:
    keep(folder, out / 'drafter', found)
  cli.note(f'calibration error of the confidence head: {found.describe()}, '
           f'{found.rounds} rounds; wrote {out}/drafter', quiet)
  return 0


def check(folder: str | None) -> Path:
  """Returns the folder of a drafter that can be calibrated.

  Raises:
    ValueError: none is given, it is not ours, or it has no confidence head.
  """
  if folder is None:
    raise ValueError('--drafter: give the folder of a drafter')
  if drafter_file.whose(folder) == 'other':
    raise ValueError(f'{folder}: a drafter of another project; convert it '
                     'first (train.export --format specjax)')
  facts = drafter_file.read(folder)[2]
  if not confidence.has_head(trained.from_values(facts['model'])):
    raise ValueError(f'{folder}: this drafter ({facts["kind"]}) has no '
                     'confidence head, nothing to calibrate')
  return Path(folder)


def calibrate(
    config: Any, target: Model, loaded: drafter_lib.Loaded,
    text: text_lib.Text,
) -> confidence.Calibration:
  """Returns what decoding the held-out prompts says."""
  return confidence.calibrate(
      loaded.source.model, target.lm,
      Models(target=target.params, drafter=loaded.params),
      measure.context(
          text.prompts, config.eval.new_tokens, eos=target.eos,
          temperature=config.eval.temperature, seed=config.seed),
      chunk=min(128, target.lm.chunk))


def keep(folder: Path, out: Path, found: confidence.Calibration) -> None:
  """Writes a copy of a drafter with temperatures."""
  facts = drafter_file.read(folder)[2]
  model = confidence.calibrated(
      trained.from_values(facts['model']), found.temperatures)
  drafter_file.copy(folder, out, {
      **facts, 'model': trained.to_values(model),
      'metrics': {**facts.get('metrics', {}),
                  'calibration': found.to_values()}})


if __name__ == '__main__':
  cli.run(main)
