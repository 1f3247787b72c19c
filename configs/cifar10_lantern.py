"""Images of CIFAR-10's classes by LANTERN, with the weights in `checkpoints/`.

  python -m specjax.sample --config configs/cifar10_lantern.py --out out/images

Half a minute on two CPU cores. Writes a labelled grid, a map of where drafts
were accepted, and the summary. LANTERN bends the law: the summary says by how
much a token. The others, from the same weights:

  --config configs/cifar10_lantern.py:exact      the decoder's own law
  --config configs/cifar10_lantern.py:lantern++  a static tree, ratios limited
  --config configs/cifar10_lantern.py:jacobi     exact, drafts without training
  --config configs/cifar10_lantern.py:grouped    GSD: groups of like probability
  --config configs/cifar10_lantern.py:tiny       random weights, seconds
"""

from ml_collections import config_dict

from configs import common, sample_image

_ARGS = ('', 'exact', 'lantern++', 'jacobi', 'grouped', 'tiny')


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is one of the docstring's."""
  if arg not in _ARGS:
    raise ValueError(f"config argument {arg!r}: one of "
                     f"{', '.join(map(repr, _ARGS))}")
  config = sample_image.get_config('tiny' if arg == 'tiny' else '')
  if arg != 'tiny':
    config.target = f'{common.CODES}/decoder'
    config.images.tokenizer = f'{common.CODES}/tokenizer'
    config.images.per_class = 2
    config.batch_size = 20
  if arg not in ('tiny', 'jacobi', 'grouped'):
    config.speculative = common.speculative(
        method='eagle3', model=f'{common.CODES}/drafter',
        num_speculative_tokens=5)
  if arg in ('', 'tiny'):
    config.verify = 'lantern'
    config.verify_options.update(dict(
        codebook=config.images.tokenizer if arg == '' else 'synthetic',
        num_neighbours=3 if arg else 10, delta=0.05))
  elif arg == 'lantern++':
    config.speculative.update(dict(
        num_speculative_tokens=None, draft_sample_method='without_replacement',
        speculative_token_tree='branching:4,2,2,1'))
    config.verify = 'lantern'
    config.verify_options.update(dict(
        codebook=config.images.tokenizer, num_neighbours=10, lam=2.0))
  elif arg == 'grouped':
    config.verify = 'grouped'
    config.verify_options.group = 14
  return config
