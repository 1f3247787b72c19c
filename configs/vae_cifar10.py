"""Continuous tokens for CIFAR-10: 32 x 32 pixels to 8 x 8 of 16 channels.

3.2 M parameters.

  python -m train.vae --config configs/vae_cifar10.py \
      --config.data.path=cifar10.npz --out out/vae

`data.path` is a dataset of `train.images`, an .npz of CIFAR-10's JPEG files,
or one of plain images (docs/images.md). Trains for `config.minutes`.

  --config configs/vae_cifar10.py:tiny   made-up images, seconds
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  config = common.image_run()
  config.model = config_dict.ConfigDict(dict(
      latent_channels=16, channels=32, multipliers=(2, 3, 3),
      num_res_blocks=2, attention=True, dtype='bfloat16'))
  config.loss = config_dict.ConfigDict(dict(l1=1.0, l2=1.0, kl=1e-6))
  # --- Training -------------------------------------------------------
  config.minutes = 6.0
  config.batch_size = 256
  config.optimizer = common.optimizer(5e-4)
  config.eval_every = 1000  # steps
  config.eval = config_dict.ConfigDict(dict(num_images=10_000))
  config.save = config_dict.ConfigDict(dict(form='int8'))
  if arg == 'tiny':
    common.shorten(config)
    config.model.update(dict(
        latent_channels=4, channels=8, num_res_blocks=1, attention=False,
        dtype='float32'))
    config.eval.num_images = 16
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config
