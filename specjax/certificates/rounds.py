"""How many rounds a text takes: closed forms, in float64.

The law of a text says nothing about how good the drafts were: a drafter that
reads stale states, or drafts from the wrong slot, still leaves every text its
law. It only takes more rounds. Here each round of a text is followed, with
the law that its drafts should be drawn from when it begins: a certificate
that compares finds what the text hides.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import numpy as np

from specjax.certificates.setting import NUM_KINDS, Laws
from specjax.core.types import IID, POINT
from specjax.drafters import ChainLM, GrownLattice, GrownLM, Lattice, TreeLM
from specjax.verify import Match, Speculative

Text = tuple[int, ...]
# Chance f64[V] that a token is the next one and was drafted: of a kind, the
# text when the round began, and the drafts accepted so far.
Kept = Callable[[int, Text, Text], np.ndarray]


def expected(laws: Laws, drafter: Any, rule: Any) -> np.ndarray | None:
  """Returns mean rounds a text f64[kinds], or None where none is known.

  NaN where the setting does not know what the drafter should say.
  """
  kept = _kept(laws, drafter, rule)
  if kept is None:
    return None
  return np.asarray([_rounds(laws, kind, drafter.topology.max_depth, kept)
                     for kind in range(NUM_KINDS)])


def _rounds(laws: Laws, kind: int, depth: int, kept: Kept) -> float:
  """Returns the mean number of rounds of a kind's texts."""
  it = laws.setting.kinds[kind]
  if np.isnan(laws.setting.logits('drafter', kind, (), 0)).any():
    return np.nan

  @functools.cache
  def after(made: Text) -> float:
    """Rounds that follow a round which ended with this text."""
    if len(made) == it.new or it.eos in made:
      return 0.0
    return 1.0 + within(made, ())

  def within(made: Text, path: Text) -> float:
    """Rounds that follow the one which has accepted `path` so far."""
    text, total = made + path, 0.0
    if len(text) == it.new or it.eos in text:
      return 0.0
    p = laws.of('target', kind, text)
    on = (kept(kind, made, path) if len(path) < depth else np.zeros_like(p))
    for x in range(len(p)):
      if on[x] != 0:
        total += on[x] * within(made, (*path, x))
      if p[x] - on[x] != 0:
        total += (p[x] - on[x]) * after((*text, x))
    return total

  return after(())


def _kept(laws: Laws, drafter: Any, rule: Any) -> Kept | None:
  """Returns how a drafter's tokens are kept, None if that is not known.

  One token a slot: the rules accept x with min(p, q), or p q where tokens
  are matched. Deterministic tokens are kept when the text says them.
  """
  if type(rule) not in (Speculative, Match):
    return None
  if getattr(drafter, 'copying', None) is not None:
    return None  # the text has a say in what is drafted
  shape = type(drafter)
  if shape in (ChainLM, Lattice) and drafter.modes == (IID,):
    join = np.minimum if type(rule) is Speculative else np.multiply
    return lambda kind, made, path: join(
        laws.of('target', kind, made + path),
        laws.of('drafter', kind, made + path, len(made)))
  if shape not in _DRAFTED or drafter.modes != (POINT,):
    return None

  @functools.cache
  def drafted(kind: int, made: Text) -> frozenset[Text]:
    return frozenset(_DRAFTED[shape](drafter, functools.partial(
        _scores, laws, kind, made, shape in (GrownLattice, Lattice))))

  def kept(kind: int, made: Text, path: Text) -> np.ndarray:
    p = laws.of('target', kind, made + path)
    here = [(*path, x) in drafted(kind, made) for x in range(len(p))]
    return np.where(here, p, 0.0)

  return kept


def _scores(
    laws: Laws, kind: int, made: Text, is_raw: bool, path: Text
) -> np.ndarray:
  """Returns log-probabilities f64[V] that order a node's children.

  A lattice takes them as the network says them, before any penalty.
  """
  if is_raw:
    z = laws.setting.logits('drafter', kind, made + path, len(made))
    z = np.asarray(z, np.float64)
    return z - np.log(np.sum(np.exp(z - z.max()))) - z.max()
  with np.errstate(divide='ignore'):
    return np.log(laws.of('rank', kind, made + path, len(made)))


Scores = Callable[[Text], np.ndarray]


def _static(drafter: Any, scores: Scores) -> list[Text]:
  """Returns the paths of a static tree: children in order of rank."""
  topology = drafter.topology
  out: list[Text] = []

  def below(row: int, path: Text) -> None:
    slots = topology.children[row]
    if slots:
      best = np.argsort(-scores(path), kind='stable')[:len(slots)]
      for slot, token in zip(slots, best.tolist()):
        out.append((*path, token))
        below(slot + 1, (*path, token))

  below(0, ())
  return out


def _grown(drafter: Any, scores: Scores) -> list[Text]:
  """Returns the likeliest paths of a tree grown where it is likely."""
  top = drafter.tree_top_k
  most = top if isinstance(drafter, GrownLM) else drafter.num_candidates
  pool: list[tuple[float, Text]] = []
  front: list[tuple[float, Text]] = [(0.0, ())]
  for _ in range(drafter.tree_depth):
    level = []
    for total, path in front:
      law = scores(path)
      level += [(total + law[x], (*path, x))
                for x in np.argsort(-law, kind='stable')[:most].tolist()]
    level = [one for one in level if one[0] > -np.inf]
    pool += level
    front = sorted(level, reverse=True)[:top]
  best = sorted(pool, key=lambda one: -one[0])
  return [path for _, path in best[:drafter.num_speculative_tokens]]


_DRAFTED: dict[type, Callable[[Any, Scores], list[Text]]] = {
    TreeLM: _static, Lattice: _static, GrownLM: _grown, GrownLattice: _grown}
