"""What training minimises: losses that take turns, weights of the slots.

    mixture = Mixture(first=(('kl', 1.0),), last=(('kl', 0.1), ('l1', 0.9)))
    weight = mask * decay(num_slots, gamma=4.0)
    value = mixed(mixture, step / num_steps, log_p, log_q, weight)
"""

from __future__ import annotations

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

from specjax.distill.losses import NAMES, loss

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Mixture:
  """A sum of losses that changes in the course of training; hashable.

  Attributes:
    first: `((name, weight), ...)` at the start: names of NAMES, each once;
      weights finite and >= 0.
    last: the same at the end; None for `first`, that is, no change.
    hold: share of training, in [0, 1], over which `first` is kept; then the
      weights move linearly, and reach `last` at the end. With 1, never.

  Raises:
    ValueError: on other names, weights or shares, or when nothing is left.
  """

  first: tuple[tuple[str, float], ...] = (('kl', 1.0),)
  last: tuple[tuple[str, float], ...] | None = None
  hold: float = 0.3

  def __post_init__(self):
    for part in (self.first, *([] if self.last is None else [self.last])):
      names = [name for name, _ in part]
      if len({*names}) < len(names) or not {*names} <= {*NAMES}:
        raise ValueError(f'losses {names}: must be of {NAMES}, each once')
      weights = [weight for _, weight in part]
      if not any(weights) or not all(
          w >= 0 and math.isfinite(w) for w in weights):
        raise ValueError(f'weights {weights}: must be finite and >= 0, and '
                         'not all 0')
    if not 0 <= self.hold <= 1:
      raise ValueError(f'hold={self.hold}: must be in [0, 1]')

  def weights(self, progress: Array | float) -> dict[str, Array]:
    """Returns `{name: f32[]}` at a share of training, clipped to [0, 1].

    The names do not depend on `progress`: all whose weight is ever positive.
    """
    first = dict(self.first)
    last = first if self.last is None else dict(self.last)
    progress = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
    # With hold = 1 the numerator is never positive.
    share = (progress - self.hold) / max(1.0 - self.hold, 1e-6)
    share = jnp.clip(share, 0.0, 1.0)
    both = {name: (first.get(name, 0.0), last.get(name, 0.0))
            for name in NAMES if name in first or name in last}
    return {name: a + share * (b - a) for name, (a, b) in both.items()
            if a or b}


def mixed(
    mixture: Mixture, progress: Array | float, log_p: Array, log_q: Array,
    weight: Array, **options,
) -> Array:
  """Returns f32[]: the mixture's losses at a share of training, summed.

  Only losses that the mixture ever uses are computed; both mixtures' are at
  all times, as `progress` (f32[], in [0, 1]) may be traced. `options` are
  those of `loss`; errors too.
  """
  terms = [w * loss(name, log_p, log_q, weight, **options)
           for name, w in mixture.weights(progress).items()]
  return sum(terms[1:], start=terms[0])


def decay(num: int, gamma: float) -> Array:
  """Returns f32[num]: `exp(-(k - 1) / gamma)`, k = 1, ..., num, gamma > 0.

  Weights of the slots of a block, the first predicted token first.
  """
  if not gamma > 0:
    raise ValueError(f'gamma={gamma}: must be > 0')
  return jnp.exp(-jnp.arange(num, dtype=jnp.float32) / gamma)


def ttt_decay(num: int, base: float = 0.8) -> Array:
  """Returns f32[num]: `base ** s`, s = 0, ..., num - 1, base in (0, 1].

  Weights of the self-fed steps of EAGLE-3's training-time test.
  """
  if not 0 < base <= 1:
    raise ValueError(f'base={base}: must be in (0, 1]')
  return jnp.float32(base) ** jnp.arange(num, dtype=jnp.float32)


def dpace(log_q_label: Array, valid: Array, smoothing: float = 0.5) -> Array:
  """Returns f32[...,G] >= 0, weights of a block's slots, without gradient.

  With smoothed chances `s_i = (1 - smoothing) q_i + smoothing` that slot i is
  right, `w_j = sum_{m >= j} prod_{i <= m} s_i`: the derivative of the expected
  number of right tokens, `sum_m prod_{i <= m} s_i`, in `log s_j`. Multiply the
  mask by them, and divide by the mask alone (`normaliser`): how sure a block
  is must show in its gradient.

  Args:
    log_q_label: [...,G], the drafter's log-probability of the label.
    valid: bool[...,G]. Other slots get weight 0, count as certain (s = 1) for
      the slots after them, and add nothing to the sums.
    smoothing: in [0, 1]. 1 gives `w_j = G - j + 1`.

  References: D-PACE, arXiv:2605.18810, equations 7 and 8.
  """
  if not 0 <= smoothing <= 1:
    raise ValueError(f'smoothing={smoothing}: must be in [0, 1]')
  chex.assert_equal_shape([log_q_label, valid])
  log_q = jax.lax.stop_gradient(jnp.asarray(log_q_label, jnp.float32))
  chance = (1.0 - smoothing) * jnp.exp(log_q) + smoothing
  reached = jnp.cumprod(jnp.where(valid, chance, 1.0), axis=-1)
  gained = jnp.where(valid, reached, 0.0)
  return jnp.where(valid, jnp.cumsum(gained[..., ::-1], -1)[..., ::-1], 0.0)
