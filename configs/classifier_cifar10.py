"""A classifier of CIFAR-10 that judges samples: accuracy, and features.

  python -m train.classifier --config configs/classifier_cifar10.py \
      --config.data.path=cifar10.npz --out out/classifier

Minutes on one accelerator. The data are those of `train.vq`, with labels.

  --config configs/classifier_cifar10.py:tiny   made-up images, seconds
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  config = config_dict.ConfigDict()
  config.mesh = (1, 1)
  config.seed = 0
  config.data = common.images()
  config.flip = True  # left and right
  config.padding = 4  # pixels, of which a random crop is taken
  config.model = config_dict.ConfigDict(dict(
      width=64, num_stages=3, num_blocks=2, dtype='bfloat16'))
  # --- Training -------------------------------------------------------
  config.steps = 0  # 0: as many as make the epochs
  config.epochs = 30.0
  config.batch_size = 256
  config.label_smoothing = 0.1
  config.decay = 0.999  # of the moving average, which is kept
  config.optimizer = config_dict.ConfigDict(dict(
      learning_rate=2e-3, warmup=0.1, schedule='cosine', betas=(0.9, 0.99),
      weight_decay=0.05, clip_norm=1.0, muon=False))
  config.log_every = 50
  config.eval_every = 1000
  config.save_every = 1000
  if arg == 'tiny':
    config.data.path = 'synthetic'
    config.model.update(dict(width=8, num_blocks=1, dtype='float32'))
    config.epochs, config.batch_size, config.padding = 20.0, 32, 1
    config.decay, config.optimizer.learning_rate = 0.9, 1e-2
    config.log_every, config.eval_every, config.save_every = 10, 20, 20
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config
