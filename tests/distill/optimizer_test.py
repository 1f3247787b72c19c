"""Schedules by hand, AdamW by hand, which weights Muon moves and how."""

from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specjax.distill import optimizer


def params():
  rng = np.random.default_rng(0)
  shapes = {
      'layer_0': {'attention': {'qkv': (16, 2, 3, 4), 'out': (2, 1, 4, 16)},
                  'mlp': {'gate_up': (16, 2, 12), 'down': (12, 16)},
                  'norm': {'scale': (16,)}},
      'fuse': (32, 16), 'markov_in': (20, 4), 'confidence_bias': ()}
  return jax.tree.map(
      lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes,
      is_leaf=lambda s: isinstance(s, tuple))


def first_update(grads, **options):
  tree = params()
  move = optimizer.make(**{'learning_rate': 0.1, 'steps': 10,
                           'schedule': 'constant', **options})
  updates, _ = jax.jit(move.update)(grads, move.init(tree), tree)
  return updates


@pytest.mark.parametrize('schedule,middle,end', [
    ('cosine', 0.5, 0.0), ('linear', 0.5, 0.0), ('constant', 1.0, 1.0)])
def test_schedules(schedule, middle, end):
  rate = optimizer.learning_rate(2.0, 24, warmup=4, schedule=schedule)
  found = jax.vmap(rate)(jnp.asarray([0, 1, 3, 4, 14, 24, 99]))
  np.testing.assert_allclose(
      found, [0.5, 1, 2, 2, 2 * middle, 2 * end, 2 * end], atol=1e-6)
  plain = optimizer.learning_rate(2.0, 24, schedule=schedule)
  assert plain(0) == 2.0


def test_cosine_is_half_a_period():
  rate = optimizer.learning_rate(1.0, 12)
  np.testing.assert_allclose(rate(2), (1 + np.cos(np.pi / 6)) / 2, rtol=1e-6)


def test_first_step_of_adamw_and_what_decays():
  grads = jax.tree.map(lambda x: -2.0 * jnp.ones_like(x), params())
  plain = first_update(grads)
  for update in jax.tree.leaves(plain):  # m / sqrt(v) is the sign
    np.testing.assert_allclose(update, 0.1, rtol=1e-5)
  decayed = first_update(grads, weight_decay=0.5)
  def check(update, x):
    decay = 0.05 * x if x.ndim >= 2 else 0.0
    np.testing.assert_allclose(update, 0.1 - decay, atol=1e-5)
  jax.tree.map(check, decayed, params())


def test_clipping_is_over_all_parameters():
  tree = {'a': jnp.zeros(3), 'b': jnp.zeros(())}
  grads = {'a': jnp.full(3, 100.0), 'b': jnp.full((), 100.0)}  # norm 200
  second = {'a': jnp.full(3, 0.1), 'b': jnp.full((), 0.1)}

  def moved(clip_norm):
    move = optimizer.make(learning_rate=1.0, steps=9, schedule='constant',
                          clip_norm=clip_norm, betas=(0.5, 0.5))
    _, state = move.update(grads, move.init(tree), tree)
    return move.update(second, state, tree)[0]['b']

  def adam(g1, g2):  # bias corrections: 1 - 0.5^2
    m, v = 0.25 * g1 + 0.5 * g2, 0.25 * g1 ** 2 + 0.5 * g2 ** 2
    return -(m / 0.75) / np.sqrt(v / 0.75)

  np.testing.assert_allclose(moved(1.0), adam(0.5, 0.1), rtol=1e-5)
  np.testing.assert_allclose(moved(None), adam(100, 0.1), rtol=1e-5)


def test_muon_moves_matrices_by_orthogonal_steps():
  rng = np.random.default_rng(1)
  grads = jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params())
  adam, muon = (first_update(grads, muon=m) for m in (False, True))
  for name in ('markov_in', 'confidence_bias'):
    np.testing.assert_allclose(muon[name], adam[name], rtol=1e-6)
  layer = muon['layer_0']
  np.testing.assert_allclose(
      layer['norm']['scale'], adam['layer_0']['norm']['scale'], rtol=1e-6)
  attention, mlp = layer['attention'], layer['mlp']
  for matrix in (attention['qkv'].reshape(16, -1), muon['fuse'],
                 attention['out'].reshape(-1, 16), mlp['down'],
                 mlp['gate_up'][:, 0], mlp['gate_up'][:, 1]):
    values = np.linalg.svd(matrix, compute_uv=False)
    # Newton-Schulz leaves singular values within [0.7, 1.2] of one another's
    # common size, which is 0.2 sqrt(the greater dimension).
    size = 0.1 * 0.2 * np.sqrt(max(matrix.shape))
    assert values.min() > 0.6 * size and values.max() < 1.3 * size


def test_boxes_of_logical_axes_change_nothing():
  boxed = jax.tree.map(
      lambda x: meta.Partitioned(x, (None,) * x.ndim), params())
  move = optimizer.make(learning_rate=0.1, steps=10, muon=True)
  found = move.update(boxed, move.init(boxed), boxed)[0]
  plain = move.update(params(), move.init(params()), params())[0]
  jax.tree.map(np.testing.assert_array_equal, meta.unbox(found), plain)


@pytest.mark.parametrize('muon', [False, True])
def test_training_reaches_the_minimum(muon):
  tree = {'down': jnp.ones((4, 3)), 'scale': jnp.ones(3)}
  goal = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)), jnp.float32)
  move = optimizer.make(
      learning_rate=0.4, steps=200, warmup=10, muon=muon)

  def objective(p):
    return jnp.sum(jnp.square(p['down'] - goal)) + jnp.sum(
        jnp.square(p['scale'] - 3))

  def step(carry, _):
    p, state = carry
    updates, state = move.update(jax.grad(objective)(p), state, p)
    return (optax.apply_updates(p, updates), state), None

  (tree, _), _ = jax.lax.scan(step, (tree, move.init(tree)), length=200)
  assert objective(tree) < 1e-2


@pytest.mark.parametrize('bad', [
    dict(learning_rate=0.0), dict(steps=0), dict(warmup=11), dict(warmup=-1),
    dict(schedule='step'), dict(betas=(0.9, 1.0)), dict(weight_decay=-1.0),
    dict(clip_norm=0.0)])
def test_errors(bad):
  with pytest.raises(ValueError):
    optimizer.make(**{'learning_rate': 0.1, 'steps': 10, **bad})
