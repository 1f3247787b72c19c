"""The model card of a trained drafter, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
import json
from pathlib import Path
import sys
from typing import Any

import jax

from specjax import version
from specjax.eval import training
from specjax.host.load import Model
from specjax.io import output
from train.log import Metrics


def write(
    folder: Path, config: Any, scores: Mapping[str, Any],
    text: Mapping[str, Any], metrics: Metrics, target: Model,
) -> None:
  """Writes `MODEL_CARD.md` and the figures beside the drafter."""
  title = f'{config.kind} for {target.name}'
  figures = training.draw(
      metrics.of('train'), metrics.of('eval'), folder, title)
  output.write_text(
      folder / 'MODEL_CARD.md',
      _card(config, scores, text, target, [p.name for p in figures]))


def _card(config, scores, text, target, figures) -> str:
  origin = text['origin']
  command = 'python -m train.drafter ' + ' '.join(sys.argv[1:])
  device = jax.devices()[0]
  lines = [
      f'# A drafter for {target.name}: {config.kind}', '',
      'Drafts for this target only; with an exact rule the text is the '
      "target's own. Load it with the speculative configuration", '',
      '```json', json.dumps({'method': config.kind, 'model': 'FOLDER'}),
      '```', '', '## Scores', '',
      '| | |', '| --- | --- |',
      f'| tokens a round (tau), {_how(config.eval.temperature)}, held-out '
      'prompts | '
      f'{scores["tau"]:.3f} |',
      f'| the same with the weights as saved ({config.save.form}) | '
      f'{scores["saved_tau"]:.3f} |',
      f'| accepted by position, given those before | '
      f'{_percent(scores["conditional"])} |',
      f'| teacher-forced acceptance by position, held-out text | '
      f'{_percent(scores["held_out"]["acceptance"])} |',
      *_confidence(scores),
      f'| tokens that can be drafted | {scores["draft_vocab_size"]}, '
      f'{scores["held_out_coverage"]:.2%} of held-out text |', '',
      f'Measured on {config.eval.num_prompts} prompts at most, '
      f'{config.eval.new_tokens} new tokens each.', '', '## Training', '',
      f'{scores["step"]} steps of {config.batch_size} rows of '
      f'{config.data.length} tokens in {scores["minutes"]:.1f} minutes on '
      f'{jax.device_count()} {device.device_kind} (specjax '
      f'{version.__version__}, jax {jax.__version__}), seed {config.seed}:',
      '', '```sh', command, '```', '', '## Text', '',
      f'{text["texts"]} texts, {text["supervised_tokens"]} tokens that the '
      f'target generated itself; {text["held_out_texts"]} texts held out.', '']
  for key in ('target', 'revision', 'chat_template', 'prompts_dropped'):
    if origin.get(key):
      lines.append(f'* {key}: `{origin[key]}`')
  lines += ['', *(f'![{name}]({name})' for name in figures), '']
  return '\n'.join(lines)


def _confidence(scores: Mapping[str, Any]) -> list[str]:
  """Returns the row of a confidence head, if there is one."""
  if 'calibration' not in scores:
    return []
  return ['| calibration error of the confidence head by position, before | '
          f'{_percent(scores["calibration"]["before"])} |',
          '| the same after calibration | '
          f'{_percent(scores["calibration"]["after"])} |']


def _how(temperature: float) -> str:
  return f'temperature {temperature:g}' if temperature else 'greedy'


def _percent(values) -> str:
  return ' '.join(f'{100 * x:.1f}' for x in values) + ' %'
