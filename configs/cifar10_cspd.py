"""Continuous image tokens, drafted and verified: CIFAR-10, shipped weights.

  python -m specjax.sample --config configs/cifar10_cspd.py --out out/latents

Two minutes on two CPU cores. Writes a labelled grid, maps of where (in the
image, in the order of decoding) drafts were accepted, and the summary. The
rule compares the drafts' own denoising paths and is exact; drafts are scored
by one pass of a causal decoder. Decoders of this size spend their time in
denoising steps: guessing those ahead (`:ahead`) makes them 2.8 times as fast,
also exactly, where drafts of tokens do not pay. See docs/continuous.md.

  --config configs/cifar10_cspd.py:published  the published rule, which is not
                                              exact
  --config configs/cifar10_cspd.py:ahead      drafts of denoising steps
  --config configs/cifar10_cspd.py:plain      without drafts
  --config configs/cifar10_cspd.py:tiny       random weights, seconds
"""

from ml_collections import config_dict

from configs import common, sample_latents

_ARGS = ('', 'published', 'ahead', 'plain', 'tiny')


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is one of the docstring's."""
  if arg not in _ARGS:
    raise ValueError(f"config argument {arg!r}: one of "
                     f"{', '.join(map(repr, _ARGS))}")
  if arg == 'tiny':
    config = sample_latents.get_config('tiny')
    config.verify, config.verify_options.last_steps = 'path_exact', 2
    return config
  config = sample_latents.get_config()
  config.target = f'{common.LATENTS}/decoder'
  config.images.tokenizer = f'{common.LATENTS}/autoencoder'
  config.images.update(dict(per_class=1, guidance=4.0))
  config.batch_size = 10
  config.speculative.update(dict(
      model=f'{common.LATENTS}/drafter', num_speculative_tokens=3))
  if arg == 'published':
    config.verify = 'cspd'
  elif arg == 'ahead':
    config.speculative = common.speculative(method='null')
    config.images.process.ahead, config.batch_size = 4, 1
  elif arg == 'plain':
    config.speculative = common.speculative(method='null')
    config.images.per_class, config.batch_size = 4, 40
    config.compare_plain = False
  return config
