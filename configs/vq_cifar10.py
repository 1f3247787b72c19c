"""An image tokenizer for CIFAR-10: 32 x 32 pixels to 16 x 16 of 4,096 codes.

1.7 M parameters.

  python -m train.vq --config configs/vq_cifar10.py \
      --config.data.path=cifar10.npz --out out/vq

`data.path` is a dataset of `train.images`, an .npz of CIFAR-10's JPEG files,
or one of plain images (docs/images.md). Trains for `config.minutes`.

  --config configs/vq_cifar10.py:tiny   made-up images, seconds
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  config = common.image_run()
  config.model = config_dict.ConfigDict(dict(
      num_codes=4096, code_dim=8, channels=32, multipliers=(2, 2),
      num_res_blocks=3, latent_dim=128, attention=True, dtype='bfloat16'))
  config.loss = config_dict.ConfigDict(dict(
      l1=1.0, l2=1.0, commitment=0.25, dead_after=200))
  # --- Training -------------------------------------------------------
  config.minutes = 15.0
  config.batch_size = 256
  config.optimizer = common.optimizer(5e-4)
  config.eval_every = 1000  # steps
  config.eval = config_dict.ConfigDict(dict(num_images=10_000))
  config.save = config_dict.ConfigDict(dict(form='int8'))
  if arg == 'tiny':
    common.shorten(config)
    config.model.update(dict(
        num_codes=16, code_dim=4, channels=8, num_res_blocks=1, latent_dim=8,
        attention=False, dtype='float32'))
    config.eval.num_images = 16
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config
