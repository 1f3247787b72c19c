"""Step times of plain and padded decoding, and of what surrounds them.

  python -m benchmarks.decode --out docs/results/h100_decode.json \
      --sections loop,shape7b,batch,lookup,hf,profile --questions FILE

Each section is one comparison in one run; machines are shared, so ratios
count. Figures are medians with minimum, maximum and number of repeats.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import setup, support
import specjax
from specjax.core import loop
from specjax.core.types import Models
from specjax.data import builtin
from specjax.drafters import Lookup, Null
from specjax.host import cli, tiny
from specjax.host.load import random_model
from specjax.models.attention import Block
from specjax.models.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Where:
  """Slot size and prompt length in tokens; steps timed at a time."""

  size: int
  prompt: int
  steps: int


def prompts_of(batch: int, length: int, vocab: int) -> np.ndarray:
  """Returns random prompts int[B,length]."""
  return np.random.default_rng(0).integers(3, vocab, (batch, length))


def bare_loop(lm, params, cache, token, position, steps):
  """A hand-written greedy loop around the same model: the floor."""
  def body(carry):
    i, token, position, cache, out = carry
    block = Block(base=position, position=position[:, None])
    logits, _, cache = lm.forward(params, cache, token, block)
    token = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)[:, None]
    return i + 1, token, position + 1, cache, out.at[:, i].set(token[:, 0])

  out = jnp.zeros((token.shape[0], 4096), jnp.int32)
  return jax.lax.while_loop(lambda c: c[0] < steps, body,
                            (0, token, position, cache, out))


class Bare:
  """The hand-written loop, compiled once."""

  def __init__(self, model, batch: int, where: Where):
    self.model, self.batch, self.where = model, batch, where
    self.run = jax.jit(bare_loop, static_argnums=0, donate_argnums=2)
    self.token = jnp.ones((batch, 1), jnp.int32)
    self.position = jnp.full((batch,), where.prompt, jnp.int32)
    self.cache = model.lm.empty(batch, where.size + 1)['cache']

  def compile(self) -> None:
    """Compiles ahead of time."""
    self.run = self.run.lower(
        self.model.lm, self.model.params, self.cache, self.token,
        self.position, np.int32(self.where.steps)).compile()

  def __call__(self) -> float:
    """Runs `steps` steps; returns seconds a step."""
    seconds, out = setup.timed(
        self.run, self.model.params, self.cache, self.token, self.position,
        np.int32(self.where.steps))
    self.cache = out[3]
    return seconds / self.where.steps


class Padded:
  """The library's loop with a null drafter of width K, compiled once."""

  def __init__(self, model, batch: int, where: Where, width: int):
    self.where = where
    self.engine = setup.engine(model.lm, Null(width))
    self.params = Models(target=model.params)
    self.run, _ = loop.compiled()
    self.start = lambda: setup.state(
        self.engine, vocab_size=model.vocab_size, batch=batch,
        size=where.size, params=self.params, prefill=False,
        prompts=prompts_of(batch, where.prompt, model.vocab_size))

  def compile(self) -> None:
    """Compiles ahead of time."""
    self.run = self.run.lower(
        self.engine, self.params, jax.eval_shape(self.start),
        np.int32(self.where.steps)).compile()

  def __call__(self) -> float:
    """Runs `steps` rounds from a fresh state; returns seconds a round."""
    state = jax.block_until_ready(self.start())
    seconds, _ = setup.timed(
        self.run, self.params, state, np.int32(self.where.steps))
    return seconds / self.where.steps


def paired(runners: dict[str, Any], repeats: int) -> dict[str, Any]:
  """Times runners in turn; medians in ms, ratios to the first, pair by pair.
  """
  times: dict[str, list[float]] = {name: [] for name in runners}
  for run in runners.values():
    run()  # warms up
  for _ in range(repeats):
    for name, run in runners.items():
      times[name].append(run() * 1e3)
  first = next(iter(times))
  ratio = {name: setup.spread([a / b for a, b in zip(t, times[first])])
           for name, t in times.items() if name != first}
  return {'ms': {n: setup.spread(t) for n, t in times.items()},
          f'ratio_to_{first}': ratio}


def section_loop(model, repeats: int, where: Where):
  """The cost of the loop, and of 16 query tokens instead of one."""
  runners = {
      'bare': Bare(model, 1, where),
      'null_k0': Padded(model, 1, where, 0),
      'null_k7': Padded(model, 1, where, 7),
      'null_k15': Padded(model, 1, where, 15)}
  support.compile_all([r.compile for r in runners.values()], 8)
  return paired(runners, repeats)


def section_batch(model, repeats: int, where: Where, batches):
  """Plain and padded decoding by batch size."""
  out = {}
  runners = {batch: {'null_k0': Padded(model, batch, where, 0),
                     'null_k7': Padded(model, batch, where, 7)}
             for batch in batches}
  support.compile_all(
      [r.compile for both in runners.values() for r in both.values()], 8)
  for batch in batches:
    one = paired(runners[batch], repeats)
    one['tokens_per_s'] = batch / one['ms']['null_k0']['median'] * 1e3
    out[str(batch)] = one
  return out


def section_shape7b(repeats: int, where: Where, layers: int = 32):
  """A Llama-2-7B shape with random bf16 weights: bytes of weights a second.
  """
  config = TransformerConfig(
      vocab_size=32000, num_layers=layers, embed_dim=4096, mlp_dim=11008,
      num_heads=32, num_kv_heads=32, head_dim=128, tied=False,
      dtype='bfloat16')
  model = random_model(config)
  runners = {'null_k0': Padded(model, 1, where, 0),
             'null_k15': Padded(model, 1, where, 15)}
  support.compile_all([r.compile for r in runners.values()], 8)
  out = paired(runners, repeats)
  # One row of the embedding is read, all the rest once a step.
  read = 2 * (config.num_params - config.vocab_size * config.embed_dim)
  out['weight_bytes'] = read
  for name in ('null_k0', 'null_k15'):
    out[f'{name}_tb_per_s'] = read / out['ms'][name]['median'] / 1e9
  source = jnp.zeros((2 << 30,), jnp.bfloat16)
  copy = jax.jit(lambda x: x + 1)
  setup.timed(copy, source)
  best = min(setup.timed(copy, source)[0] for _ in range(10))
  out['copy_tb_per_s'] = 2 * source.nbytes / best / 1e12
  return out


def section_lookup(model, questions: str, per_category: int, repeats: int):
  """Prompt lookup against plain decoding on real questions, batch 1."""
  rows = [json.loads(line) for line in open(questions, encoding='utf-8')]
  out = {}
  for category in ('summarization', 'rag'):
    chosen = [r for r in rows if r['category'] == category][:per_category]
    prompts = [[{'role': 'user', 'content': r['turns'][0]}] for r in chosen]
    sampling = specjax.Sampling(max_new_tokens=256)
    drafters = {'plain': None, 'lookup_k7': Lookup(7, 4, 2),
                'lookup_k15': Lookup(15, 4, 2)}
    speed: dict[str, list[float]] = {name: [] for name in drafters}
    length = {}
    for _ in range(repeats + 1):  # the first compiles
      for name, drafter in drafters.items():
        result = specjax.generate(model, drafter, prompts, sampling,
                                  batch_size=1, capacity=2048)
        summary = result.summary()
        speed[name].append(summary['tokens_per_s'])
        length[name] = summary['mean_acceptance_length']
    plain = speed['plain'][1:]
    out[category] = {
        'num_questions': len(prompts), 'mean_acceptance_length': length,
        'tokens_per_s': {n: setup.spread(s[1:]) for n, s in speed.items()},
        'speedup': {
            n: setup.spread([a / b for a, b in zip(s[1:], plain)])
            for n, s in speed.items() if n != 'plain'}}
  return out


def section_copy(model, repeats: int):
  """Lookup on a copy-heavy prompt (repeat a passage), batch 1, paired."""
  prompt = builtin.QUICKSTART[0]
  sampling = specjax.Sampling(max_new_tokens=96)
  drafters = {'plain': None, 'lookup_k7': Lookup(7, 4, 2)}
  times: dict[str, list[float]] = {name: [] for name in drafters}
  length = {}
  for _ in range(repeats + 1):  # the first compiles
    for name, drafter in drafters.items():
      result = specjax.generate(model, drafter, [prompt], sampling)
      times[name].append(result.wall_s)
      length[name] = result.summary()['mean_acceptance_length']
  ratio = [a / b for a, b in zip(times['plain'][1:], times['lookup_k7'][1:])]
  return {'wall_s': {n: setup.spread(t[1:]) for n, t in times.items()},
          'mean_acceptance_length': length, 'speedup': setup.spread(ratio)}


def section_profile(model, where: Where):
  """Device time of a round by kernel name, from a profiler trace."""
  from benchmarks import profile
  run = Padded(model, 1, where, 0)
  run.compile()
  run()
  state = jax.block_until_ready(run.start())
  return profile.kernels(
      lambda: jax.block_until_ready(
          run.run(run.params, state, np.int32(32))), rounds=32)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--out', required=True)
  parser.add_argument('--target', default='smollm2-135m-instruct')
  parser.add_argument('--sections', default='loop,batch,shape7b,lookup')
  parser.add_argument('--questions', default='')
  parser.add_argument('--repeats', type=int, default=10)
  parser.add_argument('--steps', type=int, default=128)
  parser.add_argument('--size', type=int, default=512)
  parser.add_argument('--prompt', type=int, default=64)
  parser.add_argument('--batches', default='1,2,4,8,16,32,64')
  parser.add_argument('--layers7b', type=int, default=32)
  parser.add_argument('--num_questions', type=int, default=12)
  args = parser.parse_args()
  record = setup.Record(args.out)
  where = Where(args.size, args.prompt, args.steps)
  wanted = args.sections.split(',')
  if args.target == 'tiny':  # to try the script out
    model = tiny.model()
  else:
    model = specjax.load(args.target, quiet=True)
  record.data['target'] = {
      'name': args.target, 'dtype': model.lm.config.dtype}
  batches = [int(b) for b in args.batches.split(',')]

  def hf():
    from benchmarks import huggingface
    return huggingface.section(
        model, args.questions, args.repeats,
        lambda value: record.add('hf', value))

  sections = {
      'loop': lambda: section_loop(model, args.repeats, where),
      'batch': lambda: section_batch(
          model, max(args.repeats // 2, 2), where, batches),
      'shape7b': lambda: section_shape7b(
          max(args.repeats // 2, 2), where, args.layers7b),
      'lookup': lambda: section_lookup(
          model, args.questions, args.num_questions, 2),
      'hf': hf,
      'copy': lambda: section_copy(model, max(args.repeats // 2, 3)),
      'profile': lambda: section_profile(model, where),
  }
  for name in wanted:
    begin = time.perf_counter()
    record.add(name, sections[name]())
    print(f'{name}: {time.perf_counter() - begin:.0f} s', flush=True)


if __name__ == '__main__':
  sys.exit(cli.reported(main))
