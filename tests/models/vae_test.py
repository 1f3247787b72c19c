"""The continuous tokenizer against the published architecture in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_tokenizers
import pytest

from specjax.io.errors import FormatError
from specjax.models import vae
from specjax.models.vae import VAE, VAEConfig

SMALL = VAEConfig(channels=8, multipliers=(1, 2, 2), num_res_blocks=1,
                  latent_channels=3)


def weights(config):
  """Returns parameters of which each matters."""
  return numpy_tokenizers.weights(vae.abstract(config), 0.2)


def test_published_architecture():
  params = weights(SMALL)
  image = np.random.default_rng(1).uniform(-1, 1, (2, 8, 12, 3))
  model = VAE(SMALL)
  law = model.apply({'params': params}, jnp.asarray(image, jnp.float32),
                    method='encode')
  tokens = model.apply({'params': params}, jnp.asarray(image, jnp.float32),
                       method='tokens')
  back = model.apply({'params': params}, tokens, method='decode')
  peer = numpy_tokenizers.Continuous(SMALL, vae.to_published(SMALL, params))
  assert tokens.shape == (2, 2, 3, 3)
  np.testing.assert_allclose(tokens, 0.2325 * law.mean, rtol=1e-6)
  for one, mean, log_variance, decoded in zip(
      image, law.mean, law.log_variance, back, strict=True):
    expected = peer.encode(np.moveaxis(one, -1, 0))
    np.testing.assert_allclose(mean, expected[0], atol=2e-3)
    np.testing.assert_allclose(
        log_variance, np.clip(expected[1], -30, 20), atol=2e-3)
    np.testing.assert_allclose(
        decoded, peer.decode(expected[0]), atol=5e-3)


def test_names_and_what_does_not_fit():
  params = weights(SMALL)
  tensors = vae.to_published(SMALL, params)
  for name in ('encoder.down.2.attn.0.q.weight', 'encoder.mid.block_1.norm1'
               '.weight', 'decoder.up.2.block.1.conv1.weight',
               'decoder.up.1.upsample.conv.weight', 'quant_conv.weight',
               'encoder.down.0.downsample.conv.bias'):
    assert name in tensors, name
  assert not [n for n in tensors if n.startswith('decoder.up') and 'attn' in n]
  assert tensors['quant_conv.weight'].shape == (6, 6, 1, 1)
  again = vae.from_published(
      SMALL, {**tensors, 'loss.logvar': np.zeros(())})
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params),
                  strict=True):
    np.testing.assert_array_equal(a, b)
  for change, text in (
      ({'quant_conv.bias': None}, 'missing tensors: quant_conv.bias'),
      ({'extra.weight': np.ones(3)}, 'without a place: extra.weight'),
      ({'quant_conv.bias': np.ones(8)}, r"'quant_conv.bias' has shape \(8,\)")):
    bad = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    with pytest.raises(FormatError, match=text):
      vae.from_published(SMALL, bad)


def test_law_of_the_latents():
  mean = jnp.asarray(np.random.default_rng(0).normal(size=(1, 50, 50, 4)))
  law = vae.Posterior(mean, jnp.full_like(mean, np.log(0.25)))
  away = (law.sample(jax.random.key(0)) - mean) / 0.5
  assert abs(float(away.mean())) < 0.04 and abs(float(away.std()) - 1) < 0.03
  want = 0.5 * np.sum(np.square(mean) + 0.25 - 1 - np.log(0.25))
  assert float(law.kl()[0]) == pytest.approx(want, rel=1e-4)
  assert not np.any(vae.Posterior(
      jnp.zeros((2, 3, 3, 4)), jnp.zeros((2, 3, 3, 4))).kl())


def test_gradients_reach_the_encoder():
  params = weights(dataclasses.replace(SMALL, multipliers=(1, 2)))
  model = VAE(dataclasses.replace(SMALL, multipliers=(1, 2)))

  def loss(params):
    image, law = model.apply({'params': params}, jnp.ones((1, 4, 4, 3)),
                             jax.random.key(0))
    return jnp.mean(jnp.square(image)) + 1e-3 * jnp.sum(law.kl())

  grads = jax.grad(loss)(params)
  assert all(np.any(g) for g in jax.tree.leaves(grads['encoder']['conv_in']))


def test_shapes_that_cannot_be():
  for values in ({'channels': 40}, {'multipliers': ()},
                 {'latent_channels': 0}, {'scale': 0.0}):
    with pytest.raises(ValueError, match='must be|groups|sizes'):
      VAEConfig(**values)
