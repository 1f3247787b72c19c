"""A drafter for an image decoder: EAGLE-3's layer, given guided codes.

  python -m train.image_rollout --config configs/rollout_image.py \
      --config.target=out/image_ar/model --out out/codes
  python -m train.drafter --config configs/drafter_image.py \
      --config.target=out/image_ar/model --config.data.rollouts=out/codes \
      --out out/eagle_image

As `configs/drafter_smollm2.py`, whose arguments it takes; the default kind is
eagle3. The drafter reads the states of the view with the class and learns the
guided law, so `guidance` is that of decoding.

  --config configs/drafter_image.py:tiny   random weights, seconds
"""

from ml_collections import config_dict

from configs import drafter_smollm2


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; see `drafter_smollm2.get_config` for `arg`."""
  tiny, _, kind = arg.partition('-')
  if tiny == 'tiny':
    config = drafter_smollm2.get_config(f'tiny-{kind or "eagle3"}')
  else:
    config = drafter_smollm2.get_config(arg or 'eagle3')
  config.guidance = 2.0
  # All codes: none is rare enough to be left out.
  config.draft_vocab_size = config_dict.placeholder(int)
  config.eval.temperature = 1.0
  if tiny == 'tiny':
    config.data.length, config.eval.new_tokens = 17, 16
    config.eval.max_prompt = 1
    return config
  config.target = config_dict.placeholder(str)
  config.data.length = 257  # an image of 16 x 16 codes and its class a row
  config.batch_size = 64
  config.minutes = 5.0
  config.eval.update(dict(num_prompts=64, max_prompt=1, new_tokens=256))
  return config
