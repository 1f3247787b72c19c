"""How a drafter's parameters are moved: AdamW or Muon, clipped, scheduled.

    optimizer = make(learning_rate=1e-3, steps=10_000, warmup=300)
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

Array = jax.Array

SCHEDULES = ('cosine', 'linear', 'constant')

# Inputs and outputs of weights that are matrices of more than two axes. The
# axis of size 2 of `gate_up` is neither: two matrices.
_FOLDED = {
    'qkv': MuonDimensionNumbers(0, (1, 2, 3)),
    'out': MuonDimensionNumbers((0, 1, 2), 3),
    'gate_up': MuonDimensionNumbers(0, 2),
}
# Rows belong to tokens: most get no gradient in a step, and orthogonal
# updates would move them all alike.
_TABLES = ('embedding', 'head', 'markov_in', 'markov_out')


def learning_rate(
    peak: float, steps: int, *, warmup: int = 0, schedule: str = 'cosine',
) -> optax.Schedule:
  """Returns a function of the step (int32[], 0-based) to f32[] in [0, peak].

  Step s < warmup has `peak (s + 1) / warmup`, so that the first one counts.
  Then 'constant' stays at peak; 'linear' and 'cosine' (half a period) fall to
  0 at step `steps`, the first that is not taken, and stay there.

  Args:
    peak: > 0. steps: of the training, >= 1. warmup: in [0, steps].
    schedule: one of SCHEDULES.

  Raises:
    ValueError: on other values.
  """
  if not peak > 0:
    raise ValueError(f'learning_rate={peak}: must be > 0')
  if not 0 <= warmup <= steps or steps < 1:
    raise ValueError(f'steps={steps}, warmup={warmup}: must be >= 1, and in '
                     '[0, steps]')
  if schedule not in SCHEDULES:
    raise ValueError(f'schedule={schedule!r}: must be one of {SCHEDULES}')

  def rate(step) -> Array:
    step = jnp.asarray(step, jnp.float32)
    rise = jnp.minimum((step + 1.0) / max(warmup, 1), 1.0)
    done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    fall = {'cosine': 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
            'linear': 1.0 - done, 'constant': jnp.ones_like(done)}[schedule]
    return peak * rise * fall
  return rate


def make(
    *, learning_rate: float, steps: int, warmup: int = 0,
    schedule: str = 'cosine', betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0, clip_norm: float | None = 1.0,
    muon: bool = False,
) -> optax.GradientTransformation:
  """Returns an optimizer; its moments have the dtype of the parameters.

  AdamW; with `muon`, Muon for the weights that are matrices (the networks'
  folded ones included), scaled to the size of AdamW's updates, so that
  learning rates carry over, and AdamW for tables, vectors and the rest.

  Args:
    learning_rate, steps, warmup, schedule: of the function `learning_rate`.
    betas: of AdamW, in [0, 1).
    weight_decay: >= 0, decoupled; of parameters of two axes or more.
    clip_norm: greatest Euclidean norm of the gradient of all parameters, > 0;
      None does not clip.
    muon: whether to.

  Raises:
    ValueError: on other values.

  References: Loshchilov and Hutter 2019, arXiv:1711.05101; Liu et al. 2025,
  arXiv:2502.16982 (Muon).
  """
  rate = _rate(learning_rate, steps, warmup=warmup, schedule=schedule)
  first, second = betas
  if not (0 <= first < 1 and 0 <= second < 1):
    raise ValueError(f'betas={betas}: must be in [0, 1)')
  if not weight_decay >= 0:
    raise ValueError(f'weight_decay={weight_decay}: must be >= 0')
  if clip_norm is not None and not clip_norm > 0:
    raise ValueError(f'clip_norm={clip_norm}: must be > 0, or None')
  adam = optax.adamw(rate, b1=first, b2=second, weight_decay=weight_decay,
                     mask=_decayed)
  move: optax.GradientTransformation = adam
  if muon:
    matrices = optax.contrib.muon(
        rate, weight_decay=weight_decay, consistent_rms=0.2,
        muon_weight_dimension_numbers=_dimensions)
    move = optax.partition({'adam': adam, 'muon': matrices}, _labels)
  if clip_norm is None:
    return move
  return optax.chain(optax.clip_by_global_norm(clip_norm), move)


_rate = learning_rate  # `make` has an argument of that name


def _decayed(params: Any) -> Any:
  return jax.tree.map(lambda x: x.ndim >= 2, params)


def _labels(params: Any) -> Any:
  """Returns 'muon' for matrices, 'adam' for the rest, as a tree."""
  def label(path, x) -> str:
    name = _name(path)
    matrix = name in _FOLDED or x.ndim == 2 and name not in _TABLES
    return 'muon' if matrix else 'adam'
  return jax.tree_util.tree_map_with_path(label, params)


def _dimensions(params: Any) -> Any:
  """Returns which axes of each matrix are its rows and columns, as a tree."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: _FOLDED.get(_name(path), MuonDimensionNumbers()), params)


def _name(path: tuple) -> str:
  # Below the last name are only the boxes of logical axes, if any.
  names = [str(entry.key) for entry in path if hasattr(entry, 'key')]
  return names[-1] if names else ''
