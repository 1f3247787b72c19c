"""A class-conditional image decoder for CIFAR-10, on codes of `train.vq`.

  python -m train.image_ar --config configs/image_ar_cifar10.py \
      --config.data.path=cifar10.npz --config.tokenizer=out/vq/tokenizer \
      --out out/image_ar

28 M parameters; trains for `config.minutes`.

  --config configs/image_ar_cifar10.py:small  8 M parameters
  --config configs/image_ar_cifar10.py:tiny   made-up images, seconds; on the
                                              tokenizer of vq_cifar10.py:tiny
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '', 'small' or 'tiny'."""
  config = common.image_run()
  config.tokenizer = config_dict.placeholder(str)
  config.init_from = config_dict.placeholder(str)  # a decoder to go on from
  config.model = config_dict.ConfigDict(dict(
      num_layers=7, num_heads=8, embed_dim=512, dropout=0.15,
      dtype='bfloat16'))
  # --- Training -------------------------------------------------------
  config.flip = True
  config.class_dropout = 0.1  # for guidance
  config.minutes = 30.0
  config.batch_size = 128
  config.optimizer = common.optimizer(1e-3, weight_decay=0.05)
  config.eval_every = 2000  # steps
  config.eval = config_dict.ConfigDict(dict(batches=16, guidance=2.0))
  config.save = config_dict.ConfigDict(dict(form='int8'))
  if arg == 'small':
    config.model.update(dict(
        num_layers=7, num_heads=4, embed_dim=256, dropout=0.1))
  elif arg == 'tiny':
    common.shorten(config)
    config.tokenizer = 'out/vq/tokenizer'
    config.model.update(dict(
        num_layers=1, num_heads=2, embed_dim=16, dtype='float32'))
    config.eval.batches = 2
  elif arg:
    raise ValueError(f"config argument {arg!r}: '', 'small' or 'tiny'")
  return config
