"""Trains a drafter: `python -m train.drafter --config configs/...`.

Reads rollouts of the target, trains, measures acceptance with the decoder
itself on held-out prompts, and writes the drafter, its scores, a model card
and figures to `--out`. A run that is interrupted, started again with the same
config, goes on exactly where it stopped.
"""

from __future__ import annotations

from pathlib import Path
import tempfile
from typing import Any

import jax

from specjax.data import conversations
from specjax.distill import confidence, kinds
from specjax.distill.trainer import Trainer
from specjax.host import cli
from specjax.host import drafter as drafter_lib
from train import card, log, loop
from train import text as text_lib
from train.run import Run, load_target

_FLAGS = cli.define_flags('out/drafter')


def main() -> int:
  """Runs the program; returns the exit code."""
  config, out, stop, mesh, quiet = loop.begin(_FLAGS)
  target = load_target(config, mesh, quiet)

  # --- Text -----------------------------------------------------------
  text = text_lib.read(config, target, config.seed)
  ids, vocab = text_lib.vocabulary(text, target, config.draft_vocab_size)
  cli.note(
      f'{text.facts["texts"]} texts, {text.facts["supervised_tokens"]} tokens '
      f'to learn from; {len(ids)} tokens can be drafted: '
      f'{vocab["held_out_coverage"]:.2%} of the held-out text', quiet)

  dropped = conversations.describe(text.facts['eval_prompts_dropped'])
  if dropped:
    cli.note(f'{config.eval.prompts}: dropped {dropped}', quiet)

  # --- Task, and training ---------------------------------------------
  task = kinds.build(
      config.kind, target.lm.config, len(ids), **{
          name: config[name].to_dict() for name in ('model', 'task', 'loss')})
  trainer = Trainer(task, target.lm, loop.optimiser(config.optimizer))
  run = Run(trainer, target, ids, text, config, mesh)
  state, metrics, code = loop.complete(
      run, out, text.digest, mesh, stop, quiet)
  if code:
    return code

  # --- Keep -----------------------------------------------------------
  last = {k: v for k, v in metrics.of('eval')[-1].items() if k != 'kind'}
  with tempfile.TemporaryDirectory() as spare:
    # All processes decode with what is loaded again; the first one's stays.
    folder = out if jax.process_index() == 0 else Path(spare)
    keep(run, state, {**vocab, **last}, metrics, folder / 'drafter', quiet)
  return 0


def keep(
    run: Run, state: Any, scores: dict[str, Any], metrics: log.Metrics,
    folder: Path, quiet: bool,
) -> None:
  """Writes the drafter, and what there is to say about it."""
  config, target = run.config, run.target
  form, model = config.save.form, run.trainer.task.model

  def save() -> None:
    drafter_lib.save_drafter(
        folder, model, state.net, run.ids, target,
        kind=config.kind, num_draft=run.num_draft, form=form, facts={
            'metrics': scores, 'config': config.to_dict(),
            'text': run.text.facts})
  save()
  # What users will load, not what was trained: other number formats.
  loaded = drafter_lib.load_drafter(folder, target)
  scores['saved_tau'] = run.decode(loaded.params).tau
  found = run.calibrate(loaded.params)
  if found is not None:
    model = confidence.calibrated(model, found.temperatures)
    scores['calibration'] = found.to_values()
    cli.note(f'calibration error of the confidence head: {found.describe()}',
             quiet)
  save()
  card.write(folder, config, scores, run.text.facts, metrics, target)
  cli.note(f'tau {scores["tau"]:.3f}, {scores["saved_tau"]:.3f} as saved '
           f'({form}); wrote {folder}', quiet)


if __name__ == '__main__':
  cli.run(main)
