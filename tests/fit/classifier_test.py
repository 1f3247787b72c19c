"""What a classifier is trained for: its loss, and views of an image."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from specjax.distill import optimizer
from specjax.fit.classifier import ClassifierObjective, views
from specjax.fit.step import Fitter
from specjax.models.classifier import Classifier
from specjax.parallel import rules
from specjax.parallel.mesh import make_mesh

NET = Classifier.of(dict(num_classes=3, width=8, num_stages=2, num_blocks=1))


def batch(num=16):
  rng = np.random.default_rng(0)
  return {'image': rng.integers(0, 256, (num, 6, 5, 3), np.uint8),
          'label': rng.integers(0, 3, num).astype(np.int32)}


def test_the_loss():
  some, key = batch(), jax.random.key(0)
  plain = ClassifierObjective(NET)
  net, memory = jax.jit(plain.init)(key)
  loss, (scalars, _) = jax.jit(plain.loss)(net, memory, some, key)
  log_p = np.asarray(jax.nn.log_softmax(
      jax.jit(NET.apply)(net, some['image'])[1]))
  right = log_p[np.arange(16), some['label']]
  np.testing.assert_allclose(loss, -right.mean(), rtol=1e-5)
  assert scalars['accuracy'] == np.mean(log_p.argmax(-1) == some['label'])
  smooth = ClassifierObjective(NET, label_smoothing=0.3)
  loss, _ = jax.jit(smooth.loss)(net, memory, some, key)
  np.testing.assert_allclose(
      loss, -(0.7 * right + 0.3 * log_p.mean(-1)).mean(), rtol=1e-5)
  # Views differ by key, and so does their loss.
  moved = jax.jit(ClassifierObjective(NET, flip=True, padding=1).loss)
  losses = [float(moved(net, memory, some, jax.random.key(i))[0])
            for i in (0, 0, 1)]
  assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize('change', [
    {'padding': -1}, {'label_smoothing': 1.0}, {'label_smoothing': -0.1}])
def test_values_that_cannot_be_trained_for(change):
  with pytest.raises(ValueError, match=f'{list(change)[0]}='):
    ClassifierObjective(NET, **change)


def test_a_mesh_trains_alike():
  """Each row has its own view, wherever it is."""
  fitter = Fitter(
      ClassifierObjective(NET, label_smoothing=0.1, flip=True, padding=2),
      optimizer.make(learning_rate=1.0, steps=1, schedule='constant'))
  mesh = make_mesh((8, 1))
  by_rows = NamedSharding(mesh, PartitionSpec('data'))
  found = []
  for place in (jax.device_put, lambda x: rules.put(
      x, jax.tree.map(lambda _: by_rows, x))):
    state = fitter.init(jax.random.key(0))
    if found:
      state = rules.on_mesh(state, mesh)
    for _ in range(2):
      state, report = fitter.step(
          state, place(batch()), jax.random.key(1), np.float32(1e-3))
    found.append(report)
  for name in ('loss', 'grad_norm', 'accuracy'):  # sums in another order
    np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4)


def test_views():
  x = np.arange(1, 2 * 6 * 5 * 3 + 1).reshape(2, 6, 5, 3).astype(np.uint8)
  key = jax.random.key(0)
  same = views(key, jnp.asarray(x), flip=False, padding=0)
  np.testing.assert_array_equal(same, x)
  many = np.repeat(x[:1], 64, 0)
  flipped = np.asarray(views(key, many, flip=True, padding=0))
  mirrored = [np.array_equal(y, x[0, :, ::-1]) for y in flipped]
  plain = [np.array_equal(y, x[0]) for y in flipped]
  assert all(a != b for a, b in zip(mirrored, plain, strict=True))
  assert 16 < sum(mirrored) < 48
  padded = np.pad(x[0], ((2, 2), (2, 2), (0, 0)))
  crops = {padded[i:i + 6, j:j + 5].tobytes(): (i, j)
           for i in range(5) for j in range(5)}
  found = np.asarray(views(key, many, flip=False, padding=2))
  assert found.dtype == np.uint8 and found.shape == many.shape
  places = {crops[y.tobytes()] for y in found}  # each is a crop
  assert {i for i, _ in places} == {j for _, j in places} == set(range(5))
