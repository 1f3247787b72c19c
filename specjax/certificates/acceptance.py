"""How many drafts the first round keeps: closed forms, in float64.

Derived from the papers and not from the rules' code. Kept means accepted and
in the text: a draft that is an end token counts as the round's last token, as
does the one at the limit.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax.certificates.setting import NUM_KINDS, Laws
from specjax.core.tree import Topology
from specjax.core.types import (
  IID,
  MATCH,
  POINT,
  TOP_PLUS_ONE,
  WITHOUT_REPLACEMENT,
)
from specjax.verify import RULES
from specjax.verify import bound as bound_lib

Text = tuple[int, ...]


class Walk:
  """One kind of row, one static topology, one way of drafting.

  Attributes:
    p, q: laws of target and drafter after a text, Text -> f64[V].
    rank: what orders the drafter's deterministic tokens, Text -> f64[V].
    topology: static. mode: of all slots.
  """

  def __init__(self, laws: Laws, kind: int, topology: Topology, mode: int):
    it = laws.setting.kinds[kind]
    self.p: Callable[[Text], np.ndarray] = functools.partial(
        laws.of, 'target', kind)
    self.q = functools.partial(laws.of, 'drafter', kind)
    self.rank = functools.partial(laws.of, 'rank', kind)
    self.topology, self.mode = topology, mode
    self._new, self._eos = it.new, it.eos

  def counts(self, text: Text) -> bool:
    """Whether the last token of a drafted text counts as kept."""
    return len(text) < self._new and text[-1] != self._eos

  def top(self, text: Text, num: int) -> list[int]:
    """Returns the drafter's `num` likeliest tokens, lowest id first on ties."""
    return np.argsort(-self.rank(text), kind='stable')[:num].tolist()

  def follow(self, accept: Callable[[int, Text], dict[tuple[int, int], float]]
             ) -> float:
    """Returns the expected number of kept drafts.

    `accept(row, text)` gives the probability that the node at `row`, reached
    by `text`, goes on to (slot, token).
    """
    def below(row: int, text: Text) -> float:
      if not self.topology.children[row]:
        return 0.0
      total = 0.0
      for (slot, token), chance in accept(row, text).items():
        if chance > 0 and self.counts((*text, token)):
          total += chance * (1 + below(slot + 1, (*text, token)))
      return total

    return below(0, ())


def rejection(walk: Walk, row: int, text: Text) -> dict:
  """Recursive rejection; the children of a node are drawn from q.

  Sums over all draws: child j is taken with probability min(1, p_j / q_j) of
  what is left after the rejections before it.
  """
  slots = walk.topology.children[row]
  found: dict[tuple[int, int], float] = {}
  replace = walk.mode == IID

  def visit(j: int, reach: float, p: np.ndarray, q: np.ndarray) -> None:
    if j == len(slots) or q.sum() <= 0:
      return
    q = q / q.sum()
    left = np.maximum(p - q, 0.0)
    left = left / left.sum() if left.sum() > 0 else p
    for x in np.nonzero(q > 0)[0].tolist():
      take = min(1.0, p[x] / q[x])
      key = (slots[j], x)
      found[key] = found.get(key, 0.0) + reach * q[x] * take
      if reach * q[x] * (1 - take) > 0:
        rest = q if replace else np.where(np.arange(len(q)) == x, 0.0, q)
        visit(j + 1, reach * q[x] * (1 - take), left, rest)

  visit(0, 1.0, walk.p(text), walk.q(text))
  return found


def points(walk: Walk, row: int, text: Text) -> dict:
  """Deterministic children: each is kept with its probability."""
  slots, p = walk.topology.children[row], walk.p(text)
  tops = walk.top(text, len(slots))
  return {(slot, x): float(p[x]) for slot, x in zip(slots, tops)}


def top_plus_one(walk: Walk, row: int, text: Text) -> dict:
  """Greedy multi-draft: top tokens keep p, the drawn one min(p, q')."""
  slots, p = walk.topology.children[row], walk.p(text)
  tops = walk.top(text, len(slots) - 1)
  q = walk.q(text).copy()
  q[tops] = 0.0
  found = {(slot, x): float(p[x]) for slot, x in zip(slots, tops)}
  if q.sum() > 0:
    q = q / q.sum()
    found |= {(slots[-1], x): float(min(p[x], q[x])) for x in range(len(q))
              if x not in tops}
  return found


def matching(walk: Walk, row: int, text: Text) -> dict:
  """A drawn draft and an independent draw of the target; chains only."""
  [slot] = walk.topology.children[row]
  p, q = walk.p(text), walk.q(text)
  return {(slot, x): float(p[x] * q[x]) for x in range(len(p))}


def coupled(walk: Walk, row: int, text: Text) -> dict:
  """Draft and target maximise over one shared noise; chains only.

  Both choose x with probability 1 / sum_y max(p_y / p_x, q_y / q_x): Daliri
  et al. 2024, arXiv:2408.07978.
  """
  [slot] = walk.topology.children[row]
  p, q = walk.p(text), walk.q(text)
  both = [x for x in range(len(p)) if p[x] > 0 and q[x] > 0]
  return {(slot, x): float(1 / np.maximum(p / p[x], q / q[x]).sum())
          for x in both}


def block(walk: Walk) -> float:
  """Block verification: sum over drafted texts of q(text) w(text).

  w_i = min(1, w_{i-1} p_i / q_i) is the chance that at least i drafts are
  kept, given the drafts: Sun et al. 2025, arXiv:2403.10444.
  """
  def below(text: Text, chance: float, weight: float) -> float:
    if len(text) == walk.topology.max_depth:
      return 0.0
    p, q, total = walk.p(text), walk.q(text), 0.0
    for x in np.nonzero(q > 0)[0].tolist():
      w, longer = min(1.0, weight * p[x] / q[x]), (*text, x)
      if walk.counts(longer):
        total += chance * q[x] * w + below(longer, chance * q[x], w)
    return total

  return below((), 1.0, 1.0)


def expected(laws: Laws, drafter: Any, rule: Any) -> np.ndarray | None:
  """Returns f64[kinds], or None where no closed form is known.

  Only for drafters whose every slot is drafted whatever the text (a small
  model of the setting on a static topology); exact rules.
  """
  topology = drafter.topology
  # A rule that is derived from one of ours may accept otherwise.
  if topology.parents is None or rule.lossy or type(rule) not in RULES:
    return None
  [mode] = drafter.modes or (POINT,)
  walks = [Walk(laws, k, topology, mode) for k in range(NUM_KINDS)]
  name = rule.name
  if name == 'block' or (name == 'traversal' and topology.is_chain):
    return np.asarray([block(w) for w in walks]) if mode == IID else None
  accept = _form(name, mode, topology.is_chain, getattr(rule, 'num_noise', 1))
  if accept is None:
    return None
  return np.asarray([
      w.follow(functools.partial(accept, w)) for w in walks])


def _form(name: str, mode: int, is_chain: bool, num_noise: int):
  """Returns the function that says how a node goes on, or None."""
  if mode == POINT:
    known = ('speculative', 'match', 'greedy_multi_draft', 'greedy')
    return points if name in known else None
  if mode == MATCH:
    one = is_chain and num_noise == 1 and name in ('match', 'gumbel')
    return coupled if one else None
  if name == 'match':
    return matching if is_chain and mode == IID else None
  if name == 'greedy_multi_draft':
    return top_plus_one if mode == TOP_PLUS_ONE or is_chain else None
  if name == 'speculative' and mode in (IID, WITHOUT_REPLACEMENT):
    return rejection
  return None


_BOUNDS = {IID: 'iid', WITHOUT_REPLACEMENT: 'without_replacement',
           TOP_PLUS_ONE: 'top_plus_one', POINT: 'top'}


def bounds(laws: Laws, drafter: Any) -> np.ndarray | None:
  """Returns f64[kinds]: no exact rule keeps a first draft more often.

  The optimum of the transport problem (`verify.bound`) at the root.
  """
  topology = drafter.topology
  [mode] = drafter.modes or (None,)
  if topology.parents is None or mode not in _BOUNDS:
    return None
  num, out = len(topology.children[0]), []
  for kind in range(NUM_KINDS):
    q = laws.of('rank' if mode == POINT else 'drafter', kind, ())
    if mode == TOP_PLUS_ONE:
      out.append(_top_plus_one_bound(laws, kind, num))
      continue
    p = jnp.asarray(laws.of('target', kind, ()))
    out.append(float(bound_lib.acceptance_upper_bound(
        p, jnp.asarray(q), num, _BOUNDS[mode])))
  return np.asarray(out)


def _top_plus_one_bound(laws: Laws, kind: int, num: int) -> float:
  """Its top tokens are ranked before filters, its last drawn after them."""
  p, q = laws.of('target', kind, ()), laws.of('drafter', kind, ()).copy()
  tops = np.argsort(-laws.of('rank', kind, ()), kind='stable')[:num - 1]
  q[tops] = 0.0
  drawn = np.minimum(p, q / q.sum()) if q.sum() > 0 else 0 * p
  return float(np.where(np.isin(np.arange(len(p)), tops), p, drawn).sum())
