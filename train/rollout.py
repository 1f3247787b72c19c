"""Makes training text: `python -m train.rollout --config configs/...`.

Reads prompts, or lets the target invent them, generates an answer to each,
and to what users say next, and writes what passes the filters as a dataset to
`--out`. An interrupted run, started again with the same config, goes on where
it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import functools
import hashlib
from pathlib import Path
import signal
from typing import Any

import jax
import numpy as np

from specjax.data import conversations, filters, store
from specjax.data.dialogues import Dialogue, by_prompt
from specjax.data.store import Record
from specjax.distill import rollout
from specjax.distill.rollout import Settings
from specjax.host import cli
from specjax.host.load import Model
from specjax.io import hub, output
from specjax.io.tokenizer import Tokenizer
from train import answers

_FLAGS = cli.define_flags('out/rollout')
# What a user would say, in a template; nobody says this.
_SENTINEL = 'q7Zx40Wq'


def main() -> int:
  """Runs the program; returns the exit code."""
  config, quiet = _FLAGS.config.value, _FLAGS.quiet.value
  out = output.prepare(_FLAGS.out.value)
  answer, user = settings(config, 'answer'), settings(config, 'user')
  limits = filters.Limits(**config.limits.to_dict())
  check_turns(config)
  data = place(out, config.form)
  # A job that is told to stop keeps what is finished, as after Ctrl-C.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  cli.start(_FLAGS.distributed.value)
  mesh = cli.mesh(config.mesh)
  target = cli.load_target(config, mesh, quiet)
  if target.tokenizer is None:
    raise ValueError(f'{target.name} has no tokenizer')
  origin = {
      'target': target.name, 'revision': revision(config.target),
      'dtype': target.lm.config.dtype,
      'chat_template': target.tokenizer.template_hash}

  # --- Prompts --------------------------------------------------------
  free = room(target, answer)
  dropped: Counter[str] = Counter()
  prompts, dialogues = from_files(config, target, dropped)
  prompts += invented(config, target, user, origin, out, dropped, quiet)
  prompts = distinct(prompts, config.max_prompt, dropped, free)

  # --- Answers --------------------------------------------------------
  write = answers.Writer(
      target, answer, origin, out, config.part_size, config.max_prompt,
      limits, quiet)
  found = write(prompts, dialogues, config.max_turns, dropped)

  # --- What is kept ---------------------------------------------------
  train, held_out = answers.split(
      found, prompts, config.held_out, config.seed)
  keep = filters.Filter(limits)
  # The held-out text first: what resembles it is then not trained on.
  kept = {'held_out': list(keep(held_out)), 'train': list(keep(train))}
  kept = {name: rows for name, rows in kept.items() if rows}
  facts = {
      **origin, 'user': answers.describe(user),
      'answer': answers.describe(answer),
      'limits': config.limits.to_dict(), 'prompts_dropped': dict(dropped),
      'answers': dict(keep.reasons),
      'num_prompts': sum(map(len, found.turns)),
      'turns': [len(turn) for turn in found.turns],
      'texts': {name: len(rows) for name, rows in kept.items()},
      'new_tokens': {name: sum(len(r.answer) for r in rows)
                     for name, rows in kept.items()},
      'tokens_per_s': found.tokens_per_s}
  if jax.process_index() == 0:
    save(data, kept, facts)
    output.write_json(out / 'rollout.json', facts)
    if not quiet:
      report(facts, data)
  return 0


def place(out: Path, form: str) -> Path:
  """Returns where the dataset goes; raises ValueError if one is there."""
  if form not in ('tfds', 'npz'):
    raise ValueError(f"config.form={form!r}: 'tfds' or 'npz'")
  data = out / ('rollouts' if form == 'tfds' else 'rollouts.npz')
  if data.exists():
    raise ValueError(f'{data} exists: give another --out')
  return data


def check_turns(config: Any) -> None:
  """Raises ValueError for turns that cannot be answered in order."""
  if config.max_turns < 1:
    raise ValueError(f'config.max_turns={config.max_turns}: must be >= 1')
  if config.max_turns > 1 and config.turns != 'first':
    raise ValueError(
        f'config.max_turns={config.max_turns} begins with the first turn of '
        "each conversation: give --config.turns=first, too (not "
        f'{config.turns!r})')


def room(target: Model, answer: Settings) -> int | None:
  """Returns the tokens that the context has for a prompt; None: any number.

  Raises:
    ValueError: answers take all of it.
  """
  free = rollout.room(target.lm, answer)
  if free is not None and free < 1:
    raise ValueError(
        f'config.answer.max_new={answer.max_new}: the context of '
        f'{target.name} is {target.max_length} tokens, prompt included')
  return free


def settings(config: Any, section: str) -> Settings:
  """Returns the `Settings` of a section; unset options are the defaults."""
  values = {k: v for k, v in config[section].to_dict().items()
            if v is not None}
  return Settings(seed=config.seed, **values)


def revision(source: str) -> str:
  """Returns the sha256 of a target's weights file (of all, in a folder)."""
  if source == 'random':
    return 'random'
  path = hub.resolve(source, quiet=True)
  files = [path] if path.is_file() else sorted(
      p for p in path.rglob('*') if p.is_file() and p.suffix != '.json')
  found = hashlib.sha256()
  for file in files:
    with open(file, 'rb') as data:
      while block := data.read(1 << 22):
        found.update(block)
  return found.hexdigest()


def from_files(
    config: Any, target: Model, dropped: Counter[str]
) -> tuple[list[np.ndarray], dict[bytes, Dialogue]]:
  """Returns the prompts of `config.prompts`; counts what is dropped.

  Returns:
    `(prompts, dialogues)`; see `data.dialogues.by_prompt`. Without a
    `config.max_turns` over 1 no dialogue is wanted.
  """
  if config.prompts is None:
    return [], {}
  rows, bad = conversations.read(config.prompts.split(','))
  encode = functools.partial(answers.encode, target)
  found, unfit = conversations.prompts(
      rows, encode, max_length=config.max_prompt, turns=config.turns)
  dropped.update(bad)
  dropped.update(unfit)
  if config.max_turns == 1:
    return found, {}
  return found, by_prompt(rows, encode)


def around_user(
    tokenizer: Tokenizer, system: str = '', opening: str = ''
) -> tuple[list[int], list[int]]:
  """Returns the token ids of the chat template around a user's words.

  Args:
    tokenizer: with a chat template.
    system: of a system message; '' leaves it to the template.
    opening: how the user begins; part of what stands before.

  Returns:
    `(before, after)`; `after` ends where the answer begins.
  """
  messages = [{'role': 'user', 'content': _SENTINEL}]
  if system:
    messages.insert(0, {'role': 'system', 'content': system})
  text = tokenizer.apply_chat_template(messages)
  before, found, after = text.partition(_SENTINEL)
  if not found or not before or not after:
    raise ValueError('the chat template does not enclose what a user says: '
                     'give prompts (config.prompts)')
  # A word that goes on is another token than one that has ended.
  opening = opening.rstrip(' ')
  return (tokenizer.encode(before + opening, add_bos=False),
          tokenizer.encode(after, add_bos=False))


def invented(
    config: Any, target: Model, user: Settings, origin: dict[str, Any],
    out: Path, dropped: Counter[str], quiet: bool,
) -> list[np.ndarray]:
  """Returns `config.num_self_prompts` user turns less those that failed."""
  num = config.num_self_prompts
  if not num:
    return []
  text: Any = target.tokenizer
  around = [around_user(text, system, opening)
            for system in config.system_prompts
            for opening in config.openings]

  status = answers.Status(quiet or jax.process_index() != 0)

  def prompts(skip):
    for index, tokens in rollout.self_prompts(
        target.lm, target.params, num, prefixes=[a[0] for a in around],
        suffix=around[0][1], eos=target.eos, settings=user, skip=skip,
        mesh=target.mesh, on_progress=status):
      yield Record(tokens, len(tokens), prompt_index=index)

  asked = {**origin, **answers.describe(user), 'num': num,
           'system_prompts': config.system_prompts,
           'openings': config.openings}
  whole = out / 'turns.npz'
  if whole.exists():
    records, facts = store.load_npz(whole)
    if facts['settings'] == digest_of(asked):
      return _turns(records, num, dropped)
    raise ValueError(f'{whole} is of other settings: give another --out')
  status.begin('user turns')
  records = answers.decode(
      out / 'turns', asked, config.part_size, status, prompts)
  if jax.process_index() == 0:
    # Turns that failed leave no record, so the parts cannot tell the end.
    store.save_npz(whole, records, {'settings': digest_of(asked)})
  return _turns(records, num, dropped)


def digest_of(values: dict[str, Any]) -> str:
  """Returns a hash of settings."""
  return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()


def _turns(records, num, dropped) -> list[np.ndarray]:
  dropped['user turn without an end'] += num - len(records)
  return [r.tokens for r in records]


def distinct(
    prompts: Sequence[np.ndarray], longest: int, dropped: Counter[str],
    free: int | None = None,
) -> list[np.ndarray]:
  """Returns the prompts without duplicates and those that are too long.

  Args:
    prompts: token ids. longest: tokens that are wanted, at most.
    dropped: counts the others, by reason.
    free: tokens that the context has for a prompt; None: any number.
  """
  kept: dict[bytes, np.ndarray] = {}
  for tokens in prompts:
    key = tokens.tobytes()
    if len(tokens) > longest:
      dropped['too long'] += 1
    elif free is not None and len(tokens) > free:
      dropped[answers.NO_ROOM] += 1
    elif key in kept:
      dropped['duplicate prompt'] += 1
    else:
      kept[key] = tokens
  if not kept:
    raise ValueError('no prompt is left: '
                     f'{conversations.describe(dropped) or "none asked for"}')
  return list(kept.values())


def save(data: Path, kept: dict[str, list[Record]], facts: Any) -> None:
  """Writes the splits: a tfds directory, or an .npz file each."""
  if not kept.get('train'):
    raise ValueError('nothing to train on is left: '
                     f'{conversations.describe(facts["answers"])}')
  if data.suffix != '.npz':
    store.write(data, kept, facts)
    return
  for name, rows in kept.items():
    if name != 'train':
      store.save_npz(data.with_name(f'{data.stem}-{name}.npz'), rows, facts)
  store.save_npz(data, kept['train'], facts)


def report(facts: dict[str, Any], data: Path) -> None:
  """Prints what came of it."""
  turns = ', '.join(map(str, facts['turns']))
  by_turn = f' ({turns} by turn)' if len(facts['turns']) > 1 else ''
  print(f'prompts: {facts["num_prompts"]}{by_turn}; dropped: '
        f'{conversations.describe(facts["prompts_dropped"]) or "none"}')
  print(f'answers: {conversations.describe(facts["answers"])}')
  for name, num in facts['texts'].items():
    print(f'{name}: {num} texts, {facts["new_tokens"][name]} new tokens')
  print(f'{facts["tokens_per_s"]:.0f} tokens/s')
  cli.note(f'wrote {data}')


if __name__ == '__main__':
  cli.run(main)
