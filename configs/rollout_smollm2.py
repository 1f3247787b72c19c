"""SmolLM2-135M-Instruct writes the text that its drafters learn from.

  python -m train.rollout --config configs/rollout_smollm2.py --out out/text

With no data at all: the model invents the questions, too. `--out` then holds
the dataset and `rollout.json`; run the same command again after an
interruption and it goes on.

  --config configs/rollout_smollm2.py:tiny   random weights, seconds
  --config.prompts=a.jsonl,b.json            your own conversations as well
"""

from ml_collections import config_dict

# How invented user turns begin; '' leaves that to the model. The others ask
# for work whose answer copies from the question, which is rare otherwise.
_OPENINGS = (
    '', '', '', '', 'Summarize the following text:\n\n',
    'Here is a passage:\n\n', 'Write a Python function that ',
    'Fix the bug in this code:\n\n```python\n', 'Translate this ',
    'A shop sells ', 'Rewrite this email: ', 'List ', 'How ', 'What is ',
    'Explain ', 'Write a ', 'Extract the names and dates from this text: ')


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the config; `arg` is '' or 'tiny'."""
  config = config_dict.ConfigDict()
  config.target = 'smollm2-135m-instruct'
  config.dtype = config_dict.placeholder(str)
  config.mesh = (1, 1)
  config.seed = 0
  # --- Prompts --------------------------------------------------------
  config.prompts = config_dict.placeholder(str)  # files, comma between
  config.turns = 'all'  # of a conversation: first, last, all
  # User turns answered in order, each after the target's own answer to the
  # one before; over 1 it takes `turns` 'first'.
  config.max_turns = 1
  config.num_self_prompts = 65_536
  config.system_prompts = ('',)  # '' is the template's own
  config.openings = _OPENINGS
  config.max_prompt = 1024  # tokens
  # --- How user turns and answers are generated -----------------------
  config.user = _generation(max_new=256, temperatures=(1.0,), top_p=0.95)
  config.answer = _generation(max_new=512, temperatures=(0.0, 0.0, 0.7, 1.0))
  # --- What is kept ---------------------------------------------------
  config.held_out = 0.02  # share of the prompts
  config.limits = config_dict.ConfigDict(dict(
      least_new=8, head=32, repeated=((4, 0.6), (8, 0.4)), max_period=64,
      repeats=3, cut=True))
  config.form = 'tfds'  # or 'npz'
  config.part_size = 8192  # records that an interruption can cost
  if arg == 'tiny':
    config.target = 'random'
    # Random weights seldom end a turn; 64 tokens hold those that they do,
    # with an answer: a row of `configs/drafter_smollm2.py:tiny`.
    config.num_self_prompts = 192
    config.openings = ('', 'a')
    config.user = _generation(
        max_new=24, temperatures=(1.0,), batch=64)
    config.answer = _generation(
        max_new=16, temperatures=(0.0, 1.0), batch=4)
    config.limits.least_new = 2
    config.held_out = 0.25
    config.form = 'npz'
    config.part_size = 4
  elif arg:
    raise ValueError(f"config argument {arg!r}: '' or 'tiny'")
  return config


def _generation(**values) -> config_dict.ConfigDict:
  """Returns the options of `specjax.distill.rollout.Settings`."""
  section = config_dict.ConfigDict()
  for name, kind in dict(
      max_new=int, temperatures=tuple, top_p=float, batch=int, refill=float,
      rounds=int, chunk=int, buckets=tuple, cache_tokens=int).items():
    section[name] = config_dict.placeholder(kind)
  section.update(values)
  return section
