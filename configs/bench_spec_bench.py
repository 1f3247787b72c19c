"""Spec-Bench (Xia et al. 2024), or any prompts file, at two batch sizes.

  python -m specjax.bench --config configs/bench_spec_bench.py \
      --config.prompts=question.jsonl --out out/spec_bench

`question.jsonl` is Spec-Bench's own file (480 questions, 13 categories; the
eight of MT-bench are reported as one), or JSONL of prompts or messages, or a
text file with a prompt a line. The answer files can be read by Spec-Bench's
`speed.py`. For one GPU: 280,000 tokens a repeat and run at most, which at
1,000 tokens/s for a single sequence makes half an hour in all. On two CPU
cores add `--config.max_prompts=26 --config.repeats=1` (two questions of each
category), and expect as long. Both times are estimates.

  --config configs/bench_spec_bench.py:tiny    random weights, seconds; built-
                                               in questions unless given some
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  lookup = {'method': 'ngram', 'prompt_lookup_min': 2, 'prompt_lookup_max': 4}
  config = config_dict.ConfigDict()
  config.target = 'smollm2-135m-instruct'
  config.dtype = config_dict.placeholder(str)
  config.prompts = config_dict.placeholder(str)  # None: built-in questions
  config.max_prompts = config_dict.placeholder(int)
  config.categories = ()  # all
  config.runs = (
      {'name': 'lookup-7',
       'speculative': {**lookup, 'num_speculative_tokens': 7}},
      {'name': 'lookup-15',
       'speculative': {**lookup, 'num_speculative_tokens': 15}},
  )
  config.verify = 'auto'
  config.verify_options = common.verify_options()
  config.sampling = common.sampling(temperature=0.0, max_new_tokens=256)
  config.batch_sizes = (1, 8)
  config.repeats = 3
  config.mesh = (1, 1)
  config.seed = 0
  config.exact = False
  if arg == 'tiny':
    config.target = 'random'
    config.max_prompts = 3
    config.sampling.max_new_tokens = 12
    config.batch_sizes = (1, 2)
    config.repeats = 2
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config
