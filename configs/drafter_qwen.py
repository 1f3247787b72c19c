"""A block drafter (DSpark) for Qwen2.5-Coder-1.5B-Instruct.

  python -m train.rollout --config configs/rollout_qwen.py --out out/text_qwen
  python -m train.drafter --config configs/drafter_qwen.py \
      --config.data.rollouts=out/text_qwen --out out/dspark_qwen

As `configs/drafter_smollm2.py`, whose arguments it takes, for a target of ten
times the size: half an hour on one accelerator with 80 GB.

  --config configs/drafter_qwen.py:tiny   random weights, under a minute
"""

from ml_collections import config_dict

from configs import drafter_smollm2


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; see `drafter_smollm2.get_config` for `arg`."""
  config = drafter_smollm2.get_config(arg)
  if arg.startswith('tiny'):
    return config
  config.target = 'qwen2.5-coder-1.5b-instruct'
  config.batch_size, config.data.length = 8, 1024
  config.optimizer.learning_rate = 1.2e-3
  if config.kind in ('dspark', 'dflash'):
    config.model.update(dict(num_taps=5, mlp_dim=4608, markov_rank=256,
                             markov_input='table'))
    config.save.form = 'bfloat16'
    config.task.num_anchors = 256
  return config
