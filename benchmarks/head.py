"""A denoising head's steps, one by one and drafted by what it said last.

  python -m benchmarks.head --target out/mar/model --out docs/results/head.json
  python -m benchmarks.head --target random --out out/head.json --repeats 1

What heads are told comes from images that the decoder makes itself. For each
number of tokens denoised at a time: seconds of a whole chain (a scan, as
decoding draws one), of drafts of K steps in the loop of texts
(`drafters.held.Held`) and in a loop of their own (`models.ahead`), in turn;
calls of the head. Exact any way: by reflection where variances are fixed, else
by thinning.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import setup
from sample.sweeps import Turns
import specjax
from specjax import verify
from specjax.core import chains, loop
from specjax.core.round import Engine
from specjax.core.types import Context, Models, Options
from specjax.drafters.held import Held
from specjax.host import cli, latent_sampling, mar
from specjax.models.ahead import Ahead
from specjax.models.denoising import Denoising


def told(model: Any, num: int, seed: int) -> Any:
  """Returns what the head is told of `num` tokens, leaves [num,...].

  Of images that are made by the decoder, at random places in their order.
  """
  lm = model.lm
  size, rows = lm.num_tokens, min(num, 16)
  each = -(-num // rows)
  labels = np.arange(rows) % lm.num_classes
  orders = latent_sampling.orders_of('random', rows, size, seed)
  starts = latent_sampling.begin(lm, labels, orders)
  found = specjax.generate(
      model, None, starts,
      specjax.Sampling(temperature=1.0, max_new_tokens=size),
      batch_size=rows, seed=seed)
  text = np.pad(np.asarray([r.tokens for r in found], np.float32),
                ((0, 0), (1, 0), (0, 0)))
  known = np.random.default_rng(seed).integers(0, size, (rows, each))
  context = _context(
      text, rows, size, condition={'order': orders, 'label': labels}, seed=seed)
  out = jax.jit(lm.features)(
      model.params, context, jnp.asarray(text), jnp.asarray(known))
  return jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:])[:num], out)


def _context(
    text: np.ndarray, rows: int, steps: int, *, condition: Any, seed: int
) -> Context:
  """Returns rows that have one token and make `steps` more."""
  one = jnp.ones((rows,), jnp.int32)
  return Context(
      tokens=jnp.asarray(text), length=one, prompt_length=one + 0,
      limit=one + steps, done=jnp.zeros((rows,), bool),
      rounds=jnp.zeros((rows,), jnp.int32),
      keys=jax.random.split(jax.random.key(seed), rows),
      options=Options(temperature=jnp.ones((rows,))),
      condition=jax.tree.map(jnp.asarray, condition))


def decode(engine: Engine, params: Models, conditions: Any):
  """Returns `fn(seed) -> (tokens f32[B,C], rounds int32[B])`, compiled."""
  process = engine.target.process  # type: ignore[attr-defined]
  rows = len(jax.tree.leaves(conditions)[0])

  @jax.jit
  def run(context: Context):
    state = loop.run(
        engine, params, loop.empty(engine, context), jnp.int32(2**20))
    return state.context.tokens[:, process.num_steps], state.context.rounds

  def fn(seed: int):
    text = np.zeros((rows, process.num_steps + 1, process.channels),
                    np.float32)
    text[:, 0] = np.random.default_rng(seed).normal(size=text[:, 0].shape)
    return run(_context(text, rows, process.num_steps, condition=conditions,
                        seed=seed))

  return fn


class Comparison:
  """Drafted chains beside plain ones."""

  def __init__(
      self, process: Any, head: Any, conditions: Any, width: int, hold: str
  ):
    """Compiles the ways."""
    rule: Any = (verify.PathExact() if process.variance == 'learned'
                 else verify.Reflection())
    rows = len(jax.tree.leaves(conditions)[0])
    draw = jax.jit(lambda law, keys: law.token(law.sample(keys)))

    def chain(process: Any):
      law = chains.Path(process, head, conditions, jnp.ones((rows,)))
      return lambda seed: draw(
          law, jax.random.split(jax.random.key(seed), rows))

    self.steps = process.num_steps
    self.ways = {
        'plain': chain(process),
        'drafted': decode(
            Engine(Denoising(process), Held(width, process, hold), rule),
            Models(target=head), conditions),
        'ahead': chain(dataclasses.replace(process, ahead=Ahead(width)))}
    for way in self.ways.values():
      setup.timed(way, 0)

  def measured(self, repeats: int) -> dict[str, Any]:
    """Returns times, in turn, and calls."""
    times: dict[str, list[float]] = {name: [] for name in self.ways}
    calls = []
    for seed in range(1, repeats + 1):
      for name, way in self.ways.items():
        took, made = setup.timed(way, seed)
        times[name].append(took)
        if name == 'drafted':
          calls.append(float(np.asarray(made[1]).max()))
    return {
        **{f'{name}_s': setup.spread(took) for name, took in times.items()},
        **{f'{name}_speedup': setup.spread([
            a / b for a, b in zip(times['plain'], times[name], strict=True)])
           for name in ('drafted', 'ahead')},
        'calls': setup.spread(calls), 'steps': self.steps}


def main(arguments=None) -> None:
  """Runs the program."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--target', required=True)
  parser.add_argument('--out', required=True)
  parser.add_argument('--batches', default='1,8,64')
  parser.add_argument('--widths', default='4,8,16')
  parser.add_argument('--variances', default='lower,learned')
  parser.add_argument('--hold', default='token')
  parser.add_argument('--repeats', type=int, default=10)
  parser.add_argument('--turns', type=Turns, default=Turns(''), metavar='FILE',
                      help='a lock of the programs that share a device')
  args = parser.parse_args(arguments)
  if args.repeats < 1:
    parser.error(f'--repeats {args.repeats}: must be >= 1')
  record = setup.Record(args.out)
  model = mar.tiny() if args.target == 'random' else mar.load(args.target)[0]
  sizes = [int(b) for b in args.batches.split(',')]
  conditions = told(model, max(sizes), seed=0)
  ready = {}
  with args.turns.work() as pause:
    for variance, batch, width in itertools.product(
        args.variances.split(','), sizes, map(int, args.widths.split(','))):
      process = dataclasses.replace(model.lm.process, variance=variance)
      some = jax.tree.map(lambda x, n=batch: x[:n], conditions)
      ready[f'{variance}, {batch} at a time, K={width}'] = Comparison(
          process, model.params['head'], some, width, args.hold)
      pause()
  with args.turns.alone():
    for name, comparison in ready.items():
      record.add(name, comparison.measured(args.repeats))


if __name__ == '__main__':
  sys.exit(cli.reported(main))
