"""Prompt lookup against plain decoding, SmolLM2-135M-Instruct on a laptop.

  python -m specjax.bench --config configs/bench_smollm2_cpu.py --out out/cpu

Twelve built-in questions of eight kinds, greedy. Expect under 5 minutes on
two idle CPU cores, after a download of 98 MB by the first run.

  --config configs/bench_smollm2_cpu.py:tiny   random weights, seconds
"""

from ml_collections import config_dict

from configs import common


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
      {'name': 'lookup-7', 'speculative': lookup},
      {'name': 'lookup-7-heuristic',
       'speculative': {**lookup, 'draft_len_schedule': 'heuristic'}},
  )
  config.verify = 'auto'
  config.verify_options = common.verify_options()
  config.sampling = common.sampling(temperature=0.0, max_new_tokens=40)
  config.batch_sizes = (1,)
  config.repeats = 2
  config.mesh = (1, 1)
  config.seed = 0
  config.exact = False
  if arg == 'tiny':
    config.target = 'random'
    config.max_prompts = 3
    config.sampling.max_new_tokens = 12
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config
