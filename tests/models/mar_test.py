"""MAR against plain numpy that keeps only what is not masked; its schedule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from specjax.models import mar, named
from specjax.models.diffusion_head import DenoisingMLP
from specjax.models.mar import MAR

TINY = MAR(num_tokens=9, channels=3, num_classes=4, width=8, num_encoder=2,
           num_decoder=2, num_heads=2, buffer=3)


def weights(model=TINY, seed=0):
  """Returns random parameters, norms and biases included."""
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.normal(
      float('norm' in name and 'weight' in name), 0.3, shape), jnp.float32)
          for name, shape in model.shapes.items()}


def numpy_mar(tensors, tokens, is_masked, vector, model):
  """One image: unmasked tokens are gathered, as the published code does."""
  get = lambda name: np.asarray(tensors[name], float)  # noqa: E731

  def linear(name, x):
    return x @ get(f'{name}.weight').T + get(f'{name}.bias')

  def norm(name, x):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x * get(f'{name}.weight') + get(f'{name}.bias')

  def block(name, x):
    heads, dim = model.num_heads, model.width // model.num_heads
    qkv = linear(f'{name}.attn.qkv', norm(f'{name}.norm1', x))
    q, k, v = (part.reshape(-1, heads, dim).swapaxes(0, 1)
               for part in np.split(qkv, 3, axis=1))
    share = special.softmax(q @ k.swapaxes(1, 2) / np.sqrt(dim), axis=-1)
    x = x + linear(f'{name}.attn.proj', (share @ v).swapaxes(0, 1).reshape(
        len(x), -1))
    h = linear(f'{name}.mlp.fc1', norm(f'{name}.norm2', x))
    h = h * 0.5 * (1 + special.erf(h / np.sqrt(2)))
    return x + linear(f'{name}.mlp.fc2', h)

  x = np.concatenate([np.tile(vector, (model.buffer, 1)),
                      linear('z_proj', tokens)])
  x = norm('z_proj_ln', x + get('encoder_pos_embed_learned')[0])
  kept = np.concatenate([np.ones(model.buffer, bool), ~is_masked])
  x = x[kept]
  for i in range(model.num_encoder):
    x = block(f'encoder_blocks.{i}', x)
  x = linear('decoder_embed', norm('encoder_norm', x))
  full = np.tile(get('mask_token')[0], (len(kept), 1))
  full[kept] = x
  x = full + get('decoder_pos_embed_learned')[0]
  for i in range(model.num_decoder):
    x = block(f'decoder_blocks.{i}', x)
  x = norm('decoder_norm', x)[model.buffer:]
  return x + get('diffusion_pos_embed_learned')[0]


def test_masked_attention_is_the_published_gather():
  rng = np.random.default_rng(1)
  params = weights()
  tensors = named.save(params, tables=mar.TABLES)
  tokens = rng.normal(size=(5, 9, 3))
  is_masked = rng.random((5, 9)) < np.linspace(0, 1, 5)[:, None]
  label = np.asarray([0, 3, 4, 1, 4])  # 4: any
  found = TINY(params, jnp.asarray(tokens, jnp.float32),
               jnp.asarray(is_masked), jnp.asarray(label))
  table = np.concatenate([tensors['class_emb.weight'],
                          tensors['fake_latent']])
  for i in range(5):
    want = numpy_mar(tensors, tokens[i], is_masked[i], table[label[i]], TINY)
    np.testing.assert_allclose(found[i], want, atol=2e-4)
  # Nothing of a masked token is read, a number or not.
  worse = np.where(is_masked[..., None], np.nan, tokens)
  again = TINY(params, jnp.asarray(worse, jnp.float32),
               jnp.asarray(is_masked), jnp.asarray(label))
  np.testing.assert_array_equal(found, again)


@pytest.mark.parametrize(('width', 'blocks', 'heads', 'mlp', 'millions'), [
    (768, 12, 12, (6, 1024), 207.9), (1024, 16, 16, (8, 1280), 478.3),
    (1280, 20, 16, (12, 1536), 942.4)])
def test_published_sizes(width, blocks, heads, mlp, millions):
  model = MAR(width=width, num_encoder=blocks, num_decoder=blocks,
              num_heads=heads)
  head = DenoisingMLP(16, width, mlp[1], mlp[0])
  assert (model.num_params + head.num_params) / 1e6 == pytest.approx(
      millions, abs=0.06)


def test_fresh_parameters_and_names():
  params = TINY.init(jax.random.key(0))
  assert {k: v.shape for k, v in params.items()} == TINY.shapes
  tensors = named.save(params, tables=mar.TABLES)
  assert tensors['z_proj.weight'].shape == (8, 3)
  assert tensors['class_emb.weight'].shape == (4, 8)
  back = named.load(tensors, TINY.shapes, tables=mar.TABLES)
  for name, value in params.items():
    np.testing.assert_array_equal(value, back[name])
  with pytest.raises(ValueError, match=r'z_proj.weight: shape \(8, 2\)'):
    named.load(tensors | {'z_proj.weight': np.ones((8, 2))}, TINY.shapes,
               tables=mar.TABLES, of='MAR of 3 channels')


def test_low_precision_stays_close():
  params = weights()
  rng = np.random.default_rng(2)
  inputs = (jnp.asarray(rng.normal(size=(2, 9, 3)), jnp.float32),
            jnp.asarray(rng.random((2, 9)) < 0.5), jnp.asarray([1, 2]))
  low = dataclasses.replace(TINY, dtype='bfloat16')(params, *inputs)
  assert low.dtype == jnp.float32
  np.testing.assert_allclose(low, TINY(params, *inputs), atol=0.15)


@pytest.mark.parametrize('steps', [1, 2, 7, 16, 32, 64, 255, 256])
def test_schedule(steps):
  left = mar.num_masked(256, steps)
  made = -np.diff(left)
  assert left[0] == 256 and left[-1] == 0 and len(made) == steps
  assert made.min() >= 1 and made.sum() == 256
  most = {64: 7, 32: 13, 256: 1}.get(steps)
  assert most is None or made.max() == most


@pytest.mark.parametrize(('values', 'text'), [
    ({'width': 9, 'num_heads': 2}, 'multiple of num_heads=2'),
    ({'num_tokens': 0}, 'num_tokens=0'), ({'dtype': 'int8'}, "dtype='int8'")])
def test_bad_shapes_are_refused(values, text):
  with pytest.raises(ValueError, match=text):
    MAR(**values)
  with pytest.raises(ValueError, match='num_iterations=5'):
    mar.num_masked(4, 5)
