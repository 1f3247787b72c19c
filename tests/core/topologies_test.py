"""Token trees: formats, shapes, presets, and Sequoia against brute force."""

import collections
import functools
import itertools

import numpy as np
import pytest

from specjax.core import topologies, tree

SOME = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)]
BUILT = [
    topologies.from_paths(SOME), topologies.branching((4, 2, 2)),
    topologies.k_ary(3, 2), topologies.sequences((8, 4, 4)),
    topologies.sequences((2, 5, 1)), topologies.preset('eagle-25'),
    topologies.preset('medusa-63'), tree.chain(3),
    topologies.sequoia((0.5, 0.3, 0.1), 20),
]


def level_sizes(topology):
  count = collections.Counter(topology.depth)
  return [count[d] for d in range(1, topology.max_depth + 1)]


@pytest.mark.parametrize('topology', BUILT)
def test_slots_are_breadth_first_and_paths_round_trip(topology):
  """Parents never decrease: levels are ranges, siblings are neighbours."""
  assert list(topology.parents) == sorted(topology.parents)
  assert list(topology.depth) == sorted(topology.depth)
  paths = topologies.to_paths(topology)
  assert len(set(paths)) == len(paths) == topology.num_nodes
  row = {path: i for i, path in enumerate([(), *paths])}
  assert topology.parents == tuple(row[path[:-1]] for path in paths)
  assert topologies.from_paths(paths) == topology
  assert topologies.from_paths(str(list(paths))) == topology


def test_from_paths_by_hand():
  """Rows as counted by hand; order, containers and spaces do not matter."""
  want = tree.from_parents((0, 0, 1, 1, 2, 4))
  assert topologies.from_paths(SOME) == want
  assert topologies.to_paths(want) == tuple(SOME)
  for order in itertools.islice(itertools.permutations(SOME), 0, 720, 37):
    assert topologies.from_paths([list(p) for p in order]) == want
  assert topologies.from_paths(' [(0, 0), (0,),(0,1),(1,),(1,0),(0,1,0)] '
                               ) == want
  assert topologies.from_paths('[(0,), (0, 0)]') == tree.chain(2)
  assert topologies.from_paths([np.array([0]), np.array([0, 0])]).is_chain


def test_to_paths_of_other_orders():
  """Depth-first slots keep their order; the way back renumbers them."""
  deep = tree.from_parents((0, 1, 0, 3))
  paths = topologies.to_paths(deep)
  assert paths == ((0,), (0, 0), (1,), (1, 0))
  assert topologies.from_paths(paths) == tree.from_parents((0, 0, 1, 2))
  assert topologies.to_paths(tree.chain(0)) == ()
  dynamic = tree.Topology(num_nodes=2, max_depth=2, max_children=2,
                          is_chain=False, parents=None)
  with pytest.raises(ValueError, match='dynamic'):
    topologies.to_paths(dynamic)


@pytest.mark.parametrize('paths, message', [
    ([], 'at least one'),
    ('[]', 'at least one'),
    ('', 'cannot be parsed'),
    ('[(0,), (1', 'cannot be parsed'),
    ('[(0,), f(1)]', 'cannot be parsed'),
    ('[' * 5000, 'cannot be parsed'),
    ('(0, 0)', 'list of tuples of ints'),
    ('[(0), (0, 0)]', r'written \(0,\)'),
    ('3', 'list of tuples of ints'),
    (3, 'list of tuples of ints'),
    ([(0,), (0, 0.0)], 'list of tuples of ints'),
    ([(0,), '0'], 'list of tuples of ints'),
    ([(), (0,)], r'\(\) is the root'),
    ([(0,), (-1,)], r'\(-1,\) has a negative rank'),
    ([(0,), (0, -2)], r'\(0, -2\) has a negative rank'),
    ([(0,), (1, 0)], r'\(1, 0\) without its parent \(1,\)'),
    ([(0,), (0, 0, 0)], r'\(0, 0, 0\) without its parent \(0, 0\)'),
    ([(0,), (0, 0), (0,)], r'\(0,\) is listed twice'),
    ([(0,), (2,)], r'\(2,\) without \(1,\).*gap'),
    ([(0,), (0, 1)], r'\(0, 1\) without \(0, 0\).*gap'),
    ([(1,)], r'\(1,\) without \(0,\).*gap'),
])
def test_bad_paths_raise(paths, message):
  with pytest.raises(ValueError, match=message):
    topologies.from_paths(paths)


@pytest.mark.parametrize('topology, parents', [
    (topologies.branching((2, 1)), (0, 0, 1, 2)),
    (topologies.branching((1, 3)), (0, 1, 1, 1)),
    (topologies.branching([1, 1, 1]), (0, 1, 2)),
    (topologies.k_ary(2, 2), (0, 0, 1, 1, 2, 2)),
    (topologies.k_ary(4, 1), (0, 0, 0, 0)),
    (topologies.sequences((3,)), (0, 1, 2)),
    (topologies.sequences((1, 3, 2)), (0, 0, 0, 2, 3, 4)),
])
def test_shapes_by_hand(topology, parents):
  assert topology == tree.from_parents(parents)


def test_level_sizes():
  """Products of the widths; chains that reach a level."""
  assert level_sizes(topologies.branching((4, 2, 2))) == [4, 8, 16]
  assert level_sizes(topologies.k_ary(3, 4)) == [3, 9, 27, 81]
  assert level_sizes(topologies.sequences((8, 4, 4))) == [3] * 4 + [1] * 4


@pytest.mark.parametrize('build, name', [
    (lambda: topologies.branching(()), 'widths'),
    (lambda: topologies.branching((2, 0)), r'widths=\(2, 0\)'),
    (lambda: topologies.branching((2.5,)), 'widths=2.5'),
    (lambda: topologies.k_ary(0, 2), 'k=0'),
    (lambda: topologies.k_ary(2, 0), 'depth=0'),
    (lambda: topologies.k_ary(2, -1), 'depth=-1'),
    (lambda: topologies.sequences([]), 'lengths'),
    (lambda: topologies.sequences((4, 0)), r'lengths=\(4, 0\)'),
])
def test_bad_shapes_raise(build, name):
  with pytest.raises(ValueError, match=name):
    build()


@pytest.mark.parametrize('name, sizes, most', [
    ('eagle-25', [4, 8, 8, 3, 2], 4), ('medusa-63', [10, 28, 23, 2], 10)])
def test_presets(name, sizes, most):
  """Sizes as published; the likeliest path is the deepest."""
  made = topologies.preset(name)
  assert level_sizes(made) == sizes
  assert made.num_nodes == sum(sizes) == int(name.split('-')[1])
  assert made.max_children == most
  assert (0,) * len(sizes) in topologies.to_paths(made)
  assert name in topologies.presets()


def test_presets_by_their_child_counts():
  """Widths of the internal nodes, counted in the published lists."""
  eagle = [len(k) for k in topologies.preset('eagle-25').children]
  assert eagle[:13] == [4, 3, 2, 2, 1, 3, 2, 2, 1, 0, 0, 0, 0]
  assert eagle[13:] == [3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]
  medusa = [len(k) for k in topologies.preset('medusa-63').children]
  assert medusa[:11] == [10, 10, 7, 3, 2, 1, 1, 1, 1, 1, 1]
  assert medusa[11:24] == [10, 3, 2, 1, 1, 1, 1, 1, 0, 0, 2, 0, 0]
  with pytest.raises(ValueError, match='eagle-25, medusa-63'):
    topologies.preset('eagle')


@functools.cache
def forests(num, most, depth, left=None):
  """Returns every forest of `num` nodes as nested tuples of children.

  At most `depth` levels and `most` siblings; `left` of them still to place.
  """
  left = most if left is None else left
  if num == 0:
    return [()]
  if left == 0 or depth == 0:
    return []
  return [(first, *rest)
          for size in range(1, num + 1)
          for first in forests(size - 1, most, depth - 1)
          for rest in forests(num - size, most, depth, left - 1)]


def forest_value(forest, rows, depth=0):
  """Returns the expected number of levels passed, child by child."""
  row = rows[min(depth, len(rows) - 1)]
  return sum(a * (1 + forest_value(child, rows, depth + 1))
             for a, child in zip(row, forest))


def as_forest(topology, row=0):
  return tuple(as_forest(topology, s + 1) for s in topology.children[row])


def random_rows(rng, num_rows, most, *, decreasing=False):
  """Returns [num_rows,most] in random order, some of it zero."""
  rows = rng.dirichlet(np.ones(most + 1), num_rows)[:, :most]
  if decreasing:
    return -np.sort(-rows)
  return rows * (rng.random(rows.shape) < 0.9)


def test_forests_are_all_trees():
  """Catalan numbers without a limit, and one tree a size for chains."""
  assert [len(forests(n, 9, 9)) for n in range(7)] == [
      1, 1, 2, 5, 14, 42, 132]
  assert [len(forests(n, 1, 9)) for n in range(4)] == [1, 1, 1, 1]
  assert len(forests(6, 2, 2)) == 1


@pytest.mark.parametrize('most, num_rows', [
    (1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (3, 4)])
def test_sequoia_is_the_best_of_all_trees(most, num_rows):
  """All trees of up to 6 nodes, limits on depth and siblings included."""
  rng = np.random.default_rng(10 * most + num_rows)
  cases = 0
  for num, depth, _ in itertools.product(
      range(1, 7), [None, 2, 4], range(2)):
    rows = random_rows(rng, num_rows, most)
    widest = [None, int(rng.integers(1, 4))][cases % 2]
    kids, deep = min(most, widest or most), depth or num
    everything = forests(num, kids, deep)
    given = rows[0] if num_rows == 1 else rows
    build = functools.partial(topologies.sequoia, given, num,
                              max_depth=depth, max_children=widest)
    cases += 1
    if not everything:
      with pytest.raises(ValueError, match='at most'):
        build()
      continue
    made = build()
    assert as_forest(made) in everything
    best = max(forest_value(f, rows) for f in everything)
    np.testing.assert_allclose(
        [topologies.expected_accepted(made, given),
         forest_value(as_forest(made), rows)], best, rtol=1e-12, atol=1e-15)
  assert cases == 36


def test_sequoia_is_more_than_greedy():
  """A useless child is worth its slot when the next sibling is likely.

  One node at a time stops at the chain: .5 + .25 + .125 < .5 + 0 + .45.
  """
  made = topologies.sequoia((0.5, 0.0, 0.45), 3)
  assert made == tree.from_parents((0, 0, 0))
  assert topologies.expected_accepted(
      made, (0.5, 0.0, 0.45)) == pytest.approx(0.95)


@pytest.mark.parametrize('num', [1, 7, 25])
def test_sequoia_of_decreasing_acceptance_is_greedy(num):
  """Then the nodes with the largest path products are closed: a tree."""
  rng = np.random.default_rng(num)
  rows = random_rows(rng, 4, 3, decreasing=True)
  product = {
      path: np.prod([rows[d, rank] for d, rank in enumerate(path)])
      for depth in range(1, 5)
      for path in itertools.product(range(3), repeat=depth)}
  top = sorted(product, key=lambda path: -product[path])[:num]
  made = topologies.sequoia(rows, num, max_depth=4)
  assert made == topologies.from_paths(top)
  assert topologies.expected_accepted(made, rows) == pytest.approx(
      sum(product[path] for path in top), rel=1e-12)


def test_sequoia_of_a_config_size():
  """64 nodes, 10 ranks, 10 levels: beats the published tree of that size."""
  acceptance = 0.6 * 0.4 ** np.arange(10)
  made = topologies.sequoia(acceptance, 63, max_depth=10)
  assert made.num_nodes == 63 and made.max_depth <= 10
  assert list(made.parents) == sorted(made.parents)
  value = topologies.expected_accepted(made, acceptance)
  medusa = topologies.preset('medusa-63')
  assert value > topologies.expected_accepted(medusa, acceptance) > 1
  assert topologies.sequoia(acceptance, 63, max_depth=1 + 62,
                            max_children=1) == tree.chain(63)


def test_expected_accepted_by_hand():
  """Sums of path products; deeper levels use the last row."""
  pair = topologies.from_paths([(0,), (1,), (1, 0), (1, 0, 0)])
  assert topologies.expected_accepted(pair, (0.5, 0.25)) == pytest.approx(
      0.5 + 0.25 + 0.125 + 0.0625)
  rows = [(0.5, 0.25), (0.8, 0.0)]
  assert topologies.expected_accepted(pair, rows) == pytest.approx(
      0.5 + 0.25 + 0.25 * 0.8 + 0.25 * 0.8 * 0.8)
  sure = topologies.expected_accepted(tree.chain(5), [1.0])
  assert sure == 5.0
  deep_first = tree.from_parents((0, 1, 0))
  assert topologies.expected_accepted(
      deep_first, (0.5, 0.25)) == pytest.approx(1.0)
  assert topologies.expected_accepted(tree.chain(0), [0.5]) == 0.0


@pytest.mark.parametrize('acceptance, num, limits, message', [
    ([0.5, -0.1], 2, {}, r'in \[0, 1\]'),
    ([1.5], 2, {}, r'in \[0, 1\]'),
    ([float('nan')], 2, {}, r'in \[0, 1\]'),
    ([float('inf')], 2, {}, r'in \[0, 1\]'),
    ([[0.5, 0.5], [0.6, 0.41]], 2, {}, 'a row sums to 1.01'),
    ([], 2, {}, 'shape'),
    (0.5, 2, {}, 'shape'),
    ([[[0.5]]], 2, {}, 'shape'),
    ([0.5], 0, {}, 'num_nodes=0'),
    ([0.5], 1.5, {}, 'num_nodes=1.5'),
    ([0.5], 2, {'max_depth': 0}, 'max_depth=0'),
    ([0.5], 2, {'max_children': 0}, 'max_children=0'),
    ([0.5, 0.2], 3, {'max_depth': 1}, 'at most 2 nodes'),
    ([0.5, 0.2], 7, {'max_depth': 2}, 'at most 6 nodes'),
    ([0.5, 0.2], 4, {'max_depth': 3, 'max_children': 1}, 'at most 3 nodes'),
])
def test_bad_sequoia_arguments_raise(acceptance, num, limits, message):
  with pytest.raises(ValueError, match=message):
    topologies.sequoia(acceptance, num, **limits)


def test_expected_accepted_rejects():
  """Ranks without a probability, and bad probabilities."""
  with pytest.raises(ValueError, match='2 ranks.*up to 3'):
    topologies.expected_accepted(topologies.k_ary(3, 1), (0.5, 0.2))
  with pytest.raises(ValueError, match='row sums'):
    topologies.expected_accepted(tree.chain(1), (0.7, 0.4))


@pytest.mark.parametrize('spec, want', [
    (tree.chain(3), tree.chain(3)),
    (SOME, topologies.from_paths(SOME)),
    (tuple(SOME), topologies.from_paths(SOME)),
    (str(SOME), topologies.from_paths(SOME)),
    ('((0,), (1,))', tree.from_parents((0, 0))),
    ('eagle-25', topologies.preset('eagle-25')),
    (' medusa-63\n', topologies.preset('medusa-63')),
    ('branching:4,2,2', topologies.branching((4, 2, 2))),
    ('branching: 3', topologies.k_ary(3, 1)),
    ('sequences:8,4,4', topologies.sequences((8, 4, 4))),
])
def test_parse(spec, want):
  assert topologies.parse(spec) == want


@pytest.mark.parametrize('spec', [
    '', 'eagle', 'branching', 'branching:', 'branching:4,,2', 'branching:a',
    'sequences:1.5', 'branching=4,2', 'spread:4', None, 5, {'a': 1}])
def test_parse_lists_what_is_allowed(spec):
  with pytest.raises(ValueError, match='token_tree=') as error:
    topologies.parse(spec)
  for word in ('list of paths', *topologies.presets(), 'branching:4,2,2',
               'sequences:8,4,4'):
    assert word in str(error.value)


@pytest.mark.parametrize('spec, message', [
    ('[(0,), (2,)]', 'gap'), ([(1, 0)], 'without its parent'),
    ('[(0,', 'cannot be parsed'), ('branching:4,0', 'widths'),
    ('sequences:-1', 'lengths=-1')])
def test_parse_passes_on_the_reason(spec, message):
  with pytest.raises(ValueError, match=message):
    topologies.parse(spec)
