"""The shape that a trained drafter drafts in: chain, tree, lattice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specjax.core import topologies
from specjax.drafters import ChainLM, GrownLattice, GrownLM, Lattice, TreeLM
from specjax.drafters.block import BlockSource
from specjax.drafters.copying import Copying


def shape(
    source: Any, num_draft: int, config: Mapping[str, Any], copy_max: int = 0
) -> Any:
  """Returns the drafter of a source that a configuration asks for.

  Args:
    source: a `drafters.source.Source`.
    num_draft: tokens of a chain, unless the configuration says otherwise.
    config: `num_speculative_tokens`; `speculative_token_tree`, or
      `use_dynamic_tree` with `tree_depth`, `tree_top_k`;
      `draft_confidence_threshold`, `draft_acceptance_threshold` (chains) and
      `draft_sample_method` (trees), which exclude a lattice. Of block
      drafters: `lattice`, default true unless excluded, and of those
      `num_candidates` and `copy_max`, the longest match of the text's end
      whose continuation is a candidate too (0: none).
    copy_max: of lattices whose configuration does not say.

  Raises:
    ValueError: a combination that is not possible.
  """
  config = {k: v for k, v in config.items() if v is not None}
  free = {k: config.pop(k) for k in (
      'draft_confidence_threshold', 'draft_acceptance_threshold',
      'draft_sample_method') if k in config}
  is_block = isinstance(source, BlockSource)
  lattice = config.pop('lattice', is_block and not free)
  if lattice and not is_block:
    raise ValueError("'lattice': only block drafters (dspark, dflash) have "
                     'one')
  if lattice and free:
    raise ValueError(f'{sorted(free)} need "lattice": false')
  candidates = _candidates(config, lattice, copy_max)
  tree = config.pop('speculative_token_tree', None)
  if config.pop('use_dynamic_tree', False):
    if tree is not None or free:
      raise ValueError("'use_dynamic_tree' grows its own tree: leave out "
                       f"{['speculative_token_tree', *free]}")
    if lattice:
      return GrownLattice(source=source, **candidates, **config)
    return GrownLM(model=source, **config)
  misplaced = sorted({'tree_depth', 'tree_top_k'} & set(config))
  if misplaced:
    raise ValueError(f"{misplaced} are for 'use_dynamic_tree': true")
  num = config.pop('num_speculative_tokens', None)
  if tree is not None:
    return _static(source, topologies.parse(tree), num, lattice, candidates,
                   free)
  num = num_draft if num is None else num
  if num < 1:
    raise ValueError(f"num_speculative_tokens={num}: 'null' drafts nothing")
  return _chain(source, num, lattice, candidates, free)


def _candidates(
    config: dict[str, Any], lattice: bool, copy_max: int
) -> dict[str, Any]:
  """Takes what a lattice's candidates are from a configuration."""
  found: dict[str, Any] = {
      k: config.pop(k) for k in ('num_candidates', 'copy_max')
      if k in config}
  if not lattice:
    if found:
      raise ValueError(f'{sorted(found)}: for a lattice')
    return {}
  fits = found.get('num_candidates', 2) > 1
  longest = found.pop('copy_max', copy_max if fits else 0)
  if not 0 <= longest <= len(Copying.shares):
    raise ValueError(f'copy_max={longest}: must be in '
                     f'[0, {len(Copying.shares)}]')
  if longest:
    found['copying'] = Copying(Copying.shares[:longest])
  return found


def _chain(source, num, lattice, candidates, free) -> Any:
  if lattice:
    # A chain of all slots is what a lattice is without a tree.
    drafter = Lattice(source=source, **candidates)
    return drafter if num == source.num_slots else drafter.narrow(num)
  if 'draft_sample_method' in free and free['draft_sample_method'] != 'iid':
    raise ValueError("'draft_sample_method' needs 'speculative_token_tree'")
  return ChainLM(
      model=source, num_speculative_tokens=num,
      confidence_threshold=free.get('draft_confidence_threshold', 0.0),
      acceptance_threshold=free.get('draft_acceptance_threshold', 0.0))


def _static(source, topology, num, lattice, candidates, free) -> Any:
  """Returns the drafter of a static tree."""
  if num not in (None, topology.num_nodes):
    raise ValueError(f'num_speculative_tokens={num}: the tree has '
                     f'{topology.num_nodes} nodes')
  if lattice:
    return Lattice(source=source, tree=topology, **candidates)
  thresholds = sorted({
      'draft_confidence_threshold', 'draft_acceptance_threshold'} & set(free))
  if thresholds:
    raise ValueError(f'{thresholds} are for chains')
  method = free.get('draft_sample_method')
  return TreeLM(tree=topology, model=source, **(
      {} if method is None else {'draft_sample_method': method}))
