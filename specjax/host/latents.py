"""Images as continuous tokens and back; folders of such autoencoders."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specjax.host import images as images_lib
from specjax.io import model_folder, pth
from specjax.models import vae, vq
from specjax.models.vae import VAE, Posterior, VAEConfig

Array = jax.Array

_VAE = 'specjax-vae'


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
  """An autoencoder of images ready to use.

  Attributes:
    config: its shape. params: float32. facts: what `config.json` says.
  """

  config: VAEConfig
  params: Any
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def encode(
      self, images: np.ndarray, batch_size: int = 256, seed: int | None = None,
  ) -> np.ndarray:
    """Returns tokens f32[N,h,w,C] of uint8[N,H,W,3].

    Args:
      images: N >= 1. batch_size: images encoded in one call.
      seed: of tokens that are drawn; None takes the mean of each. The noise
        of an image depends on the seed and its index, not on `batch_size`.

    Raises:
      ValueError: other images, or sides that `config.factor` does not divide.
    """
    images_lib.check(images, self.config)
    key = None if seed is None else jax.random.key(seed)
    return images_lib.in_batches(
        lambda x, index: _encode(self.config, self.params, x, index, key),
        batch_size, images, np.arange(len(images), dtype=np.uint32))

  def decode(self, tokens: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Returns uint8[N,H,W,3] of tokens f32[N,h,w,C].

    Raises:
      ValueError: tokens of another shape or number of channels, or such that
        are not finite.
    """
    tokens = np.asarray(tokens, np.float32)
    if tokens.ndim != 4:
      raise ValueError(f'tokens are {list(tokens.shape)}: must be [N,h,w,C]')
    if tokens.shape[3] != self.config.latent_channels:
      raise ValueError(
          f'tokens of {tokens.shape[3]} channels: this autoencoder has '
          f'{self.config.latent_channels}')
    bad = tokens.size - np.count_nonzero(np.isfinite(tokens))
    if bad:
      raise ValueError(f'{bad} of {tokens.size} values of tokens are not '
                       'finite')
    return images_lib.in_batches(
        lambda x: _decode(self.config, self.params, x), batch_size, tokens)


@jax.jit(static_argnums=0)
def _encode(
    config: VAEConfig, params: Any, image: Array, index: Array,
    key: Array | None,
) -> Array:
  model: Any = VAE(config)
  law = model.apply({'params': params}, vq.to_float(image), method='encode')
  latents = law.mean
  if key is not None:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    latents = jax.vmap(Posterior.sample)(law, keys)
  return latents * config.scale


@jax.jit(static_argnums=0)
def _decode(config: VAEConfig, params: Any, tokens: Array) -> Array:
  model: Any = VAE(config)
  return vq.to_bytes(model.apply({'params': params}, tokens, method='decode'))


def save_autoencoder(
    folder: str | Path, config: VAEConfig, params: Any,
    facts: Mapping[str, Any], form: str = 'bfloat16',
) -> Path:
  """Writes an autoencoder; see `io.forms` for `form`."""
  return model_folder.save(folder, _VAE, params, {
      'model': dataclasses.asdict(config), **facts}, form)


def load_autoencoder(folder: str | Path) -> Autoencoder:
  """Reads what `save_autoencoder` wrote, or the published KL-16 (.ckpt).

  Raises:
    FormatError: something else, or a tensor of another size; names it.
  """
  if Path(folder).is_file():
    published = VAEConfig()
    return Autoencoder(
        published, vae.from_published(published, pth.read(folder)),
        {'source': str(folder)})
  facts, arrays = model_folder.load(folder, _VAE)
  config = VAEConfig.of(facts['model'])
  params = model_folder.fitted(folder, arrays, vae.abstract(config))
  return Autoencoder(config, params, facts)
