"""Images of continuous tokens through `specjax.sample`."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specjax.drafters import Null
from specjax.eval import pictures
from specjax.host import cli, latents, mar
from specjax.host.load import Model
from specjax.host.requests import Result, Start
from specjax.host.results import accepted
from specjax.models import vae
from specjax.models.masked_images import MaskedImages
from specjax.models.vae import VAEConfig

ORDERS = ('random', 'raster')
SCHEDULES = ('constant', 'linear')
# Of what an order is drawn with besides the seed and the image's number.
_ORDER = 0x6F72


@dataclasses.dataclass(frozen=True)
class Pictures:
  """What is to be drawn, and how tokens become pixels.

  Attributes:
    autoencoder: of the tokens. grid: rows and columns of tokens an image.
    orders: int[N,T], place of the k-th token that is made, an image a row.
    names: of the classes asked for, one a row of the figure.
    per_class: images of each.
    iterations: of plain decoding to compare with.
  """

  autoencoder: latents.Autoencoder
  grid: tuple[int, int]
  orders: np.ndarray
  names: tuple[str, ...]
  per_class: int
  iterations: tuple[int, ...] = ()

  def plain(self, target: Model) -> tuple[Model, Any]:
    """Returns the target without guesses of any kind: an iteration a round."""
    lm: Any = mar.changed(target.lm)
    drafter: Any = None
    if getattr(lm, 'num_iterations', None) is not None:
      lm = dataclasses.replace(lm, num_passes=1)
      drafter = Null(lm.largest - 1)
    return dataclasses.replace(target, lm=lm), drafter

  def rivals(self, target: Model) -> dict[str, tuple[Model, Any]]:
    """Returns targets of fewer iterations and what decodes them plainly.

    Raises:
      ValueError: a causal decoder, which makes one token after another.
    """
    out = {}
    for number in self.iterations:
      if not isinstance(target.lm, MaskedImages):
        raise ValueError('config.images.rivals: a causal decoder has no '
                         'iterations')
      # A round is an iteration: one pass is all that is needed.
      lm: Any = mar.changed(target.lm)
      lm = dataclasses.replace(lm, num_iterations=number, num_passes=1)
      out[f'plain, {number} iterations'] = (
          dataclasses.replace(target, lm=lm), Null(lm.largest - 1))
    return out

  @property
  def length(self) -> int:
    """Tokens of an image."""
    return self.grid[0] * self.grid[1]

  def pixels(self, results: Sequence[Result]) -> np.ndarray:
    """Returns uint8[N,H,W,3]."""
    made = np.stack([np.asarray(r.tokens, np.float32) for r in results])
    placed = np.empty_like(made)
    np.put_along_axis(placed, self.orders[..., None], made, axis=1)
    return self.autoencoder.decode(
        placed.reshape(len(made), *self.grid, made.shape[-1]))

  def draw(self, results: Sequence[Result], out: Path) -> None:
    """Writes the grid, the map of accepted drafts and their curve."""
    out.mkdir(parents=True, exist_ok=True)
    pictures.grid(
        self.pixels(results), out / 'samples.png',
        columns=self.per_class, rows=self.names)
    kept = accepted(results)
    places = np.zeros(kept.shape)
    np.put_along_axis(places, self.orders, kept.astype(float), axis=1)
    pictures.heat_map(
        places.mean(axis=0).reshape(self.grid), out / 'acceptance.png',
        'Share of accepted drafts by place (others: drawn by the target)')
    pictures.curve(
        kept.mean(axis=0), out / 'acceptance_by_step.png',
        'Share of accepted drafts by step of an image', 'tokens made before')


def prepare(
    config: Any, mesh: Any = None
) -> tuple[Model, list[Start], Pictures]:
  """Loads what `config.images` asks for; see `image_sampling.prepare`."""
  section = config.images
  if config.sampling.n not in (None, 1):
    raise ValueError(f'config.sampling.n={config.sampling.n}: images have '
                     'orders of their own; use config.images.per_class')
  process = {k: v for k, v in section.process.to_dict().items()
             if v is not None}
  if config.target == 'random':
    model, facts, autoencoder = random_models()
  else:
    model, facts = mar.load(config.target, dtype=config.dtype)
    autoencoder = latents.load_autoencoder(section.tokenizer)
  lm: Any = mar.changed(model.lm, **process)
  decoding = {k: v for k, v in section.decoding.to_dict().items()
              if v is not None}
  if decoding and not isinstance(lm, MaskedImages):
    raise ValueError(f'config.images.decoding.{min(decoding)}: a causal '
                     'decoder has no iterations')
  lm = dataclasses.replace(lm, **decoding)
  model = dataclasses.replace(model, lm=lm, mesh=mesh)
  channels = autoencoder.config.latent_channels
  if channels != lm.process.channels:
    raise ValueError(
        f'config.images.tokenizer={section.tokenizer} has {channels} '
        f'channels, {config.target} {lm.process.channels}')
  guidance = scales(
      lm.num_tokens, section.guidance, section.guidance_schedule)
  if guidance is not None:
    model = dataclasses.replace(model, lm=mar.guided(lm))
  wanted, labels = cli.labels(section, facts['data']['classes'])
  orders = orders_of(
      section.order, len(labels), lm.num_tokens, config.seed)
  starts = begin(lm, labels, orders, guidance)
  side = round(lm.num_tokens**0.5)
  grid = tuple(facts.get('grid', (side, side)))
  return model, starts, Pictures(
      autoencoder, grid, orders, wanted, section.per_class,
      tuple(section.rivals))


def begin(
    lm: Any, labels: Sequence[int] | np.ndarray, orders: np.ndarray,
    guidance: np.ndarray | None = None,
) -> list[Start]:
  """Returns prompts of images that are not begun.

  Args:
    lm: the decoder. labels: classes; `num_classes` for any.
    orders: int[N,T], see `orders_of`. guidance: f32[T], see `scales`.

  Raises:
    ValueError: labels out of range.
  """
  bad = [x for x in labels if not 0 <= x <= lm.num_classes]
  if bad:
    raise ValueError(f'labels {bad[:5]}: must be in [0, {lm.num_classes}]')
  blank = np.zeros((1, lm.process.channels), np.float32)
  more = {} if guidance is None else {'guidance': guidance}
  return [Start(blank, {'order': order.astype(np.int32),
                        'label': np.int32(label), **more})
          for label, order in zip(labels, orders, strict=True)]


def orders_of(name: str, rows: int, size: int, seed: int) -> np.ndarray:
  """Returns int[N,T]: the place of the k-th token of each image.

  Raises:
    ValueError: an unknown order.
  """
  if name not in ORDERS:
    raise ValueError(f'config.images.order={name!r}: known are '
                     f'{", ".join(ORDERS)}')
  if name == 'raster':
    return np.tile(np.arange(size), (rows, 1))
  return np.stack([
      np.random.default_rng([_ORDER, seed, i]).permutation(size)
      for i in range(rows)])


def scales(size: int, scale: float, schedule: str) -> np.ndarray | None:
  """Returns f32[T], guidance at each token, or None where it is 1 for all.

  'linear' begins near 1 and ends at `scale`, as MAR does.

  Raises:
    ValueError: an unknown schedule, or a scale that is no number.
  """
  if schedule not in SCHEDULES:
    raise ValueError(f'config.images.guidance_schedule={schedule!r}: known '
                     f'are {", ".join(SCHEDULES)}')
  if not np.isfinite(scale):
    raise ValueError(f'guidance={scale}: must be a number')
  if scale == 1:
    return None
  share = np.ones(size)
  if schedule == 'linear':
    share = np.arange(1, size + 1) / size
  return (1 + (scale - 1) * share).astype(np.float32)


def random_models() -> tuple[Model, dict[str, Any], latents.Autoencoder]:
  """Returns tiny models of random weights: programs run without files."""
  shape = VAEConfig(
      channels=8, multipliers=(1, 2), num_res_blocks=1, latent_channels=2,
      attention=False, scale=1.0)
  facts = {'grid': [4, 4], 'data': {'classes': ['a', 'b']}}
  return mar.tiny(), facts, latents.Autoencoder(
      shape, vae.init(shape, jax.random.key(0)))
