"""Acceptance rules. `get(name)` finds one by its config name."""

from specjax.verify.block import Block
from specjax.verify.greedy import Greedy, Match
from specjax.verify.speculative import Speculative

_RULES = {rule.name: rule for rule in (Block, Greedy, Match, Speculative)}


def names() -> tuple[str, ...]:
  """Returns the names that `get` knows, sorted."""
  return tuple(sorted(_RULES))


def get(name: str):
  """Returns the rule called `name`; ValueError lists what is known."""
  if name not in _RULES:
    raise ValueError(f'verify={name!r}: known are {", ".join(names())}')
  return _RULES[name]()


__all__ = ['Block', 'Greedy', 'Match', 'Speculative', 'get', 'names']
