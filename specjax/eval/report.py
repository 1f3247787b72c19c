"""Benchmark results for people and for Spec-Bench: Markdown, answer files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import time
from typing import Any
import uuid

from specjax.eval.speed import OVERALL

_DEFINITIONS = '''\
Plain decoding is the same engine without drafts, compiled as well, and runs
in turn with the others. Values are medians over {repeats} repeats, with
(smallest–largest); each run is compiled and warmed up before that.

* **speed-up**: mean over prompts of tokens/s, divided by that of plain
  decoding (Spec-Bench's ratio of means). **per prompt**: the mean of the
  prompts' own speed-ups. **wall clock**: all tokens over the time of the
  whole run, divided by that of plain decoding.
* **tokens/s**: all tokens over the time of the whole run. **TTFT**: from
  admission to the first token. **TPOT**: time for each further token.
* **tokens/round**: emitted tokens over calls of the target, the corrected or
  bonus token included (mean acceptance length; plain decoding is 1).
* **drafts kept**: accepted over drafted tokens.
* **same text**: share of answers equal to plain decoding's, token for token.
  The law of the text is the same under an exact rule; the block is wider, so
  with rounding a near-tie can fall the other way.
* **joint** acceptance at position i: share of rounds whose first i drafts
  were all accepted. **conditional**: share of drafts at i that were accepted
  where all before them were.
'''


def markdown(report: Mapping[str, Any]) -> str:
  """Returns the content of `bench.md`.

  Args:
    report: what `bench.json` holds: `rows` (see `eval.speed.rows`) and the
      setting that `specjax.bench` describes.
  """
  rows = report['rows']
  whole = [r for r in rows if r['category'] == OVERALL]
  parts = [f"# Speculative decoding of {report['target']}", _setting(report)]
  if report.get('interrupted'):
    parts.append('**Interrupted: only the repeats that were finished.**')
  parts += ['## Overall', _overall(whole)]
  for batch_size in dict.fromkeys(r['batch_size'] for r in rows):
    here = [r for r in rows if r['batch_size'] == batch_size]
    parts += [f'## By category, batch size {batch_size}', _grid(here)]
  parts += ['![speed-up by category](speedup_by_category.png)',
            '## Acceptance by position', _positions(whole),
            '![acceptance by position](acceptance_by_position.png)',
            '## By batch size', '![speed by batch size](speed_by_batch.png)',
            '## What the columns mean',
            _DEFINITIONS.format(repeats=report['num_repeats'])]
  return '\n\n'.join(part.rstrip('\n') for part in parts) + '\n'


def answers(
    measurement: Mapping[str, Any], model_id: str, tstamp: float | None = None
) -> list[dict[str, Any]]:
  """Returns the lines of a Spec-Bench answer file.

  One line per prompt and one choice per sample; times are seconds, lists run
  over turns, and `accept_lengths` over the steps of all turns, in order.

  Args:
    measurement: see `eval.speed`.
    model_id: goes into every line.
    tstamp: seconds since 1970; None is now.
  """
  tstamp = time.time() if tstamp is None else tstamp
  grouped: dict[int, dict[int, list[Mapping[str, Any]]]] = {}
  for answer in measurement['answers']:
    samples = grouped.setdefault(answer['prompt'], {})
    samples.setdefault(answer['stream'], []).append(answer)
  lines = []
  for samples in grouped.values():
    head = next(iter(samples.values()))[0]
    lines.append({
        'question_id': _question_id(head['question_id']),
        'category': head['category'], 'answer_id': uuid.uuid4().hex,
        'model_id': model_id,
        'choices': [_choice(i, turns) for i, turns in sorted(
            samples.items())],
        'tstamp': tstamp})
  return lines


def device(report: Mapping[str, Any]) -> str:
  """Returns the device, with the number of cores where that is a CPU."""
  name = report['device']
  if 'cpu' in name.lower():
    name += f" ({report['num_cpu_cores']} cores)"
  return name


def _choice(index: int, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  turns = sorted(turns, key=lambda t: t['turn'])
  return {
      'index': index,
      'turns': [t['text'] for t in turns],
      'decoding_steps': [t['rounds'] for t in turns],
      'new_tokens': [len(t['tokens']) for t in turns],
      'wall_time': [t['wall_s'] for t in turns],
      'accept_lengths': [
          n for t in turns for n in t['step_lengths']]}


def _question_id(text: str) -> int | str:
  # Spec-Bench's ids are numbers, and its scripts sort by them.
  return int(text) if text.isdecimal() else text


def _setting(report: Mapping[str, Any]) -> str:
  sampling = ', '.join(f'{k}={v}' for k, v in report['sampling'].items())
  versions = ', '.join(f'{k} {v}' for k, v in report['versions'].items())
  counts = ', '.join(
      f'{n} {name}' for name, n in report['num_prompts_by_category'].items())
  skipped = report.get('num_skipped_prompts')
  skipped = f' ({skipped} malformed rows were skipped)' if skipped else ''
  return '\n'.join([
      f"* target: {report['target']}, {report['dtype']}; {device(report)}",
      f"* prompts: {report['num_prompts']} ({counts}){skipped}",
      f'* sampling: {sampling}; {report["num_repeats"]} repeats',
      f'* versions: {versions}',
      f"* command: `{report['command']}`"])


def _overall(rows: Sequence[Mapping[str, Any]]) -> str:
  header = ['run', 'batch', 'speed-up', 'per prompt', 'wall clock',
            'tokens/s', 'tokens/round', 'drafts kept', 'TTFT ms', 'TPOT ms',
            'rounds', 'same text']
  body = [[
      _name(r), str(r['batch_size']), _spread(r, 'speedup', 2),
      _spread(r, 'speedup_mean_of_ratios', 2),
      _spread(r, 'speedup_wall', 2), _spread(r, 'tokens_per_s', 1),
      _number(r['mean_acceptance_length'], 2),
      _percent(r['draft_acceptance_rate']),
      _number(r['ttft_s'], 1, 1e3), _number(r['tpot_s'], 1, 1e3),
      str(r['num_rounds']), _percent(r['same_as_plain'])] for r in rows]
  return _table(header, body)


def _grid(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns categories by runs: speed-up and tokens per round."""
  runs = list(dict.fromkeys(r['run'] for r in rows))
  cells = {(r['category'], r['run']): r for r in rows}
  names = {r['run']: _name(r) for r in rows}
  header = ['category', 'prompts'] + [
      f'{names[run]}: {what}' for run in runs[1:]
      for what in ('speed-up', 'tokens/round')]
  body = []
  for category in dict.fromkeys(r['category'] for r in rows):
    line = [category, str(cells[category, runs[0]]['num_prompts'])]
    for run in runs[1:]:
      row = cells[category, run]
      line += [_spread(row, 'speedup', 2),
               _number(row['mean_acceptance_length'], 2)]
    body.append(line)
  return _table(header, body)


def _positions(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns joint / conditional acceptance at each position."""
  rows = [r for r in rows if r['per_position_acceptance']]
  if not rows:
    return 'No run drafts.'
  width = max(len(r['per_position_acceptance']) for r in rows)
  header = ['run, joint / conditional %', 'batch'] + [
      str(i + 1) for i in range(width)]
  body = []
  for row in rows:
    pairs = zip(row['per_position_acceptance'],
                row['conditional_acceptance'], strict=True)
    cells = [f'{_number(a, 0, 100)} / {_number(b, 0, 100)}'
             for a, b in pairs]
    cells += [''] * (width - len(cells))
    body.append([_name(row), str(row['batch_size']), *cells])
  return _table(header, body)


def _name(row: Mapping[str, Any]) -> str:
  return row['run'] + (' (lossy)' if row.get('lossy') else '')


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
  lines = [header, ['---'] + ['---:'] * (len(header) - 1), *body]
  escaped = [[cell.replace('|', '\\|') for cell in line] for line in lines]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in escaped)


def _spread(row: Mapping[str, Any], name: str, digits: int) -> str:
  low, high = row[f'{name}_min'], row[f'{name}_max']
  text = _number(row[name], digits)
  if low is None or low == high:
    return text
  return f'{text} ({_number(low, digits)}–{_number(high, digits)})'


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
  return '–' if value is None else f'{value * scale:.{digits}f}'


def _percent(value: float | None) -> str:
  return '–' if value is None else f'{100 * value:.0f} %'
