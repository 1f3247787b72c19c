"""A decoder of continuous tokens for CIFAR-10, on tokens of `train.vae`.

  python -m train.mar --config configs/mar_cifar10.py \
      --config.data.path=cifar10.npz \
      --config.tokenizer=out/vae/autoencoder --out out/mar

31 M parameters; trains for `config.minutes`. Causal over an order of each
image's own: one pass scores a window of drafts. Drafters of it:

  --config configs/mar_cifar10.py:small --out out/mar_small
      6 M parameters, trained on the images like the target
  --config configs/mar_cifar10.py:small --config.teacher=out/mar/model \
      --out out/mar_drafter
      likewise, taught the target's own steps; with
      --config.init_from=out/mar_small/model it begins where that one ended
  --config configs/mar_cifar10.py:nano --config.teacher=out/mar_small/model \
      --out out/mar_nano
      1.4 M parameters, to draft for the 6 M as a target

  --config configs/mar_cifar10.py:masked  MAR's bidirectional decoder
  --config configs/mar_cifar10.py:tiny    made-up images, seconds; on the
                                          autoencoder of vae_cifar10.py:tiny
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '', 'small', 'nano', 'masked' or 'tiny'."""
  config = common.image_run()
  config.tokenizer = config_dict.placeholder(str)
  config.init_from = config_dict.placeholder(str)  # a decoder to go on from
  config.model = config_dict.ConfigDict(dict(
      kind='causal', num_layers=8, num_heads=8, width=512, buffer=16,
      dtype='bfloat16'))
  config.head = config_dict.ConfigDict(dict(
      width=512, num_blocks=3, dtype='float32'))
  # `first`: chains begin a step later than MAR's, where a head's error is
  # multiplied by 60 instead of 300 (see docs/continuous.md).
  config.diffusion = config_dict.ConfigDict(dict(
      num_levels=100, first=98, variance='learned'))
  # --- Drafters -------------------------------------------------------
  config.teacher = config_dict.placeholder(str)
  config.teacher_dtype = config_dict.placeholder(str)
  config.distil = config_dict.ConfigDict(dict(
      task=0.1, distil=1.0, guidance=1.0, most=10.0))
  # --- Training -------------------------------------------------------
  config.masks = config_dict.ConfigDict(dict(least=0.0, spread=10.0))
  config.repeats = 4  # levels of noise that a token is used with
  config.flip = True
  config.class_dropout = 0.1  # for guidance
  config.minutes = 12.0
  config.batch_size = 256
  config.optimizer = common.optimizer(5e-4, weight_decay=0.02, clip_norm=3.0)
  config.eval_every = 2000  # steps
  config.eval = config_dict.ConfigDict(dict(
      batches=4, guidance=1.0, num_draft=7))
  config.save = config_dict.ConfigDict(dict(form='int8'))
  if arg == 'small':
    config.model.update(dict(num_layers=4, num_heads=4, width=256))
    config.head.update(dict(width=384, num_blocks=3))
  elif arg == 'nano':
    config.model.update(dict(num_layers=2, num_heads=2, width=128))
    config.head.update(dict(width=256, num_blocks=2))
  elif arg == 'masked':
    config.model.kind = 'masked'
  elif arg == 'tiny':
    common.shorten(config)
    config.tokenizer = 'out/vae/autoencoder'
    config.model.update(dict(
        num_layers=2, num_heads=2, width=16, buffer=2, dtype='float32'))
    config.head.update(dict(width=8, num_blocks=1))
    config.diffusion.update(dict(num_levels=8, first=6))
    config.eval.batches = 2
    config.eval.num_draft = 3
  elif arg:
    raise ValueError(
        f"config argument {arg!r}: '', 'small', 'nano', 'masked' or 'tiny'")
  return config
