"""What several configs share: data, sampling and speculation, every key."""

import pathlib

from ml_collections import config_dict

# What comes with the sources: the drafter of SmolLM2-135M-Instruct; for
# CIFAR-10 a tokenizer, a decoder of its codes and a drafter, and the same for
# continuous tokens.
_SHIPPED = pathlib.Path(__file__).parents[1] / 'checkpoints'
DRAFTER = str(_SHIPPED / 'smollm2-135m-instruct-dspark')
CODES = str(_SHIPPED / 'cifar10-codes')
LATENTS = str(_SHIPPED / 'cifar10-latents')

_INT, _FLOAT, _STR = int, float, str


def sampling(**values) -> config_dict.ConfigDict:
  """Returns all options of `specjax.Sampling`; unset ones are None."""
  types = dict(
      temperature=_FLOAT, top_k=_INT, top_p=_FLOAT, min_p=_FLOAT,
      repetition_penalty=_FLOAT, presence_penalty=_FLOAT,
      frequency_penalty=_FLOAT, allowed_ids=tuple, banned_ids=tuple,
      max_new_tokens=_INT, min_new_tokens=_INT, stop=tuple, ignore_eos=bool,
      seed=_INT, n=_INT, log_probs=bool)
  return _section(types, values)


def speculative(**values) -> config_dict.ConfigDict:
  """Returns all keys of a speculative configuration; unset ones are None."""
  types = dict(
      method=_STR, num_speculative_tokens=_INT, prompt_lookup_min=_INT,
      prompt_lookup_max=_INT, prefer=_STR, max_ngram=_INT, model=_STR,
      draft_confidence_threshold=_FLOAT, draft_len_schedule=_STR,
      exact_shape=bool, draft_cost=_FLOAT, widths=tuple, round_costs=tuple,
      draft_vocab=_STR, draft_vocab_counts=_STR,
      prompt_lookup_lengths=tuple, speculative_token_tree=_STR,
      draft_sample_method=_STR, use_dynamic_tree=bool, tree_depth=_INT,
      tree_top_k=_INT, lattice=bool, num_candidates=_INT, copy_max=_INT,
      draft_acceptance_threshold=_FLOAT, prefill=_INT, init=_STR, width=_INT,
      redraft=_STR)
  return _section(types, values)


def verify_options(**values) -> config_dict.ConfigDict:
  """Returns options of all rules, and the files of their arrays; unset None.

  `codebook` is a tokenizer of `train.vq`, an .npy file of VQ vectors
  [entries, channels] or 'synthetic', `head` a judge's .safetensors file.
  """
  types = dict(
      lenience=_FLOAT, epsilon=_FLOAT, delta=_FLOAT, form=_STR,
      num_neighbours=_INT, lam=_FLOAT, residual=_STR, offset=_INT,
      threshold=_FLOAT, num_noise=_INT, drafts=_STR, group=_INT, band=_FLOAT,
      distance=_FLOAT, last_steps=_INT, max_tries=_INT, align=bool,
      inner_temperature=_FLOAT, inverted=bool, codebook=_STR, head=_STR)
  return _section(types, values)


def online(**values) -> config_dict.ConfigDict:
  """Returns `enabled` and all fields of `specjax.distill.online.Settings`.

  Off unless `enabled`; unset ones are None.
  """
  types = dict(
      enabled=bool, every=_INT, steps=_INT, learning_rate=_FLOAT,
      clip_norm=_FLOAT, length=_INT, places=_INT)
  return _section(types, values)


def images(**values) -> config_dict.ConfigDict:
  """Returns the images that a program learns from; `path` has to be given.

  `path` is a dataset of `train.images`, an .npz of images or 'synthetic';
  `test` is another .npz to be tested on. Without it, where `path` has no test
  split, the share `held_out` of its images is not learnt from.
  """
  return _section(
      dict(path=_STR, test=_STR), {'held_out': 0.1, **values})


def image_run() -> config_dict.ConfigDict:
  """Returns what runs that train models of images have in common.

  `steps` decides how long they last, or `minutes`, which is not here.
  """
  return config_dict.ConfigDict(dict(
      mesh=(1, 1), seed=0, data=images(),
      steps=0,  # 0: as many as fit into the minutes
      decay=0.999,  # of the moving average, which is kept
      log_every=50, save_every=2000))


def optimizer(learning_rate: float, **values) -> config_dict.ConfigDict:
  """Returns all options of `train.loop.optimiser`: AdamW, unless changed."""
  return config_dict.ConfigDict({
      **dict(learning_rate=learning_rate, warmup=0.03, schedule='cosine',
             betas=(0.9, 0.95), weight_decay=0.0, clip_norm=1.0, muon=False),
      **values})


def shorten(config: config_dict.ConfigDict) -> None:
  """Makes a run of seconds of `config`, on made-up images."""
  config.data.path = 'synthetic'
  config.steps, config.batch_size = 12, 8
  config.log_every, config.eval_every, config.save_every = 4, 6, 6


def _section(types, values) -> config_dict.ConfigDict:
  section = config_dict.ConfigDict()
  for name, kind in types.items():
    section[name] = config_dict.placeholder(kind)
  section.update(values)
  return section
