"""Speed-ups over plain decoding, and their spread, from repeated runs.

Machines are noisy, so every repeat of a run is compared with the plain run of
the same repeat, which was taken just before it; what is reported is the
median over repeats, with the smallest and the largest.

A *measurement* is a plain dict, one per (run, batch size, repeat): `run`,
`batch_size`, `repeat`; `wall_s` and `compile_s`, seconds; `figures`, a dict
of acceptance and latency figures for each group (see below); and `answers`,
a list of dicts with `prompt`, `stream`, `turn`, `question_id`, `category`,
`group`, `text`, `tokens`, `rounds`, `step_lengths`, `wall_s`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OVERALL = 'overall'
# Spec-Bench reports its eight MT-bench categories as one.
MT_BENCH = frozenset((
    'writing', 'roleplay', 'reasoning', 'math', 'coding', 'extraction',
    'stem', 'humanities'))


def groups(categories: Sequence[str]) -> list[str]:
  """Returns the group that each prompt is reported in.

  The group is the category; but the eight of MT-bench become 'mt_bench' when
  all of them are there, as in Spec-Bench's own tables.
  """
  if not MT_BENCH <= set(categories):
    return list(categories)
  return ['mt_bench' if c in MT_BENCH else c for c in categories]


def select(
    categories: Sequence[str], wanted: Sequence[str] = (),
    max_prompts: int | None = None,
) -> list[int]:
  """Returns the indices of the prompts to use, in order.

  Args:
    categories: one for each prompt.
    wanted: categories or groups to keep; () keeps all.
    max_prompts: taken from the categories in turn, so that a short run still
      sees each of them; None takes all.

  Raises:
    ValueError: a category that no prompt has, or `max_prompts` < 1.
  """
  names = groups(categories)
  known = list(dict.fromkeys([*categories, *names]))
  for name in wanted:
    if name not in known:
      raise ValueError(f'config.categories: no prompt has category {name!r}; '
                       f'there are {", ".join(known)}')
  if max_prompts is not None and max_prompts < 1:
    raise ValueError(f'config.max_prompts={max_prompts}: must be >= 1')
  seen: dict[str, int] = {}
  ranked = []
  for index, pair in enumerate(zip(categories, names, strict=True)):
    if not wanted or not set(wanted).isdisjoint(pair):
      rank = seen[pair[0]] = seen.get(pair[0], 0) + 1
      ranked.append((rank, index))
  return sorted(index for _, index in sorted(ranked)[:max_prompts])


def rows(
    measured: Sequence[Mapping[str, Any]], plain: str
) -> list[dict[str, Any]]:
  """Returns a row per batch size, run and group, 'overall' first.

  Every row has `speedup` and `mean_acceptance_length`. Speeds are tokens per
  second:

  * `request_tokens_per_s`: mean over prompts of tokens / time in its slot.
  * `speedup`: `request_tokens_per_s` over that of plain decoding (the ratio
    of means that Spec-Bench prints).
  * `speedup_mean_of_ratios`: mean over prompts of their own speed-ups.
  * `tokens_per_s` and `speedup_wall`: all tokens over the time of the whole
    run. Prompts share the clock, so groups have None.
  * `same_as_plain`: share of answers that equal plain decoding's token for
    token. Block shapes differ, so near-ties may fall the other way.

  Speeds and speed-ups come with `_min` and `_max` over repeats.

  Args:
    measured: measurements; plain ones for every batch size and repeat.
    plain: name of the run to compare with.
  """
  out = []
  for batch_size in dict.fromkeys(m['batch_size'] for m in measured):
    here = [m for m in measured if m['batch_size'] == batch_size]
    base = {m['repeat']: m for m in here if m['run'] == plain}
    for run in dict.fromkeys(m['run'] for m in here):
      own = [m for m in here if m['run'] == run]
      for group in own[0]['figures']:
        pairs = [(m, base[m['repeat']]) for m in own]
        out.append(_row(pairs, group))
  return out


def median_repeat(
    measured: Sequence[Mapping[str, Any]], run: str, batch_size: int
) -> Mapping[str, Any]:
  """Returns the repeat of a run whose wall time is the (lower) median."""
  own = [m for m in measured
         if m['run'] == run and m['batch_size'] == batch_size]
  return sorted(own, key=lambda m: m['wall_s'])[(len(own) - 1) // 2]


def _row(pairs, group: str) -> dict[str, Any]:
  """Returns the row of one run; `pairs` are (measurement, plain)."""
  first, plain = pairs[0]
  figures = first['figures'][group]
  speeds = [(_speeds(m, group), _speeds(b, group)) for m, b in pairs]
  means = [(_mean(a), _mean(b)) for a, b in speeds]
  units = {(a['prompt'], a['stream']) for a in _answers(first, group)}
  row = {
      'run': first['run'], 'batch_size': first['batch_size'],
      'category': group,
      'num_prompts': len({prompt for prompt, _ in units}),
      'num_repeats': len(pairs)}
  row |= _spread('speedup', [a / b for a, b in means])
  row |= _spread('speedup_mean_of_ratios', [
      _mean({u: a[u] / b[u] for u in a}) for a, b in speeds])
  row |= _spread('request_tokens_per_s', [a for a, _ in means])
  totals = [_total_speed(m) for m, _ in pairs]
  whole = group == OVERALL
  row |= _spread('tokens_per_s', totals if whole else [])
  row |= _spread('speedup_wall', [
      a / _total_speed(b) for a, (_, b) in zip(totals, pairs, strict=True)
  ] if whole else [])
  row['same_as_plain'] = _same(_answers(first, group), _answers(plain, group))
  row |= figures
  for name in ('ttft_s', 'tpot_s'):
    row[name] = _median([m['figures'][group][name] for m, _ in pairs])
  if whole:
    row['compile_s'] = first['compile_s']
    row['wall_s'] = _median([m['wall_s'] for m, _ in pairs])
  return row


def _answers(measurement, group: str) -> list[Mapping[str, Any]]:
  return [a for a in measurement['answers']
          if group in (OVERALL, a['group'])]


def _speeds(measurement, group: str) -> dict[tuple[int, int], float]:
  """Returns tokens/s of each sample of each prompt, over all its turns."""
  new: dict[tuple[int, int], int] = {}
  time: dict[tuple[int, int], float] = {}
  for answer in _answers(measurement, group):
    unit = answer['prompt'], answer['stream']
    new[unit] = new.get(unit, 0) + len(answer['tokens'])
    time[unit] = time.get(unit, 0.0) + answer['wall_s']
  return {unit: new[unit] / max(time[unit], 1e-9) for unit in new}


def _total_speed(measurement) -> float:
  new = sum(len(a['tokens']) for a in measurement['answers'])
  return new / max(measurement['wall_s'], 1e-9)


def _same(answers, plain) -> float:
  """Returns the share of equal answers; both are in the same order."""
  equal = [a['tokens'] == b['tokens']
           for a, b in zip(answers, plain, strict=True)]
  return float(np.mean(equal))


def _mean(values: Mapping[Any, float]) -> float:
  return float(np.mean(list(values.values())))


def _median(values: Sequence[float | None]) -> float | None:
  known = [v for v in values if v is not None]
  return float(np.median(known)) if known else None


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
  """Returns `name` (the median), `name_min` and `name_max`."""
  return {
      name: _median(values),
      f'{name}_min': min(values) if values else None,
      f'{name}_max': max(values) if values else None}
