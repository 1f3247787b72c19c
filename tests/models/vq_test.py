"""The image tokenizer against the published architecture in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_tokenizers
import pytest

from specjax.io.errors import FormatError
from specjax.models import vq, vq_weights
from specjax.models.vq import VQ, VQConfig

SMALL = VQConfig(num_codes=29, code_dim=4, channels=8, multipliers=(1, 2),
                 num_res_blocks=1, latent_dim=6)


def weights(config):
  """Returns parameters of which each matters."""
  return numpy_tokenizers.weights(vq.abstract(config), 0.3)


def test_published_architecture():
  config = dataclasses.replace(SMALL, multipliers=(1, 1, 2),
                               num_res_blocks=2)
  params = weights(config)
  image = np.random.default_rng(1).uniform(-1, 1, (2, 12, 8, 3))
  out = jax.jit(VQ(config).apply)(
      {'params': params}, jnp.asarray(image, jnp.float32))
  peer = numpy_tokenizers.Official(config, vq_weights.to_llamagen(params))
  assert out.ids.shape == (2, 3, 2) and len(np.unique(out.ids)) > 2
  for one, ids, encoded, decoded in zip(
      image, out.ids, out.encoded, out.image, strict=True):
    expected, vectors = peer.encode(np.moveaxis(one, -1, 0))
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(encoded, vectors, atol=2e-5)
    np.testing.assert_allclose(decoded, peer.decode(expected), atol=2e-3)


def test_tokens_and_back():
  params = weights(SMALL)
  model, wrapped = VQ(SMALL), {'params': weights(SMALL)}
  image = jnp.asarray(
      np.random.default_rng(2).uniform(-1, 1, (3, 8, 8, 3)), jnp.float32)
  whole = model.apply(wrapped, image)
  ids = model.apply(wrapped, image, method='tokens')
  np.testing.assert_array_equal(whole.ids, ids)
  np.testing.assert_allclose(
      model.apply(wrapped, ids, method='decode'), whole.image, atol=1e-4)
  np.testing.assert_allclose(
      np.linalg.norm(whole.codes, axis=-1), 1, atol=1e-6)
  # The nearest by distance, among unit rows.
  book = np.asarray(params['codebook'])
  book = book / np.linalg.norm(book, axis=-1, keepdims=True)
  gap = np.asarray(whole.encoded)[..., None, :] - book
  np.testing.assert_array_equal(
      np.argmin(np.sum(gap * gap, -1), -1), whole.ids)


def test_gradients_pass_through_the_codes():
  params = weights(SMALL)
  image = jnp.asarray(
      np.random.default_rng(2).uniform(-1, 1, (1, 4, 4, 3)), jnp.float32)

  def loss(params):
    return jnp.sum(VQ(SMALL).apply({'params': params}, image).image ** 2)
  grads = jax.grad(loss)(params)
  assert np.abs(grads['encoder']['conv_in']['kernel']).max() > 0
  assert np.abs(grads['decoder']['conv_out']['kernel']).max() > 0
  assert not np.any(grads['codebook'])  # losses of its own move it


def test_converter_round_trip_and_errors():
  params = weights(SMALL)
  tensors = vq_weights.to_llamagen(params)
  assert 'encoder.conv_blocks.1.attn.0.proj_out.weight' in tensors
  assert 'decoder.conv_blocks.0.upsample.conv.bias' in tensors
  assert tensors['quant_conv.weight'].shape == (4, 6, 1, 1)
  buffers = {'quantize.codebook_used': np.zeros(5)}
  again = vq_weights.from_llamagen(SMALL, {**tensors, **buffers})
  jax.tree.map(np.testing.assert_array_equal, params, again)
  with pytest.raises(FormatError, match='quantize.embedding.weight'):
    vq_weights.from_llamagen(dataclasses.replace(SMALL, num_codes=30), tensors)
  with pytest.raises(FormatError, match='missing tensors: quant_conv.bias'):
    vq_weights.from_llamagen(SMALL, {k: v for k, v in tensors.items()
                             if k != 'quant_conv.bias'})
  with pytest.raises(FormatError, match='without a place: other.weight'):
    vq_weights.from_llamagen(SMALL, {**tensors, 'other.weight': np.zeros(3)})


def test_published_sizes():
  """72 M and 70 M parameters are reported."""
  for config, millions in ((vq.VQ16, 72), (vq.VQ8, 70)):
    size = sum(x.size for x in jax.tree.leaves(vq.abstract(config)))
    assert abs(size / 1e6 - millions) < 1
  assert (vq.VQ16.factor, vq.VQ8.factor) == (16, 8)


def test_shapes_that_cannot_be():
  with pytest.raises(ValueError, match='>= 1'):
    VQConfig(multipliers=(1, 0))
  with pytest.raises(ValueError, match='groups'):
    VQConfig(channels=40)
