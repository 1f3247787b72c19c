"""Divides the noise of a rule into boxes in which it decides alike.

A rule is a black box here: a function of U uniforms and S draws (tokens), for
a given draft. Every box is probed at corners and at random points; where a
probe decides differently from the box's own point, the first noise that
matters on the way between the two is found, and the box is split there (at
the value where the decision flips, by bisection, or by the token drawn). No
knowledge of the rule is used. A region that all probes of its box missed
would show as a difference from the target's law, not hide one.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

TOP = np.float32(1 - 2.0**-24)  # the largest value that a uniform takes
# Thresholds to 2^-25, well below what a float32 law can tell.
_BITS = 25
# Evaluations that cost no more than one (they are made in chunks), and the
# most values that are tried at once.
_ROOM, _MOST = 512, 15
_RANDOM_PROBES = 6
# Laws in one box are the same up to rounding.
_SAME_LAW = 1e-6
_MAX_CELLS = 400_000


class NotEnumerable(ValueError):
  """The rule's decisions are not made of finitely many boxes of noise.

  Either it uses randomness other than `core.keys.uniform` and
  `Categorical.sample`, or there are too many boxes. Sample instead.
  """


class Points(NamedTuple):
  """Noise for m evaluations.

  Attributes:
    row: int[m], the draft. uniform: f32[m,U]. draw: int32[m,S].
    keys: int[m], 0 or 1: which of two unrelated sets of keys is handed over.
  """

  row: np.ndarray
  uniform: np.ndarray
  draw: np.ndarray
  keys: np.ndarray


class Seen(NamedTuple):
  """What m evaluations gave.

  Attributes:
    tokens: int[m,D+1], emitted; those after the last one are -1.
    accepted: int[m], drafts. law: f64[m,S,V], of each draw.
    excess: f32[m], as the rule reports it.
  """

  tokens: np.ndarray
  accepted: np.ndarray
  law: np.ndarray
  excess: np.ndarray


Run = Callable[[Points], Seen]


@dataclasses.dataclass
class Cells:
  """n boxes of noise.

  Attributes:
    row: int[n], the draft. low, high: f32[n,U], inclusive; both ends have
      been evaluated. value: int32[n,S], the token drawn, or -1 (any).
    final: int[n], the draw whose token is emitted as it is, or -1.
  """

  row: np.ndarray
  low: np.ndarray
  high: np.ndarray
  value: np.ndarray
  final: np.ndarray

  def take(self, index: np.ndarray) -> Cells:
    """Returns some of them."""
    return Cells(*(getattr(self, f.name)[index]
                   for f in dataclasses.fields(self)))

  def replace(self, **changes: Any) -> Cells:
    """Returns them with other entries."""
    return dataclasses.replace(self, **changes)

  def used(self) -> np.ndarray:
    """Returns bool[n,U+S]: which noises decided."""
    draws = np.arange(self.value.shape[1])
    return np.concatenate([
        (self.low > 0) | (self.high < TOP),
        (self.value >= 0) | (draws == self.final[:, None])], axis=1)

  def chance(self, law: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns f64[n], the probability of its uniforms and of its draws.

    Args:
      law: f64[n,S,V], of the draws.
    """
    width = (self.high.astype(np.float64) - self.low) / TOP
    drawn = np.take_along_axis(
        law, np.maximum(self.value, 0)[..., None], axis=-1)[..., 0]
    drawn = np.where(self.value >= 0, np.nan_to_num(drawn), 1.0)
    return width.prod(axis=1), drawn.prod(axis=1)


def explore(
    run: Run, rows: np.ndarray, num_uniforms: int, num_draws: int,
    vocab_size: int, seed: int = 0,
) -> tuple[Cells, Seen]:
  """Returns boxes that cover all noise of every row, and what is seen there.

  Args:
    run: evaluates the rule. rows: int[r], drafts.
    num_uniforms, num_draws: U and S. vocab_size: V.
    seed: of the random probes.

  Raises:
    NotEnumerable: see there.
  """
  rng = np.random.default_rng(seed)
  count = len(rows)
  cells = Cells(
      row=np.asarray(rows), low=np.zeros((count, num_uniforms), np.float32),
      high=np.full((count, num_uniforms), TOP, np.float32),
      value=np.full((count, num_draws), -1, np.int32),
      final=np.full(count, -1))
  done: list[tuple[Cells, Seen]] = []
  total = 0
  while len(cells.row):
    total += len(cells.row)
    if total > _MAX_CELLS:
      raise NotEnumerable(
          f'more than {_MAX_CELLS} boxes of noise: the decision depends on '
          'the noise continuously, or the problem is too large')
    probes = _probes(cells, vocab_size, rng)
    seen = _run_all(run, probes)
    same = np.stack([_agree(cells, p, s, probes[0], seen[0])
                     for p, s in zip(probes, seen)])
    if not same[1].all():
      raise NotEnumerable('the verdict depends on randomness that is drawn '
                          'neither by keys.uniform nor by Categorical.sample')
    settled: np.ndarray = np.all(same, axis=0)
    done.append((cells.take(settled), _take(seen[0], settled)))
    split = np.nonzero(~settled)[0]
    witness = np.argmin(same, axis=0)[split]
    other = Points(*(np.stack(x)[witness, split] for x in zip(*probes)))
    cells = _Splitter(
        run, cells.take(split), _take(probes[0], split), other,
        _take(seen[0], split), vocab_size).split()
  return _join([c for c, _ in done]), Seen(
      *(np.concatenate(x) for x in zip(*(s for _, s in done))))


def _take(x: Any, index: np.ndarray) -> Any:
  return type(x)(*(part[index] for part in x))


def _join(parts: list[Cells]) -> Cells:
  return Cells(*(np.concatenate([getattr(p, f.name) for p in parts])
                 for f in dataclasses.fields(Cells)))


def _run_all(run: Run, points: list[Points]) -> list[Seen]:
  """Evaluates several sets of equal size at once."""
  seen = run(Points(*(np.concatenate(x) for x in zip(*points))))
  num = len(points)
  parts = [np.split(x, num) for x in seen]
  return [Seen(*x) for x in zip(*parts)]


def _probes(cells: Cells, vocab_size: int, rng) -> list[Points]:
  """Returns the box's own point, the same with other keys, and others."""
  def point(uniform, draw, keys: int) -> Points:
    draw = np.where(cells.value >= 0, cells.value, draw).astype(np.int32)
    return Points(cells.row, uniform, draw, np.full(len(cells.row), keys))

  low, high = cells.low, cells.high
  num = low.shape[1]
  out = [point(low, 0, 0), point(low, 0, 1), point(high, 0, 1),
         point(low, 1 % vocab_size, 1), point(high, vocab_size - 1, 1)]
  if num > 1:  # with one noise apart from the others
    one = np.eye(num, dtype=bool)
    out += [point(np.where(i, high, low), 0, 1) for i in one]
    out += [point(np.where(i, low, high), 0, 1) for i in one]
  for k in range(_RANDOM_PROBES):
    part = rng.random(low.shape, np.float32)
    if k % 2:  # a corner: regions of small probability have corners too
      part = np.round(part)
    inside = np.clip(low + part * (high - low), low, high)
    draw = rng.integers(0, vocab_size, cells.value.shape)
    out.append(point(inside, draw, 1))
  return out


def _agree(
    cells: Cells, point: Points, seen: Seen, own: Points, base: Seen
) -> np.ndarray:
  """Returns bool[n]: the same decision as at the box's own point.

  The token of the `final` draw may differ; its law may not, nor those of the
  draws that are fixed.
  """
  def shown(p: Points, s: Seen) -> np.ndarray:
    passed = _passes(p, s, cells.final)
    last = np.arange(s.tokens.shape[1]) == s.accepted[:, None]
    return np.where(last & passed[:, None], -2, s.tokens)

  same = (seen.accepted == base.accepted) & np.isclose(
      seen.excess, base.excess, atol=1e-6)
  same &= (shown(point, seen) == shown(own, base)).all(axis=1)
  site = np.arange(cells.value.shape[1])
  matters = (cells.value >= 0) | (site == cells.final[:, None])
  close = np.isclose(
      seen.law, base.law, rtol=0, atol=_SAME_LAW, equal_nan=True)
  return same & (close.all(axis=-1) | ~matters).all(axis=1)


def _passes(point: Points, seen: Seen, site: np.ndarray) -> np.ndarray:
  """Returns bool[n]: the last token is what draw `site` gave."""
  if not point.draw.shape[1]:
    return np.zeros(len(site), bool)
  last = np.take_along_axis(seen.tokens, seen.accepted[:, None], axis=1)[:, 0]
  drawn = np.take_along_axis(
      point.draw, np.maximum(site, 0)[:, None], axis=1)[:, 0]
  return (site >= 0) & (last == drawn)


@dataclasses.dataclass
class _Splitter:
  """Splits boxes, each between its own point and a witness.

  Attributes:
    run: evaluates the rule. cells: n boxes. own, other: points in them that
      are decided differently. base: what is seen at `own`.
  """

  run: Run
  cells: Cells
  own: Points
  other: Points
  base: Seen
  vocab_size: int

  def split(self) -> Cells:
    """Returns the parts of all boxes."""
    if not len(self.cells.row):
      return self.cells
    site = self._first_that_matters()
    num = self.cells.low.shape[1]
    before = self._mixed(site)
    by_uniform, by_draw = site < num, site >= num
    parts = []
    if by_uniform.any():
      parts += self._part(by_uniform)._at_threshold(
          site[by_uniform], _take(before, by_uniform))
    if by_draw.any():
      parts += self._part(by_draw)._at_draw(
          site[by_draw] - num, _take(before, by_draw))
    return _join(parts)

  def _part(self, index: np.ndarray) -> _Splitter:
    return _Splitter(
        self.run, self.cells.take(index), _take(self.own, index),
        _take(self.other, index), _take(self.base, index), self.vocab_size)

  def _mixed(self, num: np.ndarray) -> Points:
    """Returns `own` with its first `num int[n]` noises from `other`."""
    sites = np.arange(self.cells.low.shape[1] + self.cells.value.shape[1])
    moved = sites < num[:, None]
    u = self.cells.low.shape[1]
    return Points(
        self.own.row,
        np.where(moved[:, :u], self.other.uniform, self.own.uniform),
        np.where(moved[:, u:], self.other.draw, self.own.draw),
        self.other.keys)

  def _same(self, point: Points) -> np.ndarray:
    return _agree(self.cells, point, self.run(point), self.own, self.base)

  def _first_that_matters(self) -> np.ndarray:
    """Returns int[n]: moving this noise, after those before it, decides."""
    low = np.zeros(len(self.cells.row), int)
    high = np.full_like(
        low, self.cells.low.shape[1] + self.cells.value.shape[1])
    while (high - low > 1).any():
      middle = (low + high) // 2
      same = self._same(self._mixed(middle))
      low, high = np.where(same, middle, low), np.where(same, high, middle)
    return low

  def _at_threshold(self, site: np.ndarray, before: Points) -> list[Cells]:
    """Splits at the value of uniform `site` where the decision flips.

    By bisection, or with more values at once where boxes are few.
    """
    which = np.arange(self.cells.low.shape[1]) == site[:, None]
    low = np.where(which, before.uniform, 0).sum(axis=1, dtype=np.float32)
    high = np.where(which, self.other.uniform, 0).sum(
        axis=1, dtype=np.float32)
    size = min(max(_ROOM // len(site), 1), _MOST)
    share = np.arange(size + 2, dtype=np.float32) / (size + 1)
    for _ in range(math.ceil(_BITS / math.log2(size + 1))):
      tried = low + share[:, None] * (high - low)
      tried[-1] = high  # exactly
      seen = _run_all(self.run, [before._replace(uniform=np.where(
          which, value[:, None], before.uniform)) for value in tried[1:-1]])
      same = np.array([_agree(self.cells, before, x, self.own, self.base)
                       for x in seen])
      first = np.cumprod(same, axis=0).sum(axis=0)[None]
      low = np.take_along_axis(tried, first, axis=0)[0]
      high = np.take_along_axis(tried, first + 1, axis=0)[0]
    cells = self.cells
    return [
        cells.replace(high=np.where(which, low[:, None], cells.high)),
        cells.replace(low=np.where(which, high[:, None], cells.low))]

  def _at_draw(self, site: np.ndarray, before: Points) -> list[Cells]:
    """Splits by the token of draw `site`, or finds that it is emitted."""
    cells = self.cells
    which = np.arange(cells.value.shape[1]) == site[:, None]
    tried = [before._replace(draw=np.where(which, v, before.draw))
             for v in range(self.vocab_size)]
    seen = _run_all(self.run, tried)
    as_final = cells.replace(final=site)
    emitted = np.all([
        _agree(as_final, p, s, tried[0], seen[0]) & _passes(p, s, site)
        for p, s in zip(tried, seen)], axis=0) & (cells.final != site)
    kept = cells.take(~emitted)
    free = np.where(kept.final == site[~emitted], -1, kept.final)
    return [as_final.take(emitted)] + [
        kept.replace(
            final=free, value=np.where(which[~emitted], v, kept.value))
        for v in range(self.vocab_size)]
