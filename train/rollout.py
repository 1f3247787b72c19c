"""Makes training text: `python -m train.rollout --config configs/...`.

Reads prompts, or lets the target invent them, generates an answer to each,
and writes what passes the filters as a dataset to `--out`. An interrupted
run, started again with the same config, goes on where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
import dataclasses
import hashlib
from pathlib import Path
import signal
import sys
import time
from typing import Any

import jax
import numpy as np

from specjax.data import conversations, filters, store
from specjax.data.store import Record
from specjax.distill import rollout
from specjax.distill.rollout import Progress, Settings
from specjax.host import cli
from specjax.host.load import Model
from specjax.io import hub, output
from specjax.io.tokenizer import Tokenizer

_FLAGS = cli.define_flags('out/rollout')
# What a user would say, in a template; nobody says this.
_SENTINEL = 'q7Zx40Wq'


def main() -> int:
  """Runs the program; returns the exit code."""
  config, quiet = _FLAGS.config.value, _FLAGS.quiet.value
  out = output.prepare(_FLAGS.out.value)
  answer, user = settings(config, 'answer'), settings(config, 'user')
  limits = filters.Limits(**config.limits.to_dict())
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
  dropped: Counter[str] = Counter()
  prompts = from_files(config, target, dropped)
  prompts += invented(config, target, user, origin, out, dropped, quiet)
  prompts = distinct(prompts, config.max_prompt, dropped)

  # --- Answers --------------------------------------------------------
  def answers(skip, status):
    return rollout.generate(
        target.lm, target.params, prompts, eos=target.eos, settings=answer,
        skip=skip, mesh=mesh, on_progress=status)

  about = {**origin, **describe(answer), 'prompts': digest(prompts)}
  records, speed = decode(
      out / 'parts', about, config.part_size, quiet, 'answers', answers)

  # --- What is kept ---------------------------------------------------
  train, held_out = filters.split(records, config.held_out, config.seed)
  keep = filters.Filter(limits)
  # The held-out text first: what resembles it is then not trained on.
  kept = {'held_out': list(keep(held_out)), 'train': list(keep(train))}
  kept = {name: rows for name, rows in kept.items() if rows}
  facts = {
      **origin, 'user': describe(user), 'answer': describe(answer),
      'limits': config.limits.to_dict(), 'prompts_dropped': dict(dropped),
      'answers': dict(keep.reasons), 'num_prompts': len(prompts),
      'texts': {name: len(rows) for name, rows in kept.items()},
      'new_tokens': {name: sum(len(r.answer) for r in rows)
                     for name, rows in kept.items()},
      'tokens_per_s': speed}
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


def settings(config: Any, section: str) -> Settings:
  """Returns the `Settings` of a section; unset options are the defaults."""
  values = {k: v for k, v in config[section].to_dict().items()
            if v is not None}
  return Settings(seed=config.seed, **values)


def describe(settings: Settings) -> dict[str, Any]:
  """Returns settings as JSON values."""
  return dataclasses.asdict(settings)


def digest(prompts: Sequence[np.ndarray]) -> str:
  """Returns a hash of all prompts, in order."""
  found = hashlib.sha256()
  for tokens in prompts:
    found.update(len(tokens).to_bytes(8, 'little'))
    found.update(np.asarray(tokens, '<i4').tobytes())
  return found.hexdigest()


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
) -> list[np.ndarray]:
  """Returns the prompts of `config.prompts`; counts what is dropped."""
  if config.prompts is None:
    return []
  rows, bad = conversations.read(config.prompts.split(','))
  text: Any = target.tokenizer

  def encode(what):
    if isinstance(what, str):
      return text.encode(what)
    return text.encode(text.apply_chat_template(what), add_bos=False)

  found, unfit = conversations.prompts(
      rows, encode, max_length=config.max_prompt, turns=config.turns)
  dropped.update(bad)
  dropped.update(unfit)
  return found


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

  def prompts(skip, status):
    for index, tokens in rollout.self_prompts(
        target.lm, target.params, num, prefixes=[a[0] for a in around],
        suffix=around[0][1], eos=target.eos, settings=user, skip=skip,
        mesh=target.mesh, on_progress=status):
      yield Record(tokens, len(tokens), prompt_index=index)

  asked = {**origin, **describe(user), 'num': num,
           'system_prompts': config.system_prompts,
           'openings': config.openings}
  whole = out / 'turns.npz'
  if whole.exists():
    records, facts = store.load_npz(whole)
    if facts['settings'] == digest_of(asked):
      return _turns(records, num, dropped)
    raise ValueError(f'{whole} is of other settings: give another --out')
  records, _ = decode(
      out / 'turns', asked, config.part_size, quiet, 'user turns', prompts)
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
    prompts: Sequence[np.ndarray], longest: int, dropped: Counter[str]
) -> list[np.ndarray]:
  """Returns the prompts without duplicates and those that are too long."""
  kept: dict[bytes, np.ndarray] = {}
  for tokens in prompts:
    key = tokens.tobytes()
    if len(tokens) > longest:
      dropped['too long'] += 1
    elif key in kept:
      dropped['duplicate prompt'] += 1
    else:
      kept[key] = tokens
  if not kept:
    raise ValueError('no prompt is left: '
                     f'{conversations.describe(dropped) or "none asked for"}')
  return list(kept.values())


def decode(
    folder: Path, about: dict[str, Any], part_size: int, quiet: bool,
    title: str, make: Callable[..., Any],
) -> tuple[list[Record], float]:
  """Generates what is not on disk yet.

  Returns:
    `(records, tokens_per_s)`: all of them, by index; the speed of this run.
  """
  parts = store.Parts(folder, about, part_size)
  is_first = jax.process_index() == 0
  if parts.done:
    cli.note(f'{title}: {len(parts.done)} are there already', quiet)
  status = Status(title, quiet or not is_first)
  records = list(parts)
  try:
    for record in make(frozenset(parts.done), status):
      records.append(record)
      if is_first:
        parts.add(record)
  finally:  # also when interrupted
    status.end()
    if is_first:
      parts.flush()
  return sorted(records, key=lambda r: r.prompt_index), status.speed


class Status:
  """Says on stderr how far things are."""

  def __init__(self, title: str, quiet: bool):
    self._title, self._quiet = title, quiet
    self._is_tty = sys.stderr.isatty()
    self._last, self._line = 0.0, ''
    self.speed = 0.0

  def __call__(self, progress: Progress) -> None:
    """Shows progress: once a second, in a log every half minute."""
    self.speed = progress.new_tokens / max(progress.elapsed_s, 1e-9)
    self._line = self.text(progress)
    now = time.monotonic()
    if self._quiet or now - self._last < (1 if self._is_tty else 30):
      return
    self._last = now
    sys.stderr.write(
        '\r\x1b[2K' + self._line if self._is_tty else self._line + '\n')
    sys.stderr.flush()

  def text(self, progress: Progress) -> str:
    """Returns the line: rows, tokens/s, time left."""
    line = (f'{self._title}: {progress.num_done}/{progress.num_prompts}, '
            f'{progress.new_tokens} tokens, {self.speed:.0f} tokens/s, '
            f'{progress.share:.0%} of the slots busy')
    if 0 < progress.num_done < progress.num_prompts:
      left = progress.num_prompts - progress.num_done
      seconds = progress.elapsed_s / progress.num_done * left
      line += f', {seconds:.0f} s left'
    return line

  def end(self) -> None:
    """Writes the last line once more, to stay."""
    if not self._quiet and self._line:
      sys.stderr.write(
          ('\r\x1b[2K' if self._is_tty else '') + self._line + '\n')
      sys.stderr.flush()


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
  print(f'prompts: {facts["num_prompts"]}; dropped: '
        f'{conversations.describe(facts["prompts_dropped"]) or "none"}')
  print(f'answers: {conversations.describe(facts["answers"])}')
  for name, num in facts['texts'].items():
    print(f'{name}: {num} texts, {facts["new_tokens"][name]} new tokens')
  print(f'{facts["tokens_per_s"]:.0f} tokens/s')
  cli.note(f'wrote {data}')


if __name__ == '__main__':
  cli.run(main)
