"""Images of continuous tokens, of a decoder and autoencoder that you trained.

  python -m specjax.sample --config configs/sample_latents.py \
      --config.target=out/mar/model \
      --config.images.tokenizer=out/vae/autoencoder \
      --config.speculative.model=out/mar_drafter/model --out out/latents

Writes a labelled grid, maps of where and when drafts were accepted, and the
summary. The rule is exact; for the published one: --config.verify=cspd

  --config configs/sample_latents.py:tiny   random weights, seconds
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
      order='random',  # or 'raster'
      guidance=1.0,  # 1 is off
      guidance_schedule='constant',  # or 'linear'
      # Plain decoding in so many iterations is shown beside (masked decoders).
      rivals=(),
      # Of a masked decoder: see `models.masked_images.MaskedImages`.
      decoding=dict(
          num_iterations=config_dict.placeholder(int),
          schedule=config_dict.placeholder(str),
          num_passes=config_dict.placeholder(int)),
      # What to change of the denoising steps; None is what was trained for.
      process=dict(
          num_levels=config_dict.placeholder(int),
          first=config_dict.placeholder(int),
          last_noise=config_dict.placeholder(bool),
          # States guessed ahead and checked in one call of the head.
          ahead=config_dict.placeholder(int))))
  config.sampling = common.sampling(temperature=1.0)
  config.speculative = common.speculative(
      method='draft_model', num_speculative_tokens=8)
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
    config.speculative.model = 'random'
    config.images.per_class = 2
    config.speculative.num_speculative_tokens = 3
    config.images.rivals = (8, 4)
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config
