"""Speculative sampling on chains and trees, and its lenient relaxation."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from specjax.core.types import Context, Draft, Models, Scores, Verdict
from specjax.verify import base, rejection
from specjax.verify.rejection import Array, Test


@dataclasses.dataclass(frozen=True)
class Speculative(base.Rule):
  """Accepts draft x with probability min(1, p(x) / q(x)), in order.

  Lossless: emitted tokens follow the target's processed law p, provided that
  q is the law that x was drawn from. A point stands for the one-hot law of
  its token (accepted with probability p(x)). On a chain, position i is
  accepted with probability sum_x min(p, q) = 1 - TV(p, q).

  On a tree this is recursive rejection: children are tried in draw order,
  each against the law that is left of p after the rejections before it, and,
  for drafts without replacement, against q renormalised over what was not
  drawn yet.

  References: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et
  al. 2023, arXiv:2302.01318. Trees: SpecInfer, arXiv:2305.09781; EAGLE,
  arXiv:2401.15077; Sequoia, arXiv:2402.12374.
  """

  name = 'speculative'

  def numerator(
      self, params: Models, context: Context, draft: Draft, scores: Scores,
      test: Test,
  ) -> Array:
    """Returns what is compared with u q: the target's probability."""
    del params, context, draft, scores
    return test.p

  def left_over(self, params: Models, test: Test, p: Array, q: Array) -> Array:
    """Returns weights f32[...,V] of the law after a rejection.

    `p`, `q` are f32[...,V], batched as `test`.
    """
    del params, test
    return jnp.maximum(p - q, 0.0)

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Tests the drafts in order; corrects the last rejection."""
    return rejection.run(self, params, context, draft, scores)


@dataclasses.dataclass(frozen=True)
class Lenient(Speculative):
  """Lossy: accepts with probability min(1, p(x) / (l q(x))).

  No token becomes more than 1 / l times as likely. Greedy rows accept x when
  p(x) >= l max p (p at temperature 1).

  Attributes:
    lenience: l in (0, 1]; 1 is lossless.

  References: Leviathan et al. 2023, arXiv:2211.17192, appendix.
  """

  lenience: float = 0.5

  name = 'lenient'
  lossy = True
  taps = ('logits',)

  def __post_init__(self):
    if not 0 < self.lenience <= 1:
      raise ValueError(f'lenience={self.lenience}: must be in (0, 1]')

  def numerator(self, params, context, draft, scores, test) -> Array:
    """Returns p / l; on greedy rows, acceptance of near-argmax tokens."""
    del params
    if self.lenience == 1:  # an exact tie with the argmax is not the argmax
      return test.p
    soft = rejection.soft_greedy(context, draft, scores, test)
    near = soft.p >= self.lenience * soft.best
    return jnp.where(soft.rows, jnp.where(near, rejection.ALWAYS, test.p),
                     test.p / self.lenience)
