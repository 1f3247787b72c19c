"""Typical acceptance: keep what the target finds likely enough. Lossy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from specjax.core import keys, tree
from specjax.core.types import (
  MATCH,
  POINT,
  Context,
  Draft,
  Models,
  Scores,
  Verdict,
)
from specjax.verify import base, rejection
from specjax.verify.rejection import Array
from specjax.verify.speculative import Speculative


@dataclasses.dataclass(frozen=True)
class Typical(Speculative):
  """Lossy: accepts x when p(x) > min(epsilon, delta exp(-H(p))).

  Two forms:
  * 'residual' (default): accepts when typical or when the exact test passes;
    rejections are corrected exactly, so that `excess` is the distortion.
  * 'medusa': the released form for deterministic candidates: the longest path
    of typical tokens wins (ties: the likelier path), and the token after it
    is drawn from p. `excess` is the sum of 1 - p(x) over accepted tokens: a
    token that is accepted for sure replaces a draw from p.

  A token of probability 1 always passes. At temperature 0 both are exact
  matching.

  Attributes:
    epsilon: threshold at high certainty, in [0, 1].
    delta: scale at entropy H nats, >= 0; the paper suggests sqrt(epsilon).
    form: 'residual' or 'medusa'.

  References: Cai et al. 2024 (Medusa), arXiv:2401.10774, section 2.3.1.
  """

  epsilon: float = 0.09
  delta: float = 0.3
  form: str = 'residual'

  name = 'typical'
  lossy = True

  def __post_init__(self):
    if not 0 <= self.epsilon <= 1:
      raise ValueError(f'epsilon={self.epsilon}: must be in [0, 1]')
    if not self.delta >= 0:
      raise ValueError(f'delta={self.delta}: must be >= 0')
    if self.form not in ('residual', 'medusa'):
      raise ValueError(f"form={self.form!r}: 'residual' or 'medusa'")

  def check(self, topology, modes, vocab_size: int, params: Any) -> None:
    """Also: 'medusa' wants deterministic candidates."""
    super().check(topology, modes, vocab_size, params)
    if self.form == 'medusa' and not set(modes) <= {POINT, MATCH}:
      raise ValueError("typical acceptance with form='medusa' is for "
                       "deterministic drafts: use form='residual', or draft "
                       'the top tokens')

  def threshold(self, law) -> Array:
    """Returns f32[B,N+1], what a probability must exceed after each row."""
    return jnp.minimum(self.epsilon, self.delta * jnp.exp(-law.entropy()))

  def numerator(self, params, context, draft, scores, test) -> Array:
    """Typical tokens pass; others take the exact test."""
    del params, context, draft
    limit = rejection.take(self.threshold(scores.target_law), test.row)
    return jnp.where(test.first_p > limit, rejection.ALWAYS, test.p)

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Keeps typical drafts."""
    if self.form == 'residual' or draft.topology.num_nodes == 0:
      return rejection.run(self, params, context, draft, scores)
    law, topology = scores.target_law, draft.topology
    log_p = base.target_log_prob(draft, scores)
    parents = jnp.broadcast_to(base.parent_rows(draft), log_p.shape)
    limit = rejection.take(self.threshold(law), parents)
    p = jnp.exp(log_p)
    alive = ((p > limit) | (p >= 1)) & draft.valid  # the limit may be 1
    above = jnp.broadcast_to(
        tree.ancestors(topology, draft.parents)[..., 1:, 1:],
        log_p.shape + log_p.shape[-1:])
    total = jnp.sum(jnp.where(above, log_p[:, None], 0.0), axis=-1)
    stop = tree.deepest(topology, draft.parents, alive, tie=total)
    path, _ = tree.path_to(topology, draft.parents, stop)
    on_path = jnp.any(
        jnp.arange(1, topology.num_nodes + 1) == path[..., None], axis=1)
    excess = jnp.sum(jnp.where(on_path, 1 - p, 0.0), axis=1)
    token = law.at(stop).sample(keys.row(context, keys.Purpose.RESIDUAL))
    return base.finish(draft, stop, token, excess)
