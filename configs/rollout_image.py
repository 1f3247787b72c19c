"""An image decoder writes the codes that its drafters learn from.

  python -m train.image_rollout --config configs/rollout_image.py \
      --config.target=out/image_ar/model --out out/codes

  --config configs/rollout_image.py:tiny   random weights, seconds
"""

from ml_collections import config_dict


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  config = config_dict.ConfigDict()
  config.target = config_dict.placeholder(str)
  config.dtype = config_dict.placeholder(str)  # None: by the backend
  config.guidance = 2.0  # 1 is off; what the drafter is to be used with
  config.temperature = 1.0
  config.num_images = 20_000
  config.batch_size = 512
  config.held_out = 0.02
  config.seed = 0
  if arg == 'tiny':
    config.target = 'random'
    config.num_images, config.batch_size, config.held_out = 40, 8, 0.2
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config
