"""Statistics of certificates: G-test, power, and how far two laws may differ.

Counts are compared with laws that are known exactly, so nothing is fitted and
the degrees of freedom are the number of cells less one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import special

# A G statistic over cells with fewer expected counts has a heavier tail than
# its chi-square: false alarms at p = 0.001.
LEAST_EXPECTED = 20.0


class Cells(NamedTuple):
  """One multinomial: `seen` int[m] counts of `law` f64[m]."""

  seen: np.ndarray
  law: np.ndarray


class GTest(NamedTuple):
  """A likelihood-ratio test.

  Attributes:
    statistic: 2 sum seen log(seen / expected); inf when something impossible
      was seen. freedom: degrees of freedom. p_value: of the chi-square.
    number: n, observations.
  """

  statistic: float
  freedom: int
  p_value: float
  number: int


def merge(cells: Cells) -> Cells:
  """Merges rare cells until each expects at least `LEAST_EXPECTED` counts.

  Impossible cells are dropped. Which cells are merged depends on the law and
  the number of counts only, never on the counts.
  """
  possible = cells.law > 0
  seen = cells.seen[possible].astype(np.float64)
  law = cells.law[possible]
  order = np.argsort(-law, kind='stable')
  seen, law = seen[order], law[order]
  need = LEAST_EXPECTED / max(cells.seen.sum(), 1)
  out_seen, out_law = [0.0], [0.0]
  for s, p in zip(seen, law, strict=True):
    if out_law[-1] >= need:
      out_seen.append(0.0)
      out_law.append(0.0)
    out_seen[-1] += s
    out_law[-1] += p
  if len(out_law) > 1 and out_law[-1] < need:
    for out in (out_seen, out_law):
      last = out.pop()
      out[-1] += last
  return Cells(np.asarray(out_seen), np.asarray(out_law))


def g_test(parts: list[Cells]) -> GTest:
  """Tests several independent multinomials at once."""
  statistic, freedom, count = 0.0, 0, 0
  for part in parts:
    total = int(part.seen.sum())
    count += total
    if part.seen[part.law <= 0].any():
      return GTest(math.inf, max(freedom, 1), 0.0, count)
    seen, law = merge(part)
    hit = seen > 0
    statistic += 2 * float(
        (seen[hit] * np.log(seen[hit] / (total * law[hit]))).sum())
    freedom += len(law) - 1
  p_value = float(special.chdtrc(freedom, statistic)) if freedom else 1.0
  return GTest(statistic, freedom, p_value, count)


def detectable_tv(
    freedom: int, count: int, size: float, power: float
) -> float:
  """Returns the total variation that a G-test finds with this power.

  By Pinsker's inequality a law at total variation d of the tested one has
  noncentrality of at least 4 n d^2.

  Args:
    freedom: degrees of freedom. count: n. size: level of the test.
    power: wanted probability of a rejection, in (0, 1).

  Returns:
    d in [0, 1]; 0 where there is nothing random (any deviation is found).
  """
  if freedom < 1:
    return 0.0
  critical = special.chdtri(freedom, size)
  low, high = 0.0, 4.0 * (critical + 100)
  for _ in range(60):
    middle = (low + high) / 2
    if special.chndtr(critical, freedom, middle) > 1 - power:
      low = middle
    else:
      high = middle
  return min(math.sqrt(high / (4 * count)), 1.0)


def total_variation(parts: list[Cells]) -> float:
  """Returns the counts' total variation from the laws, averaged over parts.

  The plug-in estimate; see `noise` for how large it is by chance alone.
  """
  return _weighted(parts, lambda c: 0.5 * float(
      np.abs(c.seen / c.seen.sum() - c.law).sum()))


def noise(parts: list[Cells], size: float) -> float:
  """Returns what `total_variation` adds by chance, but with probability size.

  Its mean is at most half the sum of the cells' standard deviations; it
  exceeds that by sqrt(log(1 / size) / (2 n)) with probability `size` at most
  (McDiarmid).
  """
  count = sum(int(c.seen.sum()) for c in parts)

  def mean_of(cells: Cells) -> float:
    share = cells.seen / cells.seen.sum()
    return 0.5 * float(np.sqrt(share * (1 - share) / cells.seen.sum()).sum())

  mean = _weighted(parts, mean_of)
  return mean + math.sqrt(math.log(1 / size) / (2 * count))


def _weighted(parts: list[Cells], f) -> float:
  count = sum(int(c.seen.sum()) for c in parts)
  return sum(f(c) * int(c.seen.sum()) for c in parts) / count
