"""The shipped drafter and prompt lookup against plain decoding, on a laptop.

  python -m specjax.bench --config configs/bench_smollm2_cpu.py --out out/cpu

SmolLM2-135M-Instruct, twelve built-in questions of eight kinds, greedy. Expect
under 5 minutes on two idle CPU cores, after a download of 98 MB by the first
run. Trees are small: without an accelerator every further token of a block
costs a good part of a step. Each row of `bench.json` has `speedup` and
`mean_acceptance_length`.

  --config configs/bench_smollm2_cpu.py:tiny   random weights, seconds; there
                                               is no drafter for those
"""

from ml_collections import config_dict

from configs import common

# Beside this folder: programs are started from the one that holds both.
_DRAFTER = 'checkpoints/smollm2-135m-instruct-dspark'


def _tree(nodes: int, depth: int) -> dict:
  return {'method': 'dspark', 'model': _DRAFTER, 'use_dynamic_tree': True,
          'num_speculative_tokens': nodes, 'tree_depth': depth,
          'tree_top_k': 4}


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  lookup = {'method': 'ngram', 'num_speculative_tokens': 7,
            'prompt_lookup_min': 2, 'prompt_lookup_max': 4}
  config = config_dict.ConfigDict()
  config.target = 'smollm2-135m-instruct'
  config.dtype = config_dict.placeholder(str)  # None: by the backend
  config.prompts = config_dict.placeholder(str)  # None: built-in questions
  config.max_prompts = config_dict.placeholder(int)
  config.categories = ()  # all
  config.runs = (
      {'name': 'dspark-tree-4', 'speculative': _tree(4, 4)},
      {'name': 'dspark-tree-7', 'speculative': _tree(7, 7)},
      {'name': 'lookup-7', 'speculative': lookup},
  )
  config.verify = 'auto'
  config.verify_options = common.verify_options()
  config.sampling = common.sampling(temperature=0.0, max_new_tokens=128)
  config.batch_sizes = (1,)
  config.repeats = 1  # more for a spread; this takes four minutes
  config.mesh = (1, 1)
  config.seed = 0
  config.exact = False
  if arg == 'tiny':
    config.target = 'random'
    config.runs = config.runs[-1:]
    config.max_prompts = 3
    config.sampling.max_new_tokens = 12
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config
