"""Topologies: depths, ancestors and histories against brute force."""

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
  return tree.Topology(
      num_nodes=static.num_nodes, max_depth=static.max_depth,
      max_children=static.max_children, is_chain=False, parents=None)


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


@pytest.mark.parametrize('num', [0, 1, 4])
def test_chain_is_the_tree_of_a_chain(num):
  """Equal topologies are equal values: they share a trace."""
  made = tree.chain(num)
  assert made == tree.from_parents(range(num))
  assert hash(made) == hash(tree.from_parents(range(num)))
  assert made.is_chain and made.max_depth == num
  tokens = jnp.arange(2 * num, dtype=jnp.int32).reshape(2, num)
  slow = tree.Topology(
      num_nodes=num, max_depth=num, max_children=min(num, 1), is_chain=False,
      parents=made.parents)
  np.testing.assert_array_equal(
      tree.history(made, None, tokens), tree.history(slow, None, tokens))


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
  free = dynamic(tree.chain(2))
  with pytest.raises(ValueError, match='no static depths'):
    _ = free.depth
  with pytest.raises(ValueError, match=r'needs Draft\.parents'):
    tree.ancestors(free, None)


def test_take_row_clips():
  """Padding of a path reads the last row; nothing ever wraps to the end."""
  x = jnp.arange(12).reshape(2, 3, 2)
  np.testing.assert_array_equal(
      tree.take_row(x, jnp.asarray([-1, 3])), [[0, 1], [10, 11]])
  got = tree.take_row(x[..., 0], jnp.asarray([[-5, 1], [2, 9]]))
  np.testing.assert_array_equal(got, [[0, 2], [10, 10]])
