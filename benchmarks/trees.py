"""Trees on a real model: bits, near-ties, and what exactness costs.

  python -m benchmarks.trees --out docs/results/h100_trees.json

SmolLM2-135M-Instruct, greedy, a tree of 32 drafted nodes.

* step: time of a round without drafts at the block shapes of a chain of 32
  and of the tree, the latter with and without path-ordered attention
  (`CausalLM.exact_trees`), for two capacities.
* bits: a scripted drafter that leads through all parts of the tree, and
  several lookup matches side by side: their texts against those of the null
  drafter at the same shape, for both kinds of attention, and against decoding
  token by token. Where they differ: position, top-2 gap, rounding.
* own: the model as its own drafter (top-k tree, grown tree).

Exits non-zero when a text differs that was promised not to, or by more than
rounding explains.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import jax
import numpy as np

from benchmarks import setup, support
import specjax
from specjax.core import loop, topologies
from specjax.core.types import Models
from specjax.data import builtin
from specjax.drafters import (
  GrownLM,
  LookupTree,
  Null,
  ScriptedTree,
  TreeLM,
)
from specjax.host import cli, divergence, tiny

TREE = topologies.sequoia(np.asarray([0.6, 0.15, 0.07, 0.04]), 32)


class Program:
  """A compiled run of one drafter."""

  def __init__(self, model, drafter, prompts, size: int, params=None):
    self.engine = setup.engine(model.lm, drafter)
    self.params = Models(target=model.params, drafter=params)
    self.run, _ = loop.compiled()
    self.make = lambda script=None, prefill=True: setup.state(
        self.engine, vocab_size=model.vocab_size, batch=len(prompts),
        size=size, prompts=prompts, params=self.params, script=script,
        prefill=prefill)
    self.needs_script = isinstance(drafter, ScriptedTree)
    self.size, self.batch = size, len(prompts)

  def compile(self) -> None:
    """Compiles ahead of time."""
    script = np.zeros((self.batch, self.size), np.int32)
    shape = jax.eval_shape(lambda: self.make(
        script if self.needs_script else None, False))
    self.run = self.run.lower(
        self.engine, self.params, shape, np.int32(1)).compile()

  def __call__(self, rounds: int, script=None):
    """Returns the final state."""
    return self.run(self.params, self.make(script), np.int32(rounds))


def with_exact(model):
  """Returns the model with path-ordered tree attention."""
  return dataclasses.replace(
      model, lm=dataclasses.replace(model.lm, exact_trees=True))


def steps(record, model, prompts, args, dtype: str) -> bool:
  """Times rounds without drafts at each block shape."""
  del prompts  # random ones do
  rows = []
  for batch, size in ((1, 512), (1, 2048), (8, 512)):
    prompts = np.random.default_rng(0).integers(3, 1000, (batch, 64))
    programs = {
        'plain': Program(model, Null(0), prompts, size),
        'chain of 32': Program(model, Null(32), prompts, size),
        'tree of 32': Program(model, Null(tree=TREE), prompts, size),
        'tree of 32, exact': Program(
            with_exact(model), Null(tree=TREE), prompts, size)}
    support.compile_all([p.compile for p in programs.values()], 8)
    for name, program in programs.items():
      times = []
      for _ in range(args.repeats + 1):
        state = jax.block_until_ready(program.make(prefill=False))
        seconds, _ = setup.timed(
            program.run, program.params, state, np.int32(args.rounds))
        times.append(seconds / args.rounds * 1e6)
      rows.append({'program': name, 'batch': batch, 'capacity': size,
                   'us': setup.spread(times[1:])})
  record.add(f'step, {dtype}', rows)
  return True


def compare(model, prompts, want, got) -> list[dict[str, Any]]:
  """Returns the first difference of each row, if any."""
  out = []
  for i, prompt in enumerate(prompts):
    a, b = (np.asarray(s.context.tokens[i])[len(prompt):int(min(
        want.context.length[i], got.context.length[i]))].tolist()
        for s in (want, got))
    found = divergence.first_divergence(model, prompt, a, b)
    if found is not None:
      out.append({'row': i, **dataclasses.asdict(found),
                  'is_near_tie': bool(found.is_near_tie)})
  return out


def texts(record, model, prompts, args, dtype: str) -> bool:
  """Compares texts; returns whether all promises were kept."""
  size, fine, rows = args.size, True, []
  lookup = LookupTree((12, 10, 10), 3, 1)
  plain = Program(model, Null(0), prompts, size)
  programs = {
      (name, drafter): Program(lm, drafter, prompts, size)
      for name, lm in (('ordinary', model), ('exact', with_exact(model)))
      for drafter in (Null(tree=TREE), ScriptedTree(TREE, 0.8),
                      Null(tree=lookup.topology), lookup)}
  support.compile_all(
      [p.compile for p in (plain, *programs.values())], 8)
  single = plain(size)
  for (name, drafter), program in programs.items():
    if isinstance(drafter, Null):
      reference = program(size)
      script = np.asarray(reference.context.tokens)
      continue
    got = program(size, script if program.needs_script else None)
    made = int((got.context.length - got.context.prompt_length).sum())
    differ = compare(model, prompts, reference, got)
    others = compare(model, prompts, single, got)
    fine &= all(d['is_near_tie'] for d in differ + others)
    fine &= name != 'exact' or not differ
    rows.append({
        'attention': name, 'drafter': type(drafter).__name__,
        'rows': len(prompts), 'new_tokens': made,
        'tokens_a_round': made / int(got.context.rounds.sum()),
        'accepted_by_rank': np.asarray(got.metrics.ranks).sum(
            axis=(0, 1)).tolist(),
        'differences_same_shape': differ,
        'differences_from_one_token_decoding': others})
  record.add(f'bits, {dtype}', rows)
  return fine


def own(record, model, prompts, args, dtype: str) -> bool:
  """Decodes with the model as its own drafter (slow to compile)."""
  size, fine, rows = args.size, True, []
  cases = {
      'null': (Null(0), None),
      'top-k tree of 32': (TreeLM(
          tree=TREE, model=model.lm, draft_sample_method='top_k'),
          model.params),
      'grown tree of 32': (GrownLM(32, model.lm, 5, 4), model.params)}
  programs = {k: Program(model, d, prompts, size, p)
              for k, (d, p) in cases.items()}
  support.compile_all([p.compile for p in programs.values()], 8)
  plain = programs['null'](size)
  for name, program in programs.items():
    got = program(size)
    made = int((got.context.length - got.context.prompt_length).sum())
    differ = compare(model, prompts, plain, got)
    fine &= all(d['is_near_tie'] for d in differ)
    rows.append({
        'drafter': name, 'new_tokens': made,
        'tokens_a_round': made / int(got.context.rounds.sum()),
        'differences_from_one_token_decoding': differ})
  record.add(f'own drafter, {dtype}', rows)
  return fine


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True)
  parser.add_argument('--target', default='smollm2-135m-instruct')
  parser.add_argument('--dtypes', default='bfloat16,float32')
  parser.add_argument('--sections', default='step,bits,own')
  parser.add_argument('--size', type=int, default=448)
  parser.add_argument('--rounds', type=int, default=100)
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  record, fine = setup.Record(args.out), True
  sections = {'step': steps, 'bits': texts, 'own': own}
  for dtype in args.dtypes.split(','):
    if args.target == 'random':
      model = tiny.model()
      prompts = [[5, 9, 5, 9, 5], [7, 7, 8]]
    else:
      model = specjax.load(args.target, dtype=dtype, quiet=True)
      prompts = [model.tokenizer.encode(p.turns[0])[:96]
                 for p in builtin.QUICKSTART]
    for section in args.sections.split(','):
      fine &= sections[section](record, model, prompts, args, dtype)
  return 0 if fine else 1


if __name__ == '__main__':
  sys.exit(cli.reported(main))
