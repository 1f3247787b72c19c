"""Codes of images under guidance: `Setting` with decoders that have classes.

The loop runs the guided pair with its cache and drafts. The law that texts
are compared with is worked out apart: one pass over whole texts of the bare
decoder, with the class and without, combined in numpy.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates.setting import Kind, Setting
from specjax.core.types import Models
from specjax.models import image_lm, weights
from specjax.models.guided import Guided
from specjax.models.image_lm import ImageLM
from specjax.models.transformer_config import TransformerConfig

_CLASSES, _WIDTH = 2, 2
# Classes by kind of row, and codes that the prompt holds behind them.
_BEGUN: tuple[tuple[int, ...], ...] = ((0,), (1, 2), (0, 1, 3), (1,))
# Spread of the last layer, for laws that are far from flat.
_SHARPER = 8.0


@dataclasses.dataclass(frozen=True)
class Pictures(Setting):
  """Rows that write codes given a class, under guidance.

  Penalties are left out: they would count the classes.

  Attributes:
    scale: of guidance. drafted: of the drafter's guidance.
    stated: scale of the law that is compared with; None is `scale`. Another
      one is a fault that has to be found.
  """

  scale: float = 2.0
  drafted: float = 1.3
  stated: float | None = None

  @property
  def names(self) -> tuple[str, ...]:
    """Options that are set."""
    return tuple(n for n in super().names if 'penalty' not in n)

  @functools.cached_property
  def kinds(self) -> tuple[Kind, ...]:
    """Rows as in `Setting`, whose prompts begin with a class."""
    return tuple(
        kind._replace(prompt=(self.vocab_size + begun[0], *(
            token % self.vocab_size for token in begun[1:])))
        for kind, begun in zip(super().kinds, _BEGUN, strict=True))

  def shape(self, num_layers: int) -> TransformerConfig:
    """Returns the shape of a decoder."""
    return image_lm.shape(
        num_layers, 2, 16, grid_width=_WIDTH, vocab_size=self.vocab_size,
        num_classes=_CLASSES)

  @property
  def target(self) -> Any:
    """The guided pair."""
    return Guided(ImageLM(self.shape(2), chunk=8), self.scale)

  @property
  def small(self) -> Any:
    """A model to draft with, guided too."""
    return Guided(ImageLM(self.shape(1), chunk=8), self.drafted)

  def params(self, num_layers: int) -> Any:
    """Returns weights of a decoder."""
    found = weights.random_params(
        self.shape(num_layers), jax.random.key(num_layers))
    return {**found, 'head': jax.tree.map(
        lambda x: _SHARPER * x, found['head'])}

  def models(self, drafter: Any = None, verifier: Any = None) -> Models:
    """Returns the parameters of both decoders."""
    return Models(
        target=self.params(2),
        drafter=self.params(1) if drafter is None else drafter,
        verifier=verifier)

  def logits(
      self, who: str, kind: int, made: tuple[int, ...], begun: int
  ) -> np.ndarray:
    """Returns guided logits f[V]; see `Setting.logits`."""
    del begun
    scale = self.drafted
    if who == 'target':
      scale = self.scale if self.stated is None else self.stated
    known = self._tables[who][kind]
    row = np.ravel_multi_index(
        made + (0,) * (self.length - len(made)),
        (self.vocab_size,) * self.length)
    with_it, without = known[:, row, len(made)]
    return without + scale * (with_it - without)

  @functools.cached_property
  def _tables(self) -> dict[str, list[np.ndarray]]:
    """Logits f32[2,V^L,L,V] by model and kind: with the class, without."""
    texts = np.asarray(list(itertools.product(
        range(self.vocab_size), repeat=self.length)), np.int32)
    out: dict[str, list[np.ndarray]] = {}
    for who, layers in (('target', 2), ('drafter', 1)):
      lm = ImageLM(self.shape(layers), chunk=2**30)
      params = self.params(layers)
      out[who] = []
      for kind in self.kinds:
        label, *codes = kind.prompt
        whole = np.concatenate([np.tile(codes, (len(texts), 1)).astype(
            np.int32), texts], axis=1)
        views = [np.asarray(lm.whole(
            params, jnp.asarray(whole), jnp.full(len(texts), one)))
                 for one in (label - self.vocab_size, _CLASSES)]
        out[who].append(np.stack(views)[:, :, len(codes):])
    return out
