"""Judge decoding: the target's own hidden state says "correct here". Lossy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core.types import Scores
from specjax.verify import base, rejection
from specjax.verify.rejection import Array
from specjax.verify.speculative import Speculative

_NAMES = ('weight', 'bias', 'mean', 'scale')


@dataclasses.dataclass(frozen=True)
class Judge(Speculative):
  """Lossy: accepts a draft when a linear head on the target says so.

  The head reads the target's final hidden state *at the draft's own
  position* (after consuming it); a draft passes when its score exceeds
  `threshold`, or by the exact test, so the judge can only add acceptance.
  `Models.verifier` is `{'weight' f32[D], 'bias' f32[], 'mean' f32[D],
  'scale' f32[D]}`; `distill.judge` trains it. No guarantee on the law beyond
  the reported `excess`.

  Attributes:
    threshold: in [0, 1]; at 1 the rule is exact.

  References: Bachmann et al. 2025, arXiv:2501.19309.
  """

  threshold: float = 0.5

  name = 'judge'
  lossy = True
  taps = ('final',)

  def __post_init__(self):
    if not 0 <= self.threshold <= 1:
      raise ValueError(f'threshold={self.threshold}: must be in [0, 1]')

  def check(self, topology, modes, vocab_size: int, params: Any) -> None:
    """Also: there is a head."""
    base.Rule.check(self, topology, modes, vocab_size, params)
    if not isinstance(params, dict) or any(n not in params for n in _NAMES):
      raise ValueError(
          "verify='judge' needs a trained head: pass verifier_params with "
          f"{', '.join(_NAMES)} (specjax.distill.judge.fit), or "
          'verify_options.head=FILE.safetensors')

  def scores(self, params, scores: Scores) -> Array:
    """Returns f32[B,N+1] in [0, 1]: how right each row's own token looks."""
    head = params.verifier
    state = scores.taps['final'].astype(jnp.float32)
    state = (state - head['mean']) / head['scale']
    return jax.nn.sigmoid(state @ head['weight'] + head['bias'])

  def numerator(self, params, context, draft, scores, test) -> Array:
    """Drafts that look right pass; others take the exact test."""
    del context, draft
    # Row i + 1 consumed slot i; the row that scored it is its parent's.
    own = rejection.take(self.scores(params, scores), test.slot + 1)
    return jnp.where(own > self.threshold, rejection.ALWAYS, test.p)
