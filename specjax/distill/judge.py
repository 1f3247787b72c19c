"""Training of a judge head: which drafts are right, though not the target's.

A judge reads the target's hidden state *after* it has consumed a draft and
says whether the token is correct where it stands. The target is frozen, so
training is logistic regression on stored hidden states:

    e = judge_data.features(target, params, tokens, lengths)
    y, keep = judge_data.labels(end - start, first_error)  # answer of row 0
    x = e[0, start:end][keep]  # its features; stack those of all rows
    head, report = fit(x, y[keep], held_out=(x_held, y_held))
    tau = thresholds.choose_threshold(
        score(head, x_held), y_held).threshold

Reference: Bachmann et al. 2025, arXiv:2501.19309. How it weighs the classes
is not public; the balanced weight is a choice made here.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from specjax.distill.judge_data import TAP
from specjax.distill.thresholds import (
  Threshold,
  auc,
  check_share,
  checked_labels,
  choose_threshold,
)

Array = jax.Array
Head = dict[str, Array]

_NAMES = ('weight', 'bias', 'mean', 'scale')


class Report(NamedTuple):
  """How well a head fits.

  Attributes:
    loss: the objective on the training data, in nats, penalty included.
    gradient_norm: Euclidean norm of its gradient; near 0 says converged.
    auc: probability that a correct token outscores an error (ties count
      half), on the held-out data if there are any, else on the training data.
    operating_point: the recall of errors at the acceptance asked for, on the
      same data as `auc`.
  """

  loss: float
  gradient_norm: float
  auc: float
  operating_point: Threshold


def score(head: Head, hidden: Array) -> Array:
  """Returns f32[...] in [0, 1] for hidden states [...,D]: high is correct."""
  x = (jnp.asarray(hidden, jnp.float32) - head['mean']) / head['scale']
  logit = jnp.dot(x, head['weight'], precision=jax.lax.Precision.HIGHEST)
  return jax.nn.sigmoid(logit + head['bias'])


def fit(
    hidden: npt.ArrayLike, label: npt.ArrayLike, *,
    negative_weight: float | str = 'balanced', l2: float = 1e-3,
    num_steps: int = 100, acceptance: float = 0.9,
    held_out: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
) -> tuple[Head, Report]:
  """Fits a judge head: logistic regression on standardised features.

  Minimises sum_i w_i BCE(y_i, logit_i) / sum_i w_i + l2 / 2 * |weight|^2 with
  full-batch L-BFGS from zero, in float32; the best iterate is kept. The bias
  is not penalised. Equal inputs give equal bits on one machine. Solvers that
  sum the loss over M unweighted tokens call 1 / (l2 M) C. Try several decades
  of `l2` and keep the best held-out AUC.

  Args:
    hidden: [M,D], tokens of several models' answers, correct and not.
    label: [M] of 0 (error) and 1 (correct); both occur.
    negative_weight: w of an error, > 0, where a correct token weighs 1.
      'balanced' gives both classes the same total weight; scores then are
      probabilities under equal class priors.
    l2: >= 0, of weights on standardised features.
    num_steps: of L-BFGS, >= 1. acceptance: in (0, 1], at which the report
      states the recall of errors.
    held_out: `(hidden, label)` to report on.

  Returns:
    `(head, report)`. `head` is `{'weight': f32[D], 'bias': f32[],
    'mean': f32[D], 'scale': f32[D]}`, all finite; see `score`. A feature that
    does not vary gets weight 0.

  Raises:
    ValueError: on other shapes, labels or ranges, values that are not finite
      or whose differences leave float32, or a class that is missing.
  """
  x, y = _checked(hidden, label, 'training')
  weight = _negative_weight(negative_weight, y)
  if not (l2 >= 0 and math.isfinite(l2)):
    raise ValueError(f'l2={l2}: must be finite and >= 0')
  if num_steps < 1:
    raise ValueError(f'num_steps={num_steps}: must be >= 1')
  check_share('acceptance', acceptance)
  test_x, test_y = x, y
  if held_out is not None:
    test_x, test_y = _checked(*held_out, 'held-out')
    if test_x.shape[1] != x.shape[1]:
      raise ValueError(f'held-out D={test_x.shape[1]}, training D={x.shape[1]}')
  mean, scale = _moments(x)
  with np.errstate(over='ignore'):
    standard = (x - mean) / scale
  if not np.isfinite(standard).all():
    raise ValueError('training features are too far apart for float32')
  w = np.where(y, 1.0, weight)
  best, loss, norm = _minimise(
      jnp.asarray(standard), jnp.asarray(y, jnp.float32),
      jnp.asarray(w / w.sum(), jnp.float32), l2, num_steps=num_steps)
  head = {**best, 'mean': jnp.asarray(mean), 'scale': jnp.asarray(scale)}
  scores = np.asarray(score(head, jnp.asarray(test_x)))
  return head, Report(
      float(loss), float(norm), auc(scores, test_y),
      choose_threshold(scores, test_y, acceptance=acceptance))


@functools.partial(jax.jit, static_argnames='num_steps')
def _minimise(x: Array, y: Array, w: Array, l2: float, *, num_steps: int):
  """Returns `({'weight', 'bias'}, loss, gradient norm)` of the best iterate."""
  def objective(v: Head) -> Array:
    logit = jnp.dot(x, v['weight'], precision=jax.lax.Precision.HIGHEST)
    losses = optax.sigmoid_binary_cross_entropy(logit + v['bias'], y)
    penalty = 0.5 * l2 * jnp.sum(jnp.square(v['weight']))
    return jnp.sum(w * losses) + penalty

  optimizer = optax.lbfgs()
  evaluate = optax.value_and_grad_from_state(objective)

  def better(best, v, loss, gradient):
    new = (v, loss, optax.tree.norm(gradient))
    # False for a NaN, so that a failed line search cannot be kept.
    return jax.tree.map(lambda n, o: jnp.where(loss < best[1], n, o),
                        new, best)

  def step(carry, _):
    v, state, best = carry
    loss, gradient = evaluate(v, state=state)
    best = better(best, v, loss, gradient)
    update, state = optimizer.update(
        gradient, state, v, value=loss, grad=gradient, value_fn=objective)
    return (optax.apply_updates(v, update), state, best), None

  start = {'weight': jnp.zeros(x.shape[1]), 'bias': jnp.zeros(())}
  nothing = (start, jnp.float32(jnp.inf), jnp.float32(jnp.inf))
  (v, _, best), _ = jax.lax.scan(
      step, (start, optimizer.init(start), nothing), length=num_steps)
  return better(best, v, *jax.value_and_grad(objective)(v))


def save(path: str | Path, head: Head, threshold: float) -> None:
  """Writes a head as safetensors; it appears complete or not at all.

  Tensors are those of `head`, float32; the metadata holds the threshold (in
  [0, 1], else ValueError) and the name of the hidden state that the head
  reads. The folder must exist; a file of that name is replaced.
  """
  if not 0 <= threshold <= 1:
    raise ValueError(f'threshold={threshold}: must be in [0, 1]')
  path, end = Path(path), 0
  arrays = [np.asarray(head[name], '<f4') for name in _NAMES]
  facts = {'tap': TAP, 'threshold': repr(float(np.float32(threshold)))}
  header: dict[str, Any] = {'__metadata__': facts}
  for name, array in zip(_NAMES, arrays):
    begin, end = end, end + array.nbytes
    header[name] = {'dtype': 'F32', 'shape': list(array.shape),
                    'data_offsets': [begin, end]}
  blob = json.dumps(header).encode()
  blob += b' ' * (-len(blob) % 8)
  partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
  try:
    partial.write_bytes(b''.join(
        [len(blob).to_bytes(8, 'little'), blob,
         *(array.tobytes() for array in arrays)]))
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def load(path: str | Path) -> tuple[Head, float]:
  """Reads what `save` wrote: `(head, threshold)`.

  Raises:
    ValueError: the file is not one of `save`'s, is damaged, or its head reads
      another hidden state.
    OSError: it cannot be opened.
  """
  data = Path(path).read_bytes()
  head: Head = {}
  try:
    start = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:start])
    facts = header['__metadata__']
    tap, threshold = facts['tap'], float(facts['threshold'])
    for name in _NAMES:
      begin, end = header[name]['data_offsets']
      values = np.frombuffer(data[start + begin:start + end], '<f4')
      head[name] = jnp.asarray(values.reshape(header[name]['shape']))
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path}: not a judge head: {error!r}') from error
  shapes = [head[name].shape for name in _NAMES]
  vector = (head['weight'].size,)
  if tap != TAP or shapes != [vector, (), vector, vector]:
    raise ValueError(f'{path}: tap {tap!r} and shapes {shapes}; expected '
                     f'{TAP!r} and [D], [], [D], [D]')
  return head, threshold


def _checked(hidden, label, what: str):
  """Returns `(f32[M,D], bool[M])`, or raises ValueError."""
  x, y = np.asarray(hidden, np.float32), np.asarray(label)
  if x.ndim != 2 or y.shape != x.shape[:1] or not x.size:
    raise ValueError(f'{what} features {x.shape} and labels {y.shape}: must '
                     'be [M,D] and [M], M, D >= 1')
  if not np.isfinite(x).all():
    raise ValueError(f'{what} features are not all finite')
  return x, checked_labels(y, f'{what} ')


def _negative_weight(value: float | str, y: npt.NDArray) -> float:
  """Returns the weight of an error, where a correct token weighs 1."""
  if value == 'balanced':
    return y.sum() / (~y).sum()
  if isinstance(value, str) or not (value > 0 and math.isfinite(value)):
    raise ValueError(f"negative_weight={value!r}: 'balanced', or a finite "
                     'number > 0')
  return value


def _moments(x: npt.NDArray) -> tuple[npt.NDArray, npt.NDArray]:
  """Returns mean and scale, f32[D]; the scale is never 0."""
  mean = x.mean(axis=0, dtype=np.float64)
  square = np.zeros_like(mean)
  for rows in np.array_split(x, -(-len(x) // 1024)):  # bounds the copies
    square += ((rows - mean) ** 2).sum(axis=0)
  # Spread below float32's resolution of the mean is rounding, not signal.
  scale = np.maximum(np.sqrt(square / len(x)), 1e-6 * np.abs(mean))
  scale = np.where(scale > 1e-30, scale, 1.0)
  return mean.astype(np.float32), scale.astype(np.float32)
