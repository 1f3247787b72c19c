"""The decoder's cache: whatever the way there, the logits are the same.

Chunks, ragged rows, rollbacks, rings, trees and resumed layers are compared
with a plain forward pass. Logits are float32 of size 1 to 20.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax.core import tree
from specjax.models import attention, transformer, weights
from specjax.models.attention import Block

# Sums run in another order when shapes differ; seen: below 2e-5.
CLOSE = dict(atol=2e-4, rtol=0)
each_family = pytest.mark.parametrize(
    'config', tiny.CONFIGS.values(), ids=tiny.CONFIGS)
# Llama and Gemma 3: without and with sliding windows.
each_kind = pytest.mark.parametrize(
    'config', [tiny.CONFIGS['llama'], tiny.CONFIGS['gemma3']],
    ids=['global', 'window'])


@each_family
def test_chunks_and_ragged_rows(config):
  """Prefill in chunks with rows of different lengths, then single tokens."""
  x = tiny.tokens(2, 16)
  expected = tiny.full(config, x)
  length = np.array([11, 6])
  cache = tiny.empty(config)
  fed = np.arange(12) < length[:, None]
  padded = np.where(fed, x[:, :12], 0)
  logits, cache = tiny.feed(config, padded, cache, np.zeros(2, int), fed)
  np.testing.assert_allclose(logits[fed], expected[:, :12][fed], **CLOSE)
  for step in range(5):
    at = length + step
    token = np.take_along_axis(x, at[:, None], axis=1)
    logits, cache = tiny.feed(config, token, cache, at)
    want = np.take_along_axis(expected, at[:, None, None], axis=1)
    np.testing.assert_allclose(logits, want, **CLOSE)


@each_kind
def test_rollback_and_ring(config):
  """Rejected drafts are overwritten; windows wrap many times."""
  total, drafts = 40, tiny.CHUNK - 1
  x = tiny.tokens(2, total)
  expected = tiny.full(config, x)
  cache = tiny.empty(config, total + drafts)
  if config.window:
    assert cache[0]['k'].shape[2] == tiny.WINDOW + drafts + 1
  rng = np.random.default_rng(1)
  base, seen = np.zeros(2, int), 0
  rows = np.arange(2)[:, None]
  while base.min() < total:
    at = np.minimum(base[:, None] + np.arange(drafts + 1), total - 1)
    accepted = rng.integers(0, drafts + 1, 2)
    right = np.arange(drafts + 1) <= accepted[:, None]
    block = np.where(right, x[rows, at], (x[rows, at] + 7) % tiny.VOCAB)
    logits, cache = tiny.feed(config, block, cache, base)
    right &= base[:, None] + np.arange(drafts + 1) < total
    np.testing.assert_allclose(
        logits[right], expected[rows, at][right], **CLOSE)
    seen += right.sum()
    base = base + accepted + 1
  assert seen == 2 * total


@each_kind
def test_row_is_used_again(config):
  """A new text in an old row sees nothing of the old one."""
  cache = tiny.empty(config)
  _, cache = tiny.feed(config, tiny.tokens(2, 36, seed=5), cache, [0, 0])
  x = tiny.tokens(2, 21)
  logits, _ = tiny.feed(config, x, cache, [0, 0])
  np.testing.assert_allclose(logits, tiny.full(config, x), **CLOSE)


@each_kind
@pytest.mark.parametrize('capacity', [12, 20])  # less, more than a ring
def test_end_of_capacity(config, capacity):
  """Entries past the end are dropped, not written elsewhere."""
  x = tiny.tokens(2, capacity)
  expected = tiny.full(config, x)
  cache = tiny.empty(config, capacity)
  _, cache = tiny.feed(config, x[:, :-2], cache, [0, 0])
  block = np.concatenate([x[:, -2:], tiny.tokens(2, 7, seed=9)], axis=1)
  before = cache
  logits, cache = tiny.feed(config, block, cache, [capacity - 2] * 2)
  np.testing.assert_allclose(logits[:, :2], expected[:, -2:], **CLOSE)
  for old, new in zip(before, cache, strict=True):
    if 'slot' not in new:  # of a ring, what is still seen was checked above
      np.testing.assert_array_equal(
          old['k'][:, :, :-2], new['k'][:, :, :-2])
      np.testing.assert_array_equal(
          old['v'][:, :, :-2], new['v'][:, :, :-2])
  logits, _ = tiny.feed(config, x[:, -1:], cache, [capacity - 1] * 2)
  np.testing.assert_allclose(logits, expected[:, -1:], **CLOSE)


PREFIX = np.array([9, 6])  # root slots


def _random_parents(seed, nodes=8):
  rng = np.random.default_rng(seed)
  # Mostly chains, so that paths are longer than a window.
  return [int(rng.integers(max(0, i - 1), i + 1)) for i in range(nodes)]


def _paths(parents):
  """Returns, per row, the rows from below the root to it."""
  paths = [[]]
  for i, parent in enumerate(parents):
    paths.append(paths[parent] + [i + 1])
  return paths


def _prefilled(config):
  """Returns (tokens, cache) with `PREFIX[b]` entries; the root is next."""
  x = tiny.tokens(2, 12)
  fed = np.arange(12) < PREFIX[:, None]
  return x, tiny.feed(config, x, tiny.empty(config), [0, 0], fed)[1]


def _score_tree(config, cache, drafts, topology, x, parents=None):
  """Returns (logits [B,N+1,V], cache) of the root and its tree."""
  root = np.take_along_axis(x, PREFIX[:, None], axis=1)
  depth = jnp.broadcast_to(
      tree.node_depth(topology, parents), drafts.shape)
  depth = jnp.concatenate([jnp.zeros((2, 1), jnp.int32), depth], axis=1)
  base = jnp.asarray(PREFIX, jnp.int32)
  block = Block(base=base, position=base[:, None] + depth,
                ancestors=tree.ancestors(topology, parents))
  block_tokens = np.concatenate([root, drafts], axis=1)
  logits, _, cache = tiny.run(
      config, tiny.params(config), block_tokens, cache, block)
  return np.asarray(logits), cache


def _expected_tree(config, x, drafts, parents):
  """Scores every path by a plain forward pass; `parents` per batch row."""
  texts, last = [], []
  for b in range(2):
    for path in _paths(parents[b]):
      text = list(x[b, :PREFIX[b] + 1]) + [drafts[b, r - 1] for r in path]
      last.append(len(text) - 1)
      texts.append(text + [0] * (20 - len(text)))
  logits = tiny.full(config, np.asarray(texts, np.int32))
  picked = logits[np.arange(len(last)), last]
  return picked.reshape(2, -1, tiny.VOCAB)


@each_family
@pytest.mark.parametrize('seed', [0, 1])
def test_tree_equals_its_paths(config, seed):
  parents = _random_parents(seed)
  assert tree.from_parents(parents).max_depth >= tiny.WINDOW
  x, cache = _prefilled(config)
  drafts = tiny.tokens(2, len(parents), seed=3)
  got, _ = _score_tree(config, cache, drafts, tree.from_parents(parents), x)
  want = _expected_tree(config, x, drafts, [parents, parents])
  np.testing.assert_allclose(got, want, **CLOSE)


@each_kind
def test_dynamic_tree_equals_its_paths(config):
  parents = [_random_parents(4), _random_parents(5)]
  topology = tree.Topology(num_nodes=8, max_depth=8, max_children=8,
                           is_chain=False, parents=None)
  x, cache = _prefilled(config)
  drafts = tiny.tokens(2, 8, seed=3)
  got, _ = _score_tree(config, cache, drafts, topology, x,
                       jnp.asarray(parents, jnp.int32))
  want = _expected_tree(config, x, drafts, parents)
  np.testing.assert_allclose(got, want, **CLOSE)


@each_kind
def test_sibling_order_does_not_matter(config):
  parents = np.array([0, 0, 1, 2, 2, 3, 5, 0])
  order = np.array([0, 3, 1, 6, 5, 4, 8, 7, 2])  # new name of each row
  again = np.zeros_like(parents)
  again[order[1:] - 1] = order[parents]
  x, cache = _prefilled(config)
  drafts = tiny.tokens(2, 8, seed=3)
  renamed = np.zeros_like(drafts)
  renamed[:, order[1:] - 1] = drafts
  a, _ = _score_tree(config, cache, drafts, tree.from_parents(parents), x)
  b, _ = _score_tree(config, cache, renamed, tree.from_parents(again), x)
  np.testing.assert_allclose(a, b[:, order], **CLOSE)


@each_kind
def test_compact_then_continue(config):
  """An accepted path, moved into place, is as good as having been fed."""
  parents = [0, 0, 1, 2, 3, 3, 5, 0]  # rows 1-3-5-7 and 2-4 are paths
  accepted = [[1, 3, 5, 7], [2, 4]]
  x, cache = _prefilled(config)
  drafts = tiny.tokens(2, 8, seed=3)
  _, cache = _score_tree(config, cache, drafts, tree.from_parents(parents), x)
  path = np.full((2, 5), 8)  # padding repeats a row
  for b, rows in enumerate(accepted):
    path[b, :len(rows) + 1] = [0, *rows]
  root = jnp.asarray(PREFIX, jnp.int32)
  cache = tuple(
      attention.compact(c, root, jnp.asarray(path)) for c in cache)
  follow = tiny.tokens(2, 3, seed=11)
  texts = np.zeros((2, 20), np.int32)
  base = PREFIX + 1 + np.array([len(a) for a in accepted])
  for b, rows in enumerate(accepted):
    text = [*x[b, :PREFIX[b] + 1], *(drafts[b, r - 1] for r in rows),
            *follow[b]]
    texts[b, :len(text)] = text
  expected = tiny.full(config, texts)
  logits, _ = tiny.feed(config, follow, cache, base)
  at = base[:, None] + np.arange(3)
  np.testing.assert_allclose(
      logits, expected[np.arange(2)[:, None], at], **CLOSE)


@each_kind
def test_resume(config, layer=1):
  """Running the lower and then the upper layers is running all of them."""
  x = tiny.tokens(2, 7)
  params = tiny.params(config)
  cache = tiny.empty(config)
  block = tiny.chain([0, 0], 7)
  whole, _, all_written = tiny.run(config, params, x, cache, block)
  none, found, cache = tiny.run(config, params, x, cache, block, stop=layer)
  assert none is None
  assert set(found) == {f'resid_{layer}'}
  logits, _, cache = tiny.run(
      config, params, found[f'resid_{layer}'], cache, block, start=layer)
  np.testing.assert_allclose(logits, whole, **CLOSE)
  for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(all_written),
                  strict=True):
    np.testing.assert_allclose(a, b, **CLOSE)


def test_taps():
  config = tiny.CONFIGS['gemma3']
  x, params = tiny.tokens(2, 7), tiny.params(config)
  cache = tiny.empty(config)
  block = tiny.chain([0, 0], 7)
  names = ('resid_0', 'resid_1', 'resid_2', 'final')
  logits, taps, _ = tiny.run(config, params, x, cache, block, taps=names)
  assert set(taps) == set(names)
  assert {t.shape for t in taps.values()} == {(2, 7, config.embed_dim)}
  np.testing.assert_allclose(
      taps['resid_0'], params['embedding'][x] * config.embed_scale, rtol=1e-6)
  model = transformer.Transformer(config)
  head = model.apply({'params': params}, taps['final'], method='head')
  np.testing.assert_allclose(head, logits, **CLOSE)
  none, taps, _ = tiny.run(config, params, x, cache, block, taps=('final',),
                           with_head=False)
  assert none is None
  assert set(taps) == {'final'}


@each_kind
def test_bfloat16_keeps_dtypes(config):
  config = dataclasses.replace(config, dtype='bfloat16')
  params = tiny.params(config)
  cache = tiny.empty(config)
  x, block = tiny.tokens(2, 4), tiny.chain([0, 0], 4)
  logits, taps, new = tiny.run(config, params, x, cache, block,
                               taps=('resid_1', 'final'))
  assert logits.dtype == jnp.float32
  assert {t.dtype for t in taps.values()} == {jnp.dtype('bfloat16')}
  # A loop carries the cache: structure, shapes and dtypes must not change.
  spec = lambda c: jax.tree.map(lambda a: (a.shape, a.dtype), c)  # noqa: E731
  assert spec(new) == spec(cache)
  assert {c['k'].dtype for c in new} == {jnp.dtype('bfloat16')}
  scale = params['layer_0']['mlp_norm']['scale']
  assert scale.dtype == jnp.float32


@each_family
def test_num_params(config):
  leaves = jax.tree.leaves(weights.abstract(config))
  assert config.num_params == sum(x.size for x in leaves)


def test_impossible_configs():
  base = dict(vocab_size=8, num_layers=2, embed_dim=8, mlp_dim=8,
              num_heads=3, num_kv_heads=3, head_dim=4)
  for change in ({'num_kv_heads': 2}, {'activation': 'relu'},
                 {'local_layers': (True,)}):
    with pytest.raises(ValueError, match=next(iter(change))):
      transformer.TransformerConfig(**{**base, **change})
