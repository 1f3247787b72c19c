"""Calibration of a confidence head: chances that mean what they say.

    temperatures = fit(logits, accepted, drafted)
    chance = jax.nn.sigmoid(logits / temperatures)

On the host, from rounds that training did not see (`distill.confidence`
decodes them).
"""

from __future__ import annotations

from typing import Any

import numpy as np

NUM_BINS = 20
_GRID = np.geomspace(0.1, 10.0, 121)  # 1 is in it


def ece(
    chance: Any, label: Any, weight: Any = None, *, num_bins: int = NUM_BINS
) -> float:
  """Returns the expected calibration error, in [0, 1].

  The mean over predictions of the distance between the mean chance and the
  share of true labels in their bin; bins are equally wide.

  Args:
    chance: [n] in [0, 1]. label: bool[n]. weight: [n] >= 0, or None for 1;
      without any weight the error is 0.
  """
  chance = np.asarray(chance, np.float64)
  label = np.asarray(label, np.float64)
  weight = np.ones_like(chance) if weight is None else (
      np.asarray(weight, np.float64))
  index = np.clip((chance * num_bins).astype(int), 0, num_bins - 1)
  gap = np.bincount(index, weight * (chance - label), num_bins)
  return float(np.abs(gap).sum() / max(weight.sum(), 1e-12))


def joint(logits: Any, temperatures: Any = 1.0) -> np.ndarray:
  """Returns f64[n,G]: the chance that a draft and all before it are accepted.

  Args:
    logits: [n,G] of a confidence head. temperatures: [G] or a number.
  """
  return np.cumprod(_sigmoid(
      np.asarray(logits, np.float64) / temperatures), axis=1)


def errors(
    logits: Any, accepted: Any, drafted: Any = None, temperatures: Any = 1.0,
    *, num_bins: int = NUM_BINS,
) -> np.ndarray:
  """Returns f64[G]: the calibration error of each slot's joint chance.

  Args: as `fit`; temperatures as `joint`.
  """
  label = np.logical_and.accumulate(np.asarray(accepted, bool), axis=1)
  weight = np.ones(label.shape) if drafted is None else (
      np.asarray(drafted, np.float64))
  chance = joint(logits, temperatures)
  return np.asarray([ece(*columns, num_bins=num_bins) for columns in zip(
      chance.T, label.T, weight.T, strict=True)])


def fit(
    logits: Any, accepted: Any, drafted: Any = None, *,
    grid: Any = _GRID, num_bins: int = NUM_BINS,
) -> np.ndarray:
  """Returns f64[G]: temperatures by which to divide the logits.

  From left to right: each is the one of `grid` for which the joint chance
  has the smallest calibration error, those before it being fixed. A tie goes
  to the one nearest to 1; a slot that was never drafted gets 1.

  Args:
    logits: [n,G], of n rounds. accepted: bool[n,G], drafts that were; what
      follows a rejection does not count as accepted.
    drafted: bool[n,G], drafts that were verified, or None for all.
    grid: temperatures > 0 to choose from.

  Raises:
    ValueError: shapes that differ, or a temperature that is not positive.

  References: DSpark, arXiv:2607.05147 (sequential temperature scaling).
  """
  logits = np.asarray(logits, np.float64)
  label = np.logical_and.accumulate(np.asarray(accepted, bool), axis=1)
  weight = np.ones(logits.shape) if drafted is None else (
      np.asarray(drafted, np.float64))
  if not logits.shape == label.shape == weight.shape or logits.ndim != 2:
    raise ValueError(f'logits {logits.shape}, accepted {label.shape}, '
                     f'drafted {weight.shape}: must be [n,G] alike')
  grid = np.asarray(grid, np.float64)
  if not grid.size or not (grid > 0).all():
    raise ValueError(f'grid={grid}: temperatures must be > 0')
  grid = grid[np.argsort(np.abs(np.log(grid)), kind='stable')]
  before = np.ones(len(logits))
  out = np.ones(logits.shape[1])
  for k in range(logits.shape[1]):
    if weight[:, k].any():
      errors = [ece(before * _sigmoid(logits[:, k] / t), label[:, k],
                    weight[:, k], num_bins=num_bins) for t in grid]
      out[k] = grid[int(np.argmin(errors))]
    before = before * _sigmoid(logits[:, k] / out[k])
  return out


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 0.5 * (1.0 + np.tanh(0.5 * x))  # no overflow
