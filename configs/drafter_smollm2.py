"""A block drafter (DSpark) for SmolLM2-135M-Instruct.

  python -m train.rollout --config configs/rollout_smollm2.py --out out/text
  python -m train.drafter --config configs/drafter_smollm2.py \
      --config.data.rollouts=out/text --out out/dspark

Half an hour on one accelerator with 80 GB; `--config.minutes=10` for less.
What is None below has each kind's own default.

  --config configs/drafter_smollm2.py:tiny     random weights, under a minute
  --config configs/drafter_smollm2.py:eagle3   another kind: dflash, eagle1,
                                               eagle3, hass, medusa, hydra,
                                               small_lm

A small LM (FastDraft, Direct Alignment) is trained in stages, each from the
one before; the first two need no text of the target:

  ... --config configs/drafter_smollm2.py:small_lm --config.task.stage=pretrain
      --config.data.rollouts=out/plain --out out/small_plain
  ... --config configs/drafter_smollm2.py:small_lm --config.task.stage=align
      --config.init_from=out/small_plain/drafter --out out/small
"""

from ml_collections import config_dict

_INT, _FLOAT, _STR = int, float, str


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '', 'tiny', or a kind (tiny: 'tiny-KIND')."""
  config = config_dict.ConfigDict()
  config.target = 'smollm2-135m-instruct'
  config.dtype = config_dict.placeholder(str)  # None: by the backend
  config.mesh = (1, 1)
  config.seed = 0
  config.kind = 'dspark'
  config.draft_vocab_size = 16_384
  config.init_from = config_dict.placeholder(str)  # a drafter to train on
  # --- Text -----------------------------------------------------------
  config.data = config_dict.ConfigDict(dict(
      rollouts=config_dict.placeholder(str), length=512, share=1.0,
      held_out=0.02))  # the last: where the rollouts hold nothing out
  # --- Network: None is the kind's default, or the target's -----------
  config.model = section(
      num_layers=_INT, mlp_dim=_INT, num_heads=_INT, num_kv_heads=_INT,
      head_dim=_INT, qk_norm=bool, taps=tuple, num_taps=_INT)
  # --- Training -------------------------------------------------------
  config.task = config_dict.ConfigDict()
  config.loss = config_dict.ConfigDict()
  config.steps = 0  # 0: as many as fit into the minutes
  config.minutes = 30.0
  config.batch_size = 32
  config.optimizer = config_dict.ConfigDict(dict(
      learning_rate=1e-3, warmup=0.03, schedule='cosine', betas=(0.9, 0.95),
      weight_decay=0.0, clip_norm=1.0, muon=False))
  # --- Tests, states, results -----------------------------------------
  config.log_every = 50
  config.eval_every = 1000
  config.save_every = 1000
  config.eval = config_dict.ConfigDict(dict(
      prompts=config_dict.placeholder(str), num_prompts=64, max_prompt=512,
      new_tokens=128, batches=4, draft=section(
          num_speculative_tokens=_INT, speculative_token_tree=_STR,
          use_dynamic_tree=bool, tree_depth=_INT, tree_top_k=_INT,
          lattice=bool, num_candidates=_INT)))
  config.save = config_dict.ConfigDict(dict(form='bfloat16'))
  tiny, _, kind = arg.partition('-')
  if tiny == 'tiny':
    arg = kind or 'dspark'
  of_kind(config, arg or 'dspark')
  if tiny == 'tiny':
    shrink(config)
  return config


def of_kind(config: config_dict.ConfigDict, kind: str) -> None:
  """Sets the options that a kind of drafter has."""
  config.kind = kind
  if kind in ('dspark', 'dflash'):
    config.model.num_layers, config.model.num_taps = 3, 4
    config.model.update(section(
        num_slots=_INT, layout=_STR, mask_token=_INT, markov=_STR,
        markov_rank=_INT, markov_input=_STR, confidence=bool))
    config.model.num_slots = 8
    # As shipped: 10 MiB in int8.
    config.model.mlp_dim = 960
    config.model.markov_rank, config.model.markov_input = 64, 'embedding'
    config.save.form = 'int8'
    config.task.update(dict(num_anchors=96, gamma=4.0, weighting='decay',
                            confidence_weight=1.0))
    config.loss.update(section(first=dict, last=dict, hold=_FLOAT, chunk=_INT))
    config.loss.first = dict(kl=1.0)
    config.loss.last = dict(kl=0.1, l1=0.9)
    config.loss.hold = 0.3
  elif kind in ('eagle1', 'eagle3', 'hass'):
    config.model.update(section(own_head=bool, fuse_bias=bool))
    config.task.update(section(
        steps=_INT, decay=_FLOAT, renormalise=bool, feature_weight=_FLOAT,
        top_k=_INT, top_k_weight=_FLOAT, noise=_FLOAT))
    config.loss.update(section(first=dict, last=dict, hold=_FLOAT, chunk=_INT))
  elif kind in ('medusa', 'hydra'):
    config.model = section(num_heads=_INT, head=_STR, num_layers=_INT)
    config.task.update(section(num_anchors=_INT, decay=_FLOAT))
    config.loss.update(section(first=dict, last=dict, hold=_FLOAT, chunk=_INT))
  elif kind == 'small_lm':
    config.model.update(section(
        embed_dim=_INT, tied=bool, embedding=_STR))
    del config.model.taps, config.model.num_taps  # it reads tokens alone
    config.model.num_layers = 4
    config.task.update(dict(
        stage='align', text_weight=0.0, steps=5, on_policy=0.0, every=100,
        max_new=128))
    config.loss.update(section(first=dict, last=dict, hold=_FLOAT, chunk=_INT))
  else:
    raise ValueError(f"config argument {kind!r}: '', 'tiny', a kind (dspark, "
                     "dflash, eagle1, eagle3, hass, medusa, hydra, small_lm) "
                     "or 'tiny-KIND'")


def shrink(config: config_dict.ConfigDict) -> None:
  """Makes a run of seconds, without any data."""
  config.target, config.draft_vocab_size = 'random', 128
  config.data.rollouts, config.data.length = 'synthetic', 48
  config.data.held_out = 0.2
  config.steps = 12
  config.batch_size = 4
  config.log_every, config.eval_every, config.save_every = 4, 6, 6
  config.eval.update(dict(num_prompts=3, max_prompt=16, new_tokens=8,
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
