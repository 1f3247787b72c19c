"""Training of small causal drafters: on plain text, then on the target's.

Stages are runs, each going on from the one before (`init_from`): 'pretrain'
on plain text, 'continue' on text of the domain, both without the target;
'align' on text that the target generated, with its laws (Direct Alignment).

References: FastDraft, arXiv:2411.11055; Goel et al. 2024, arXiv:2403.00858;
DistillSpec, arXiv:2310.08461.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.distill import losses
from specjax.distill.objective import Mixture
from specjax.distill.places import ahead, followed
from specjax.distill.task import (
  ModelTask,
  Objective,
  in_chunks,
  weighted_sum,
)
from specjax.distill.teacher import Batch, Teacher
from specjax.drafters.source import LanguageModel
from specjax.models import draft_vocab
from specjax.models.small_lm import SmallLMModel

Array = jax.Array

STAGES = ('pretrain', 'continue', 'align')


@dataclasses.dataclass(frozen=True)
class SmallLMTask(ModelTask):
  """Trains a `SmallLMModel`.

  Attributes:
    model: what is trained.
    stage: 'pretrain' and 'continue' learn to predict all of the text with
      cross-entropy: the target's forward pass is not even compiled. 'align'
      learns the target's law of every token that the target generated.
    objective: losses of 'align'.
    text_weight: of the cross-entropy on tokens that the target did not
      generate (prompts, plain text mixed in), beside `objective`.
    steps: K of the reports. Depth means nothing to a model that reads the
      text alone, so position k counts the places that a chain of drafts can
      reach at depth k: those with k more drafted tokens before them.
    on_policy: share of each batch, in [0, 1), that the drafter writes itself
      (`distill.on_policy`), for the trainer's host to read.
    every: steps between two such texts. max_new: their answers' length.

  Raises:
    ValueError: a value out of range.
  """

  model: SmallLMModel
  stage: str = 'align'
  objective: Objective = Objective(Mixture())
  text_weight: float = 0.0
  steps: int = 5
  on_policy: float = 0.0
  every: int = 100
  max_new: int = 128

  def __post_init__(self):
    checks = {
        'stage': self.stage in STAGES, 'steps': self.steps >= 1,
        'text_weight': self.text_weight >= 0,
        'on_policy': 0 <= self.on_policy < 1, 'every': self.every >= 1,
        'max_new': self.max_new >= 1}
    for name, is_good in checks.items():
      if not is_good:
        raise ValueError(f'{name}={getattr(self, name)!r}: out of range'
                         + (f'; known are {", ".join(STAGES)}'
                            if name == 'stage' else ''))
    if self.on_policy and self.stage != 'align':
      raise ValueError(f'on_policy={self.on_policy}: only stage "align" has '
                       'a teacher for texts of the drafter')
    mixture = self.objective.mixture
    if self.on_policy and 'ce' in dict(mixture.first + (mixture.last or ())):
      raise ValueError("on_policy: 'ce' would teach the drafter its own "
                       'text; use kl, reverse_kl, jsd, tvd, tvd_pp, ...')

  @property
  def num_draft(self) -> int:
    return self.steps

  def source(self) -> LanguageModel:
    return LanguageModel(self.model)

  def attach(self, net: Any, target: Any, ids: Any) -> Any:
    """See `task.Task.attach`; no copies, which would not follow `net`."""
    return self.model.attach(net, target, ids, copies=False)

  def loss(
      self, params: Any, target: Any, batch: Batch, teacher: Teacher,
      key: Array, progress: Array,
  ) -> tuple[Array, dict[str, Array]]:
    """See `task.Task.loss`.

    Before 'align' the text is the teacher: `acceptance` sums the chances
    that a drawn draft is the next token, `match` counts argmaxes that are.
    """
    del key
    params = self.computed(params)
    rows = places(
        batch, params['inverse'], self.model.config.draft_vocab_size,
        self.steps, every=self.stage != 'align')
    valid = rows['valid'][..., 0]
    rows['weight'] = valid / jnp.maximum(jnp.sum(valid), 1e-6)
    other = rows.pop('joined') * (1.0 - valid)
    rows['text'] = self.text_weight * other / jnp.maximum(
        jnp.sum(other), 1e-6)
    rows['hidden'] = self._states(params, batch)
    if self.stage == 'align':
      rows |= {'final': teacher.final, 'log_z': teacher.log_z,
               'top': params['inverse'][teacher.top]}
    drafted = self.model.lm_params(params)['head']
    judged = draft_vocab.rows(target, params['ids'])
    score = self._aligned if self.stage == 'align' else self._plain
    sums = in_chunks(
        lambda part: score(drafted, judged, part, progress), rows,
        self.objective.chunk, axes=2)
    return sums.pop('loss'), sums

  def logits(
      self, params: Any, target: Any, batch: Batch, teacher: Teacher,
      anchors: Array,
  ) -> Array:
    """See `task.Task.logits`."""
    del target, teacher
    params = self.computed(params)
    hidden = self._states(params, batch)
    place = anchors[..., None] + jnp.arange(self.steps)
    place = jnp.minimum(place, batch.tokens.shape[1] - 1)
    picked = jax.vmap(lambda row, i: row[i])(hidden, place)
    return self.model.logits(self.model.lm_params(params)['head'], picked)

  def _states(self, params: Any, batch: Batch) -> Array:
    """Returns normed states [B,S,D]; documents do not see each other."""
    size = batch.tokens.shape[1]
    seen = (batch.document[:, :, None] == batch.document[:, None]) & (
        jnp.tril(jnp.ones((size, size), bool)))
    return self.model.states(params, batch.tokens, batch.position, seen)

  def _aligned(self, drafted, judged, part, progress) -> dict[str, Array]:
    """Returns sums over places, from the target's laws."""
    log_q = jax.nn.log_softmax(
        self.model.logits(drafted, part['hidden']), axis=-1)
    log_p = self.model.logits(judged, part['final'])
    log_p = jax.lax.stop_gradient(log_p - part['log_z'][:, None])
    loss = self.objective.sums(
        progress, log_p, log_q, part['weight'], part['label'])
    if self.text_weight:
      loss += _cross_entropy(log_q, part['label'], part['text'])
    alpha = jax.lax.stop_gradient(losses.acceptance(log_p, log_q))
    match = jnp.argmax(log_q, axis=-1) == part['top']
    return {'loss': loss, **_reports(part['valid'], alpha, match)}

  def _plain(self, drafted, judged, part, progress) -> dict[str, Array]:
    """Returns sums over places, from the text alone."""
    del judged, progress
    log_q = jax.nn.log_softmax(
        self.model.logits(drafted, part['hidden']), axis=-1)
    label = part['label']
    loss = _cross_entropy(log_q, label, part['weight'])
    taken = jnp.take_along_axis(
        log_q, jnp.maximum(label, 0)[:, None], axis=-1)[:, 0]
    alpha = jnp.where(label >= 0, jnp.exp(taken), 0.0)
    match = jnp.argmax(log_q, axis=-1) == label
    return {'loss': loss, **_reports(
        part['valid'], jax.lax.stop_gradient(alpha), match)}


def places(
    batch: Batch, inverse: Array, width: int, steps: int, *,
    every: bool = False,
) -> dict[str, Array]:
  """Returns what is known about each place of the text, [B,S,...].

  A place is a token that the next one is predicted from.

  Args:
    batch: texts. inverse: int32[V], draft ids, `width` if not drafted.
    steps: K.
    every: counts all tokens, not only those that the target generated.

  Returns:
    `valid f32[B,S,K]`: whether the next token counts, and whether it does at
    depth k, as the k tokens up to here count too and can be drafted.
    `joined f32[B,S]`: whether there is a next token in the document.
    `label int32[B,S]`: its draft id, -1 if it has none.
  """
  joined = followed(batch)
  label = ahead(inverse[batch.tokens])
  counts = joined if every else joined & ahead(batch.supervised)
  drafted = counts & (label < width)
  valid = [counts]
  for step in range(1, steps):
    before = jnp.pad(drafted, ((0, 0), (step, 0)))[:, :drafted.shape[1]]
    valid.append(valid[-1] & before)
  return {'valid': jnp.stack(valid, axis=2).astype(jnp.float32),
          'joined': joined.astype(jnp.float32),
          'label': jnp.where(label < width, label, -1)}


def _reports(valid: Array, alpha: Array, match: Array) -> dict[str, Array]:
  """Returns sums by depth; `valid f32[n,K]`, the others [n]."""
  def at(value: Array) -> Array:
    # A place of weight 0 may hold NaN.
    return jnp.sum(jnp.where(valid > 0, value[:, None], 0.0), axis=0)
  return {'weight': jnp.sum(valid, axis=0), 'acceptance': at(alpha),
          'match': at(match.astype(jnp.float32))}


def _cross_entropy(log_q: Array, label: Array, weight: Array) -> Array:
  """Returns f32[], the weighted sum; labels of -1 add nothing."""
  return weighted_sum(
      losses.pointwise('ce', log_q, log_q, label=label), weight)
