"""Topologies: everything that is read off a tree, against brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.core import tree

PARENTS = [
    (), (0,), (0, 1, 2), (0, 0, 0), (0, 1, 0, 3, 3), (0, 0, 1, 1, 2, 5, 5, 7),
]


def brute_paths(parents):
  """Returns each row's path: rows from below the root down to it."""
  paths = [[]]
  for slot, parent in enumerate(parents):
    paths.append(paths[parent] + [slot + 1])
  return paths


def dynamic(static: tree.Topology) -> tree.Topology:
  """Returns the topology of trees as large whose parents are data."""
  return tree.Topology(
      num_nodes=static.num_nodes, max_depth=static.max_depth,
      max_children=static.max_children, is_chain=False, parents=None)


# Random trees of one size, as rows of a batch: each has its own parents.
NUM, ROWS = 7, 48
FREE = tree.Topology(num_nodes=NUM, max_depth=NUM, max_children=NUM,
                     is_chain=False, parents=None)
# A chain, a star, two branches; the rest is random.
RANDOM = np.stack([np.arange(NUM), np.zeros(NUM, int), (0, 0, 1, 2, 3, 4, 5)]
                  + [np.random.default_rng(seed).integers(
                      0, np.arange(NUM) + 1) for seed in range(ROWS - 3)])
SHAPES = [tree.from_parents(RANDOM[i]) for i in (0, 2, 5)]


@pytest.mark.parametrize('parents', PARENTS)
def test_static_tree_against_brute_force(parents):
  """Depth, ancestors and history of every row."""
  made = tree.from_parents(parents)
  paths = brute_paths(parents)
  assert list(made.depth) == [len(p) for p in paths[1:]]
  assert made.max_depth == max(len(p) for p in paths)
  counts = [list(parents).count(r) for r in range(len(paths))]
  assert made.max_children == max(counts)
  np.testing.assert_array_equal(tree.node_depth(made, None), made.depth)
  seen = np.asarray(tree.ancestors(made, None))
  for row, path in enumerate(paths):
    assert set(np.flatnonzero(seen[row])) == {0, *path}
  tokens = 10 + np.arange(2 * len(parents)).reshape(2, -1)
  past = np.asarray(tree.history(made, None, jnp.asarray(tokens, jnp.int32)))
  assert past.shape == (2, len(paths), made.max_depth)
  for b in range(2):
    for row, path in enumerate(paths):
      want = [tokens[b, r - 1] for r in path]
      want += [-1] * (made.max_depth - len(path))
      assert list(past[b, row]) == want


def test_dynamic_tree_equals_static_ones_row_by_row():
  """Parents that differ by row: each row is its own static tree."""
  rows = [(0, 1, 0, 3, 3), (0, 0, 0, 2, 4), (0, 1, 2, 2, 2)]
  topology = tree.Topology(
      num_nodes=5, max_depth=4, max_children=3, is_chain=False, parents=None)
  parents = jnp.asarray(rows, jnp.int32)
  tokens = jax.random.randint(jax.random.key(0), (3, 5), 0, 50)
  depth = tree.node_depth(topology, parents)
  seen = tree.ancestors(topology, parents)
  past = tree.history(topology, parents, tokens)
  for b, one in enumerate(rows):
    static = tree.from_parents(one)
    assert tuple(np.asarray(depth[b])) == static.depth
    np.testing.assert_array_equal(seen[b], tree.ancestors(static, None))
    want = tree.history(static, None, tokens[b:b + 1])[0]
    np.testing.assert_array_equal(past[b, :, :static.max_depth], want)
    assert (past[b, :, static.max_depth:] == -1).all()


def brute_children(parents, order=None):
  """Returns the slots below every row, in draw order."""
  order = range(len(parents)) if order is None else order
  below = [[] for _ in range(len(parents) + 1)]
  for slot in sorted(range(len(parents)), key=lambda s: order[s]):
    below[parents[slot]].append(slot)
  return below


def check_children(slots, exists, rows, below) -> None:
  """Compares `(slots, exists)` of one row of a batch with lists."""
  slots, exists = np.asarray(slots), np.asarray(exists)
  assert len(slots) == len(rows)
  for i, row in enumerate(rows):
    assert list(slots[i][exists[i]]) == below[row]
    # Those that exist come first; the others point at slot 0.
    assert list(exists[i]) == sorted(exists[i], reverse=True)
    assert not slots[i][~exists[i]].any()


@pytest.mark.parametrize('parents', PARENTS)
def test_children_of_static_trees(parents):
  """As tuples, and as arrays; internal rows are those with children."""
  made, below = tree.from_parents(parents), brute_children(parents)
  assert made.children == tuple(map(tuple, below))
  assert made.internal == tuple(r for r, kids in enumerate(below) if kids)
  slots, exists = tree.children(made, None, None)
  assert slots.shape == (len(made.internal), made.max_children)
  check_children(slots, exists, made.internal, below)


@pytest.mark.parametrize('per_row', [False, True])
@pytest.mark.parametrize('shape', [None, *SHAPES[1:]])
def test_children_in_draw_order(shape, per_row):
  """Any order, of all rows or of each; static and computed parents."""
  rng = np.random.default_rng(0)
  order = np.stack([rng.permutation(NUM) for _ in range(ROWS)])
  sibling = jnp.asarray(order if per_row else order[3], jnp.int32)
  topology, parents = (FREE, jnp.asarray(RANDOM)) if shape is None else (
      shape, None)
  slots, exists = jax.jit(functools.partial(tree.children, topology))(
      parents, sibling)
  if shape is not None and not per_row:
    assert slots.ndim == 2  # nothing of size B is made
    slots, exists = slots[None], exists[None]
  assert slots.shape[1:] == (len(topology.internal), topology.max_children)
  for b in range(len(slots)):
    up = RANDOM[b] if shape is None else topology.parents
    below = brute_children(up, order[b if per_row else 3])
    check_children(slots[b], exists[b], topology.internal, below)


def test_children_of_computed_parents_without_an_order():
  """The order of slots; every row may have children, the last has none."""
  slots, exists = tree.children(FREE, jnp.asarray(RANDOM), None)
  assert FREE.internal == tuple(range(NUM + 1))
  assert not exists[:, NUM].any()
  for b, parents in enumerate(RANDOM):
    check_children(
        slots[b], exists[b], FREE.internal, brute_children(parents))


@pytest.mark.parametrize('shape', [None, *SHAPES])
def test_paths_against_brute_force(shape):
  """The path to every row, and its length."""
  topology, given = (FREE, jnp.asarray(RANDOM)) if shape is None else (
      shape, None)
  path_to = jax.jit(functools.partial(tree.path_to, topology))
  for row in range(NUM + 1):
    rows = (row + np.arange(ROWS)) % (NUM + 1)
    path, depth = path_to(given, jnp.asarray(rows, jnp.int32))
    assert path.shape == (ROWS, topology.max_depth + 1)
    for b in range(ROWS):
      parents = RANDOM[b] if shape is None else topology.parents
      want = [0, *brute_paths(parents)[rows[b]]]
      assert int(depth[b]) == len(want) - 1
      want += [NUM + 1] * (topology.max_depth + 1 - len(want))
      assert list(np.asarray(path[b])) == want


def brute_deepest(parents, alive, tie) -> int:
  """Returns the first best of the rows that alive slots lead to."""
  best = (0, 0.0, 0)
  for row, path in enumerate(brute_paths(parents)):
    if path and all(alive[r - 1] for r in path):
      found = (len(path), tie[row - 1], row)
      best = max(best, found, key=lambda x: x[:2])
  return best[2]


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('shape', [None, *SHAPES])
def test_deepest_against_brute_force(shape, tied):
  """Equal depths: the largest tie, which may be negative; the first slot."""
  topology, given = (FREE, jnp.asarray(RANDOM)) if shape is None else (
      shape, None)
  deepest = jax.jit(functools.partial(tree.deepest, topology))
  rng = np.random.default_rng(1)
  found = set()
  for chance in (0.0, 0.5, 0.8, 1.0):
    alive = rng.random((ROWS, NUM)) < chance
    tie = rng.integers(-3, 0, (ROWS, NUM)).astype(np.float32)
    got = deepest(given, jnp.asarray(alive),
                  tie=jnp.asarray(tie) if tied else None)
    for b in range(ROWS):
      parents = RANDOM[b] if shape is None else topology.parents
      key = tie[b] if tied else np.zeros(NUM)
      assert int(got[b]) == brute_deepest(parents, alive[b], key)
      found.add(int(got[b]))
  assert 0 in found and len(found) > 2


@pytest.mark.parametrize('num', [0, 1, 4])
def test_chain_is_the_tree_of_a_chain(num):
  """Equal topologies are equal values: they share a trace."""
  made = tree.chain(num)
  assert made == tree.from_parents(range(num))
  assert hash(made) == hash(tree.from_parents(range(num)))
  assert made.is_chain and made.max_depth == num
  tokens = jnp.arange(2 * num, dtype=jnp.int32).reshape(2, num)
  parents = jnp.broadcast_to(jnp.arange(num, dtype=jnp.int32), (2, num))
  np.testing.assert_array_equal(
      tree.history(made, None, tokens),
      tree.history(dynamic(made), parents, tokens))


@pytest.mark.parametrize('parents', [
    (1,), (-1,), (0, 2), (0, 1, 3), (0, -1)])
def test_bad_parents_raise(parents):
  """A parent stands before its child: no cycles, no forward references."""
  with pytest.raises(ValueError, match='parents'):
    tree.from_parents(parents)


def test_bad_shapes_raise():
  """Counts that contradict each other, or that only a dynamic tree lacks."""
  with pytest.raises(ValueError, match='num_speculative_tokens=-1'):
    tree.chain(-1)
  kwargs = dict(max_children=1, is_chain=False)
  with pytest.raises(ValueError, match='max_depth=3'):
    tree.Topology(num_nodes=2, max_depth=3, parents=None, **kwargs)
  with pytest.raises(ValueError, match='1 parents for 2'):
    tree.Topology(num_nodes=2, max_depth=2, parents=(0,), **kwargs)
  with pytest.raises(ValueError, match='num_nodes=-1'):
    tree.Topology(num_nodes=-1, max_depth=0, parents=None, **kwargs)
  with pytest.raises(ValueError, match='max_depth=1: .* 2 deep'):
    tree.Topology(num_nodes=3, max_depth=1, parents=(0, 1, 0), **kwargs)
  with pytest.raises(ValueError, match='max_children=1: .* up to 2'):
    tree.Topology(num_nodes=3, max_depth=2, parents=(0, 1, 0), **kwargs)
  with pytest.raises(ValueError, match='is_chain=False'):
    tree.Topology(num_nodes=2, max_depth=2, parents=(0, 1), **kwargs)
  with pytest.raises(ValueError, match='is_chain=True'):
    tree.Topology(num_nodes=2, max_depth=1, max_children=2, is_chain=True,
                  parents=(0, 0))
  free = dynamic(tree.chain(2))
  with pytest.raises(ValueError, match='no static depths'):
    _ = free.depth
  with pytest.raises(ValueError, match='no static children'):
    _ = free.children
  with pytest.raises(ValueError, match=r'needs Draft\.parents'):
    tree.ancestors(free, None)


def test_take_row_clips():
  """Padding of a path reads the last row; nothing ever wraps to the end."""
  x = jnp.arange(12).reshape(2, 3, 2)
  np.testing.assert_array_equal(
      tree.take_row(x, jnp.asarray([-1, 3])), [[0, 1], [10, 11]])
  got = tree.take_row(x[..., 0], jnp.asarray([[-5, 1], [2, 9]]))
  np.testing.assert_array_equal(got, [[0, 2], [10, 10]])
