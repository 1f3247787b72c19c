"""Trees on a mesh: the texts of one device, ragged, with mixed options."""

import dataclasses

import numpy as np
import pytest

from specjax import Sampling, generate
from specjax.core import topologies
from specjax.drafters import LookupTree, TreeLM
from specjax.host import tiny
from specjax.models import weights
from specjax.parallel import make_mesh, rules

PLAIN = tiny.model(vocab_size=264, num_heads=8, num_kv_heads=8)
TREE = topologies.branching((2, 2))
PROMPTS = [f'say {"ab" * (i % 5)}' for i in range(12)]
OPTIONS = [Sampling(
    max_new_tokens=4 + i % 7, temperature=0.8 * (i % 3 > 0), seed=i,
    top_p=1.0 - 0.1 * (i % 2)) for i in range(12)]


def on_mesh():
  config, mesh = PLAIN.lm.config, make_mesh((4, 2))
  placed = rules.param_shardings(
      mesh, weights.logical_axes(config), weights.abstract(config))
  return dataclasses.replace(
      PLAIN, mesh=mesh, params=rules.put(PLAIN.params, placed))


@pytest.mark.parametrize('drafter, rule', [
    (TreeLM(tree=TREE, model=PLAIN.lm), 'traversal'),
    (LookupTree((3, 2)), 'match')], ids=['drawn', 'lookup'])
def test_mesh_of_four_by_two(drafter, rule):
  """Two rows a device, heads split in two; another way to sum, no more."""
  other = tiny.model(seed=1, vocab_size=264, num_heads=8, num_kv_heads=8)
  results = [generate(
      model, drafter, PROMPTS, OPTIONS, drafter_params=other.params,
      verify=rule, batch_size=batch, capacity=48)
      for model, batch in ((PLAIN, 2), (on_mesh(), 8))]
  for one, many in zip(*results):
    assert one.tokens == many.tokens
    assert one.step_lengths == many.step_lengths
  kept = np.sum([r.ranks for r in results[0]], axis=0)
  assert kept.sum() > 0  # something was accepted, on some path
