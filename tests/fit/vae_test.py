"""Steps that train autoencoders, on tiny ones, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.distill import optimizer
from specjax.fit.step import Fitter
from specjax.fit.vae import VAEObjective
from specjax.models.vae import VAE, VAEConfig

SMALL = VAEConfig(latent_channels=3, channels=8, multipliers=(1, 2),
                  num_res_blocks=1, attention=False)


def images(num=8, seed=0):
  """Returns uint8[N,8,8,3] of two colours, above and below."""
  rng = np.random.default_rng(seed)
  colours = rng.integers(0, 256, (4, 3))
  picks = rng.integers(0, 4, (num, 2))
  return np.repeat(colours[picks].astype(np.uint8), 4, axis=1)[
      :, :, None].repeat(8, axis=2)


def fit(objective, steps, rate=3e-3):
  """Returns `(state, reports)` of training on one batch."""
  fitter = Fitter(objective, optimizer.make(
      learning_rate=1.0, steps=1, schedule='constant'), decay=0.9)
  state, reports = fitter.init(jax.random.key(0)), []
  batch = {'image': jnp.asarray(images())}
  for _ in range(steps):
    state, report = fitter.step(
        state, batch, jax.random.key(1), np.float32(rate))
    reports.append(jax.device_get(report))
  return state, reports


def by_hand(net, batch, key):
  """Returns `(gaps, law's KL, latents, images)` of the model's parts.

  The law is split, drawn from and measured here, in float64.
  """
  model = VAE(SMALL)
  image = np.asarray(batch['image'], np.float64) / 127.5 - 1
  law = model.apply({'params': net}, jnp.asarray(image, jnp.float32),
                    method='encode')
  mean, spread = (np.asarray(x, np.float64) for x in (
      law.mean, np.exp(0.5 * np.asarray(law.log_variance))))
  latents = mean + spread * np.asarray(jax.random.normal(key, mean.shape))
  made = model.apply({'params': net}, jnp.asarray(
      latents * SMALL.scale, jnp.float32), method='decode')
  # Of N(m, s) from N(0, 1): log 1/s + (s^2 + m^2 - 1) / 2.
  kl = np.sum(-np.log(spread) + (spread**2 + mean**2 - 1) / 2, axis=(1, 2, 3))
  return np.asarray(made, np.float64) - image, kl, latents, image


@pytest.mark.parametrize('weights', [
    dict(l1=1.0, l2=0.0, kl=0.0), dict(l1=0.0, l2=1.0, kl=0.0),
    dict(l1=0.5, l2=2.0, kl=1e-2), dict(l1=0.5, l2=2.0, kl=1e-2, features=(
        jnp.square), feature_weight=3.0)])
def test_the_loss_by_hand(weights):
  objective = VAEObjective(SMALL, **weights)
  batch = {'image': jnp.asarray(images(3))}
  net, memory = objective.init(jax.random.key(3))
  assert memory is None
  found = {}
  for seed in (5, 6):
    key = jax.random.key(seed)
    loss, (scalars, _) = jax.jit(objective.loss)(net, memory, batch, key)
    gap, kl, latents, image = by_hand(net, batch, key)
    wanted = (weights['l1'] * np.mean(np.abs(gap))
              + weights['l2'] * np.mean(gap ** 2)
              + weights['kl'] * np.mean(kl))
    if 'features' in weights:
      wanted += 3 * np.mean(((gap + image) ** 2 - image ** 2) ** 2)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(scalars['kl'], kl.mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars['std'], latents.std(), rtol=1e-5)
    np.testing.assert_allclose(
        scalars['psnr'], -10 * np.log10(np.mean((gap / 2) ** 2)), rtol=1e-5)
    found[seed] = float(loss)
  assert found[5] != found[6]  # of what is drawn, not of means


def test_gradients_are_finite_and_reach_every_weight():
  batch = {'image': jnp.asarray(images(2))}
  net, _ = VAEObjective(SMALL).init(jax.random.key(3))

  def gradient(kl):
    objective = VAEObjective(SMALL, kl=kl)
    return jax.jit(jax.grad(lambda net: objective.loss(
        net, None, batch, jax.random.key(0))[0]))
  at = gradient(1e-3)
  grads = at(net)
  for path, g in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(g).all() and np.any(g), jax.tree_util.keystr(path)
  # The divergence pulls at the encoder only: linear in its weight.
  none, twice = (gradient(kl)(net) for kl in (0.0, 2e-3))
  for a, b in zip(jax.tree.leaves(none['decoder']),
                  jax.tree.leaves(twice['decoder']), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  bias = [g['quant_conv']['bias'] for g in (none, grads, twice)]
  assert np.abs(bias[1] - bias[0]).min() > 1e-5
  np.testing.assert_allclose(
      bias[2] - bias[0], 2 * (bias[1] - bias[0]), rtol=1e-2)
  # Laws as narrow and as wide as they can be.
  for place in (-1e4, 1e4):
    far = {**net, 'quant_conv': {**net['quant_conv'], 'bias': net[
        'quant_conv']['bias'].at[SMALL.latent_channels:].set(place)}}
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(at(far)))


def test_an_autoencoder_learns_to_see():
  state, reports = fit(VAEObjective(SMALL), 80)
  assert reports[-1]['psnr'] > reports[0]['psnr'] + 8
  assert reports[-1]['loss'] < 0.3 * reports[0]['loss']
  assert not any(r['bad'] for r in reports)
  # Noise hides what is drawn, so the law has become narrow.
  assert reports[-1]['kl'] > 2 * reports[0]['kl']
  assert int(state.step) == 80


def test_a_heavy_divergence_makes_latents_normal():
  _, reports = fit(VAEObjective(SMALL, kl=1.0), 60, rate=1e-2)
  assert reports[0]['kl'] > 5 > 0.5 > reports[-1]['kl'] >= 0
  assert abs(reports[-1]['std'] - 1) < 0.05  # of 384 draws
  assert reports[-1]['psnr'] < reports[0]['psnr'] + 6  # nothing is told


def test_what_cannot_be():
  for bad in (dict(l1=0.0, l2=0.0), dict(kl=-1e-6), dict(l1=float('nan')),
              dict(l1=-1.0, l2=2.0)):
    with pytest.raises(ValueError, match='>= 0'):
      VAEObjective(SMALL, **bad)
  for bad in (dict(feature_weight=1.0), dict(features=jnp.square)):
    with pytest.raises(ValueError, match='go together'):
      VAEObjective(SMALL, **bad)
