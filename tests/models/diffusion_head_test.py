"""MAR's head against plain numpy, its names and sizes, guidance, densities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.core import chains, density
from specjax.core import keys as keys_lib
from specjax.models import named
from specjax.models.diffusion import Diffusion, Time
from specjax.models.diffusion_head import DenoisingMLP, GuidedHead

HEAD = DenoisingMLP(channels=3, condition_dim=5, width=16, num_blocks=2)


def weights(head=HEAD, seed=0):
  """Returns random parameters: those that begin a training are half zero."""
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.normal(
      float(name.endswith('ln.weight')), 0.3, shape), jnp.float32)
          for name, shape in head.shapes.items()}


def numpy_head(tensors, x, number, z, num_blocks, prefix='diffloss.net.'):
  """The published architecture on published names, in float64."""
  get = lambda name: np.asarray(tensors[prefix + name], float)  # noqa: E731
  silu = lambda h: h / (1 + np.exp(-h))  # noqa: E731

  def linear(name, h):
    return h @ get(f'{name}.weight').T + get(f'{name}.bias')

  def norm(h):
    h = h - h.mean(axis=-1, keepdims=True)
    return h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + 1e-6)

  frequency = np.exp(-np.log(10000) * np.arange(128) / 128)
  angle = number[:, None] * frequency
  wave = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
  y = linear('time_embed.mlp.2', silu(linear('time_embed.mlp.0', wave)))
  y = y + linear('cond_embed', z)
  h = linear('input_proj', x)
  for i in range(num_blocks):
    block = f'res_blocks.{i}'
    shift, scale, gate = np.split(
        linear(f'{block}.adaLN_modulation.1', silu(y)), 3, axis=1)
    inner = norm(h) * get(f'{block}.in_ln.weight') + get(
        f'{block}.in_ln.bias')
    inner = linear(f'{block}.mlp.0', inner * (1 + scale) + shift)
    h = h + gate * linear(f'{block}.mlp.2', silu(inner))
  shift, scale = np.split(
      linear('final_layer.adaLN_modulation.1', silu(y)), 2, axis=1)
  return np.split(linear(
      'final_layer.linear', norm(h) * (1 + scale) + shift), 2, axis=1)


def test_head_is_the_published_architecture():
  rng = np.random.default_rng(1)
  x, z = rng.normal(size=(7, 3)), rng.normal(size=(7, 5))
  number = np.asarray([0, 1, 10, 250, 500, 989, 999])
  params = weights()
  want = numpy_head(named.save(params, prefix='diffloss.net.'), x, number, z, 2)
  found = HEAD(params, jnp.asarray(x, jnp.float32),
               Time(jnp.asarray(number), jnp.zeros(7)),
               jnp.asarray(z, jnp.float32))
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-3)
    assert np.std(b) > 0.1


@pytest.mark.parametrize(('blocks', 'width', 'dim', 'millions'), [
    (6, 1024, 768, 35.7), (8, 1280, 1024, 72.2), (12, 1536, 1280, 151.2)])
def test_published_sizes(blocks, width, dim, millions):
  head = DenoisingMLP(16, dim, width, blocks)
  assert head.num_params / 1e6 == pytest.approx(millions, abs=0.05)


def test_fresh_head_predicts_nothing():
  params = HEAD.init(jax.random.key(0))
  assert {k: v.shape for k, v in params.items()} == HEAD.shapes
  noise, between = HEAD(params, jnp.ones((4, 3)), Time(
      jnp.arange(4), jnp.zeros(4)), jnp.ones((4, 5)))
  assert not np.any(noise) and not np.any(between)


def test_names_go_both_ways_and_what_does_not_fit_is_named():
  params = weights()
  tensors = {**named.save(params, prefix='diffloss.net.'),
             'mask_token': np.ones(3)}
  back = named.load(tensors, HEAD.shapes, prefix='diffloss.net.')
  assert back.keys() == params.keys()
  for name, value in back.items():
    np.testing.assert_array_equal(value, params[name])
  for change, text in (
      ({'diffloss.net.cond_embed.bias': None}, 'cond_embed.bias: missing'),
      ({'diffloss.net.res_blocks.2.in_ln.bias': np.ones(16)},
       'res_blocks.2.in_ln.bias: unknown; expected this head'),
      ({'diffloss.net.cond_embed.weight': np.ones((16, 4))},
       r'cond_embed.weight: shape \(16, 4\); expected this head')):
    bad = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=text):
      named.load(bad, HEAD.shapes, prefix='diffloss.net.', of='this head')
  for values in ({'width': 0}, {'dtype': 'float16'}):
    with pytest.raises(ValueError, match='must be'):
      DenoisingMLP(**values)


def test_guidance_is_of_the_noise_alone():
  params, rng = weights(), np.random.default_rng(2)
  x, a, b = (jnp.asarray(rng.normal(size=(4, n)), jnp.float32)
             for n in (3, 5, 5))
  time = Time(jnp.arange(4) * 9, jnp.zeros(4))
  scale = jnp.asarray([0.0, 1.0, 2.0, 3.5])
  noise, between = GuidedHead(HEAD)(
      params, x, time, {'with': a, 'without': b, 'scale': scale})
  (with_it, own), (bare, _) = (HEAD(params, x, time, z) for z in (a, b))
  np.testing.assert_allclose(
      noise, bare + np.asarray(scale)[:, None] * (with_it - bare), atol=1e-5)
  np.testing.assert_array_equal(between, own)


def test_path_of_a_network_is_scored_as_it_was_drawn():
  """All steps in one call give the moments of the steps one by one."""
  # Not from the last level, where untrained heads predict tokens of
  # 10,000, and not with deviations of their own, some of which are tiny.
  process = Diffusion(GuidedHead(HEAD), 3, num_levels=8, first=4,
                      variance='lower')
  rng = np.random.default_rng(3)
  condition = {
      'with': jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32),
      'without': jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32),
      'scale': jnp.full((2, 4), 1.5)}
  law = chains.Path(process, weights(), condition, jnp.ones((2, 4)))
  keys = jax.random.split(jax.random.key(0), (2, 4))
  event = law.sample(keys)
  assert event.shape == (2, 4, 6, 3)
  noise = density.normal(keys_lib.fold(keys, 1), (5, 3))
  np.testing.assert_allclose(law.noise(event, 5), noise, atol=5e-3)
  one = law.at(jnp.asarray([2, 0]))
  tail = one.tail(jnp.stack([event[0, 2, 0], event[1, 0, 0]]), 0)
  ends = jnp.stack([event[0, 2, 1:], event[1, 0, 1:]])
  whole = law.tail(event[:, :, 0], 0).log_prob(event[:, :, 1:])
  np.testing.assert_allclose(
      tail.log_prob(ends), [whole[0, 2], whole[1, 0]], rtol=1e-3)
