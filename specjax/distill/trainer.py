"""The training step: target and drafter in one compiled program.

    trainer = Trainer(task, lm, optimizer)
    state = trainer.init(key, target)
    shared = trainer.share(state.net, target, ids)
    state, report = trainer.step(
        state, target, shared, batch, key, progress, rate)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from specjax.distill import teacher as teacher_lib
from specjax.distill.task import Task
from specjax.distill.teacher import Batch
from specjax.models.causal import CausalLM

Array = jax.Array


class TrainState(struct.PyTreeNode):
  """What training changes; donated to the step.

  Attributes:
    net: trained weights, float32. opt: the optimiser's state.
    step: int32[], updates done (also those that were left out).
    bad: int32[], steps in a row whose loss or gradient was not finite; these
      leave `net` and `opt` as they were.
  """

  net: Any
  opt: Any
  step: Array
  bad: Array


@dataclasses.dataclass(frozen=True)
class Trainer:
  """One way of training one drafter; equal trainers trace once.

  Attributes:
    task: how the drafter learns. lm: the target.
    optimizer: an `optax.GradientTransformation` at learning rate 1; each
      step is given its rate, so that the length of a run is data.
    teacher_chunk: positions whose V target logits exist at a time.
  """

  task: Task
  lm: CausalLM
  optimizer: optax.GradientTransformation
  teacher_chunk: int = 2048

  def init(self, key: Array, target: Any) -> TrainState:
    """Returns the state before the first step."""
    net = self.task.init(key, target)
    return TrainState(
        net=net, opt=self.optimizer.init(net), step=jnp.int32(0),
        bad=jnp.int32(0))

  def share(self, net: Any, target: Any, ids: Any) -> Any:
    """Returns what the drafter uses beside its weights: head, maps."""
    params = self.task.attach(net, target, ids)
    return {k: v for k, v in params.items() if k != 'net'}

  def loss(
      self, net: Any, target: Any, shared: Any, batch: Batch, key: Array,
      progress: Array,
  ) -> tuple[Array, dict[str, Array]]:
    """Returns the loss and the task's sums for one batch."""
    teacher = teacher_lib.observe(
        self.lm, target, batch, self.task.taps, chunk=self.teacher_chunk)
    shared = jax.lax.stop_gradient(shared)
    return self.task.loss(
        {**shared, 'net': net}, target, batch, teacher, key, progress)

  @functools.cached_property
  def step(self):
    """The compiled step.

    Takes `(state, target, shared, batch, key, progress, rate)`: the run's
    key (folded with the step here), the share of training done f32[] in
    [0, 1], the learning rate f32[]. Returns `(state, report)`: the report is
    the task's sums with `loss`, `grad_norm` and `bad`. The state is donated.
    """
    return jax.jit(self._step, donate_argnums=0)

  @functools.cached_property
  def evaluate(self):
    """The compiled loss without an update: `(net, target, shared, batch, key,
    progress) -> (loss, sums)`."""
    return jax.jit(self.loss)

  def _step(self, state, target, shared, batch, key, progress, rate):
    key = jax.random.fold_in(key, state.step)
    (loss, sums), grads = jax.value_and_grad(self.loss, has_aux=True)(
        state.net, target, shared, batch, key, progress)
    state, norm = update(self.optimizer, state, loss, grads, rate)
    return state, {
        **sums, 'loss': loss, 'grad_norm': norm, 'bad': state.bad}


def update(
    optimizer: optax.GradientTransformation, state: Any, loss: Array,
    grads: Any, rate: Array,
) -> tuple[Any, Array]:
  """Returns `(state, norm of the gradient)` after a guarded update.

  A loss or gradient that is not finite leaves weights and optimiser as they
  were and is counted in `bad`.

  Args:
    optimizer: at rate 1. state: a `TrainState`, or with its fields.
    loss: f32[]. grads: of `state.net`. rate: f32[].
  """
  norm = optax.global_norm(grads)
  fine = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, opt = optimizer.update(grads, state.opt, state.net)
  updates = jax.tree.map(lambda x: rate * x, updates)
  net = optax.apply_updates(state.net, updates)
  keep = lambda new, old: jnp.where(fine, new, old)  # noqa: E731
  return state.replace(
      net=jax.tree.map(keep, net, state.net),
      opt=jax.tree.map(keep, opt, state.opt), step=state.step + 1,
      bad=jnp.where(fine, 0, state.bad + 1)), norm
