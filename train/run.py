"""A drafter in training: its steps, its batches, its tests."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from specjax import verify
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.data import packing
from specjax.distill import confidence, measure, teacher
from specjax.distill.on_policy import OnPolicy
from specjax.distill.task import cast
from specjax.distill.trainer import Trainer
from specjax.host import cli, image_sampling, shapes
from specjax.host import drafter as drafter_lib
from specjax.host.load import Model
from specjax.io.errors import FormatError
from specjax.parallel import rules
from train import log, loop
from train.text import Text


def load_target(
    config: Any, mesh: jax.sharding.Mesh | None, quiet: bool
) -> Model:
  """Loads `config.target`: of text, or of codes of images under guidance.

  Raises:
    ValueError: a mesh, for images.
  """
  if 'guidance' not in config:
    return cli.load_target(config, mesh, quiet)
  if mesh is not None:
    raise ValueError('config.mesh: drafters of images are trained on one '
                     'device')
  return image_sampling.load_target(
      config.target, dtype=config.dtype, guidance=config.guidance)[0]


class Run(loop.Run):
  """A drafter in training: its steps, its batches, its tests."""

  def __init__(
      self, trainer: Trainer, target: Model, ids: np.ndarray,
      text: Text, config: Any, mesh: jax.sharding.Mesh | None,
  ):
    """Prepares a run of `config`; nothing is compiled yet."""
    self.trainer, self.target, self.ids, self.text = trainer, target, ids, text
    self.mesh = mesh
    super().__init__(config)
    self._init_key, self.key = jax.random.split(jax.random.key(config.seed))
    self._init = jax.jit(trainer.init)
    self._feeder = ThreadPoolExecutor(1)
    self._next: tuple[int, Any] | None = None
    self._shared: Any = None
    self._own = None
    task: Any = trainer.task
    if getattr(task, 'on_policy', 0.0):
      self._own = OnPolicy(
          task, length=config.data.length, eos=target.eos,
          seed=config.seed, mesh=mesh)
    temperature = config.eval.temperature
    self._context = measure.context(
        text.prompts, config.eval.new_tokens, eos=target.eos,
        temperature=temperature, seed=config.seed)
    drafter = shapes.shape(
        trainer.task.source(), trainer.task.num_draft,
        config.eval.draft.to_dict())
    # Tested as decoded by default; a tree has to be asked for.
    self.num_draft = (
        drafter.topology.max_depth if drafter.topology.is_chain
        else trainer.task.num_draft)
    self._engine = Engine(target.lm, drafter, verify.get(
        'speculative' if temperature else 'greedy'))
    self._cast = jax.jit(
        lambda net: cast(net, trainer.task.dtype))

  def fresh(self) -> Any:
    """Returns the state before the first step."""
    state = self._init(self._init_key, self.target.params)
    if self.config.init_from:
      try:
        net = drafter_lib.carry_over(
            self.config.init_from, state.net, self.ids)
      except FormatError as error:
        raise ValueError(f'config.init_from: {error}') from error
      state = state.replace(net=net)
    return state if self.mesh is None else rules.on_mesh(state, self.mesh)

  def abstract(self) -> Any:
    """Returns the shapes of `fresh`."""
    return jax.eval_shape(self._init, self._init_key, self.target.params)

  def step(self, state: Any, step: int) -> tuple[Any, Any, int]:
    """Returns `(state, report, tokens)` after step number `step`."""
    if self._next is None or self._next[0] != step:
      self._next = step, self._feeder.submit(self._batch, step)
    batch, num_tokens = self._next[1].result()
    if self._own is not None:  # before the next batch is made
      self._own.refresh(step, self._rows(step), {
          **self._share(state.net), 'net': state.net})
    self._next = step + 1, self._feeder.submit(self._batch, step + 1)
    state, report = self.trainer.step(
        state, self.target.params, self._share(state.net), batch, self.key,
        np.float32(step / self.num_steps), self.rates[step])
    return state, report, num_tokens

  def train_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of training."""
    return log.train_line(row, self.num_steps)

  def eval_line(self, row: Mapping[str, Any]) -> str:
    """Returns what is shown of a row of a test."""
    return log.eval_line(row)

  def batch_name(self, step: int) -> str:
    """Returns which rows step number `step` saw."""
    rows = packing.order(len(self.text.train), step, self.config.batch_size,
                         self.config.seed)
    return f'rows {rows[:8].tolist()} ... of the text'

  def evaluate(self, state: Any, step: int, minutes: float) -> dict[str, Any]:
    """Returns the row of a test: the decoder's, and the trainer's numbers."""
    config, shared = self.config, self._share(state.net)
    found = self.decode({**shared, 'net': self._cast(state.net)})
    reports = []
    for number in range(config.eval.batches):
      batch = self.text.held_out.batch(number, config.batch_size)
      loss, sums = self.trainer.evaluate(
          state.net, self.target.params, shared, self._place(batch), self.key,
          np.float32(1))
      reports.append({**sums, 'loss': loss})
    held_out = log.summary(jax.device_get(reports))
    del held_out['bad_steps']
    return {'step': step, 'minutes': minutes, 'tau': found.tau,
            'per_position': found.per_position.tolist(),
            'conditional': found.conditional.tolist(),
            'rounds': found.rounds, 'held_out': held_out}

  def decode(self, params: Any) -> measure.Measured:
    """Decodes the held-out prompts with a drafter's parameters."""
    return measure.acceptance(
        self._engine, Models(target=self.target.params, drafter=params),
        self._context, chunk=min(128, self.target.lm.chunk))

  def calibrate(self, params: Any) -> confidence.Calibration | None:
    """Calibrates a drafter's confidence head on the held-out prompts.

    None: it has none, or there are too few prompts.
    """
    model = self.trainer.task.model
    if not confidence.has_head(model) or len(self.text.prompts) < 2:
      return None
    return confidence.calibrate(
        model, self.target.lm,
        Models(target=self.target.params, drafter=params), self._context,
        chunk=min(128, self.target.lm.chunk))

  def _share(self, net: Any) -> Any:
    """Returns what the drafter uses beside its weights; it never changes."""
    if self._shared is None:
      self._shared = self.trainer.share(net, self.target.params, self.ids)
      if self.mesh is not None:
        self._shared = rules.on_mesh(self._shared, self.mesh)
    return self._shared

  def _batch(self, step: int) -> tuple[Any, int]:
    """Makes batch number `step`, a function of it and the seed alone."""
    rows = self._rows(step)
    if self._own is not None:
      rows = self._own.mix(step, rows)
    return self._place(rows), int(np.sum(rows['document'] > 0))

  def _rows(self, step: int) -> packing.Row:
    return self.text.train.batch(
        step, self.config.batch_size, self.config.seed)

  def _place(self, rows: Mapping[str, Any]) -> teacher.Batch:
    batch = teacher.Batch(**rows)
    if self.mesh is None:
      return jax.device_put(batch)
    by_rows = NamedSharding(self.mesh, PartitionSpec('data'))
    return rules.put(batch, jax.tree.map(lambda _: by_rows, batch))


