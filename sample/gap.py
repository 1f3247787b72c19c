"""How near acceptance rules come to the optimal-transport bound.

  python -m sample.gap --out out/gap.json

On random laws and on laws of SmolLM2-135M (the target after a whole text, the
draft's the same model when it sees only the last few tokens): acceptance at
one position of each rule, the bound for the way in which its drafts are
drawn, and how often greedy multi-draft beats recursive rejection. Takes tens of
minutes on two CPU cores with the default numbers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import numpy as np

import specjax
from specjax import verify
from specjax.certificates import gap
from specjax.data import builtin
from specjax.host import cli
from specjax.host import laws as laws_lib
from specjax.host import results as results_lib
from specjax.io import output

# Name in plots -> rule, kind of draft.
RULES = {
    'recursive, i.i.d.': ('speculative', 'iid'),
    'k-SEQ': ('k_seq', 'iid'),
    'recursive, no repl.': ('speculative', 'without_replacement'),
    'greedy multi-draft': ('greedy_multi_draft', 'top_plus_one'),
    'top-n': ('match', 'point')}


def compare(p, q, counts, num_samples: int) -> dict:
  """Returns acceptance and bounds of all rules: {n: {rule: figures}}."""
  out: dict = {'num_laws': len(p), 'num_samples': num_samples,
               'single_draft': float(np.minimum(p, q).sum(axis=1).mean())}
  for count in counts:
    rows, means = {}, {}
    for name, (rule, kind) in RULES.items():
      got, error = gap.measure(
          verify.get(rule), kind, p, q, count, num_samples=num_samples)
      best = np.asarray(gap.bound(p, q, count, kind))
      means[name] = got, error
      rows[name] = {
          'acceptance': float(got.mean()),
          'standard_error': float(np.sqrt((error**2).mean() / len(p))),
          'bound': float(best.mean()),
          'gap': float((best - got).mean()),
          'worst_excess_sigma': float(
              ((got - best) / np.maximum(error, 1e-4)).max())}
    a, ea = means['greedy multi-draft']
    b, eb = means['recursive, no repl.']
    sure = 3 * np.sqrt(ea**2 + eb**2)
    rows['greedy multi-draft against recursive, no repl.'] = {
        'better': float((a > b + sure).mean()),
        'worse': float((a < b - sure).mean())}
    out[str(count)] = rows
  return out


def real_laws(window: int, temperature: float, most: int):
  """Returns pairs of SmolLM2's laws on the built-in texts."""
  model = specjax.load('smollm2-135m-instruct', quiet=True)
  assert model.tokenizer is not None
  texts = [model.tokenizer.encode(t)[:160]
           for prompt in builtin.QUICKSTART for t in prompt.turns or ()]
  p, q = laws_lib.model_laws(
      model, texts, window=window, temperature=temperature)
  pick = np.random.default_rng(0).permutation(len(p))[:most]
  return p[pick], q[pick]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True)
  parser.add_argument('--num_laws', type=int, default=200)
  parser.add_argument('--num_samples', type=int, default=4096)
  args = parser.parse_args()
  sections = {}
  for closeness in (0.2, 0.5, 0.8):
    p, q = gap.random_laws(args.num_laws, 64, 0.3, closeness)
    sections[f'random, V 64, q = {closeness} p + ...'] = compare(
        p, q, (2, 3, 4), args.num_samples)
  for window, temperature in ((4, 1.0), (16, 1.0), (16, 0.6)):
    p, q = real_laws(window, temperature, args.num_laws)
    sections[f'SmolLM2, draft sees {window} tokens, T {temperature}'] = (
        compare(p, q, (2, 3, 4), args.num_samples))
  path = pathlib.Path(args.out)
  path.parent.mkdir(parents=True, exist_ok=True)
  output.write_json(path, {
      'command': f'python -m sample.gap --num_laws {args.num_laws} '
                 f'--num_samples {args.num_samples}',
      'device': results_lib.device_name(),
      'versions': results_lib.versions(), 'sections': sections})
  for name, section in sections.items():
    print(name, json.dumps(section, indent=1))


if __name__ == '__main__':
  sys.exit(cli.reported(main))
