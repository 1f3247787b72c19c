"""Device time by kernel, read from a JAX profiler trace."""

from __future__ import annotations

import collections
from collections.abc import Callable
import pathlib
import tempfile
from typing import Any

import jax


def kernels(fn: Callable[[], Any], rounds: int, most: int = 25) -> Any:
  """Profiles a call; returns microseconds a round by kernel name.

  Profiling turns command buffers off, so gaps between kernels are longer
  than in a timed run: read shares, not totals.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      fn()
    files = list(pathlib.Path(folder).rglob('*.xplane.pb'))
    data = jax.profiler.ProfileData.from_file(str(files[0]))
    time_ns: collections.Counter = collections.Counter()
    count: collections.Counter = collections.Counter()
    for plane in data.planes:
      if 'GPU' not in plane.name and 'TPU' not in plane.name:
        continue
      for line in plane.lines:
        if not line.name.startswith('Stream'):
          continue
        for event in line.events:
          time_ns[event.name] += event.duration_ns
          count[event.name] += 1
  total = sum(time_ns.values())
  rows = [{'kernel': name[:100], 'us_a_round': ns / 1e3 / rounds,
           'calls_a_round': count[name] / rounds, 'share': ns / total}
          for name, ns in time_ns.most_common(most)]
  return {'kernel_us_a_round': total / 1e3 / rounds,
          'kernels_a_round': sum(count.values()) / rounds, 'top': rows}
