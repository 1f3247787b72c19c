"""What each acceptance rule costs a round, beside the model's forward pass.

  python -m benchmarks.verify --out docs/results/h100_verify.json

Chains of 4 and a tree of 32 nodes; vocabularies of SmolLM2 and of Qwen2.5;
batch 1 and 32; with and without top-p. A round here is the logits pipeline
and the rule, in a compiled loop; logits change from round to round. The
forward pass is that of a decoder of the same vocabulary (random weights,
bf16, cache of 512 slots) over the same block.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import setup
from specjax import verify
from specjax.core import law as law_lib
from specjax.core import pipeline, topologies, tree, types
from specjax.core.types import Context, Draft, Models, Options, Scores
from specjax.host import cli
from specjax.host.load import random_model
from specjax.models.transformer_config import TransformerConfig

# Acceptance of the k-th child, roughly that of a good drafter.
_RANKS = (0.6, 0.15, 0.07, 0.04)
_BANK = 2  # logits that rounds alternate between
_HIDDEN = 576

MODELS = {
    'smollm2-135m': dict(
        vocab_size=49152, embed_dim=576, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, mlp_dim=1536),
    'qwen2.5-1.5b': dict(
        vocab_size=151936, embed_dim=1536, num_layers=28, num_heads=12,
        num_kv_heads=2, head_dim=128, mlp_dim=8960, qkv_bias=True),
    # To try the script itself.
    'tiny': dict(
        vocab_size=512, embed_dim=32, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=16, mlp_dim=64)}

# The pipeline's cost adds to any rule's: these show it.
_WITH_TOP_P = frozenset((
    'greedy', 'match', 'speculative', 'block', 'traversal',
    'greedy_multi_draft'))

IID, REST, TOP, POINT, MATCH = (
    types.IID, types.WITHOUT_REPLACEMENT, types.TOP_PLUS_ONE, types.POINT,
    types.MATCH)
# Rule, kind of draft, options.
CHAIN: list[tuple[str, int, dict[str, Any]]] = [
    ('greedy', POINT, {}), ('match', POINT, {}), ('gumbel', MATCH, {}),
    ('speculative', IID, {}), ('block', IID, {}), ('lenient', IID, {}),
    ('typical', IID, {}), ('judge', IID, {}),
    ('lantern', IID, {'lam': 2.0, 'num_neighbours': 1000})]
TREE: list[tuple[str, int, dict[str, Any]]] = [
    ('greedy', POINT, {}), ('match', POINT, {}),
    ('gumbel', MATCH, {'num_noise': 4}), ('speculative', IID, {}),
    ('speculative', REST, {}), ('k_seq', IID, {}),
    ('greedy_multi_draft', TOP, {}), ('traversal', REST, {}),
    ('lenient', REST, {}), ('typical', REST, {}),
    ('medusa', POINT, {}), ('judge', REST, {}),
    ('lantern', REST, {'lam': 2.0, 'num_neighbours': 1000})]


@dataclasses.dataclass(frozen=True)
class Case:
  """One program to time."""

  model: str
  batch: int
  shape: str  # 'chain4' or 'tree32'
  rule: str
  kind: int
  top_p: bool
  options: tuple[tuple[str, Any], ...]

  @property
  def topology(self) -> tree.Topology:
    if self.shape.startswith('chain'):
      return tree.chain(int(self.shape[5:]))
    return topologies.sequoia(np.asarray(_RANKS), int(self.shape[4:]))

  @property
  def vocab_size(self) -> int:
    return MODELS[self.model]['vocab_size']


def inputs(case: Case) -> dict[str, Any]:
  """Returns logits, tokens and tables for a case, made on the device."""
  topology, vocab, batch = case.topology, case.vocab_size, case.batch
  num, keys = topology.num_nodes, jax.random.split(jax.random.key(0), 6)
  bank = 3.0 * jax.random.normal(keys[0], (_BANK, batch, num + 1, vocab))
  internal = jnp.asarray(topology.internal)
  out = {'bank': bank, 'tokens': jax.random.randint(
      keys[2], (batch, num), 0, vocab)}
  if case.kind in (IID, REST, TOP):
    out['draft'] = bank[0][:, internal] + jax.random.normal(
        keys[1], (batch, len(topology.internal), vocab))
  if case.rule == 'judge':
    out['final'] = jax.random.normal(keys[3], (batch, num + 1, _HIDDEN))
    out['verifier'] = {
        'weight': jax.random.normal(keys[4], (_HIDDEN,)), 'bias': jnp.float32(
            0), 'mean': jnp.zeros(_HIDDEN), 'scale': jnp.ones(_HIDDEN)}
  if case.rule == 'lantern':
    k = dict(case.options)['num_neighbours']
    out['verifier'] = {'neighbours': jax.random.randint(
        keys[5], (min(16384, vocab), k), 0, min(16384, vocab))}
  return out


def context_of(case: Case, rounds) -> Context:
  """Returns sampled rows at temperature 0.8."""
  batch, full = case.batch, functools.partial(jnp.full, (case.batch,))
  options = Options(temperature=full(0.8))
  if case.top_p:
    options = options.replace(top_p=full(0.9))
  return Context(
      tokens=jnp.zeros((batch, 512), jnp.int32), length=full(256),
      prompt_length=full(16), limit=full(512), done=full(False),
      rounds=full(0) + rounds,
      keys=jax.random.split(jax.random.key(1), batch), options=options)


def rounds(case: Case, count, data):
  """Runs pipeline and rule `count` times; returns something of each."""
  topology = case.topology
  rule = verify.get(case.rule, **dict(case.options))
  place = {row: i for i, row in enumerate(topology.internal)}
  law_row = jnp.asarray([place[p] for p in topology.parents or ()])

  def body(i, total):
    context = context_of(case, i)
    logits = jax.lax.dynamic_index_in_dim(
        data['bank'], i % _BANK, keepdims=False)
    draft = Draft(
        topology=topology, tokens=(data['tokens'] + total[:, None]) %
        case.vocab_size, valid=jnp.ones(data['tokens'].shape, bool),
        mode=jnp.full((topology.num_nodes,), case.kind, jnp.int32),
        law_row=law_row, draft_law=law_lib.Categorical(data['draft'])
        if 'draft' in data else None)
    past = tree.history(topology, None, draft.tokens)
    scores = Scores(
        target_law=pipeline.law(context, logits, past),
        taps={'logits': logits, 'final': data.get('final')})
    verdict = rule.verify(
        Models(target=None, verifier=data.get('verifier')), context, draft,
        scores)
    return verdict.next_token + verdict.num_accepted

  return jax.lax.fori_loop(
      0, count, body, jnp.zeros((case.batch,), jnp.int32))


def forward(model, topology, batch: int):
  """Returns a function that runs `count` forward passes over a block."""
  target = model.lm
  context = context_of(Case('smollm2-135m', batch, 'chain4', 'greedy', POINT,
                            False, ()), 0)
  state = types.SpecState(
      context=context, target=target.empty(batch, 512 + 34), drafter={},
      metrics=types.empty_metrics(batch, topology))

  def run(params, state, count):
    def body(i, carry):
      state, total = carry
      draft = Draft(
          topology=topology, tokens=jnp.full(
              (batch, topology.num_nodes), 5) + total,
          valid=jnp.ones((batch, topology.num_nodes), bool),
          mode=jnp.full((topology.num_nodes,), POINT, jnp.int32))
      logits, _, state = target.raw(
          Models(target=params), state, draft, ())
      return state, jnp.argmax(logits[:, -1]).astype(jnp.int32) % 7

    return jax.lax.fori_loop(0, count, body, (state, jnp.int32(0)))

  return jax.jit(run, donate_argnums=1), state


def per_round(run, count: int, repeats: int) -> dict[str, float]:
  """Returns microseconds a round; `run(count)` waits."""
  run(3)
  times = [setup.timed(run, count)[0] / count * 1e6 for _ in range(repeats)]
  return {k: round(v, 1) for k, v in setup.spread(times).items()}


def measure_forward(record, names, batches, shapes, repeats) -> dict:
  """Times forward passes; returns medians by (model, batch, shape)."""
  found, rows = {}, []
  for name in names:
    model = random_model(TransformerConfig(
        **MODELS[name], dtype='bfloat16'), seed=0)
    for batch in batches:
      for shape in shapes:
        case = Case(name, batch, shape, 'greedy', POINT, False, ())
        fn, state = forward(model, case.topology, batch)
        held = [state]

        def run(count, fn=fn, held=held, model=model):
          held[0], out = fn(model.params, held[0], count)
          return out

        took = per_round(run, 100 if batch == 1 else 30, repeats)
        found[name, batch, shape] = took['median']
        rows.append({'model': name, 'batch': batch, 'shape': shape,
                     'us': took})
        del held, state
    del model
  record.add('forward', rows)
  return found


def measure_rules(record, cases, forward_us, repeats: int) -> None:
  """Times all rules of one model and batch size."""
  kinds = types.MODE_NAMES
  for first in {(c.model, c.batch, c.shape): c for c in cases}.values():
    group = [c for c in cases if (c.model, c.batch, c.shape) == (
        first.model, first.batch, first.shape)]
    jobs = {}
    with ThreadPoolExecutor(14) as pool:
      for case in group:
        shapes = jax.eval_shape(functools.partial(inputs, case))
        fn = jax.jit(functools.partial(rounds, case))
        jobs[case] = pool.submit(
            lambda fn=fn, s=shapes: fn.lower(np.int32(1), s).compile())
    rows = []
    for case in group:
      data = jax.block_until_ready(jax.jit(
          functools.partial(inputs, case))())
      program = jobs[case].result()
      count = 200 if case.batch == 1 else 20
      took = per_round(
          lambda n, p=program, d=data: p(np.int32(n), d), count, repeats)
      base = forward_us[case.model, case.batch, case.shape]
      rows.append({
          'rule': case.rule, 'kind': kinds[case.kind], 'top_p': case.top_p,
          'us': took, 'share_of_forward': round(took['median'] / base, 4)})
      del data
    record.add(f'{first.model} batch {first.batch} {first.shape}', rows)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True)
  parser.add_argument('--models', default='smollm2-135m,qwen2.5-1.5b')
  parser.add_argument('--batches', default='1,32')
  parser.add_argument('--shapes', default='chain4,tree32')
  parser.add_argument('--rules', default='')
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  names = args.models.split(',')
  batches = [int(b) for b in args.batches.split(',')]
  shapes = args.shapes.split(',')
  only = set(filter(None, args.rules.split(',')))
  record = setup.Record(args.out)
  forward_us = measure_forward(record, names, batches, shapes, args.repeats)
  cases = [
      Case(name, batch, shape, rule, kind, top_p, tuple(options.items()))
      for name in names for batch in batches for shape in shapes
      for rule, kind, options in (CHAIN if 'chain' in shape else TREE)
      for top_p in (False, True) if rule in (only or _WITH_TOP_P | {rule})
      and (not top_p or rule in _WITH_TOP_P)]
  measure_rules(record, cases, forward_us, args.repeats)


if __name__ == '__main__':
  sys.exit(cli.reported(main))
