"""The best token tree for a drafter, from measured acceptance.

  python -m sample.sequoia_tree --config configs/tree_smollm2.py \
      --num_nodes 32 --depth 8

Decodes the config's prompts with its tree (a wide one, in which every node
has children), prints how often the k-th child of a node is the one accepted,
and the tree that accepts most under these shares, by dynamic programming
(Sequoia), as text for `speculative_token_tree`. Writes `tree.json` to --out.
"""

from __future__ import annotations

from absl import flags
import numpy as np

import specjax
from specjax.core import topologies
from specjax.data import builtin
from specjax.host import cli, methods
from specjax.host import rules as rules_lib
from specjax.io import output
from specjax.io import prompts as prompts_io

_FLAGS = cli.define_flags('out/tree')
_NUM_NODES = flags.DEFINE_integer('num_nodes', 32, 'Drafted slots.', 1)
_DEPTH = flags.DEFINE_integer('depth', None, 'Longest path, if limited.', 1)


def main() -> int:
  """Runs the program; returns the exit code."""
  config, quiet = _FLAGS.config.value, _FLAGS.quiet.value
  out = output.prepare(_FLAGS.out.value)
  options = cli.sampling(config.sampling)
  cli.start(_FLAGS.distributed.value)
  target = cli.load_target(config, cli.mesh(config.mesh), quiet)
  drafter, params = methods.build(
      cli.speculative(config.speculative, None) or {}, target,
      cli.load_drafter(target, quiet))
  rule, tables = rules_lib.build(
      config.verify, config.verify_options.to_dict(), target.vocab_size)
  prompts = (list(builtin.QUICKSTART) if config.prompts is None
             else prompts_io.read(config.prompts))
  status = cli.StatusLine(quiet)
  results = specjax.generate(
      target, drafter, prompts, options, drafter_params=params, verify=rule,
      verifier_params=tables, batch_size=config.batch_size,
      seed=config.seed, on_progress=status)
  status.clear()

  # --- The best tree ----------------------------------------------------
  share = results.rank_acceptance()
  topology = topologies.sequoia(
      share, _NUM_NODES.value, max_depth=_DEPTH.value)
  old = drafter.topology
  found = {
      'rank_acceptance': np.round(share, 4).tolist(),
      'measured_tree': {
          'num_nodes': old.num_nodes,
          'tokens_a_round': results.summary()['mean_acceptance_length']},
      'best_tree': {
          'num_nodes': topology.num_nodes, 'depth': topology.max_depth,
          'expected_tokens_a_round': 1 + topologies.expected_accepted(
              topology, share),
          'speculative_token_tree': str(list(
              topologies.to_paths(topology)))}}
  output.write_json(out / 'tree.json', found)
  for depth, row in enumerate(share, 1):
    print(f'depth {depth}: ' + '  '.join(f'{x:.3f}' for x in row))
  best = found['best_tree']
  print(f"{old.num_nodes} nodes, measured: "
        f"{found['measured_tree']['tokens_a_round']:.2f} tokens a round")
  print(f"{best['num_nodes']} nodes, expected: "
        f"{best['expected_tokens_a_round']:.2f} tokens a round")
  print(best['speculative_token_tree'])
  return 0


if __name__ == '__main__':
  cli.run(main)
