"""Decodes SmolLM2-135M-Instruct with its drafter, and plainly beside it.

  python -m specjax.sample --config configs/quickstart.py

The first run downloads 98 MB of weights; the drafter is in `checkpoints/`.
Afterwards expect a minute or two on two CPU cores (most of it the plain
decoding that it is compared with), and 2 to 5 tokens a round.

  --config configs/quickstart.py:tiny     random weights, seconds, no download
  --config.prompts=FILE                   your own prompts (JSONL or text)
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  config = config_dict.ConfigDict()
  config.target = 'smollm2-135m-instruct'
  config.dtype = config_dict.placeholder(str)
  config.speculative = common.speculative(
      method='dspark', model=common.DRAFTER, use_dynamic_tree=True,
      num_speculative_tokens=7, tree_depth=7, tree_top_k=4)
  # enabled=True: a trained drafter learns from its rejected drafts.
  config.online = common.online()
  config.verify = 'auto'
  config.verify_options = common.verify_options()
  config.sampling = common.sampling(temperature=0.0, max_new_tokens=128)
  config.prompts = config_dict.placeholder(str)  # None: built-in prompts
  config.batch_size = 1
  config.capacity = config_dict.placeholder(int)
  config.mesh = (1, 1)
  config.exact = False
  config.seed = 0
  config.compare_plain = True
  config.stream = True  # show the text of the first row as it is decoded
  if arg == 'tiny':
    config.speculative = common.speculative(
        method='ngram', num_speculative_tokens=7, prompt_lookup_min=2,
        prompt_lookup_max=4)
    config.target = 'random'
    config.sampling.max_new_tokens = 16
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config
