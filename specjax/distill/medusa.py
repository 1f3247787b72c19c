"""Training of heads on the target's last state: Medusa, Hydra.

A head is trained where a round of decoding uses it: from the state before a
pending token, M tokens on. Places are drawn anew every step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.distill import losses, objective
from specjax.distill.objective import Mixture
from specjax.distill.places import block_slots, draw_anchors
from specjax.distill.task import (
  ModelTask,
  Objective,
  by_position,
  flat,
  in_chunks,
)
from specjax.distill.teacher import Batch, Teacher
from specjax.drafters.medusa import HeadsSource
from specjax.models.medusa import HeadsModel

Array = jax.Array

# The loss of both papers: the text's own tokens.
ON_TEXT = Objective(Mixture(first=(('ce', 1.0),)))


@dataclasses.dataclass(frozen=True)
class HeadsTask(ModelTask):
  """Trains a `HeadsModel`; the target stays as it is (Medusa-1).

  Attributes:
    model: what is trained.
    num_anchors: A, pending tokens a row of the batch, drawn anew every step.
    objective: losses; its chunk counts logits of all heads. `ON_TEXT` is the
      papers', the default learns from the target's laws.
    decay: head i weighs `decay ** i`, from 0.

  References: Medusa, arXiv:2401.10774, section 2.2.
  """

  model: HeadsModel
  num_anchors: int = 256
  objective: Objective = Objective()
  decay: float = 0.8

  def __post_init__(self):
    if self.num_anchors < 1:
      raise ValueError(f'num_anchors={self.num_anchors}: must be >= 1')
    if not 0 < self.decay <= 1:
      raise ValueError(f'decay={self.decay}: must be in (0, 1]')

  @property
  def num_draft(self) -> int:
    return self.model.num_heads

  def source(self) -> HeadsSource:
    return HeadsSource(self.model)

  def loss(
      self, params: Any, target: Any, batch: Batch, teacher: Teacher,
      key: Array, progress: Array,
  ) -> tuple[Array, dict[str, Array]]:
    """See `task.Task.loss`."""
    params = self.computed(params)
    anchors, kept = draw_anchors(batch, key, self.num_anchors)
    rows = self.rows(batch, teacher, anchors, kept, params['inverse'])
    weight = rows['valid'] * objective.ttt_decay(self.num_draft, self.decay)
    rows['weight'] = weight / jnp.maximum(jnp.sum(weight), 1e-6)
    sums = in_chunks(
        lambda part: self._score(params, target, part, progress), rows,
        max(self.objective.chunk // self.num_draft, 1), axes=2)
    return sums.pop('loss'), sums

  def rows(
      self, batch: Batch, teacher: Teacher, anchors: Array, kept: Array,
      inverse: Array,
  ) -> dict[str, Array]:
    """Returns what heads read and should say at A pending tokens a row.

    Args:
      anchors: int32[B,A], positions of pending tokens, `kept bool[B,A]` of
        which count; a pending token must have a state before it.
      inverse: int32[V], draft ids.

    Returns:
      `state [B,A,D]`, and of head i at [B,A,M,...]: the token `before` its
      own, the target's `final`, `log_z` and `top` there, its own `label`,
      `valid` (0 where no round gets there) and `slot`, i.
    """
    before = jnp.maximum(anchors - 1, 0)
    home, left = (jnp.take_along_axis(batch.document, i, axis=1)
                  for i in (anchors, before))
    kept = kept & (anchors > 0) & (home == left)
    rows = block_slots(
        batch, teacher, anchors, kept, inverse, self.num_draft,
        self.model.config.draft_vocab_size)
    state = jnp.take_along_axis(teacher.final, before[..., None], axis=1)
    return {**rows, 'state': state}

  def logits(
      self, params: Any, target: Any, batch: Batch, teacher: Teacher,
      anchors: Array,
  ) -> Array:
    """See `task.Task.logits`."""
    params = self.computed(params)
    rows = self.rows(
        batch, teacher, anchors, anchors >= 0, params['inverse'])
    return self._logits(params, target, rows)

  def _logits(self, params, target, part) -> Array:
    """Returns f32[...,M,W]."""
    hidden = self.model.hidden(
        params, target, part['state'], part['before'])
    return self.model.logits(params, hidden)

  def _score(self, params, target, part, progress) -> dict[str, Array]:
    """Returns sums over the pending tokens of a chunk, all heads at once."""
    log_q = jax.nn.log_softmax(
        self._logits(params, target, part), axis=-1)
    log_p = self.model.teacher(params, part['final'])
    log_p = jax.lax.stop_gradient(log_p - part['log_z'][..., None])
    alpha = jax.lax.stop_gradient(losses.acceptance(log_p, log_q))
    loss = self.objective.sums(progress, *flat(
        (log_p, log_q, part['weight'], part['label']), 2))
    valid, num = part['valid'], self.num_draft
    match = jnp.argmax(log_q, axis=-1) == part['top']
    count = lambda x: by_position(  # noqa: E731
        flat(x * valid, 2), flat(part['slot'], 2), num)
    return {'loss': loss, 'weight': count(jnp.ones_like(valid)),
            'acceptance': count(alpha), 'match': count(match)}
