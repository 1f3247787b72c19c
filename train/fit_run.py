"""What runs of `specjax.fit` share: states, steps, batches, what is said."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from specjax.fit.step import Fitter, Objective
from specjax.parallel import rules
from train import log, loop


class Run(loop.Run):
  """A model that is trained by a `Fitter`.

  Attributes:
    fitter: its step. mesh: or None for one device.
    unit: what `step` counts, for messages.
  """

  unit = 'images'

  def __init__(
      self, config: Any, objective: Objective,
      mesh: jax.sharding.Mesh | None,
  ):
    """Prepares a run; nothing is compiled yet."""
    super().__init__(config)
    self.mesh = mesh
    self.fitter = Fitter(
        objective, loop.optimiser(config.optimizer), config.decay)
    self.key = jax.random.key(config.seed)

  def fresh(self) -> Any:
    """Returns the state before the first step."""
    state = jax.jit(self.fitter.init)(self.key)
    net = self.begun(state.net)
    if net is not state.net:
      state = state.replace(net=net, average=jax.tree.map(jnp.copy, net))
    return state if self.mesh is None else rules.on_mesh(state, self.mesh)

  def begun(self, net: Any) -> Any:
    """Returns the weights to begin with, given random ones."""
    return net

  def abstract(self) -> Any:
    """Returns the shapes of `fresh`."""
    return jax.eval_shape(self.fitter.init, self.key)

  def take(self, state: Any, batch: Any, step: int) -> tuple[Any, Any]:
    """Returns `(state, report)` after a step on a batch of the host."""
    return self.fitter.step(
        state, self.place(batch), self.key, self.rates[step])

  def place(self, batch: Any) -> Any:
    """Puts a batch on the devices, rows over 'data'."""
    if self.mesh is None:
      return jax.device_put(batch)
    by_rows = NamedSharding(self.mesh, PartitionSpec('data'))
    return rules.put(batch, jax.tree.map(lambda _: by_rows, batch))

  def batch_name(self, step: int) -> str:
    """Returns which batch step number `step` saw."""
    return f'batch {step} of seed {self.config.seed}'

  def facts(self, metrics: log.Metrics, data: Any) -> dict[str, Any]:
    """Returns what is kept with the model: its last scores, and their origin.

    Args:
      metrics: of this run, which was tested. data: facts of the data.
    """
    last = {k: v for k, v in metrics.of('eval')[-1].items() if k != 'kind'}
    return {'metrics': last, 'config': self.config.to_dict(), 'data': data}

  def train_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of training."""
    scores = self.learnt(row) if 'loss' in row else ''
    return log.said(row, self.num_steps, scores, self.unit)

  def eval_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of a test."""
    return (f'step {row["step"]}, {row["minutes"]:.1f} min: '
            f'{self.tested(row)}')

  @abc.abstractmethod
  def learnt(self, row: Mapping[str, Any]) -> str:
    """Returns what `train_line` says beside the loss."""

  @abc.abstractmethod
  def tested(self, row: Mapping[str, Any]) -> str:
    """Returns what `eval_line` says of the scores."""
