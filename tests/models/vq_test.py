"""The image tokenizer against the published architecture in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.io.errors import FormatError
from specjax.models import vq, vq_weights
from specjax.models.vq import VQ, VQConfig

SMALL = VQConfig(num_codes=29, code_dim=4, channels=8, multipliers=(1, 2),
                 num_res_blocks=1, latent_dim=6)


def weights(config, seed=0):
  """Returns parameters of which each matters."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(
      rng.normal(size=x.shape) * (0.3 if len(x.shape) > 1 else 0.1)
      + (1.0 if len(x.shape) == 1 else 0.0), jnp.float32),
                      vq.abstract(config))


def silu(x):
  return x / (1 + np.exp(-x))


class Official:
  """LlamaGen's tokenizer, written from its tensors' names, [C,H,W] each."""

  def __init__(self, config, tensors):
    self.c, self.w = config, tensors

  def conv(self, x, name, stride=1, pad=None):
    kernel = self.w[f'{name}.weight']
    if pad is None:
      pad = ((0, 0), *((size // 2,) * 2 for size in kernel.shape[2:]))
    views = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, pad), kernel.shape[2:], (1, 2))[:, ::stride, ::stride]
    found = np.einsum('ihwab,oiab->ohw', views, kernel)
    return found + self.w[f'{name}.bias'][:, None, None]

  def norm(self, x, name):
    parts = x.reshape(min(32, len(x)), -1)
    parts = parts - parts.mean(1, keepdims=True)
    parts = parts / np.sqrt((parts ** 2).mean(1, keepdims=True) + 1e-6)
    return (parts.reshape(x.shape) * self.w[f'{name}.weight'][:, None, None]
            + self.w[f'{name}.bias'][:, None, None])

  def res(self, x, name):
    h = self.conv(silu(self.norm(x, f'{name}.norm1')), f'{name}.conv1')
    h = self.conv(silu(self.norm(h, f'{name}.norm2')), f'{name}.conv2')
    if f'{name}.nin_shortcut.weight' in self.w:
      x = self.conv(x, f'{name}.nin_shortcut')
    return x + h

  def attend(self, x, name):
    h = self.norm(x, f'{name}.norm')
    q, k, v = (self.conv(h, f'{name}.{n}').reshape(len(x), -1)
               for n in 'qkv')
    scores = q.T @ k * len(x) ** -0.5
    share = np.exp(scores - scores.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    return x + self.conv((v @ share.T).reshape(x.shape), f'{name}.proj_out')

  def level(self, x, name, blocks):
    for i in range(blocks):
      x = self.res(x, f'{name}.res.{i}')
      if f'{name}.attn.{i}.q.weight' in self.w:
        x = self.attend(x, f'{name}.attn.{i}')
    if f'{name}.downsample.conv.weight' in self.w:
      x = self.conv(x, f'{name}.downsample.conv', 2,
                    ((0, 0), (0, 1), (0, 1)))
    if f'{name}.upsample.conv.weight' in self.w:
      x = self.conv(x.repeat(2, 1).repeat(2, 2), f'{name}.upsample.conv')
    return x

  def middle(self, x, name):
    x = self.attend(self.res(x, f'{name}.mid.0'), f'{name}.mid.1')
    return self.res(x, f'{name}.mid.2')

  def codes(self):
    book = self.w['quantize.embedding.weight']
    return book / np.linalg.norm(book, axis=-1, keepdims=True)

  def encode(self, image):
    x = self.conv(image, 'encoder.conv_in')
    for i in range(len(self.c.multipliers)):
      x = self.level(x, f'encoder.conv_blocks.{i}', self.c.num_res_blocks)
    x = silu(self.norm(self.middle(x, 'encoder'), 'encoder.norm_out'))
    x = self.conv(self.conv(x, 'encoder.conv_out'), 'quant_conv')
    x = np.moveaxis(x / np.linalg.norm(x, axis=0), 0, -1)
    return (x @ self.codes().T).argmax(-1), x

  def decode(self, ids):
    x = np.moveaxis(self.codes()[ids], -1, 0)
    x = self.conv(self.conv(x, 'post_quant_conv'), 'decoder.conv_in')
    x = self.middle(x, 'decoder')
    for i in range(len(self.c.multipliers)):
      x = self.level(x, f'decoder.conv_blocks.{i}', self.c.num_res_blocks + 1)
    x = silu(self.norm(x, 'decoder.norm_out'))
    return np.moveaxis(self.conv(x, 'decoder.conv_out'), 0, -1)


def test_published_architecture():
  config = dataclasses.replace(SMALL, multipliers=(1, 1, 2),
                               num_res_blocks=2)
  params = weights(config)
  image = np.random.default_rng(1).uniform(-1, 1, (2, 12, 8, 3))
  out = jax.jit(VQ(config).apply)(
      {'params': params}, jnp.asarray(image, jnp.float32))
  peer = Official(config, vq_weights.to_llamagen(params))
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
