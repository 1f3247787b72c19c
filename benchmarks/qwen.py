"""Qwen2.5-Coder-1.5B on HumanEval: our drafters, Hugging Face, one run.

  python -m benchmarks.qwen --drafter out/dspark_qwen/drafter \
      --questions humaneval.jsonl --out docs/results/h200_qwen.json

Greedy, batch 1: plain decoding, a trained drafter in several shapes, the 0.5B
model as an independent drafter, and transformers' own generate on the same
weights and device: plain, and assisted by the 0.5B model. Ratios are taken
inside each library, then across: milliseconds a token without the prompt
(of transformers: the time for one token is taken off). Rows of the questions
file are `{"turns": [...]}`. Each part is written when it is finished; the
same command goes on after an interruption.

  python -m benchmarks.qwen --target tiny --drafter tiny --small tiny \
      --out out/try.json --new_tokens 8 --num_questions 2 --slots 512
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from benchmarks import huggingface, setup, support
from specjax.host import cli, methods

# Shapes of the trained drafter, and lengths of the independent one.
_SHAPES: dict[str, dict[str, Any]] = {
    'plain': {},
    'drafter, chain': {'model': '{dir}'},
    'drafter, tree of 15': {
        'model': '{dir}', 'use_dynamic_tree': True, 'tree_depth': 6,
        'tree_top_k': 4, 'num_speculative_tokens': 15},
    'drafter, tree of 24': {
        'model': '{dir}', 'use_dynamic_tree': True, 'tree_depth': 7,
        'tree_top_k': 8, 'num_speculative_tokens': 24},
    'drafter, tree of 31': {
        'model': '{dir}', 'use_dynamic_tree': True, 'tree_depth': 8,
        'tree_top_k': 8, 'num_speculative_tokens': 31},
    'drafter, tree of 24, no copies': {
        'model': '{dir}', 'use_dynamic_tree': True, 'tree_depth': 7,
        'tree_top_k': 8, 'num_speculative_tokens': 24, 'copy_max': 0},
    '0.5B, chain of 3': {'model': '{small}', 'num_speculative_tokens': 3},
    '0.5B, chain of 5': {'model': '{small}', 'num_speculative_tokens': 5}}


def made(model, small, loaded, only: str) -> dict[str, tuple[Any, Any]]:
  """Returns `(drafter, params)` by name; plain decoding is the first."""
  wanted = only.split(';') if only else list(_SHAPES)
  out = {}
  for name in dict.fromkeys(['plain', *wanted]):
    config = dict(_SHAPES[name]) or {'method': 'null'}
    if config.get('model') == '{dir}':
      if loaded is None:
        continue
      config['model'] = loaded
      config['tree_depth'] = min(
          config.get('tree_depth', 0), loaded.num_draft) or None
    elif config.get('model') == '{small}':
      config['model'] = small
    out[name] = methods.build(config, model)
  return out


def ours(model, kinds: dict[str, tuple[Any, Any]], asked, args, save):
  """Measures our drafters, question by question in turn."""
  runners = [support.Runner(name, model, d, p, 0.0, args.new_tokens)
             for name, (d, p) in kinds.items()]

  def done(number: int) -> None:
    if number % 20 == 0:
      save(report(runners) | {'unfinished': number})

  support.take_turns(runners, asked, args.threads, done)
  return report(runners)


def report(runners: list[support.Runner]) -> dict[str, Any]:
  """Returns the figures of all drafters so far."""
  return {r.name: {
      **support.summary(r, runners[0]),
      'ms_a_token': 1e3 * sum(x['seconds'] for x in r.rows) / sum(
          x['tokens'] for x in r.rows)} for r in runners}


def hugging_face(model, small, asked, plain, args) -> dict[str, Any]:
  """Measures transformers' generate, plain and assisted.

  Args:
    model, small: target and assistant. asked: questions.
    plain: our plain decoding's milliseconds a token, of the same run.
    args: the options.
  """
  import torch

  net, assistant = (huggingface.to_torch(m) for m in (model, small))
  device = huggingface.device()
  options = dict(do_sample=False, use_cache=True)

  def timed(ids, **kwargs) -> tuple[float, list[int]]:
    if device == 'cuda':
      torch.cuda.synchronize()
    begin = time.perf_counter()
    with torch.inference_mode():
      out = net.generate(
          ids, attention_mask=torch.ones_like(ids), **options, **kwargs)
    tokens = out[0, ids.shape[1]:].tolist()  # waits
    return time.perf_counter() - begin, tokens

  rows: dict[str, list[dict[str, Any]]] = {}
  modes: dict[str, dict[str, Any]] = {
      'plain': {}, 'assisted': {'assistant_model': assistant}}
  for number, question in enumerate([asked[0], *asked]):
    ids = torch.tensor([list(question.tokens)], device=device)
    for name, extra in modes.items():
      first, _ = timed(ids, max_new_tokens=1)
      seconds, tokens = timed(ids, max_new_tokens=args.new_tokens, **extra)
      if number:  # the first is a warm-up
        rows.setdefault(name, []).append({
            'seconds': seconds, 'first': first, 'text': tokens})
  out = {name: _figures(found) for name, found in rows.items()}
  for row in out.values():
    row['speedup'] = out['plain']['ms_a_token'] / row['ms_a_token']
    row['over_our_plain'] = plain / row['ms_a_token']
  out['assisted']['same_text_as_plain'] = sum(
      a['text'] == b['text']
      for a, b in zip(rows['plain'], rows['assisted'], strict=True))
  return out


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
  tokens = sum(max(len(r['text']) - 1, 0) for r in rows)
  decoding = sum(max(r['seconds'] - r['first'], 0.0) for r in rows)
  return {
      'ms_a_token': 1e3 * decoding / max(tokens, 1),
      'ms_a_token_with_prompt': 1e3 * sum(r['seconds'] for r in rows) / max(
          sum(len(r['text']) for r in rows), 1),
      'first_token_ms': setup.spread([1e3 * r['first'] for r in rows]),
      'questions': len(rows), 'tokens': tokens}


def parse(arguments=None) -> argparse.Namespace:
  """Returns the options."""
  parser = support.options(
      __doc__, target='qwen2.5-coder-1.5b-instruct', drafter='',
      num_questions=164, slots='768,1536')
  parser.add_argument('--small', default='qwen2.5-coder-0.5b-instruct')
  parser.add_argument('--only', default='', help='shapes, by semicolons')
  parser.add_argument('--hf_questions', type=int, default=24)
  return parser.parse_args(arguments)


def main(arguments=None) -> None:
  """Runs the program."""
  args = parse(arguments)
  model, small = support.load(args.target), support.load(args.small)
  loaded = support.drafter(model, args.drafter) if args.drafter else None
  asked, dropped = support.questions(
      model, args.questions, args.num_questions,
      [int(s) for s in args.slots.split(',')], args.new_tokens)
  done = support.record(args.out, {
      **{name: getattr(args, name) for name in (
          'target', 'small', 'only', 'num_questions', 'hf_questions',
          'new_tokens', 'slots')},
      'asked': len(asked), 'too_long': dropped, 'batch': 1,
      'temperature': 0, 'dtype': model.lm.config.dtype})
  sections = done.data['sections']

  def save(value: Any) -> None:
    sections['specjax'] = value
    done.save()

  if 'unfinished' in sections.get('specjax', {'unfinished': 0}):
    save(ours(model, made(model, small, loaded, args.only), asked, args,
              save))
  for name, row in sections['specjax'].items():
    print(f'{name:24s} tau {row["tau"]:.3f}, {row["ms_a_token"]:.3f} ms a '
          f'token, {row["speedup"]:.3f}x', flush=True)
  if 'transformers' not in sections and args.hf_questions:
    step = max(len(asked) // args.hf_questions, 1)
    done.add('transformers', hugging_face(
        model, small, asked[::step][:args.hf_questions],
        sections['specjax']['plain']['ms_a_token'], args))


if __name__ == '__main__':
  sys.exit(cli.reported(main))
