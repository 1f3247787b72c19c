"""The training step of a model: a guarded update and a moving average."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from specjax.distill.trainer import update

Array = jax.Array


class Objective(abc.ABC):
  """What a model is trained for. A frozen, hashable dataclass."""

  @abc.abstractmethod
  def init(self, key: Array) -> tuple[Any, Any]:
    """Returns `(weights in float32, memory)`; memory may be None."""

  @abc.abstractmethod
  def loss(
      self, net: Any, memory: Any, batch: Any, key: Array,
      train: bool = False,
  ) -> tuple[Array, tuple[dict[str, Array], Any]]:
    """Returns `(loss f32[], (scalars to report, what `after` needs))`.

    With `train`, as it is trained with: dropout.
    """

  def after(
      self, net: Any, memory: Any, seen: Any, key: Array
  ) -> tuple[Any, Any]:
    """Returns `(weights, memory)` after an update: revived codes, say.

    Here both as they are. The key is consumed.
    """
    del seen, key
    return net, memory


class FitState(struct.PyTreeNode):
  """What training changes; donated to the step.

  Attributes:
    net: weights, float32. average: their moving average, which is kept.
    opt: the optimiser's state. memory: of the objective.
    step: int32[], updates done (also those that were left out).
    bad: int32[], steps in a row whose loss or gradient was not finite.
  """

  net: Any
  average: Any
  opt: Any
  memory: Any
  step: Array
  bad: Array


@dataclasses.dataclass(frozen=True)
class Fitter:
  """One way of training one model; equal fitters trace once.

  Attributes:
    objective: what for.
    optimizer: at learning rate 1; each step is given its rate.
    decay: of the moving average, in [0, 1); it is shorter in the first steps.
  """

  objective: Objective
  optimizer: optax.GradientTransformation
  decay: float = 0.999

  def __post_init__(self):
    if not 0 <= self.decay < 1:
      raise ValueError(f'decay={self.decay}: must be in [0, 1)')

  def init(self, key: Array) -> FitState:
    """Returns the state before the first step."""
    net, memory = self.objective.init(key)
    return FitState(
        net=net, average=jax.tree.map(jnp.copy, net),
        opt=self.optimizer.init(net), memory=memory, step=jnp.int32(0),
        bad=jnp.int32(0))

  @functools.cached_property
  def step(self):
    """The compiled step: `(state, batch, key, rate) -> (state, report)`.

    The key is the run's, folded with the step here; the rate is f32[]. The
    report holds scalars: the objective's, `loss`, `grad_norm` and `bad`. The
    state is donated.
    """
    return jax.jit(self._step, donate_argnums=0)

  @functools.cached_property
  def evaluate(self):
    """The compiled loss without an update: `(net, memory, batch, key) ->
    (loss, scalars)`."""
    def run(net, memory, batch, key):
      loss, (scalars, _) = self.objective.loss(net, memory, batch, key)
      return loss, scalars
    return jax.jit(run)

  def _step(self, state, batch, key, rate):
    keys = jax.random.split(jax.random.fold_in(key, state.step))
    (loss, (scalars, seen)), grads = jax.value_and_grad(
        self.objective.loss, has_aux=True)(
            state.net, state.memory, batch, keys[0], train=True)
    state, norm = update(self.optimizer, state, loss, grads, rate)
    net, memory = self.objective.after(
        state.net, state.memory, seen, keys[1])
    count = state.step.astype(jnp.float32)
    decay = jnp.minimum(self.decay, (1 + count) / (10 + count))
    average = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new, state.average, net)
    state = state.replace(net=net, memory=memory, average=average)
    return state, {
        **scalars, 'loss': loss, 'grad_norm': norm, 'bad': state.bad}
