"""Texts that a small drafter writes itself, to be judged by its teacher.

A drafter that learns from the target's text alone never sees its own
mistakes. A share of each batch is therefore the drafter's own answers, drawn
at temperature 1 by our loop and written anew every few steps; no gradient
flows through the drawing.

References: DistillSpec, arXiv:2310.08461.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from specjax.data import packing
from specjax.data.packing import Packed, Row
from specjax.distill import rollout
from specjax.distill.rollout import Settings
from specjax.distill.small_lm import SmallLMTask


class OnPolicy:
  """A buffer of the drafter's own texts.

    own = OnPolicy(task, length=1024, eos=eos, seed=0)
    own.refresh(step, rows, {**shared, 'net': state.net})
    rows = own.mix(step, rows)

  Attributes:
    rows: the packed texts, None before the first `refresh`. They are no part
      of a saved state: a run that goes on writes them anew at once.
  """

  def __init__(
      self, task: SmallLMTask, *, length: int, eos: tuple[int, ...],
      seed: int = 0, mesh: jax.sharding.Mesh | None = None,
  ):
    """Prepares for batches of rows of `length` tokens.

    Raises:
      ValueError: no prompt would leave room for an answer.
    """
    if task.max_new >= length:
      raise ValueError(f'max_new={task.max_new}: rows have {length} tokens')
    self.task, self.length, self.eos = task, length, eos
    self.seed, self.mesh = seed, mesh
    self.rows: Packed | None = None

  def share(self, size: int) -> int:
    """Returns how many rows of a batch of `size` are the drafter's."""
    return round(self.task.on_policy * size)

  def refresh(self, step: int, rows: Row, params: Any) -> None:
    """Writes new texts every `task.every` steps, and when there are none.

    Args:
      step: of the run. rows: a batch, whose prompts are answered.
      params: the drafter's, with float32 weights.
    """
    count = self.share(len(rows['tokens']))
    if not count or (self.rows is not None and step % self.task.every):
      return
    most = self.length - self.task.max_new
    found = [p for p in prompts(rows) if len(p) <= most]
    if not found:
      return
    # Always as many: one program for all.
    num = count * max(1, self.length // (2 * self.task.max_new))
    asked = [found[i % len(found)] for i in range(num)]
    model = self.task.model
    settings = Settings(
        max_new=self.task.max_new, temperatures=(1.0,), buckets=(most,),
        seed=(self.seed + step) % 2**32, batch=num)
    records = sorted(rollout.generate(
        model.lm, model.lm_params(self.task.computed(params)), asked,
        eos=self.eos, settings=settings, mesh=self.mesh),
        key=lambda record: record.prompt_index)
    self.rows = Packed.from_records(records, self.length)

  def mix(self, step: int, rows: Row) -> Row:
    """Returns a batch whose first rows are the drafter's own texts."""
    count = self.share(len(rows['tokens']))
    if self.rows is None or not count:
      return rows
    own = self.rows.rows(packing.order(
        len(self.rows), step, count, self.seed))
    return {name: np.concatenate([own[name], rows[name][count:]])
            for name in rows}


def prompts(rows: Row) -> list[np.ndarray]:
  """Returns the prompts of a batch's documents.

  A prompt is what comes before a document's first supervised token;
  documents without any, or without a prompt, are left out.
  """
  out = []
  for tokens, document, supervised in zip(
      rows['tokens'], rows['document'], rows['supervised'], strict=True):
    for number in range(1, int(document.max(initial=0)) + 1):
      here = np.flatnonzero(document == number)
      answer = np.flatnonzero(supervised[here])
      if len(answer) and answer[0]:
        out.append(tokens[here[:answer[0]]])
  return out
