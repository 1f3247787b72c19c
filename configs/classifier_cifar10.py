"""A classifier of CIFAR-10 that judges samples: accuracy, and features.

  python -m train.classifier --config configs/classifier_cifar10.py \
      --config.data.path=cifar10_jpeg.npz --out out/classifier

Minutes on one accelerator. The file is CIFAR-10 as `specjax.data.images`
reads it, or any `.npz` of `images` uint8[N,H,W,3] and `labels` int[N].

  --config configs/classifier_cifar10.py:tiny    coloured patterns, seconds
"""

from ml_collections import config_dict


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  config = config_dict.ConfigDict()
  config.seed = 0
  # --- Images ---------------------------------------------------------
  config.data = config_dict.ConfigDict(dict(
      path=config_dict.placeholder(str),  # or 'synthetic'
      test=config_dict.placeholder(str),  # another .npz; None: as below
      held_out=0.1))  # of an .npz of images without a test file
  config.flip = True  # left and right
  config.padding = 4  # pixels, of which a random crop is taken
  # --- Network --------------------------------------------------------
  config.model = config_dict.ConfigDict(dict(
      width=64, num_stages=3, num_blocks=2, dtype='bfloat16'))
  # --- Training -------------------------------------------------------
  config.epochs = 30
  config.batch_size = 256
  config.label_smoothing = 0.1
  config.optimizer = config_dict.ConfigDict(dict(
      learning_rate=2e-3, warmup=0.1, schedule='cosine', betas=(0.9, 0.99),
      weight_decay=0.05, clip_norm=1.0))
  config.eval_every = 5  # epochs
  if arg == 'tiny':
    config.data.path, config.data.held_out = 'synthetic', 0.25
    config.model.update(dict(width=8, num_blocks=1, dtype='float32'))
    config.epochs, config.batch_size, config.padding = 20, 32, 1
    config.optimizer.learning_rate = 1e-2
    config.eval_every = 10
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config
