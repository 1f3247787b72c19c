"""Adapts a drafter to what it is used for, from its rejected drafts (OSD).

    online = OnlineAdaptation(task, target.lm, target.params, net, ids)
    results = specjax.generate(
        target, drafter, prompts, drafter_params=online.params,
        online=online)

After every few requests one update: cross-entropy with the target's laws at
the places where a draft was rejected, and nowhere else. Off by default. It is
lossless: a round is verified with the law of the weights that drafted, and
weights change between rounds only.

OSD keeps the target's law of each such place. Here neither laws nor hidden
states are kept, but tokens and places: the target runs once more over the
finished text, in the program of the update. That costs one forward pass per
token, a few per cent of having decoded it, and gives whole laws, and for
every kind of drafter the states that it reads.

References: Liu et al. 2024, arXiv:2310.07177.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from specjax.distill import losses
from specjax.distill import teacher as teacher_lib
from specjax.distill.blocks import BlockTask
from specjax.distill.eagle import EagleTask
from specjax.distill.medusa import HeadsTask
from specjax.distill.small_lm import SmallLMTask
from specjax.distill.task import Task
from specjax.distill.teacher import Batch
from specjax.models import draft_vocab
from specjax.models.block_model import BlockModel
from specjax.models.causal import CausalLM
from specjax.models.eagle_model import EagleModel
from specjax.models.medusa import HeadsModel

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Settings:
  """How often and how fast a drafter is adapted.

  Attributes:
    every: I, requests between updates, >= 1; also rows of an update.
    steps: gradient steps of an update, >= 1.
    learning_rate: > 0, constant. clip_norm: of the gradient.
    length: tokens of a request that are looked at, from its first on.
    places: rejected drafts of a request that are learned from, at most; the
      last ones.

  Raises:
    ValueError: a value out of range.
  """

  every: int = 8
  steps: int = 1
  learning_rate: float = 1e-4
  clip_norm: float = 1.0
  length: int = 1024
  places: int = 128

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not value > 0:
        raise ValueError(f'{field.name}={value}: must be > 0')


class Rejected(NamedTuple):
  """Where a request's drafts were rejected.

  Attributes:
    anchors: int32[R], positions of the pending tokens that the rounds began
      with.
    slots: int32[R], the draft that was rejected; the token that the target
      said instead stands at `anchors + slots + 1`.
  """

  anchors: np.ndarray
  slots: np.ndarray


def rejected(
    step_lengths: Sequence[int], prompt_length: int, num_draft: int
) -> Rejected:
  """Returns the rejections in a text that a chain of K drafts led to.

  A round that emits n <= K tokens had n - 1 drafts accepted and the next one
  rejected (or not drafted, where drafting stops early: it is learned from,
  too). A round of K + 1 tokens had none rejected. The last round does not
  count: an end token or a limit may have cut it.

  Args:
    step_lengths: tokens emitted by each round (`Result.step_lengths`).
    prompt_length: tokens before the first round's.
    num_draft: K.
  """
  emitted = np.asarray(step_lengths, np.int64)
  starts = prompt_length - 1 + np.cumsum(emitted) - emitted
  kept = emitted <= num_draft
  kept[-1:] = False
  kept &= emitted >= 1
  return Rejected(starts[kept].astype(np.int32),
                  (emitted[kept] - 1).astype(np.int32))


def task_of(model: Any, num_draft: int) -> Task:
  """Returns the task whose laws are those of a drafter's model.

  Args:
    model: `BlockModel`, `EagleModel`, `HeadsModel` or `SmallLMModel`
      (`drafters.source` objects hold it as `model`).
    num_draft: tokens that are drafted.
  """
  if isinstance(model, BlockModel):
    return BlockTask(model)
  if isinstance(model, EagleModel):
    recipe = 'ttt' if num_draft > 1 else 'plain'
    return EagleTask(model, steps=num_draft, recipe=recipe)
  if isinstance(model, HeadsModel):
    return HeadsTask(model)
  return SmallLMTask(model, steps=num_draft)


class OnlineAdaptation:
  """A drafter that learns between requests.

  Attributes:
    params: the drafter's parameters for decoding, of the latest update.
    updates: updates done. losses: floats, of each update's last step: the
      mean divergence KL(target || drafter) at rejected drafts.
    skipped: updates left out because a loss or gradient was not finite.
  """

  def __init__(
      self, task: Any, lm: CausalLM, target: Any, net: Any, ids: Any, *,
      settings: Settings | None = None,
  ):
    """Begins with a drafter's weights.

    Args:
      task: how the drafter learns (`task_of`); its losses are not used.
      lm, target: the target and its parameters.
      net: the drafter's weights, of any dtype (`params['net']`).
      ids: int[W], its draft vocabulary (`params['ids']`).
      settings: None is `Settings()`.
    """
    self.task, self.lm, self.target = task, lm, target
    self.settings = settings or Settings()
    self.updates = self.skipped = 0
    self.losses: list[float] = []
    self._ids = np.asarray(ids)
    self._dtypes = jax.tree.map(lambda x: x.dtype, net)
    self._net = jax.tree.map(lambda x: x.astype(jnp.float32), net)
    self._optimizer = optax.chain(
        optax.clip_by_global_norm(self.settings.clip_norm),
        optax.adam(self.settings.learning_rate))
    self._moments = self._optimizer.init(self._net)
    self._rows: list[tuple[np.ndarray, Rejected]] = []
    self._shared = {
        k: v for k, v in task.attach(net, target, self._ids).items()
        if k != 'net'}
    self.params = self._attach()

  def add(
      self, tokens: Sequence[int], prompt_length: int,
      step_lengths: Sequence[int], num_draft: int,
  ) -> bool:
    """Takes in a finished request; True if the drafter has changed.

    Args:
      tokens: prompt and answer. prompt_length: of them, the prompt's.
      step_lengths: tokens emitted by each round. num_draft: K.
    """
    text = np.asarray(tokens, np.int32)[:self.settings.length]
    found = rejected(step_lengths, prompt_length, num_draft)
    # EAGLE's row of a pending token is the one before it.
    kept = (found.anchors >= 1) & (found.slots < self.task.num_draft) & (
        found.anchors + found.slots < len(text))
    found = Rejected(*(x[kept][-self.settings.places:] for x in found))
    self._rows.append((text, found))
    if len(self._rows) < self.settings.every:
      return False
    rows, self._rows = self._rows, []
    return self._update(rows)

  def _update(self, rows: list[tuple[np.ndarray, Rejected]]) -> bool:
    """Runs the steps of an update; the buffer is empty afterwards."""
    if not any(len(found.anchors) for _, found in rows):
      return False  # every draft was accepted
    batch, anchors, slots, weight = _arrays(rows, self.settings)
    for _ in range(self.settings.steps):
      self._net, self._moments, loss, fine = self._step(
          self._net, self._moments, self._shared, self.target, batch,
          anchors, slots, weight)
    if not bool(fine):
      self.skipped += 1
      return False
    self.losses.append(float(loss))
    self.updates += 1
    self.params = self._attach()
    return True

  def _attach(self) -> Any:
    """Returns parameters for decoding, in the dtypes that `net` came in."""
    net = jax.tree.map(
        lambda x, dtype: x.astype(dtype), self._net, self._dtypes)
    model: Any = self.task.model  # its copies of weights are for decoding
    return model.attach(net, self.target, self._ids)

  @functools.cached_property
  def _step(self):
    return jax.jit(self._move, donate_argnums=1)

  def _move(self, net, moments, shared, target, batch, anchors, slots,
            weight):
    """Returns `(net, moments, loss, whether it was finite)`."""
    loss, grads = jax.value_and_grad(self._loss)(
        net, shared, target, batch, anchors, slots, weight)
    fine = jnp.isfinite(loss) & jnp.isfinite(optax.global_norm(grads))
    updates, new = self._optimizer.update(grads, moments, net)
    keep = lambda a, b: jnp.where(fine, a, b)  # noqa: E731
    return (jax.tree.map(keep, optax.apply_updates(net, updates), net),
            jax.tree.map(keep, new, moments), loss, fine)

  def _loss(self, net, shared, target, batch, anchors, slots, weight):
    """Returns f32[]: mean divergence at the rejected drafts alone."""
    teacher = teacher_lib.observe(self.lm, target, batch, self.task.taps)
    params = {**jax.lax.stop_gradient(shared), 'net': net}
    logits = self.task.logits(params, target, batch, teacher, anchors)
    picked = jnp.take_along_axis(
        logits, slots[..., None, None], axis=2)[:, :, 0]
    log_q = jax.nn.log_softmax(picked.astype(jnp.float32), axis=-1)
    place = anchors + slots
    final = jnp.take_along_axis(teacher.final, place[..., None], axis=1)
    log_p = draft_vocab.scores(
        self.lm.config, draft_vocab.rows(target, shared['ids']), final)
    log_p -= jnp.take_along_axis(teacher.log_z, place, axis=1)[..., None]
    return losses.loss('kl', log_p, log_q, weight)


def _arrays(
    rows: list[tuple[np.ndarray, Rejected]], settings: Settings
) -> tuple[Batch, Array, Array, Array]:
  """Returns the batch of an update, of one shape: texts, places, weights."""
  shape = settings.every, settings.length
  tokens, document = np.zeros((2, *shape), np.int32)
  anchors, slots = np.zeros((2, settings.every, settings.places), np.int32)
  weight = np.zeros(anchors.shape, np.float32)
  for row, (text, found) in enumerate(rows):
    tokens[row, :len(text)] = text
    document[row, :len(text)] = 1
    num = len(found.anchors)
    anchors[row, :num], slots[row, :num] = found
    weight[row, :num] = 1
  position = np.broadcast_to(np.arange(settings.length, dtype=np.int32),
                             shape)
  batch = teacher_lib.batch_of({
      'tokens': tokens, 'document': document, 'position': position,
      'supervised': document > 0})
  return batch, jnp.asarray(anchors), jnp.asarray(slots), jnp.asarray(weight)
