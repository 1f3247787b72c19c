"""Online adaptation, as `config.online` of `specjax.sample` asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import numbers
import time
from typing import Any

import jax

from specjax.distill import online
from specjax.distill.online import OnlineAdaptation, Settings
from specjax.host.generate import describe
from specjax.host.load import Model
from specjax.models import trained


class Adaptation(OnlineAdaptation):
  """Also knows how long it took.

  Attributes:
    seconds: spent in updates, compilation included.
  """

  seconds = 0.0

  def add(
      self, tokens: Sequence[int], prompt_length: int,
      step_lengths: Sequence[int], num_draft: int,
  ) -> bool:
    """See `OnlineAdaptation.add`."""
    start = time.perf_counter()
    changed = super().add(tokens, prompt_length, step_lengths, num_draft)
    self.seconds += time.perf_counter() - start
    return changed

  def summary(self) -> dict[str, Any]:
    """Returns JSON values: updates, skipped ones, losses, seconds.

    `first_loss` and `last_loss` are the mean divergence at rejected drafts
    in the first and the last update, summed over the draft vocabulary (with
    a reduced one it can be negative); None without updates.
    """
    first, last = (
        (self.losses[0], self.losses[-1]) if self.losses else (None, None))
    return {'updates': self.updates, 'skipped': self.skipped,
            'first_loss': first, 'last_loss': last, 'seconds': self.seconds}


def settings(section: Mapping[str, Any] | None) -> Settings | None:
  """Returns the settings of a config's section, or None when it is off.

  Args:
    section: `enabled` and fields of `distill.online.Settings`; what is None
      keeps its default. None is off.

  Raises:
    ValueError: an unknown key, a value of another type or out of range;
      values without a word on `enabled`.
  """
  given = {} if section is None else {
      k: v for k, v in section.items() if v is not None}
  kinds = {'enabled': bool, **{
      f.name: type(f.default) for f in dataclasses.fields(Settings)}}
  unknown = sorted(set(given) - set(kinds))
  if unknown:
    raise ValueError(f'config.online.{unknown[0]}: unknown; known are '
                     f'{", ".join(kinds)}')
  for name, value in given.items():
    kind: Any = numbers.Real if kinds[name] is float else kinds[name]
    if not isinstance(value, kind) or (
        isinstance(value, bool) and kind is not bool):
      raise ValueError(f'config.online.{name}={value!r}: must be of type '
                       f'{kinds[name].__name__}')
  enabled = given.pop('enabled', None)
  if enabled is None and given:
    raise ValueError(f'config.online.{min(given)}: needs '
                     'config.online.enabled=True (False turns it off)')
  if not enabled:
    return None
  try:
    return Settings(**given)
  except ValueError as error:
    raise ValueError(f'config.online.{error}') from error


def build(
    how: Settings, drafter: Any, params: Any, target: Model
) -> Adaptation:
  """Returns the adaptation of a drafter, for `generate(online=...)`.

  Args:
    how: settings. drafter, params: from `methods.build`.
    target: the model that it drafts for.

  Raises:
    ValueError: a drafter without trained weights, or several processes.
  """
  if jax.process_count() > 1:
    raise ValueError('config.online: for a single process')
  shape = getattr(drafter, 'drafter', drafter)  # within a length schedule
  model = getattr(getattr(shape, 'source', None), 'model', None)
  try:
    trained.family(model)
  except ValueError as error:
    raise ValueError(
        f'config.online: {describe(drafter)} cannot be trained; take one '
        "that train.drafter made (method 'draft_head')") from error
  return Adaptation(
      online.task_of(model, drafter.topology.max_depth), target.lm,
      target.params, params['net'], params['ids'], settings=how)
