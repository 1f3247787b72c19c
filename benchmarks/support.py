"""What the scripts about trained drafters share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
import json
from typing import Any

import jax

from benchmarks import setup
import specjax
from specjax.distill import kinds
from specjax.host import drafter as drafter_lib
from specjax.host import methods, tiny
from specjax.host.drafter import Loaded
from specjax.host.load import Model


def load(name: str) -> Model:
  """Returns a target; 'tiny' is a random one that needs no data."""
  return tiny.model() if name == 'tiny' else specjax.load(name, quiet=True)


def drafter(model: Model, folder: str) -> Loaded:
  """Returns the drafter of a folder; 'tiny' is a random one."""
  if folder != 'tiny':
    return drafter_lib.load_drafter(folder, model)
  task = kinds.build(
      'dspark', model.lm.config, 64, model=dict(
          num_layers=1, num_taps=2, num_slots=3, markov_rank=4))
  net = task.init(jax.random.key(0), model.params)
  params = task.attach(net, model.params, range(32, 96))
  return Loaded(task.source(), params, {'kind': 'dspark', 'num_draft': 3})


def build(model: Model, config: dict[str, Any] | None, folder: str = ''):
  """Returns `(drafter, params)` of a speculative configuration.

  `folder` takes the place of a `model` that is '{dir}'.
  """
  config = dict(config or {'method': 'null'})
  if config.get('model') == '{dir}':
    config['model'] = drafter(model, folder)
  return methods.build(config, model, specjax.load)


def record(out: str, setting: dict[str, Any]) -> setup.Record:
  """Returns a record to fill; sections of an earlier run are kept.

  An earlier run of another setting is left out.
  """
  made = setup.Record(out)
  setting = json.loads(json.dumps(setting))
  made.data['setting'] = setting
  if made.path.exists():
    found = json.loads(made.path.read_text())
    if all(found.get(k) == made.data[k] for k in ('setting', 'device')):
      made.data['sections'] = found['sections']
  return made


def compile_all(
    jobs: Iterable[Callable[[], Any]], threads: int
) -> list[Any]:
  """Runs compilations side by side; returns what they return."""
  with ThreadPoolExecutor(threads) as pool:
    return [job.result() for job in [pool.submit(j) for j in jobs]]
