"""Decodes SmolLM2-135M-Instruct with a tree of lookup matches.

  python -m specjax.sample --config configs/tree_smollm2.py

Three earlier matches of the text are drafted side by side (12, 10 and 10
tokens) and verified in one call; the text is that of plain greedy decoding,
up to near-ties.

  --config configs/tree_smollm2.py:tiny   a small model's tree over random
                                          weights, sampled, in seconds
"""

from ml_collections import config_dict

from configs import common, quickstart


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  config = quickstart.get_config(arg)
  config.speculative = common.speculative(
      method='ngram', prompt_lookup_lengths=(12, 10, 10),
      prompt_lookup_min=1, prompt_lookup_max=3)
  if arg == 'tiny':
    config.speculative = common.speculative(
        method='draft_model', model='random',
        speculative_token_tree='branching:3,2',
        draft_sample_method='without_replacement')
    config.sampling.temperature = 0.8
  return config
