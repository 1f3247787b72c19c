"""The network of the classifier: shapes, invariances, options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.models.classifier import Classifier, ClassifierConfig

SMALL = ClassifierConfig(num_classes=3, width=8, num_stages=2, num_blocks=1)
RNG = np.random.default_rng(0)


@pytest.fixture(scope='module', name='network')
def _network():
  network = Classifier(SMALL)
  return network, network.init(jax.random.key(0)), jax.jit(network.apply)


def test_outputs_do_not_depend_on_the_batch(network):
  net, params, apply = network
  images = RNG.integers(0, 256, (4, 12, 8, 3), dtype=np.uint8)
  features, logits = apply(params, images)
  assert features.shape == (4, net.num_features) == (4, 16)
  assert logits.shape == (4, 3)
  assert features.dtype == logits.dtype == jnp.float32
  assert features.std(0).max() > 1e-3  # images are told apart
  alone = apply(params, images[2:3])
  np.testing.assert_allclose(alone[0], features[2:3], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(alone[1], logits[2:3], rtol=1e-4, atol=1e-5)
  head = params['head']
  np.testing.assert_allclose(
      logits, features @ head['kernel'] + head['bias'], rtol=1e-4, atol=1e-5)


def test_resolution_and_depth():
  deep = Classifier(ClassifierConfig(width=16, num_stages=3, num_blocks=2))
  shapes = jax.eval_shape(deep.init, jax.random.key(0))
  widths = [shapes[f'block_{s}_1']['conv_1']['kernel'].shape
            for s in range(3)]
  assert widths == [(3, 3, 16, 16), (3, 3, 32, 32), (3, 3, 64, 64)]
  # Only blocks that change the width have a matrix beside them.
  assert ['skip' in shapes[f'block_{s}_0'] for s in range(3)] == [
      False, True, True]
  assert deep.num_features == 64


def test_bfloat16_is_near_float32(network):
  _, params, apply = network
  half = Classifier.of({**Classifier(SMALL).options, 'dtype': 'bfloat16'})
  images = RNG.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
  one, two = apply(params, images)[0], half.apply(params, images)[0]
  assert two.dtype == jnp.float32 and not np.array_equal(one, two)
  np.testing.assert_allclose(one, two, atol=0.05 * np.abs(one).max())


def test_options():
  assert Classifier.of(Classifier(SMALL).options) == Classifier(SMALL)
  for options, text in (
      ({'depth': 3}, "unknown option 'depth'"), ({'width': 12}, 'width=12'),
      ({'num_classes': 1}, 'num_classes=1'), ({'num_blocks': 0}, 'num_block'),
      ({'num_stages': 0}, 'num_stages=0'), ({'dtype': 'int8'}, "'int8'")):
    with pytest.raises(ValueError, match=text):
      Classifier.of(options)
