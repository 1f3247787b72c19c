"""Builders of static token trees: paths, regular shapes, presets, Sequoia.

A path names a node by sibling ranks from the root down: `(0,)` is the root's
first child, `(0, 2)` the third child of that. Every builder here numbers its
slots breadth first, siblings in rank order, so that a level is a contiguous
range of slots. All of it runs on the host, before anything is traced.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
import operator
from typing import Any

import numpy as np

from specjax.core import tree

# Sibling ranks of each path, one digit a level, breadth first.
_PRESETS = {
    # EAGLE-1's static tree: SafeAILab/EAGLE, eagle/model/choices.py, named
    # `mc_sim_7b_63` there although it has 25 nodes.
    'eagle-25': """
        0 1 2 3
        00 01 02 10 11 20 21 30
        000 001 002 010 011 020 021 100
        0000 0001 0002
        00000 00001""",
    # `mc_sim_7b_63` of FasterDecoding/Medusa, medusa/model/medusa_choices.py.
    'medusa-63': """
        0 1 2 3 4 5 6 7 8 9
        00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 15 16
        20 21 22 30 31 40 50 60 70 80 90
        000 001 002 003 004 005 006 007 008 009
        010 011 012 020 021 030 040 050 060 070 100 101 200
        0000 0001""",
}


def from_paths(paths: Sequence[Sequence[int]] | str) -> tree.Topology:
  """Returns the tree with these nodes.

  The format of vLLM's `speculative_token_tree` and of the `tree_choices` of
  Medusa and EAGLE.

  Args:
    paths: one path of sibling ranks (>= 0) a node, in any order, the root
      left out; or the text of such a list, `"[(0,), (1,), (0, 0)]"`. Every
      node's parent and its siblings of lower rank must be listed too.

  Returns:
    A static topology of `len(paths) >= 1` slots, breadth first.

  Raises:
    ValueError: the text does not parse, it is not a list of paths, it is
      empty, or a path is repeated, negative or lacks its parent or a sibling.
  """
  wanted = sorted(_read_paths(paths), key=lambda path: (len(path), path))
  if not wanted:
    raise ValueError('paths: a token tree needs at least one path')
  row: dict[tuple[int, ...], int] = {(): 0}
  parents = []
  for path in wanted:  # parents and siblings of lower rank come first
    above, rank = path[:-1], path[-1]
    if path in row:
      raise ValueError(f'paths: {path} is listed twice')
    if above not in row:
      raise ValueError(f'paths: {path} without its parent {above}')
    if rank and above + (rank - 1,) not in row:
      raise ValueError(f'paths: {path} without {above + (rank - 1,)}: the '
                       'ranks of siblings are 0, 1, 2, ... without a gap')
    row[path] = len(row)
    parents.append(row[above])
  return tree.from_parents(parents)


def to_paths(topology: tree.Topology) -> tuple[tuple[int, ...], ...]:
  """Returns the path of every slot, in the order of slots.

  A rank is the place among siblings in the order of slots. `from_paths` of
  the result is `topology` again when its parents never decrease (as from all
  builders here), else the same tree renumbered. ValueError when dynamic.
  """
  paths: list[tuple[int, ...]] = [()] * (topology.num_nodes + 1)
  for row, slots in enumerate(topology.children):
    for rank, slot in enumerate(slots):
      paths[slot + 1] = paths[row] + (rank,)
  return tuple(paths[1:])


def branching(widths: Sequence[int]) -> tree.Topology:
  """Returns the tree whose nodes at depth d all have `widths[d]` children.

  `(4, 2, 2)` has levels of 4, 8 and 16 slots. Widths are >= 1 and there is
  at least one (ValueError); the size is the sum of their running products.
  """
  level = [0]
  parents: list[int] = []
  for width in _counts('widths', *widths):
    first = len(parents) + 1
    parents += [row for row in level for _ in range(width)]
    level = list(range(first, len(parents) + 1))
  return tree.from_parents(parents)


def k_ary(k: int, depth: int) -> tree.Topology:
  """Returns the full tree of `depth >= 1` levels with `k >= 1` children."""
  [levels] = _counts('depth', depth)
  return branching(_counts('k', k) * levels)


def sequences(lengths: Sequence[int]) -> tree.Topology:
  """Returns chains that run side by side from the root.

  For several drafts that share nothing but the context: the i.i.d. sequences
  of SpecTr (Sun et al. 2023, arXiv:2310.15141), several lookup matches.

  `lengths` holds the tokens of each chain, >= 1, at least one chain
  (ValueError). Chain i starts with the root's child of rank i, and has one
  slot in each level that it reaches.
  """
  counts = _counts('lengths', *lengths)
  tip = [0] * len(counts)
  parents: list[int] = []
  for depth in range(max(counts)):
    for i, length in enumerate(counts):
      if depth < length:
        parents.append(tip[i])
        tip[i] = len(parents)
  return tree.from_parents(parents)


def presets() -> tuple[str, ...]:
  """Returns the names that `preset` knows."""
  return tuple(_PRESETS)


def preset(name: str) -> tree.Topology:
  """Returns a published tree by name; ValueError when there is none.

  `eagle-25`: 25 slots, depth 5 (EAGLE, Li et al. 2024, arXiv:2401.15077).
  `medusa-63`: 63 slots, depth 4 (Medusa, Cai et al. 2024, arXiv:2401.10774).
  """
  if name not in _PRESETS:
    raise ValueError(f'preset={name!r}: must be one of {", ".join(_PRESETS)}')
  return from_paths([tuple(map(int, p)) for p in _PRESETS[name].split()])


def sequoia(
    acceptance: Any, num_nodes: int, *, max_depth: int | None = None,
    max_children: int | None = None,
) -> tree.Topology:
  """Returns the tree that accepts most drafts in expectation.

  Maximises `expected_accepted` over all trees of exactly `num_nodes` slots
  by dynamic programming: the best subtree of n nodes splits them between its
  first child and its later siblings, levels from the bottom up. Exact for any
  acceptance, also where a later sibling is likelier than an earlier one and
  the best nodes one at a time are not the best set. On an exact tie the
  earliest child gets the fewest nodes. O(L C N^2) time for L levels.

  Args:
    acceptance: probabilities [C] or [D,C], as in `expected_accepted`.
    num_nodes: N >= 1, drafted slots.
    max_depth: most levels, >= 1; None is N. Levels below row D - 1 of
      `acceptance` use that row.
    max_children: most siblings, >= 1; never more than C.

  Returns:
    A static topology of N slots, breadth first.

  Raises:
    ValueError: an argument is out of range, or N nodes do not fit.

  Reference: Chen et al. 2024, arXiv:2402.12374, section 3.1.
  """
  rows = _acceptance(acceptance)
  [num] = _counts('num_nodes', num_nodes)
  [levels] = _counts('max_depth', num if max_depth is None else max_depth)
  levels = min(levels, num)
  if max_children is not None:
    rows = rows[:, :_counts('max_children', max_children)[0]]
  most = rows.shape[1]
  if (fit := sum(most ** d for d in range(1, levels + 1))) < num:
    raise ValueError(f'num_nodes={num}: a tree of depth {levels} with up to '
                     f'{most} children a node has at most {fit} nodes')
  size = _first_child_sizes(rows[np.minimum(range(levels), len(rows) - 1)], num)
  parents: list[int] = []
  level = [(0, num)]  # rows of one depth, and how many nodes go below each
  for depth in range(levels):
    below = []
    for row, left in level:
      rank = 0
      while left:
        taken = int(size[depth, rank, left])
        parents.append(row)
        below.append((len(parents), taken - 1))
        left, rank = left - taken, rank + 1
    level = below
  return tree.from_parents(parents)


def expected_accepted(topology: tree.Topology, acceptance: Any) -> float:
  """Returns the expected number of accepted drafts a round, in [0, depth].

  Under the positional acceptance assumption of Sequoia (arXiv:2402.12374,
  section 3.1): acceptance depends on rank (here on depth too) and on nothing
  else, so a node is accepted with the product of the entries on its path.

  Args:
    topology: static, with at most C children a node.
    acceptance: float [C], or [D,C] when it differs by depth. Entry [d, c] is
      the probability that it is child c of an accepted node at depth d (the
      root is at 0) that is accepted, after its earlier siblings were
      rejected: joint, so a row sums to at most 1. Need not be monotone.
      Levels below the last row use the last row.

  Raises:
    ValueError: bad probabilities, too many children, a dynamic topology.
  """
  rows = _acceptance(acceptance)
  if topology.max_children > rows.shape[1]:
    raise ValueError(f'acceptance: {rows.shape[1]} ranks for a tree with up '
                     f'to {topology.max_children} children a node')
  reached: dict[tuple[int, ...], float] = {(): 1.0}
  paths = to_paths(topology)
  for path in paths:  # parents come first
    depth = min(len(path), len(rows)) - 1
    reached[path] = reached[path[:-1]] * float(rows[depth, path[-1]])
  return sum((reached[path] for path in paths), 0.0)


def parse(
    spec: tree.Topology | Sequence[Sequence[int]] | str,
) -> tree.Topology:
  """Returns the tree that a config asks for.

  Args:
    spec: a topology; a list of paths or its text (`from_paths`); the name of
      a preset; `branching:4,2,2`; or `sequences:8,4,4`.

  Raises:
    ValueError: it is none of these, or not well formed.
  """
  if isinstance(spec, tree.Topology):
    return spec
  if isinstance(spec, (list, tuple)):
    return from_paths(spec)
  allowed = (
      f'token_tree={spec!r}: must be a list of paths such as [(0,), (1,), '
      f'(0, 0)], a preset ({", ".join(_PRESETS)}), branching:4,2,2 (children '
      'a node by depth) or sequences:8,4,4 (lengths of chains)')
  if not isinstance(spec, str):
    raise ValueError(allowed)
  text = spec.strip()
  if text in _PRESETS:
    return preset(text)
  if text.startswith(('[', '(')):
    return from_paths(text)
  kind, _, rest = text.partition(':')
  build = {'branching': branching, 'sequences': sequences}.get(kind)
  if build is None:
    raise ValueError(allowed)
  try:
    counts = [int(number) for number in rest.split(',')]
  except ValueError:
    raise ValueError(allowed) from None
  return build(counts)


def _read_paths(paths: Any) -> list[tuple[int, ...]]:
  """Returns `paths`, a list or its text, as tuples of ranks >= 0."""
  if isinstance(paths, str):
    try:
      paths = ast.literal_eval(paths.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      raise ValueError(f'paths={paths!r}: cannot be parsed; write a list of '
                       'tuples such as [(0,), (1,), (0, 0)]') from None
  try:
    read = [tuple(map(operator.index, path)) for path in paths]
  except TypeError:
    raise ValueError(f'paths={paths!r}: must be a list of tuples of ints '
                     '(a path of one rank is written (0,))') from None
  for path in read:
    if not path:
      raise ValueError('paths: () is the root, which is not drafted')
    if min(path) < 0:
      raise ValueError(f'paths: {path} has a negative rank')
  return read


def _counts(name: str, *values: int) -> tuple[int, ...]:
  """Returns `values` as ints; ValueError unless there are any, all >= 1."""
  try:
    counts = tuple(map(operator.index, values))
  except TypeError:
    counts = ()
  if not counts or min(counts) < 1:
    shown = values[0] if len(values) == 1 else values
    raise ValueError(f'{name}={shown}: must be whole and >= 1')
  return counts


def _acceptance(acceptance: Any) -> np.ndarray:
  """Returns float64[D,C] joint acceptance probabilities, checked."""
  rows = np.asarray(acceptance, np.float64)
  if rows.ndim not in (1, 2) or not rows.size:
    raise ValueError(
        f'acceptance of shape {rows.shape}: must be [C] or [D,C], not empty')
  rows = rows.reshape(-1, rows.shape[-1])
  if not ((rows >= 0) & (rows <= 1)).all():  # also false for NaN
    raise ValueError('acceptance: every entry must be in [0, 1]')
  if (total := rows.sum(axis=1).max()) > 1 + 1e-6:
    raise ValueError(
        f'acceptance: a row sums to {total:.9g}; siblings exclude each '
        'other, so that it must be <= 1')
  return rows


def _first_child_sizes(rows: np.ndarray, num_nodes: int) -> np.ndarray:
  """Splits nodes between siblings so that most drafts are accepted.

  Args:
    rows: float64[L,C], acceptance at each of the L levels.
    num_nodes: N >= 1.

  Returns:
    int[L,C,N+1]: where n nodes are to hang below one parent of depth d as
    its children of rank >= c, entry [d, c, n] is how many of them the child
    of rank c gets, itself included. Arbitrary where they do not fit.
  """
  size = np.zeros(rows.shape + (num_nodes + 1,), np.int64)
  rest_size = np.arange(num_nodes + 1)[:, None] - np.arange(1, num_nodes + 1)
  nothing = np.full(num_nodes + 1, -np.inf)  # -inf: that many do not fit
  nothing[0] = 0.0
  below = nothing  # value of n nodes under a node of the level in hand
  for depth in reversed(range(rows.shape[0])):
    rest = nothing
    for rank in reversed(range(rows.shape[1])):
      fits = np.isfinite(below[:-1])  # keeps 0 * inf out
      child = np.full(num_nodes, -np.inf)
      child[fits] = rows[depth, rank] * (1.0 + below[:-1][fits])
      value = np.where(rest_size >= 0, child + rest[rest_size], -np.inf)
      size[depth, rank] = value.argmax(axis=1) + 1
      rest = value.max(axis=1)
      rest[0] = 0.0
    below = rest
  return size
