"""Images of a decoder and a tokenizer that you trained.

  python -m specjax.sample --config configs/sample_image.py \
      --config.target=out/image_ar/model \
      --config.images.tokenizer=out/vq/tokenizer --out out/images

Writes a labelled grid, a map of where drafts were accepted, and the summary.
Drafts are Jacobi's, which need no training. The rule is exact; for a relaxed
one: --config.verify=lantern
     --config.verify_options.codebook=out/vq/tokenizer

  --config configs/sample_image.py:tiny   random weights, seconds
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  config = config_dict.ConfigDict()
  config.target = config_dict.placeholder(str)
  config.dtype = config_dict.placeholder(str)
  config.mesh = (1, 1)
  config.seed = 0
  config.images = config_dict.ConfigDict(dict(
      tokenizer=config_dict.placeholder(str),
      classes=config_dict.placeholder(tuple),  # names; None: all
      per_class=4,
      guidance=2.0,  # 1 is off
      guided_steps=config_dict.placeholder(int)))
  config.sampling = common.sampling(temperature=1.0)
  config.speculative = common.speculative(
      method='jacobi', num_speculative_tokens=16)
  config.verify = 'auto'
  config.verify_options = common.verify_options()
  config.online = common.online()
  config.batch_size = 8
  config.capacity = config_dict.placeholder(int)
  config.exact = False
  config.stream = False
  config.compare_plain = True
  if arg == 'tiny':
    config.target = config.images.tokenizer = 'random'
    config.images.per_class = 2
    config.speculative.num_speculative_tokens = 4
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config
