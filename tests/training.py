"""What tests of training share: texts, drafters that matter, short runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.distill import measure, teacher
from specjax.distill.trainer import Trainer
from specjax.drafters import ChainLM, Null
from specjax.verify import Greedy
from tests import tiny

# Two tokens cannot be drafted.
IDS = np.setdiff1d(np.arange(tiny.VOCAB), [3, 11])


def packed() -> teacher.Batch:
  """Returns two rows of texts; padding at the end of the first."""
  document = np.asarray([[1] * 7 + [2] * 6 + [0] * 3, [1] * 2 + [2] * 14])
  position = np.asarray([[*range(7), *range(6), 0, 0, 0],
                         [*range(2), *range(14)]])
  supervised = (position > 1) & (document > 0)
  supervised[1, 9] = False  # a second turn of the user
  return teacher.batch_of({
      'tokens': tiny.tokens(2, 16, seed=4), 'document': document,
      'position': position, 'supervised': supervised})


def alone(tokens: np.ndarray, prompt_length: int) -> teacher.Batch:
  """Returns a batch of texts [B,S], a document a row."""
  place = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return teacher.batch_of({
      'tokens': tokens, 'document': np.ones_like(tokens), 'position': place,
      'supervised': place >= prompt_length})


def written(
    lm: Any, target: Any, prompts: Sequence[Any], num: int, rule: Any = None,
    **options: Any,
) -> np.ndarray:
  """Returns int32[B,S]: prompts of one length, `num` tokens of the target's.

  Args:
    rule: None is `Greedy()`. options: of `measure.context`.
  """
  found = measure.acceptance(
      Engine(lm, Null(0), rule or Greedy()), Models(target=target),
      measure.context(prompts, num, **options), chunk=4)
  return np.stack(found.texts)


def moved(net: Any, by: float) -> Any:
  """Returns weights with noise added: every part of them matters."""
  return jax.tree.map(
      lambda x: x + by * tiny.noise(x.shape, x.size), net)


def run(
    task: Any, lm: Any, target: Any, ids: Any, batch: teacher.Batch,
    num: int, rate: float, net: Any = None,
) -> tuple[Any, Any, list[dict[str, Any]]]:
  """Trains `num` steps on one batch, from `net` or from fresh weights.

  Returns:
    `(net, drafter, reports)`: the weights, the parameters for decoding with
    them, and host arrays of each step.
  """
  trainer = Trainer(task, lm, optax.adam(1.0))
  state = trainer.init(jax.random.key(0), target)
  if net is not None:
    state = state.replace(net=net)
  shared = trainer.share(state.net, target, ids)
  reports = []
  for step in range(num):
    state, report = trainer.step(
        state, target, shared, batch, jax.random.key(2),
        np.float32(step / num), np.float32(rate))
    reports.append(jax.device_get(report))
  return state.net, task.attach(state.net, target, ids), reports


def tau(
    lm: Any, target: Any, source: Any, num_draft: int, drafter: Any,
    prompts: Sequence[Any], num: int,
) -> float:
  """Returns tokens a round of greedy decoding `num` tokens a prompt."""
  return measure.acceptance(
      Engine(lm, ChainLM(num_draft, source), Greedy()),
      Models(target=target, drafter=drafter),
      measure.context(prompts, num), chunk=4).tau
