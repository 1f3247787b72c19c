"""Images through `specjax.sample`: classes in, pictures out."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specjax.eval import pictures
from specjax.host import cli, images, latent_sampling
from specjax.host import results as results_lib
from specjax.host.load import Model, on_mesh
from specjax.host.requests import Result
from specjax.models import image_lm, vq, weights
from specjax.models.guided import Guided
from specjax.models.vq import VQConfig


@dataclasses.dataclass(frozen=True)
class Pictures:
  """What is to be drawn, and how codes become pixels.

  Attributes:
    tokenizer: of the codes. grid: rows and columns of codes an image.
    names: of the classes asked for, one a row of the figure.
    per_class: images of each.
  """

  tokenizer: images.Tokenizer
  grid: tuple[int, int]
  names: tuple[str, ...]
  per_class: int

  @property
  def length(self) -> int:
    """Codes of an image."""
    return self.grid[0] * self.grid[1]

  def plain(self, target: Model) -> tuple[Model, Any]:
    """Returns what decodes without drafts."""
    return target, None

  def rivals(self, target: Model) -> dict[str, tuple[Model, Any]]:
    """Returns cheaper ways to decode plainly: none."""
    del target
    return {}

  def draw(self, results: Sequence[Result], out: Path) -> None:
    """Writes `samples.png` and `acceptance.png` to a folder."""
    codes = np.stack([r.tokens for r in results]).reshape(-1, *self.grid)
    pictures.grid(
        self.tokenizer.decode(codes), out / 'samples.png',
        columns=self.per_class, rows=self.names)
    pictures.heat_map(
        results_lib.accepted(results).mean(axis=0).reshape(self.grid),
        out / 'acceptance.png',
        'Share of accepted drafts (others: drawn by the target)')


def prepare(
    config: Any, mesh: Any, quiet: bool
) -> tuple[Model, list[Any], Any]:
  """Loads what `config.images` asks for.

  Returns:
    `(model, prompts, pictures)`; with guidance, the model is guided.

  Raises:
    ValueError: unknown classes, no tokenizer, or one of other codes.
  """
  section = config.images
  if section.tokenizer is None or config.target is None:
    raise ValueError('config.target and config.images.tokenizer: give the '
                     'folders that train.image_ar and train.vq wrote, or '
                     'train.mar and train.vae')
  if section.per_class < 1:
    raise ValueError(
        f'config.images.per_class={section.per_class}: must be >= 1')
  if 'process' in section:  # tokens of real numbers
    return latent_sampling.prepare(config, mesh)
  model, facts = load_target(
      config.target, dtype=config.dtype, guidance=section.guidance,
      guided_steps=section.guided_steps)
  tokenizer = (random_models()[2] if config.target == 'random'
               else images.load_tokenizer(section.tokenizer))
  if tokenizer.config.num_codes != model.vocab_size:
    raise ValueError(
        f'config.images.tokenizer={section.tokenizer} has '
        f'{tokenizer.config.num_codes} codes, {config.target} '
        f'{model.vocab_size}')
  wanted, labels = cli.labels(section, facts['data']['classes'])
  prompts = [[model.vocab_size + label] for label in labels]
  found = Pictures(tokenizer, tuple(facts['grid']), wanted, section.per_class)
  cli.note(f'{len(prompts)} images of {found.length} codes', quiet)
  return on_mesh(model, mesh), prompts, found


def load_target(
    source: str | None, *, dtype: str | None = None, guidance: float = 1.0,
    guided_steps: int | None = None,
) -> tuple[Model, dict[str, Any]]:
  """Loads a decoder of image codes: `(model, facts)`.

  Args:
    source: the folder that `train.image_ar` wrote, a published file, or
      'random'.
    dtype: None decides by the backend.
    guidance: scale; 1 is off. guided_steps: codes that are guided, None: all.

  Raises:
    ValueError: no source, or a scale that is no number.
  """
  if source is None:
    raise ValueError('config.target: give the folder that train.image_ar '
                     'wrote')
  if not np.isfinite(guidance):
    raise ValueError(f'guidance={guidance}: must be a number')
  if source == 'random':
    model, facts, _ = random_models()
  else:
    model, facts = images.load_lm(source, dtype=dtype)
  return guided(model, guidance, guided_steps), facts


def guided(model: Model, scale: float, steps: int | None = None) -> Model:
  """Returns a model under guidance; itself at scale 1 for all codes."""
  if scale == 1 and steps is None:
    return model
  lm: Any = Guided(model.lm, scale, steps)
  return dataclasses.replace(model, lm=lm)


def random_models() -> tuple[Model, dict[str, Any], images.Tokenizer]:
  """Returns tiny models of random weights: programs run without files."""
  codes = VQConfig(num_codes=16, code_dim=4, channels=8, multipliers=(1, 2),
                   num_res_blocks=1, latent_dim=8, attention=False)
  shape = image_lm.shape(1, 2, 16, grid_width=4, vocab_size=codes.num_codes,
                         num_classes=2)
  key = jax.random.key(0)
  model = Model(name='random', lm=image_lm.ImageLM(shape, chunk=64),
                params=weights.random_params(shape, key))
  facts = {'grid': [4, 4], 'data': {'classes': ['a', 'b']}}
  return model, facts, images.Tokenizer(codes, vq.init(codes, key))
