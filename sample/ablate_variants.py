"""What `sample.ablate_drafter` compares: axes of drafters to train.

A variant is the config of `configs/drafter_smollm2.py` for its kind with some
values changed. Variants of several axes that are the same drafter are
trained once: their `key` is equal.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
import re
from typing import Any

from configs import drafter_smollm2
from specjax.distill import kinds

# Tokens drafted a round by kinds that draft one after another.
_CHAIN = 7
_LOSSES = ('ce', 'kl', 'reverse_kl', 'jsd', 'tvd', 'tvd_pp', 'nla', 'lk')
_KINDS = ('dspark', 'dflash', 'eagle3', 'eagle1', 'hass', 'medusa', 'hydra',
          'small_lm')
_BLOCKS = ('dspark', 'dflash')


@dataclasses.dataclass(frozen=True)
class Variant:
  """A drafter to train.

  Attributes:
    axis: the figure that it belongs to. label: its name there.
    kind: of the drafter.
    changes: `((dotted name in the config, value), ...)`.
  """

  axis: str
  label: str
  kind: str = 'dspark'
  changes: tuple[tuple[str, Any], ...] = ()

  @property
  def key(self) -> str:
    """What is trained, whatever the axis: changes with their values."""
    return json.dumps([self.kind, *sorted(self.changes)])

  def folder(self, seed: int) -> str:
    """Returns a name for the drafter's folder: letters, digits, `-._`."""
    name = re.sub(r'[^\w.]+', '-', f'{self.axis}-{self.label}')
    return f'{name}-{seed}' if seed else name


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Numbers along the axes; the default is for SmolLM2."""

  vocabulary: tuple[int, ...] = (8192, 16384, 28_672, 49_152)
  slots: tuple[int, ...] = (2, 4, 6, 8, 12, 16)
  layers: tuple[int, ...] = (1, 2, 3, 4)
  steps: tuple[int, ...] = (1, 2, 4, 7)
  share: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
  ranks: tuple[int, ...] = (16, 40, 128)


TINY = Sizes(vocabulary=(64, 128), slots=(2, 3), layers=(1, 2),
             steps=(1, 3), share=(0.5, 1.0), ranks=(4, 8))


def _loss(first: dict[str, float], last: Any = None):
  return (('loss.first', first), ('loss.last', last))


def axes(tiny: bool = False) -> dict[str, tuple[Variant, ...]]:
  """Returns the variants of every axis, in the order of its figure."""
  sizes = TINY if tiny else Sizes()
  known = [k for k in _KINDS if k in kinds.KINDS]
  return {axis: tuple(rows) for axis, rows in (
      ('loss', _losses()),
      ('kind', (Variant('kind', kind, kind) for kind in known)),
      ('vocabulary', _numbers(
          'vocabulary', 'draft_vocab_size', sizes.vocabulary)),
      ('slots', _numbers('slots', 'model.num_slots', sizes.slots)),
      ('layers', _numbers('layers', 'model.num_layers', sizes.layers)),
      ('ttt', _numbers('ttt', 'task.steps', sizes.steps, 'eagle3')),
      ('share', _numbers('share', 'data.share', sizes.share)),
      ('markov', _markov(sizes)),
      ('optimizer', _optimizers()))}


def _losses() -> Iterator[Variant]:
  for name in _LOSSES:
    yield Variant('loss', name, changes=_loss({name: 1.0}))
  yield Variant('loss', 'kl, then l1')  # the config's own


def _numbers(axis, name, values, kind='dspark') -> Iterator[Variant]:
  for value in values:
    yield Variant(axis, f'{value:g}', kind, ((name, value),))


def _markov(sizes: Sizes) -> Iterator[Variant]:
  yield Variant('markov', 'none', changes=(('model.markov', 'none'),))
  for rank in sizes.ranks:
    yield Variant('markov', f'rank {rank}', changes=(
        ('model.markov_rank', rank),))
  yield Variant('markov', 'of a table', changes=(
      ('model.markov_input', 'table'),))
  yield Variant('markov', 'gated', changes=(('model.markov', 'gated'),))


def _optimizers() -> Iterator[Variant]:
  for name, muon in (('AdamW', False), ('Muon', True)):
    for rate in (1e-3, 2e-3):
      yield Variant('optimizer', f'{name}, {rate:g}', changes=(
          ('optimizer.muon', muon), ('optimizer.learning_rate', rate)))


def config(variant: Variant, base: dict[str, Any], tiny: bool) -> Any:
  """Returns the config of a variant.

  Args:
    variant: kind and changes. base: values set before, by dotted name.
    tiny: the config's own tiny form.
  """
  found = drafter_smollm2.get_config(
      f'tiny-{variant.kind}' if tiny else variant.kind)
  found.unlock()
  if variant.kind in _BLOCKS:
    # The exact chain, as of every other kind: no lattice in between.
    found.eval.draft.lattice = False
  elif variant.kind not in ('medusa', 'hydra'):
    found.eval.draft.num_speculative_tokens = _CHAIN
  for name, value in {**base, **dict(variant.changes)}.items():
    put(found, name, value)
  return found


def put(config: Any, name: str, value: Any) -> None:
  """Sets a value by dotted name, of whatever type.

  Raises:
    ValueError: the config has no such key.
  """
  *path, last = name.split('.')
  for part in path:
    config = config.get(part, {})
  if last not in config:
    raise ValueError(f'{name}: this config has no such value')
  with config.ignore_type():
    config[last] = value


def trimmed(variant: Variant, config: Any) -> str:
  """Returns a variant's key with the values that are the config's own left
  out, so that a drafter that is on several axes is trained once."""
  own = []
  for name, value in variant.changes:
    there = config
    for part in name.split('.'):
      there = there.get(part)
    if hasattr(there, 'to_dict'):  # a stage of the loss
      there = {k: v for k, v in there.to_dict().items() if v is not None}
    if there != value:
      own.append((name, value))
  return dataclasses.replace(variant, changes=tuple(own)).key
