"""Qwen2.5-Coder-1.5B-Instruct writes the text that its drafters learn from.

  python -m train.rollout --config configs/rollout_qwen.py --out out/text_qwen

As `configs/rollout_smollm2.py`, but what the model invents is mostly work for
programmers.

  --config configs/rollout_qwen.py:tiny   random weights, seconds
"""

from ml_collections import config_dict

from configs import rollout_smollm2

# How invented user turns begin; '' leaves that to the model.
_OPENINGS = (
    '', '', 'Write a Python function that ', 'Write a ', 'Implement ',
    'Complete this Python function:\n\n```python\n',
    'Complete this Python function:\n\n```python\nfrom typing import ',
    'Complete this Python function:\n\n```python\ndef ',
    'Fix the bug in this code:\n\n```python\n',
    'Write unit tests for this function:\n\n```python\n',
    'Add type hints and a docstring:\n\n```python\n',
    'Explain this code:\n\n```', 'How ', 'Given ')


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  config = rollout_smollm2.get_config(arg)
  if arg == 'tiny':
    return config
  config.target = 'qwen2.5-coder-1.5b-instruct'
  config.openings = _OPENINGS
  config.num_self_prompts = 32_768
  config.max_prompt = 512
  config.user.update(dict(max_new=256, buckets=(64,)))
  config.answer.update(dict(max_new=384, buckets=(192, 512)))
  return config
