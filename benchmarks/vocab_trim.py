"""What a reduced draft vocabulary costs and brings (VocabTrim, FR-Spec).

  python -m benchmarks.vocab_trim --drafter out/dspark/drafter \
      --rollouts out/text --sizes 8192,16384,32768,full \
      --questions spec_bench_dev.jsonl --out docs/results/h100_vocab_trim.json

The trained drafter is given other vocabularies without training: the most
frequent tokens of the target's own text (rollouts; without any, the target's
answers to other questions). Tokens that it was not trained for keep their
Markov terms at zero; `own` is the vocabulary of its training. Of each:

* coverage of what the target decodes for the questions;
* tokens a round and speed against plain decoding, in one run;
* c, parameters read by a drafter's pass over those read by a target step,
  and the memory-bound speed-up `tau / (c * passes + 1)`: every pass costs the
  bytes of its weights, and nothing else costs anything. `passes` is 1 for
  drafters that propose a block at once, the chain's length for others.

Each size is written when it is finished; the same command goes on.

References: VocabTrim, arXiv:2506.22694; FR-Spec, arXiv:2502.14856.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import support
from specjax.drafters import Null
from specjax.drafters.block import BlockSource
from specjax.drafters.medusa import HeadsSource
from specjax.host import cli, shapes
from specjax.host import drafter as drafter_lib
from specjax.host.drafter import Loaded
from specjax.models import draft_vocab, trained
from train import text as text_lib

# Looked up by row, so hardly read.
_TABLES = ('embedding', 'markov_in')


def resized(model, folder: str, loaded: Loaded, ids: np.ndarray) -> Loaded:
  """Returns a drafter with another draft vocabulary, not trained for it.

  Args:
    model: the target. folder: of the drafter, or 'tiny'.
    loaded: the same, loaded. ids: int[W], ascending.
  """
  old = loaded.source.model
  net = dataclasses.replace(old, config=dataclasses.replace(
      old.config, draft_vocab_size=len(ids)))
  zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype if len(x.shape) > 1
                          else jnp.float32), trained.abstract(net))
  weights = zeros if folder == 'tiny' else drafter_lib.carry_over(
      folder, zeros, ids)
  return Loaded(type(loaded.source)(net),
                net.attach(weights, model.params, ids), loaded.facts)


def read_by_pass(loaded: Loaded) -> int:
  """Returns the parameters that a pass of a drafter reads."""
  names = drafter_lib.named(loaded.params['net'])
  own = sum(math.prod(x.shape) for name, x in names.items()
            if name.rsplit('.', 1)[-1] not in _TABLES)
  head = loaded.params.get('head')
  return own + (0 if head is None else math.prod(head.shape))


def read_by_step(model) -> int:
  """Returns the parameters that a step of the target reads."""
  config = model.lm.config
  rows = 0 if config.tied else config.vocab_size * config.embed_dim
  return config.num_params - rows


def passes(loaded: Loaded, num_draft: int) -> int:
  """Returns the passes of a drafter a round."""
  at_once = isinstance(loaded.source, (BlockSource, HeadsSource))
  return 1 if at_once else num_draft


def counts_of(model, args, asked) -> tuple[np.ndarray, str]:
  """Returns int[V] of the target's text, and where it is from."""
  size = model.vocab_size
  if args.rollouts:
    train, held_out, _ = text_lib.rollouts(pathlib.Path(args.rollouts))
    counts = np.zeros(size, np.int64)
    for record in [*train, *held_out]:
      counts += np.bincount(
          record.tokens[record.prompt_length:], minlength=size)
    return counts, 'rollouts'
  runner = support.Runner('plain', model, Null(0), None, 0.0,
                          args.new_tokens)
  support.take_turns([runner], asked, args.threads)
  return answers(runner, size), f'answers to {len(asked)} other questions'


def answers(runner: support.Runner, size: int) -> np.ndarray:
  """Returns int[V]: how often each token was decoded."""
  return sum((np.bincount(r['text'], minlength=size)
              for r in runner.rows), np.zeros(size, np.int64))


def section(model, loaded: Loaded, ids, asked, args) -> dict[str, Any]:
  """Measures one vocabulary beside plain decoding."""
  drafter = shapes.shape(
      loaded.source, loaded.num_draft, json.loads(args.config))
  runners = [
      support.Runner(name, model, d, p, 0.0, args.new_tokens)
      for name, d, p in (('plain', Null(0), None),
                         ('drafter', drafter, loaded.params))]
  support.take_turns(runners, asked, args.threads)
  found = support.summary(runners[1], runners[0])
  depth = drafter.topology.max_depth
  share = read_by_pass(loaded) / read_by_step(model)
  times = passes(loaded, depth)
  return {
      'draft_vocab_size': len(ids),
      'coverage': draft_vocab.coverage(
          answers(runners[0], model.vocab_size), ids),
      'parameters_read': read_by_pass(loaded), 'c': share, 'passes': times,
      'depth': depth,
      'memory_bound_speedup': found['tau'] / (share * times + 1),
      **{k: found[k] for k in (
          'tau', 'speedup', 'speedup_by_question', 'ms_round',
          'round_over_plain_step', 'conditional', 'same_text_as_plain')}}


def vocabularies(model, loaded, counts, sizes: str) -> dict[str, np.ndarray]:
  """Returns ids by name: 'own', 'full', or a number of tokens."""
  own = np.asarray(loaded.params['ids'])
  out = {'own': own}
  for name in sizes.split(','):
    if name == 'full':
      out[name] = np.arange(model.vocab_size)
    elif name != 'own':
      out[name] = draft_vocab.most_frequent(counts, int(name), model.eos)
  return out


def gains(sections: dict[str, Any]) -> None:
  """Adds what each size gains over the full vocabulary."""
  full = sections.get('full')
  if full is None:
    return
  for row in sections.values():
    for name in ('memory_bound_speedup', 'speedup', 'tau'):
      row[f'{name}_over_full'] = row[name] / full[name]


def parse(arguments=None) -> argparse.Namespace:
  """Returns the options."""
  parser = support.options(
      __doc__, target='smollm2-135m-instruct', drafter=None,
      num_questions=48, slots='512,1536')
  parser.add_argument('--config', default='{}', help='JSON: its shape')
  parser.add_argument('--sizes', default='8192,16384,32768,full')
  parser.add_argument('--rollouts', default='')
  return parser.parse_args(arguments)


def main(arguments=None) -> None:
  """Runs the program."""
  args = parse(arguments)
  model = support.load(args.target)
  loaded = support.drafter(model, args.drafter)
  slots = [int(s) for s in args.slots.split(',')]
  both, _ = support.questions(
      model, args.questions, 2 * args.num_questions, slots, args.new_tokens)
  # Every other one: none is counted that is measured.
  counts, origin = counts_of(model, args, both[1::2])
  done = support.record(args.out, {
      **{name: getattr(args, name) for name in (
          'target', 'config', 'num_questions', 'new_tokens')},
      'counted': origin, 'dtype': model.lm.config.dtype,
      'target_parameters_read': read_by_step(model)})
  sections = done.data['sections']
  for name, ids in vocabularies(model, loaded, counts, args.sizes).items():
    if name in sections:
      continue
    one = loaded if name == 'own' else resized(
        model, args.drafter, loaded, ids)
    sections[name] = section(model, one, ids, both[::2], args)
    gains(sections)
    done.add(name, sections[name])


if __name__ == '__main__':
  sys.exit(cli.reported(main))
