"""What the configs of `train.drafter` share: options by kind of drafter."""

from ml_collections import config_dict

_INT, _FLOAT, _STR = int, float, str
# Those of `specjax.distill.losses`; a config imports nothing of the library.
LOSSES = ('ce', 'kl', 'reverse_kl', 'jsd', 'tvd', 'l1', 'tvd_pp', 'nla', 'lk')


def of_kind(config: config_dict.ConfigDict, kind: str) -> None:
  """Sets the options that a kind of drafter has."""
  config.kind = kind
  config.loss.update(section(hold=_FLOAT, chunk=_INT))
  for stage in ('first', 'last'):
    config.loss[stage] = section(**dict.fromkeys(LOSSES, _FLOAT))
  if kind in ('dspark', 'dflash'):
    config.model.num_layers, config.model.num_taps = 3, 4
    config.model.update(section(
        num_slots=_INT, layout=_STR, mask_token=_INT, markov=_STR,
        markov_rank=_INT, markov_input=_STR, confidence=bool))
    config.model.num_slots = 8
    # As shipped: 10 MiB in int8.
    config.model.mlp_dim = 960
    config.model.markov_rank, config.model.markov_input = 40, 'embedding'
    config.save.form = 'int8'
    config.task.update(dict(num_anchors=96, gamma=4.0, weighting='decay',
                            confidence_weight=1.0))
    config.loss.first.kl = 1.0
    config.loss.last.update(dict(kl=0.1, l1=0.9))
    config.loss.hold = 0.3
  elif kind in ('eagle1', 'eagle3', 'hass'):
    config.model.update(section(own_head=bool, fuse_bias=bool))
    config.task.update(section(
        steps=_INT, decay=_FLOAT, renormalise=bool, feature_weight=_FLOAT,
        top_k=_INT, top_k_weight=_FLOAT, noise=_FLOAT))
    if kind != 'eagle3':  # trained for fewer steps than it can go on for
      config.eval.draft.num_speculative_tokens = 5
  elif kind in ('medusa', 'hydra'):
    config.model = section(num_heads=_INT, head=_STR, num_layers=_INT)
    config.task.update(section(num_anchors=_INT, decay=_FLOAT))
  elif kind == 'small_lm':
    config.model.update(section(
        embed_dim=_INT, tied=bool, embedding=_STR))
    del config.model.taps, config.model.num_taps  # it reads tokens alone
    config.model.num_layers = 4
    config.task.update(dict(
        stage='align', text_weight=0.0, steps=5, on_policy=0.0, every=100,
        max_new=128))
  else:
    raise ValueError(f"config argument {kind!r}: '', 'tiny', a kind (dspark, "
                     "dflash, eagle1, eagle3, hass, medusa, hydra, small_lm) "
                     "or 'tiny-KIND'")


def shrink(config: config_dict.ConfigDict) -> None:
  """Makes a run of seconds, without data or on `rollout_smollm2.py:tiny`'s."""
  config.target, config.draft_vocab_size = 'random', 128
  config.data.rollouts, config.data.length = 'synthetic', 64
  config.data.held_out = 0.2
  config.steps = 12
  config.eval.draft.num_speculative_tokens = None
  config.batch_size = 4
  config.log_every, config.eval_every, config.save_every = 4, 6, 6
  config.eval.update(dict(num_prompts=3, max_prompt=48, new_tokens=8,
                          batches=1))
  if config.kind in ('dspark', 'dflash'):
    config.model.update(dict(num_layers=1, num_taps=2, num_slots=3,
                             markov_rank=8))
    config.task.num_anchors = 6
  if config.kind == 'small_lm':
    config.model.update(dict(num_layers=1, embed_dim=16))
    config.task.update(dict(steps=3, every=2, max_new=8))


def section(**types) -> config_dict.ConfigDict:
  """Returns options that are None until they are set."""
  found = config_dict.ConfigDict()
  for name, kind in types.items():
    found[name] = config_dict.placeholder(kind)
  return found
