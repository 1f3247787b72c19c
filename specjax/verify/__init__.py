"""Acceptance rules. `get(name, **options)` makes one by its config name."""

from __future__ import annotations

import dataclasses
from typing import Any

from specjax.verify.base import Rule
from specjax.verify.block import Block
from specjax.verify.bound import acceptance_upper_bound
from specjax.verify.continuous import PathExact, Reflection
from specjax.verify.cspd import CSpD
from specjax.verify.greedy import Greedy, Gumbel, Match
from specjax.verify.grouped import Grouped
from specjax.verify.judge import Judge
from specjax.verify.k_seq import KSeq
from specjax.verify.lantern import Lantern, neighbours
from specjax.verify.multi_draft import GreedyMultiDraft
from specjax.verify.speculative import Lenient, Speculative
from specjax.verify.transport import OptimalTransport
from specjax.verify.traversal import Traversal
from specjax.verify.typical import Typical

RULES: tuple[type[Rule], ...] = (
    Block, CSpD, Greedy, GreedyMultiDraft, Grouped, Gumbel, Judge, KSeq,
    Lantern, Lenient, Match, OptimalTransport, PathExact, Reflection,
    Speculative, Traversal, Typical)
_BY_NAME: dict[str, type[Any]] = {rule.name: rule for rule in RULES}
# Other names for the same thing, and presets.
_ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    'recursive_rejection': ('speculative', {}),
    'deterministic': ('match', {}),
    'spechub': ('greedy_multi_draft', {}),
    'gsd': ('grouped', {}),
    'exact_j': ('path_exact', {}),
    'lantern++': ('lantern', {'lam': 2.0}),
    'medusa': ('typical', {'form': 'medusa'}),
}


def names() -> tuple[str, ...]:
  """Returns the names that `get` knows, sorted."""
  return tuple(sorted(set(_BY_NAME) | set(_ALIASES)))


def get(name: str, **options: Any) -> Any:
  """Returns the rule called `name` with these options (its fields).

  Raises:
    ValueError: unknown name or option (what is known is listed), or a value
      out of range.
  """
  real, preset = _ALIASES.get(name, (name, {}))
  if real not in _BY_NAME:
    raise ValueError(f'verify={name!r}: known are {", ".join(names())}')
  rule = _BY_NAME[real]
  known = [f.name for f in dataclasses.fields(rule) if f.init]
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise ValueError(
        f'verify={name!r} has no option {unknown[0]!r}; it has '
        f'{", ".join(known) or "none"}')
  if name == 'lantern++' and 'delta' in options:
    raise ValueError("verify='lantern++' takes lam, not delta")
  return rule(**{**preset, **options})


__all__ = [
    'RULES', 'Block', 'CSpD', 'Greedy', 'GreedyMultiDraft', 'Grouped',
    'Gumbel', 'Judge', 'KSeq', 'Lantern', 'Lenient', 'Match',
    'OptimalTransport', 'PathExact', 'Reflection', 'Rule', 'Speculative',
    'Traversal', 'Typical', 'acceptance_upper_bound', 'get', 'names',
    'neighbours']
