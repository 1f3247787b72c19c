"""What the benchmark scripts share: states at a length, timing, records."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import verify
from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.host import requests
from specjax.host import rows as rows_lib
from specjax.host.results import device_name, versions
from specjax.io import output
from specjax.io.options import Sampling


def state(engine: Engine, *, vocab_size: int, batch: int, size: int,
          prompts: np.ndarray, params: Models, chunk: int = 64,
          log_probs: bool = False, script: np.ndarray | None = None,
          sampling: Sampling | None = None, prefill: bool = True):
  """Returns a state whose rows run to the end of their slots.

  Without `prefill` the caches hold zeros where the prompts would be: enough
  for timing, and one program less to compile.
  """
  options = dataclasses.replace(
      sampling or Sampling(), max_new_tokens=size, log_probs=log_probs,
      ignore_eos=True)
  rows = [requests.Request(id=str(i), tokens=tuple(int(t) for t in prompt),
                           sampling=options, seed=i)
          for i, prompt in enumerate(prompts)]
  what = rows_lib.stages(rows, 1)

  def context(who):
    built = rows_lib.build_context(
        who, size=size, vocab_size=vocab_size, eos=(), what=what)
    if script is not None:
      built = built.replace(condition={'script': script.astype(np.int32)})
    return jax.tree.map(jnp.array, built)

  if not prefill:
    return jax.jit(lambda c: loop.empty(engine, c))(context(rows))
  _, admit = loop.compiled()
  empty = jax.jit(lambda c: loop.empty(engine, c))(context([None] * batch))
  return admit(engine, params, empty, jnp.ones((batch,), bool),
               context(rows), chunk=chunk)


def engine(lm: Any, drafter: Any, rule: str = 'greedy') -> Engine:
  """Returns an engine of a model, a drafter and a rule by name."""
  return Engine(lm, drafter, verify.get(rule))


def spread(values: list[float]) -> dict[str, float]:
  """Returns median, minimum, maximum and number of measurements."""
  return {'median': statistics.median(values), 'min': min(values),
          'max': max(values), 'n': len(values)}


def timed(fn, *args) -> tuple[float, Any]:
  """Returns `(seconds, result)` of a call, waited for."""
  begin = time.perf_counter()
  out = jax.block_until_ready(fn(*args))
  return time.perf_counter() - begin, out


class Record:
  """Collects sections and writes one JSON file after each of them."""

  def __init__(self, path: str):
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self.data: dict[str, Any] = {
        'command': _command(), 'device': device_name(),
        'versions': versions(), 'driver': _driver(), 'sections': {}}

  def add(self, name: str, value: Any) -> None:
    """Adds a section, prints it and saves everything so far."""
    self.data['sections'][name] = value
    print(f'## {name}\n{json.dumps(value, indent=1)}', flush=True)
    self.save()

  def save(self) -> None:
    """Writes what there is."""
    output.write_json(self.path, self.data)


def _command() -> str:
  """Returns the command to repeat, without this machine's folders."""
  script = pathlib.Path(sys.argv[0]).stem
  words = [pathlib.Path(word).name if word.startswith('/') else word
           for word in sys.argv[1:]]
  return ' '.join([f'python -m benchmarks.{script}', *words])


def _driver() -> str:
  try:
    return subprocess.run(
        ['nvidia-smi', '--query-gpu=name,driver_version,memory.total',
         '--format=csv,noheader'], capture_output=True, text=True,
        check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return 'none'
