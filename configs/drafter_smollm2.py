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

from configs.drafter_kinds import of_kind, section, shrink

_INT, _STR = int, str


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '', 'tiny', or a kind (tiny: 'tiny-KIND')."""
  config = config_dict.ConfigDict()
  config.target = 'smollm2-135m-instruct'
  config.dtype = config_dict.placeholder(str)  # None: by the backend
  config.mesh = (1, 1)
  config.seed = 0
  config.kind = 'dspark'
  config.draft_vocab_size = 28_672
  config.init_from = config_dict.placeholder(str)  # a drafter to train on
  # --- Text -----------------------------------------------------------
  config.data = config_dict.ConfigDict(dict(
      rollouts=config_dict.placeholder(str), length=512, share=1.0,
      held_out=0.02,  # where the rollouts hold nothing out
      exclude=config_dict.placeholder(str)))  # files of a test's questions
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
      learning_rate=2e-3, warmup=0.03, schedule='cosine', betas=(0.9, 0.95),
      weight_decay=0.0, clip_norm=1.0, muon=True))
  # --- Tests, states, results -----------------------------------------
  config.log_every = 50
  config.eval_every = 1000
  config.save_every = 1000
  config.eval = config_dict.ConfigDict(dict(
      prompts=config_dict.placeholder(str), num_prompts=64, max_prompt=512,
      new_tokens=128, temperature=0.0, batches=4, draft=section(
          num_speculative_tokens=_INT, speculative_token_tree=_STR,
          use_dynamic_tree=bool, tree_depth=_INT, tree_top_k=_INT,
          lattice=bool, num_candidates=_INT, copy_max=_INT)))
  config.save = config_dict.ConfigDict(dict(form='bfloat16'))
  tiny, _, kind = arg.partition('-')
  if tiny == 'tiny':
    arg = kind or 'dspark'
  of_kind(config, arg or 'dspark')
  if tiny == 'tiny':
    shrink(config)
  return config
