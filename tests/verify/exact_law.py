"""The law of a rule and its expected acceptance, by enumeration."""

from __future__ import annotations

import numpy as np

from specjax.certificates import exact, problems

# Laws are float32; sums of up to a thousand terms. Seen: below 2e-7.
CLOSE = 2e-6
# Expected acceptance is a sum of such laws.
NEAR = 1e-5


def check(rule, problem) -> exact.Found:
  """Returns what is found, after it was checked to be the target's law."""
  found = exact.exact_law(rule, problem)
  np.testing.assert_allclose(found.target.sum(axis=1), 1, atol=1e-12)
  assert found.error < CLOSE
  assert not found.forbidden
  return found


def accepted(rule, p, q, topology, kind) -> np.ndarray:
  """Returns the expected number of accepted drafts, and checks the law."""
  problem = problems.context_free(p, q, topology, kind)
  return check(rule, problem).num_accepted


def name(x) -> str | None:
  """Returns the name of a rule: for the ids of tests."""
  return getattr(x, 'name', None)
