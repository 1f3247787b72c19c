"""Published image tokenizers, written in numpy from their tensors' names."""

import numpy as np


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
