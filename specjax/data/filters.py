"""Which rollouts are fit to learn from: held out, repeated, degenerate.

Everything is counted with its reason. Only answers are judged: prompts are
what users wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import hashlib

import numpy as np
import numpy.typing as npt

from specjax.data.store import Record

# Odd, so that multiplying by it loses no bits of a 64-bit hash.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What is kept.

  Attributes:
    least_new: fewest tokens of an answer.
    head: an answer that begins with the same tokens, this many, as an earlier
      one is its near duplicate; 0 is off. Shorter answers are duplicates only
      if all of their tokens are equal.
    repeated: `(n, share)`: the largest share of n-grams, in [0, 1], that may
      have occurred before in the same answer.
    max_period: of the loops that are looked for at the end of an answer; 0
      is off.
    repeats: times that a loop must be said, >= 2, to be one.
    cut: cut a loop's answer after it was said twice, rather than drop it;
      what is left then has to pass the other tests.
  """

  least_new: int = 8
  head: int = 32
  repeated: tuple[tuple[int, float], ...] = ((4, 0.6), (8, 0.4))
  max_period: int = 64
  repeats: int = 3
  cut: bool = True

  def __post_init__(self):
    if self.least_new < 1 or self.head < 0 or self.max_period < 0:
      raise ValueError(f'{self}: negative, or an empty answer is kept')
    if self.repeats < 2:
      raise ValueError(f'repeats={self.repeats}: must be >= 2')
    for n, share in self.repeated:
      if n < 1 or not 0 <= share <= 1:
        raise ValueError(f'repeated=(({n}, {share}),): n >= 1, a share in '
                         '[0, 1]')


def is_held_out(
    prompt: npt.ArrayLike, share: float, seed: int = 0) -> bool:
  """Returns whether a prompt belongs to the held-out split.

  A function of its tokens, the same everywhere: equal prompts fall on the
  same side, and adding data moves none.

  Args:
    prompt: int[n], token ids.
    share: of all prompts, in [0, 1].
    seed: other seeds hold out others.
  """
  if not 0 <= share <= 1:
    raise ValueError(f'share={share}: must be in [0, 1]')
  data = np.asarray(prompt, '<i4').tobytes()
  key = seed.to_bytes(8, 'little', signed=True)
  digest = hashlib.blake2b(data, digest_size=8, key=key).digest()
  return int.from_bytes(digest, 'little') < share * 2**64


def split(
    records: Iterable[Record], share: float, seed: int = 0
) -> tuple[list[Record], list[Record]]:
  """Returns `(train, held_out)`, divided by prompt; see `is_held_out`."""
  sides: tuple[list[Record], list[Record]] = ([], [])
  for record in records:
    prompt = record.tokens[:record.prompt_length]
    sides[is_held_out(prompt, share, seed)].append(record)
  return sides


def cut(
    records: Sequence[Record], share: float
) -> tuple[list[Record], list[Record]]:
  """Returns `(train, held_out)`, the last share; of two, each has at least one.

  For prompts that are few and occur often (classes of images), which `split`
  would put on one side with all that was made of them.
  """
  num = len(records)
  last = num - min(max(1, round(share * num)), max(num - 1, 1))
  return list(records[:last]), list(records[last:])


def ngrams(
    tokens: npt.NDArray[np.integer], n: int) -> npt.NDArray[np.uint64]:
  """Returns uint64[T-n+1], a hash of every n-gram; empty if T < n.

  Different n-grams collide with probability near 2**-64.
  """
  tokens = np.asarray(tokens)
  if len(tokens) < n:
    return np.zeros(0, np.uint64)
  # Small ids are spread first: a polynomial in them would have collisions.
  spread = (tokens.astype(np.uint64) + np.uint64(1)) * _FACTOR
  spread ^= spread >> np.uint64(29)
  end = len(tokens) - n + 1
  found = np.zeros(end, np.uint64)
  for k in range(n):
    found = found * _FACTOR + spread[k:k + end]
    found ^= found >> np.uint64(32)
  return found


def repeated_share(tokens: npt.NDArray[np.integer], n: int) -> float:
  """Returns the share of n-grams that occurred before; 0 if there is none."""
  found = np.sort(ngrams(tokens, n))
  if not len(found):
    return 0.0
  return float(np.mean(np.append(False, found[1:] == found[:-1])))


def trailing_loop(
    tokens: npt.NDArray[np.integer], max_period: int = 64, repeats: int = 3
) -> tuple[int, int] | None:
  """Finds the loop that a text ends in.

  Args:
    tokens: int[T].
    max_period: longest period looked for.
    repeats: times that the period must be said in full, at least.

  Returns:
    `(start, period)`: from `start` on the text repeats itself; the shortest
    period. None if there is no loop.
  """
  tokens = np.asarray(tokens)
  size = len(tokens)
  most = min(max_period, size // repeats)
  if most < 1:
    return None
  # The last token comes back after a period: few periods are left to test.
  last = tokens[-1]
  for period in 1 + np.flatnonzero(tokens[-2:-2 - most:-1] == last):
    equal = tokens[period:] == tokens[:-period]
    run = int(np.argmin(equal[::-1])) if not equal.all() else len(equal)
    if run >= (repeats - 1) * period:
      return size - run - int(period), int(period)
  return None


def sharing(
    texts: Sequence[npt.NDArray[np.integer]],
    others: Sequence[npt.NDArray[np.integer]], n: int = 13,
) -> npt.NDArray[np.bool_]:
  """Returns bool[len(texts)]: which texts share an n-gram with the others.

  So a test's questions are kept out of the text that is learnt from.

  Args:
    texts, others: token ids. Other texts of fewer than `n` tokens share
      nothing.
    n: tokens in a row that no longer are chance, >= 1.

  Reference: Brown et al. 2020, arXiv:2005.14165, appendix C (13-grams).
  """
  wanted = [ngrams(other, n) for other in others]
  known = set(np.concatenate(wanted).tolist()) if wanted else set()
  return np.array([
      not known.isdisjoint(ngrams(text, n).tolist()) for text in texts], bool)


class Filter:
  """Applies `Limits` to a stream of records.

  Duplicates are found among all records that one filter has seen; the first
  is kept. Memory: 8 bytes a record and kind of hash, in a set.

  Attributes:
    reasons: counts of 'kept', of each reason for a drop, and of 'cut' (these
      are kept too, if nothing else is wrong).
  """

  def __init__(self, limits: Limits | None = None):
    """Starts with no record seen."""
    self.limits = limits or Limits()
    self.reasons: Counter[str] = Counter()
    self._seen: set[int] = set()

  def __call__(self, records: Iterable[Record]) -> Iterator[Record]:
    """Yields what is fit, in order."""
    for record in records:
      record, reason = self._judge(record)
      self.reasons[reason or 'kept'] += 1
      if not reason:
        yield record

  def _judge(self, record: Record) -> tuple[Record, str]:
    """Returns the record, maybe cut, and the reason to drop it or ''."""
    limits, answer = self.limits, record.answer
    body = answer[:-1] if record.finished else answer
    loop = trailing_loop(body, limits.max_period, limits.repeats)
    if loop:
      if not limits.cut:
        return record, 'loop'
      start, period = loop
      body = answer = answer[:start + 2 * period]
      end = record.prompt_length + len(answer)
      record = record._replace(tokens=record.tokens[:end], finished=False)
      self.reasons['cut'] += 1
    if len(answer) < limits.least_new:
      return record, 'short'
    for n, share in limits.repeated:
      if repeated_share(body, n) > share:
        return record, f'repeated {n}-grams'
    return record, self._duplicate(answer)

  def _duplicate(self, answer: npt.NDArray[np.int32]) -> str:
    """Returns 'duplicate', 'near duplicate' or '', and remembers."""
    whole, head = _hash(answer, 'whole'), 0
    if whole in self._seen:
      return 'duplicate'
    self._seen.add(whole)
    if 0 < self.limits.head <= len(answer):
      head = _hash(answer[:self.limits.head], 'head')
      if head in self._seen:
        return 'near duplicate'
      self._seen.add(head)
    return ''


def _hash(tokens: npt.NDArray[np.int32], kind: str) -> int:
  data = np.asarray(tokens, '<i4').tobytes()
  digest = hashlib.blake2b(data, digest_size=8, person=kind.encode()).digest()
  return int.from_bytes(digest, 'little')
