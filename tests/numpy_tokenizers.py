"""Published image tokenizers, written in numpy from their tensors' names."""

import jax
import jax.numpy as jnp
import numpy as np


def weights(shapes, spread, seed=0):
  """Returns parameters of which each matters, of `abstract`'s shapes.

  Matrices deviate by `spread` from 0, vectors by 0.1 from 1.
  """
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(
      rng.normal(size=x.shape) * (spread if len(x.shape) > 1 else 0.1)
      + (1.0 if len(x.shape) == 1 else 0.0), jnp.float32), shapes)


def silu(x):
  return x / (1 + np.exp(-x))


class Official:
  """LlamaGen's tokenizer; arrays of its layers are [C,H,W] each."""

  block = 'res'  # what blocks of a level are called

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
      x = self.res(x, f'{name}.{self.block}.{i}')
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


class Continuous(Official):
  """KL-16, the tokenizer of MAR."""

  block = 'block'

  def middle(self, x, name):
    x = self.res(x, f'{name}.mid.block_1')
    return self.res(self.attend(x, f'{name}.mid.attn_1'),
                    f'{name}.mid.block_2')

  def encode(self, image):
    x = self.conv(image, 'encoder.conv_in')
    for i in range(len(self.c.multipliers)):
      x = self.level(x, f'encoder.down.{i}', self.c.num_res_blocks)
    x = silu(self.norm(self.middle(x, 'encoder'), 'encoder.norm_out'))
    x = self.conv(self.conv(x, 'encoder.conv_out'), 'quant_conv')
    return np.split(np.moveaxis(x, 0, -1), 2, axis=-1)

  def decode(self, latents):
    x = np.moveaxis(latents, -1, 0)
    x = self.conv(self.conv(x, 'post_quant_conv'), 'decoder.conv_in')
    x = self.middle(x, 'decoder')
    for i in reversed(range(len(self.c.multipliers))):
      x = self.level(x, f'decoder.up.{i}', self.c.num_res_blocks + 1)
    x = silu(self.norm(x, 'decoder.norm_out'))
    return np.moveaxis(self.conv(x, 'decoder.conv_out'), 0, -1)
