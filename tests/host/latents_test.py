"""Continuous tokens on the host: in batches, drawn, saved, and bad ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.host import images as images_lib
from specjax.host import latents
from specjax.host.latents import Autoencoder
from specjax.io.errors import FormatError
from specjax.models import vae, vq
from specjax.models.vae import VAE, VAEConfig

SMALL = VAEConfig(latent_channels=3, channels=8, multipliers=(1, 2),
                  num_res_blocks=1, attention=False, scale=0.5)


@pytest.fixture(scope='module')
def made():
  """An autoencoder whose weights all matter."""
  rng = np.random.default_rng(0)
  return Autoencoder(SMALL, jax.tree.map(
      lambda x: jnp.asarray(rng.normal(scale=0.2, size=x.shape)
                            + (len(x.shape) == 1), jnp.float32),
      vae.abstract(SMALL)))


def pictures(num=5):
  return np.random.default_rng(1).integers(0, 256, (num, 8, 4, 3), np.uint8)


def test_means_and_what_they_decode_to(made):
  x = pictures()
  tokens = made.encode(x)
  assert tokens.shape == (5, 4, 2, 3) and tokens.dtype == np.float32
  law = VAE(SMALL).apply(
      {'params': made.params}, vq.to_float(jnp.asarray(x)), method='encode')
  np.testing.assert_allclose(tokens, 0.5 * law.mean, atol=1e-5)
  again = made.decode(tokens)
  assert again.dtype == np.uint8 and again.shape == x.shape
  wanted = vq.to_bytes(VAE(SMALL).apply(
      {'params': made.params}, law.mean, method='from_latents'))
  # Rounding to whole numbers can fall on either side.
  assert np.abs(again.astype(int) - np.asarray(wanted)).max() <= 1
  assert np.std(again) > 1
  # A last batch that is short, and batches longer than all there is.
  for size in (1, 2, 5, 9):
    np.testing.assert_allclose(made.encode(x, size), tokens, atol=1e-5)
    assert np.abs(made.decode(tokens, size).astype(int) - again).max() <= 1


def test_draws_are_of_the_law_and_of_their_index(made):
  x = np.repeat(pictures(1), 400, axis=0)
  law = VAE(SMALL).apply(
      {'params': made.params}, vq.to_float(jnp.asarray(x[:1])),
      method='encode')
  tokens = made.encode(x, seed=3)
  away = (tokens / 0.5 - law.mean) / np.exp(0.5 * law.log_variance)
  # 9,600 draws: deviations of 0.010 and 0.007.
  assert abs(away.mean()) < 0.05 and abs(away.std() - 1) < 0.04
  # None is another's.
  assert np.abs(np.corrcoef(away.reshape(400, -1).T)
                - np.eye(24)).max() < 0.25
  assert len(np.unique(tokens[:, 0, 0, 0])) == 400
  for size in (7, 64, 512):
    np.testing.assert_allclose(
        made.encode(x, size, seed=3), tokens, atol=1e-5)
  assert np.abs(made.encode(x, seed=4) - tokens).min(axis=0).max() > 0
  assert np.mean(made.encode(x, seed=4) == tokens) < 0.01


@pytest.mark.parametrize('form', ['float32', 'bfloat16'])
def test_saved_and_loaded(made, tmp_path, form):
  config = dataclasses.replace(SMALL, scale=1 / 3)
  folder = latents.save_autoencoder(
      tmp_path / 'x', config, made.params, {'data': {'name': 'n'}}, form)
  found = latents.load_autoencoder(folder)
  assert found.config == config and hash(found.config) == hash(config)
  assert found.facts['data'] == {'name': 'n'} and found.facts['form'] == form
  jax.tree.map(
      np.testing.assert_array_equal if form == 'float32' else
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1 / 128),
      found.params, made.params)
  if form == 'float32':
    np.testing.assert_allclose(
        found.encode(pictures()) * 1.5, made.encode(pictures()), rtol=1e-5)
    np.testing.assert_array_equal(
        found.decode(found.encode(pictures())),
        Autoencoder(config, made.params).decode(found.encode(pictures())))


def test_bad_input(made, tmp_path):
  with pytest.raises(ValueError, match='5 x 4 pixels: .* multiples of 2'):
    made.encode(np.zeros((1, 5, 4, 3), np.uint8))
  for bad in (np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4, 1), np.uint8),
              np.zeros((1, 4, 4, 3), np.float32)):
    with pytest.raises(ValueError, match='must be uint8'):
      made.encode(bad)
  with pytest.raises(ValueError, match=r'\[2, 2, 3\]: must be \[N,h,w,C\]'):
    made.decode(np.zeros((2, 2, 3)))
  with pytest.raises(ValueError, match='tokens of 4 channels: .* has 3'):
    made.decode(np.zeros((1, 2, 2, 4)))
  tokens = np.zeros((1, 2, 2, 3))
  tokens[0, 0, 0, 0], tokens[0, 1, 1, 2] = np.nan, np.inf
  with pytest.raises(ValueError, match='2 of 12 values .* not finite'):
    made.decode(tokens)
  for args, said in (((pictures(), 0), '5 rows in batches of 0'),
                     ((pictures(0),), '0 rows')):
    with pytest.raises(ValueError, match=f'{said}.*must be >= 1'):
      made.encode(*args)


def test_bad_folders(made, tmp_path):
  with pytest.raises(FormatError, match='"specjax-vae"'):
    latents.load_autoencoder(tmp_path)
  folder = latents.save_autoencoder(tmp_path / 'x', SMALL, made.params, {})
  with pytest.raises(FormatError, match="specjax-vq.*it has 'specjax-vae'"):
    images_lib.load_tokenizer(folder)
  other = dataclasses.replace(SMALL, latent_channels=2)
  folder = latents.save_autoencoder(tmp_path / 'y', other, made.params, {})
  with pytest.raises(FormatError, match=r'is \(.*6\), but .* asks for'):
    latents.load_autoencoder(folder)
  (tmp_path / 'z.ckpt').write_bytes(b'nothing of this kind')
  with pytest.raises(FormatError, match='z.ckpt'):
    latents.load_autoencoder(tmp_path / 'z.ckpt')


@pytest.mark.reference
def test_published_file(tmp_path, monkeypatch):
  """A file as MAR's is saved: weights of a name, its loss's beside them."""
  torch = pytest.importorskip('torch')
  params = vae.init(SMALL, jax.random.key(0))
  state = {k: torch.tensor(np.array(v))
           for k, v in vae.to_published(SMALL, params).items()}
  state['loss.logvar'] = torch.zeros(())
  torch.save({'model': state}, tmp_path / 'kl.ckpt')
  with pytest.raises(FormatError, match='missing tensors'):
    latents.load_autoencoder(tmp_path / 'kl.ckpt')  # smaller than KL-16
  monkeypatch.setattr(latents, 'VAEConfig', lambda: SMALL)
  found = latents.load_autoencoder(tmp_path / 'kl.ckpt')
  assert found.config == SMALL
  assert found.facts == {'source': str(tmp_path / 'kl.ckpt')}
  jax.tree.map(np.testing.assert_array_equal, found.params, params)
