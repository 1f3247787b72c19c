"""Training of block drafters: DFlash and DSpark.

Many blocks a text at once, each at a random anchor; a block sees the target's
states before its anchor and itself. That is what a round of decoding sees.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.distill import losses, objective
from specjax.distill.places import block_slots, draw_anchors
from specjax.distill.task import (
  ModelTask,
  Objective,
  by_position,
  flat,
  in_chunks,
)
from specjax.distill.teacher import Batch, Teacher
from specjax.drafters.block import BlockSource
from specjax.models.block_model import BlockModel

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockTask(ModelTask):
  """Trains a `BlockModel`.

  Attributes:
    model: what is trained.
    num_anchors: A, blocks a row of the batch, drawn anew every step.
    objective: losses.
    gamma: slot k weighs `exp(-k / gamma)`.
    weighting: 'decay', or 'dpace' (then the decay is left out).
    confidence_weight: of the confidence head's cross-entropy.
  """

  model: BlockModel
  num_anchors: int = 128
  objective: Objective = Objective()
  gamma: float = 4.0
  weighting: str = 'decay'
  confidence_weight: float = 1.0

  def __post_init__(self):
    if self.weighting not in ('decay', 'dpace'):
      raise ValueError(f'weighting={self.weighting!r}: known are decay, '
                       'dpace')
    if self.num_anchors < 1:
      raise ValueError(f'num_anchors={self.num_anchors}: must be >= 1')

  @property
  def num_draft(self) -> int:
    return self.model.num_slots

  def source(self) -> BlockSource:
    return BlockSource(self.model)

  def init(self, key: Array, target: Any) -> Any:
    """Fresh weights; the mask vector starts as the mean embedding."""
    net = super().init(key, target)
    if 'mask' in net:
      net['mask'] = jnp.mean(
          target['embedding'].astype(jnp.float32), axis=0)
    return net

  def loss(
      self, params: Any, target: Any, batch: Batch, teacher: Teacher,
      key: Array, progress: Array,
  ) -> tuple[Array, dict[str, Array]]:
    """See `task.Task.loss`."""
    config = self.model.config
    params = self.computed(params)
    anchors, kept = draw_anchors(batch, key, self.num_anchors)
    hidden = self._blocks(params, target, batch, teacher, anchors)
    rows = block_slots(
        batch, teacher, anchors, kept, params['inverse'], config.num_slots,
        config.draft_vocab_size)
    rows['hidden'] = hidden
    rows['weight'] = rows['valid'] * self._weights(
        params, target, rows) / jnp.maximum(self._normaliser(rows), 1e-6)
    sums = in_chunks(
        lambda part: self._score(params, target, part, progress), rows,
        self.objective.chunk, axes=3)
    return sums.pop('loss'), sums

  def logits(
      self, params: Any, target: Any, batch: Batch, teacher: Teacher,
      anchors: Array,
  ) -> Array:
    """See `task.Task.logits`."""
    config = self.model.config
    params = self.computed(params)
    rows = block_slots(
        batch, teacher, anchors, anchors >= 0, params['inverse'],
        config.num_slots, config.draft_vocab_size)
    hidden = self._blocks(params, target, batch, teacher, anchors)
    return self._logits(params, target, {**rows, 'hidden': hidden})[0]

  def _blocks(self, params, target, batch, teacher, anchors) -> Array:
    """Returns states [B,A,G,D] of the predicting slots."""
    take = lambda x: jnp.take_along_axis(x, anchors, axis=1)  # noqa: E731
    features = jnp.concatenate(
        [teacher.taps[name] for name in self.taps], axis=-1)
    slot = jnp.arange(batch.tokens.shape[1])
    seen = (slot < anchors[..., None]) & (
        batch.document[:, None] == take(batch.document)[..., None])
    embedding = self.model.embed(target, take(batch.tokens))
    return self.model.blocks(
        params, features, batch.position, embedding, take(batch.position),
        seen, self.model.mask(target))

  def _normaliser(self, rows) -> Array:
    if self.weighting == 'dpace':
      return jnp.sum(rows['valid'])
    decay = objective.decay(self.model.num_slots, self.gamma)
    return jnp.sum(rows['valid'] * decay)

  def _weights(self, params, target, rows) -> Array:
    """Returns f32[B,A,G], static or from how sure the drafter is."""
    shape = rows['valid'].shape
    if self.weighting == 'decay':
      decay = objective.decay(self.model.num_slots, self.gamma)
      return jnp.broadcast_to(decay, shape)
    read = {k: rows[k] for k in ('hidden', 'before', 'label')}

    def sure(part):
      log_q = jax.nn.log_softmax(self._logits(params, target, part)[0])
      return jnp.take_along_axis(
          log_q, jnp.maximum(part['label'], 0)[:, None], axis=-1)[:, 0]

    log_q = jax.lax.map(
        sure, flat(read, 3), batch_size=self.objective.chunk).reshape(shape)
    return objective.dpace(log_q, rows['valid'] > 0)

  def _logits(self, params, target, part) -> tuple[Array, Any]:
    """Returns f32[n,W] and the Markov vectors."""
    logits = self.model.logits(params, part['hidden'])
    previous = self.model.previous(params, target, part['before'])
    if previous is not None:
      logits += self.model.bias(params, part['hidden'], previous)
    return logits, previous

  def _score(self, params, target, part, progress) -> dict[str, Array]:
    """Returns sums over the slots of a chunk."""
    logits, previous = self._logits(params, target, part)
    log_q = jax.nn.log_softmax(logits, axis=-1)
    log_p = self.model.logits(params, part['final'])
    log_p = jax.lax.stop_gradient(log_p - part['log_z'][:, None])
    alpha = jax.lax.stop_gradient(losses.acceptance(log_p, log_q))
    num, weight, valid = self.num_draft, part['weight'], part['valid']
    loss = self.objective.sums(
        progress, log_p, log_q, weight, part['label'])
    out = {}
    if self.model.config.confidence:
      logit = self.model.confidence_logit(params, part['hidden'], previous)
      bce = jnp.sum(losses.bce(logit, alpha) * weight)
      loss += self.confidence_weight * bce
      out['confidence_loss'] = bce
      out['confidence'] = by_position(
          jax.nn.sigmoid(logit) * valid, part['slot'], num)
    match = jnp.argmax(log_q, axis=-1) == part['top']
    return {
        **out, 'loss': loss,
        'weight': by_position(valid, part['slot'], num),
        'acceptance': by_position(alpha * valid, part['slot'], num),
        'match': by_position(match * valid, part['slot'], num)}
