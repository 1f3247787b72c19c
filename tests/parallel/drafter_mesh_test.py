"""Drafters that read the target's states, on a mesh of eight devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from specjax import Sampling, generate
from specjax.core import topologies
from specjax.distill import kinds
from specjax.drafters import ChainLM, GrownLM, Lattice, TreeLM
from specjax.host import tiny
from specjax.models import weights
from specjax.parallel import make_mesh, rules

IDS = np.setdiff1d(np.arange(264), [7, 70])
PROMPTS = [f'say {"ab" * (i % 5)}' for i in range(12)]
# Few tokens to choose from, so that random drafts are accepted.
OPTIONS = [Sampling(
    max_new_tokens=4 + i % 7, temperature=0.8 * (i % 3 > 0), seed=i,
    allowed_ids=(65, 66, 67, 68)) for i in range(12)]
KINDS = {'dspark': {'num_layers': 1, 'taps': (1, 2), 'num_slots': 3,
                    'markov_rank': 4},
         'eagle3': {'taps': (0, 1, 2)}}
SHAPES = {
    'dspark': lambda source: ChainLM(3, source),
    'lattice': lambda source: Lattice(source, 8, topologies.branching((3, 2))),
    'eagle3': lambda source: TreeLM(
        topologies.branching((2, 2)), source, 'without_replacement'),
    'grown': lambda source: GrownLM(6, source, 3, 3)}


@functools.cache
def target(on_mesh: bool):
  """Returns the same weights on one device or on four by two."""
  if not on_mesh:
    return tiny.model(vocab_size=264, num_heads=8, num_kv_heads=8)
  plain, mesh = target(False), make_mesh((4, 2))
  config = plain.lm.config
  placed = rules.param_shardings(
      mesh, weights.logical_axes(config), weights.abstract(config))
  return dataclasses.replace(
      plain, mesh=mesh, params=rules.put(plain.params, placed))


@functools.cache
def drafter(kind: str):
  """Returns a source and its parameters, on one device."""
  model = target(False)
  task = kinds.build(kind, model.lm.config, len(IDS), model=KINDS[kind])
  net = jax.jit(task.init)(jax.random.key(0), model.params)
  return task.source(), task.attach(net, model.params, IDS)


@pytest.mark.parametrize('shape, kind, rule', [
    ('dspark', 'dspark', 'block'), ('lattice', 'dspark', 'traversal'),
    ('eagle3', 'eagle3', 'traversal'), ('grown', 'eagle3', 'match')])
def test_mesh_of_four_by_two(shape, kind, rule):
  """Ragged rows that come and go: the texts and rounds of one device."""
  source, params = drafter(kind)
  one, many = [generate(
      target(on_mesh), SHAPES[shape](source), PROMPTS, OPTIONS,
      drafter_params=params, verify=rule, batch_size=8 if on_mesh else 2,
      capacity=48) for on_mesh in (False, True)]
  for a, b in zip(one, many, strict=True):
    assert a.tokens == b.tokens
    assert a.step_lengths == b.step_lengths
  assert np.sum([r.ranks for r in one]) > 0  # something was accepted
