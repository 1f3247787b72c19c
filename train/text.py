"""Text for `train.drafter`: rollouts, packed; what is held out; counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import hashlib
from pathlib import Path
from typing import Any, NamedTuple
import warnings

import numpy as np

from specjax.data import conversations, filters, store
from specjax.data.packing import Packed
from specjax.data.store import Record
from specjax.distill import rollout
from specjax.distill.rollout import Settings
from specjax.host.load import Model
from specjax.models import draft_vocab

# Of the text that a dry run makes up.
_SYNTHETIC_TEXTS, _SYNTHETIC_NEW = 48, 24


class Text(NamedTuple):
  """What a drafter learns from and is tried on.

  Attributes:
    train, held_out: packed rows of length S.
    prompts: int32 arrays, whose answers measure acceptance.
    facts: JSON values for the model card.
  """

  train: Packed
  held_out: Packed
  prompts: list[np.ndarray]
  facts: dict[str, Any]

  @property
  def digest(self) -> str:
    """A hash of the rows that are trained on."""
    found = hashlib.sha256()
    for array in (self.train.tokens, self.train.document,
                  self.train.supervised):
      found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def read(config: Any, target: Model, seed: int) -> Text:
  """Reads `config.data` and the prompts of `config.eval`.

  Raises:
    ValueError: rows longer than the target's context, no such rollouts,
      another vocabulary, nothing to learn from or nothing held out; the
      message says which.
  """
  length, context = config.data.length, target.max_length
  if context is not None and length > context:
    raise ValueError(f'config.data.length={length}: the context of '
                     f'{target.name} is {context} tokens')
  train, held_out, facts = _records(config.data, target, seed)
  for name, rows in (('train', train), ('held-out', held_out)):
    _check(name, rows, target)
  train, excluded = without(train, config.data.exclude, target)
  texts = len(train)
  if not 0 < config.data.share <= 1:
    raise ValueError(f'config.data.share={config.data.share}: in (0, 1]')
  train = train[:max(1, round(texts * config.data.share))]
  packed = Packed.from_records(train, length)
  prompts, dropped = _prompts(config.eval, held_out, target)
  about = {
      'rollouts': str(config.data.rollouts), 'texts': len(train),
      'excluded': excluded, 'held_out_texts': len(held_out),
      'eval_prompts_dropped': dict(dropped),
      'tokens': int(np.sum(packed.document > 0)),
      'supervised_tokens': int(np.sum(packed.supervised)),
      'rows': len(packed), 'density': packed.density, 'origin': facts}
  return Text(packed, Packed.from_records(held_out, length),
              prompts, about)


def without(
    records: list[Record], paths: str | None, target: Model
) -> tuple[list[Record], int]:
  """Leaves out texts that share 13 tokens in a row with some questions.

  Args:
    records: texts. paths: files of conversations or prompts, comma between;
      only what users say counts. None: nothing is left out.

  Returns:
    `(records, number left out)`.

  Raises:
    ValueError: a file that cannot be read, or nothing is left.

  Warns:
    UserWarning: rows that cannot be read; what they ask is not left out.
  """
  if not paths:
    return records, 0
  if target.tokenizer is None:
    raise ValueError(f'config.data.exclude={paths}: {target.name} has no '
                     'tokenizer')
  rows, unread = conversations.read(paths.split(','))
  if unread:
    warnings.warn(
        f'config.data.exclude={paths}: rows that exclude nothing: '
        f'{conversations.describe(unread)}', stacklevel=2)
  said = [target.tokenizer.encode(what, add_bos=False)
          for row in rows for what in row.said_by_users]
  shared = filters.sharing(
      [r.tokens for r in records], [np.asarray(s) for s in said])
  kept = [r for r, drop in zip(records, shared, strict=True) if not drop]
  if not kept:
    raise ValueError(f'config.data.exclude={paths} leaves no text')
  return kept, len(records) - len(kept)


def vocabulary(
    text: Text, target: Model, size: int | None
) -> tuple[np.ndarray, dict[str, Any]]:
  """Returns the ids that can be drafted, and what they cover.

  The most frequent among the tokens that the target generated; its special
  tokens that occur there and its end tokens are always kept. None, or a size
  that is not smaller than V, keeps all.
  """
  vocab_size = target.vocab_size
  counts, held_out = (_counts(rows, vocab_size)
                      for rows in (text.train, text.held_out))
  if size is None or size >= vocab_size:
    return np.arange(vocab_size), {
        'draft_vocab_size': vocab_size, 'coverage': 1.0,
        'held_out_coverage': 1.0}
  special = target.tokenizer.special_ids if target.tokenizer else ()
  always = {*target.eos, *(i for i in special
                           if i < vocab_size and counts[i])}
  ids = draft_vocab.most_frequent(counts, size, tuple(sorted(always)))
  return ids, {
      'draft_vocab_size': size,
      'coverage': draft_vocab.coverage(counts, ids),
      'held_out_coverage': draft_vocab.coverage(held_out, ids)}


def _counts(packed: Packed, vocab_size: int) -> np.ndarray:
  return np.bincount(packed.tokens[packed.supervised], minlength=vocab_size)


def _records(
    data: Any, target: Model, seed: int
) -> tuple[list[Record], list[Record], dict[str, Any]]:
  """Returns `(train, held_out, facts)`."""
  if data.rollouts is None:
    raise ValueError('config.data.rollouts: give the folder that '
                     'train.rollout wrote')
  held_out: list[Record] = []
  if data.rollouts == 'synthetic':
    train = _synthetic(target, seed)
    facts: dict[str, Any] = {'synthetic': True}
  else:
    train, held_out, facts = rollouts(Path(data.rollouts))
    if facts.get('target', target.name) != target.name:
      warnings.warn(f'{facts["target"]} wrote these rollouts, not '
                    f'{target.name}: a drafter learns best from its '
                    "target's own text", stacklevel=2)
    if facts.get('guidance', target.guidance) != target.guidance:
      warnings.warn('these rollouts were written at guidance '
                    f'{facts["guidance"]:g}, not {target.guidance:g}',
                    stacklevel=2)
  if not held_out and target.num_ids > target.vocab_size:
    train, held_out = filters.cut(train, data.held_out)
  elif not held_out:
    # Of another seed than `train.rollout`'s: if its held-out half has been
    # lost, the same seed would find nothing in what is left.
    train, held_out = filters.split(train, data.held_out, ~seed)
  return train, held_out, facts


def rollouts(
    path: Path
) -> tuple[list[Record], list[Record], dict[str, Any]]:
  """Reads what `train.rollout` wrote.

  Args:
    path: its `--out`, or in there a dataset or an .npz file.

  Returns:
    `(train, held_out, facts)`; the second is empty where none is held out.

  Raises:
    ValueError: no rollouts there, or a damaged file.
  """
  for inner in (path / 'rollouts', path / 'rollouts.npz'):
    if inner.exists():
      path = inner
      break
  if path.is_file():
    try:
      train, facts = store.load_npz(path)
    except ValueError as error:
      raise ValueError(f'config.data.rollouts: {error}; give the folder that '
                       'train.rollout wrote') from error
    other = path.with_name(f'{path.stem}-held_out.npz')
    return train, store.load_npz(other)[0] if other.exists() else [], facts
  if not (path / 'dataset_info.json').is_file():
    raise ValueError(f'config.data.rollouts={path}: no rollouts there; make '
                     'them with train.rollout')
  facts = store.facts(path)
  splits = facts.get('texts', {'train': 1})
  held_out = list(store.read(path, 'held_out')) if (
      'held_out' in splits) else []
  return list(store.read(path, 'train')), held_out, facts


def _synthetic(target: Model, seed: int) -> list[Record]:
  """Returns the target's answers to random prompts: for dry runs."""
  rng = np.random.default_rng(seed)
  low, high, sizes = 0, target.vocab_size, (4, 12)
  if target.num_ids > high:  # classes, one of which says nothing
    low, high, sizes = high, target.num_ids - 1, (1, 2)
  prompts = [rng.integers(low, high, rng.integers(*sizes))
             for _ in range(_SYNTHETIC_TEXTS)]
  settings = Settings(max_new=_SYNTHETIC_NEW, batch=16, buckets=(12,))
  return sorted(rollout.generate(
      target.lm, target.params, prompts, eos=target.eos, settings=settings,
      mesh=target.mesh), key=lambda r: r.prompt_index)


def _check(name: str, records: Sequence[Record], target: Model) -> None:
  """Raises ValueError for texts that are not the target's."""
  if not records:
    raise ValueError(f'no {name} texts: give more rollouts, or another '
                     'config.data.held_out')
  for number, record in enumerate(records):
    tokens = record.tokens
    if not 1 <= record.prompt_length < len(tokens):
      raise ValueError(
          f'{name} text {number}: {len(tokens)} tokens, of which '
          f'{record.prompt_length} are the prompt: no answer')
    # A prompt may begin with a class: ids from V on.
    if tokens.min() < 0 or tokens.max() >= target.num_ids or (
        record.answer.max() >= target.vocab_size):
      raise ValueError(
          f'{name} text {number}: token ids {tokens.min()} to '
          f'{tokens.max()}, but {target.name} has {target.vocab_size}: '
          'another model wrote these rollouts')


def _prompts(
    config: Any, held_out: Sequence[Record], target: Model
) -> tuple[list[np.ndarray], Counter[str]]:
  """Returns the prompts that acceptance is measured on, short enough.

  Returns:
    `(prompts, dropped)`: counts of the rows of `config.prompts` that are not
    used, by reason.
  """
  longest, dropped = config.max_prompt, Counter[str]()
  if target.max_length is not None:  # and what is decoded
    longest = min(longest, target.max_length - config.new_tokens)
  if config.prompts is None:
    found = [r.tokens[:r.prompt_length] for r in held_out]
  else:
    found, dropped = _from_file(config.prompts, longest, target)
  found = [p for p in found if len(p) <= longest]
  if not found:
    raise ValueError(
        f'no held-out prompt has at most {longest} tokens: '
        f'config.eval.max_prompt={config.max_prompt}, config.eval.new_tokens='
        f'{config.new_tokens}, context {target.max_length or "unknown"}')
  # Spread over the list: a file may be in order of subject.
  places = np.unique(np.linspace(
      0, len(found) - 1, min(config.num_prompts, len(found))).astype(int))
  return [found[i] for i in places], dropped


def _from_file(
    path: str, longest: int, target: Model
) -> tuple[list[np.ndarray], Counter[str]]:
  """Returns the first prompt of each row; counts of the others."""
  text: Any = target.tokenizer
  if text is None:
    raise ValueError(f'config.eval.prompts={path}: {target.name} has no '
                     'tokenizer')

  def encode(what):
    if isinstance(what, str):
      return text.encode(what)
    return text.encode(text.apply_chat_template(what), add_bos=False)
  rows, dropped = conversations.read(path)
  try:
    found, unfit = conversations.prompts(
        rows, encode, max_length=longest, turns='first')
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  return found, dropped + unfit
