"""The image tokenizer against the published architecture in torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.io.errors import FormatError
from specjax.models import vq
from specjax.models.vq import VQ, VQConfig

torch = pytest.importorskip('torch')
F = torch.nn.functional

SMALL = VQConfig(num_codes=29, code_dim=4, channels=8, multipliers=(1, 2),
                 num_res_blocks=1, latent_dim=6)


def weights(config, seed=0):
  """Returns parameters of which each matters."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(
      rng.normal(size=x.shape) * (0.3 if len(x.shape) > 1 else 0.1)
      + (1.0 if len(x.shape) == 1 else 0.0), jnp.float32),
                      vq.abstract(config))


class Official:
  """LlamaGen's tokenizer, written from its tensors' names."""

  def __init__(self, config, tensors):
    self.c = config
    self.w = {k: torch.tensor(v) for k, v in tensors.items()}

  def conv(self, x, name, **kwargs):
    kernel = self.w[f'{name}.weight']
    kwargs.setdefault('padding', kernel.shape[-1] // 2)
    return F.conv2d(x, kernel, self.w[f'{name}.bias'], **kwargs)

  def norm(self, x, name):
    return F.group_norm(
        x, min(32, x.shape[1]), self.w[f'{name}.weight'],
        self.w[f'{name}.bias'], 1e-6)

  def res(self, x, name):
    h = self.conv(F.silu(self.norm(x, f'{name}.norm1')), f'{name}.conv1')
    h = self.conv(F.silu(self.norm(h, f'{name}.norm2')), f'{name}.conv2')
    if f'{name}.nin_shortcut.weight' in self.w:
      x = self.conv(x, f'{name}.nin_shortcut')
    return x + h

  def attend(self, x, name):
    h = self.norm(x, f'{name}.norm')
    q, k, v = (self.conv(h, f'{name}.{n}').flatten(2) for n in 'qkv')
    share = (q.mT @ k * x.shape[1] ** -0.5).softmax(-1)
    return x + self.conv(
        (v @ share.mT).reshape(x.shape), f'{name}.proj_out')

  def level(self, x, name, blocks):
    for i in range(blocks):
      x = self.res(x, f'{name}.res.{i}')
      if f'{name}.attn.{i}.q.weight' in self.w:
        x = self.attend(x, f'{name}.attn.{i}')
    if f'{name}.downsample.conv.weight' in self.w:
      x = self.conv(F.pad(x, (0, 1, 0, 1)), f'{name}.downsample.conv',
                    stride=2, padding=0)
    if f'{name}.upsample.conv.weight' in self.w:
      x = F.interpolate(x, scale_factor=2.0, mode='nearest')
      x = self.conv(x, f'{name}.upsample.conv')
    return x

  def middle(self, x, name):
    x = self.attend(self.res(x, f'{name}.mid.0'), f'{name}.mid.1')
    return self.res(x, f'{name}.mid.2')

  def codes(self):
    return F.normalize(self.w['quantize.embedding.weight'], dim=-1)

  def encode(self, image):
    x = self.conv(image, 'encoder.conv_in')
    for i in range(len(self.c.multipliers)):
      x = self.level(x, f'encoder.conv_blocks.{i}', self.c.num_res_blocks)
    x = F.silu(self.norm(self.middle(x, 'encoder'), 'encoder.norm_out'))
    x = self.conv(self.conv(x, 'encoder.conv_out'), 'quant_conv')
    x = F.normalize(x, dim=1).movedim(1, -1)
    return (x @ self.codes().T).argmax(-1), x

  def decode(self, ids):
    x = self.codes()[ids].movedim(-1, 1)
    x = self.conv(self.conv(x, 'post_quant_conv'), 'decoder.conv_in')
    x = self.middle(x, 'decoder')
    for i in range(len(self.c.multipliers)):
      x = self.level(x, f'decoder.conv_blocks.{i}', self.c.num_res_blocks + 1)
    x = F.silu(self.norm(x, 'decoder.norm_out'))
    return self.conv(x, 'decoder.conv_out')


def test_published_architecture():
  config = dataclasses.replace(SMALL, multipliers=(1, 1, 2),
                               num_res_blocks=2)
  params = weights(config)
  image = np.random.default_rng(1).uniform(-1, 1, (2, 12, 8, 3))
  out = jax.jit(VQ(config).apply)(
      {'params': params}, jnp.asarray(image, jnp.float32))
  peer = Official(config, vq.to_llamagen(params))
  ids, encoded = peer.encode(
      torch.tensor(image, dtype=torch.float32).movedim(-1, 1))
  assert out.ids.shape == (2, 3, 2) and len(np.unique(out.ids)) > 2
  np.testing.assert_array_equal(out.ids, ids.numpy())
  np.testing.assert_allclose(out.encoded, encoded.numpy(), atol=2e-5)
  np.testing.assert_allclose(
      out.image, peer.decode(ids).movedim(1, -1).numpy(), atol=2e-3)


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
  tensors = vq.to_llamagen(params)
  assert 'encoder.conv_blocks.1.attn.0.proj_out.weight' in tensors
  assert 'decoder.conv_blocks.0.upsample.conv.bias' in tensors
  assert tensors['quant_conv.weight'].shape == (4, 6, 1, 1)
  buffers = {'quantize.codebook_used': np.zeros(5)}
  again = vq.from_llamagen(SMALL, {**tensors, **buffers})
  jax.tree.map(np.testing.assert_array_equal, params, again)
  with pytest.raises(FormatError, match='quantize.embedding.weight'):
    vq.from_llamagen(dataclasses.replace(SMALL, num_codes=30), tensors)
  with pytest.raises(FormatError, match='missing tensors: quant_conv.bias'):
    vq.from_llamagen(SMALL, {k: v for k, v in tensors.items()
                             if k != 'quant_conv.bias'})
  with pytest.raises(FormatError, match='without a place: other.weight'):
    vq.from_llamagen(SMALL, {**tensors, 'other.weight': np.zeros(3)})


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
