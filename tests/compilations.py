"""Counts what XLA compiles, by the name of the jitted function."""

from __future__ import annotations

from collections import Counter

import jax.monitoring

_EVENT = '/jax/core/compile/backend_compile_duration'
_counts: Counter[str] = Counter()


def _listen(event: str, seconds: float, **about) -> None:
  del seconds
  if event == _EVENT:
    _counts[about['fun_name']] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def counts() -> Counter[str]:
  """Returns compilations so far in this process, for instance 'jit(run)'."""
  return Counter(_counts)
