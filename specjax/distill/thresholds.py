"""Where to cut scores of right and wrong tokens, and what a cut achieves."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Threshold(NamedTuple):
  """Where to cut scores, and what the cut achieves on the data it came from.

  Attributes:
    threshold: a token is accepted when its score is strictly greater.
    error_recall: share of errors that are not accepted, in [0, 1].
    acceptance: share of correct tokens that are accepted, in [0, 1].
  """

  threshold: float
  error_recall: float
  acceptance: float


def auc(scores: npt.ArrayLike, label: npt.ArrayLike) -> float:
  """Returns the area under the ROC curve, in [0, 1]; ties count half.

  Args:
    scores: [M] in [0, 1].
    label: [M] of 0 and 1; both occur, else ValueError.
  """
  values, positive = _checked_scores(scores, label)
  _, inverse, counts = np.unique(
      values, return_inverse=True, return_counts=True)
  rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
  num = int(positive.sum())
  wins = rank[positive].sum() - num * (num + 1) / 2
  return float(wins / (num * (len(values) - num)))


def choose_threshold(
    scores: npt.ArrayLike, label: npt.ArrayLike, *,
    error_recall: float | None = None, acceptance: float | None = None,
) -> Threshold:
  """Chooses where to cut scores; use data that the head was not fitted to.

  Args:
    scores: [M] in [0, 1], of `judge.score`.
    label: [M] of 0 (error) and 1 (correct); both occur.
    error_recall: in (0, 1]: reject at least this share of the errors, and
      accept all that this allows. 0.9 when neither is given.
    acceptance: in (0, 1]: accept at least this share of the correct tokens,
      and reject all that this allows.

  Returns:
    The threshold, in [0, 1], and what it achieves: what was asked or more,
    unless a correct token that must pass scores exactly 0. A greater
    `error_recall` or a smaller `acceptance` never lowers the threshold.

  Raises:
    ValueError: both are given, a share or a score is out of range, the shapes
      differ, or a class is missing.
  """
  values, positive = _checked_scores(scores, label)
  if error_recall is not None and acceptance is not None:
    raise ValueError('give error_recall or acceptance, not both')
  wrong, right = np.sort(values[~positive]), np.sort(values[positive])
  if acceptance is not None:
    lowest = right[-_at_least('acceptance', acceptance, len(right))]
    # The next score below, and not a hair below: a cut at a denormal number
    # would be flushed to zero by XLA.
    cut = float(values[values < lowest].max(initial=0.0))
  else:
    share = 0.9 if error_recall is None else error_recall
    cut = float(wrong[_at_least('error_recall', share, len(wrong)) - 1])
  return Threshold(cut, float(np.mean(wrong <= cut)),
                   float(np.mean(right > cut)))


def checked_labels(y, what: str = '') -> npt.NDArray[np.bool_]:
  """Returns bool[M], True for correct tokens, or raises ValueError."""
  if not np.isin(y, (0, 1)).all():
    raise ValueError(f'{what}labels must be 0 or 1')
  if y.min() == y.max():
    raise ValueError(f'all {what}labels are {int(y.min())}: both correct '
                     'tokens (1) and errors (0) are needed')
  return y.astype(np.bool_)


def check_share(name: str, share: float) -> None:
  """Raises ValueError unless `share` is in (0, 1]."""
  if not 0 < share <= 1:
    raise ValueError(f'{name}={share}: must be in (0, 1]')


def _checked_scores(scores, label):
  """Returns `(f32[M], bool[M])`, or raises ValueError."""
  values, y = np.asarray(scores, np.float32), np.asarray(label)
  if values.ndim != 1 or y.shape != values.shape or not values.size:
    raise ValueError(f'scores {values.shape} and labels {y.shape}: must be '
                     '[M], M >= 1')
  if not ((values >= 0) & (values <= 1)).all():
    raise ValueError('scores must be in [0, 1]')
  return values, checked_labels(y)


def _at_least(name: str, share: float, count: int) -> int:
  """Returns the least number of `count` items that makes up `share`."""
  check_share(name, share)
  # 0.07 * 100 is a hair above 7 in floating point.
  return max(1, math.ceil(share * count - 1e-9 * count))
