"""What every way of training a drafter shares.

A `Task` knows how one kind of drafter learns from the target's states; the
trainer (`distill.trainer`) knows optimisers, devices and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from specjax.distill import losses
from specjax.distill.objective import Mixture
from specjax.distill.teacher import Batch, Teacher

Array = jax.Array


class Task(Protocol):
  """How a drafter learns. A frozen, hashable dataclass.

  `net` is what is trained. `params` are the parameters for decoding that
  `attach` makes of it: the same arrays, and views of the target.
  """

  @property
  def taps(self) -> tuple[str, ...]:
    """Hidden states of the target that the drafter reads."""
    ...

  @property
  def num_draft(self) -> int:
    """Positions that are trained: length of the reports in `loss`."""
    ...

  @property
  def model(self) -> Any:
    """What is trained: a model of `drafters`."""
    ...

  @property
  def dtype(self) -> str:
    """Of the weights when they decode."""
    ...

  def init(self, key: Array, target: Any) -> Any:
    """Returns fresh trained weights, in float32."""
    ...

  def attach(self, net: Any, target: Any, ids: Any) -> Any:
    """Returns `params.drafter` for decoding with the drafter's source."""
    ...

  def loss(
      self, params: Any, target: Any, batch: Batch, teacher: Teacher,
      key: Array, progress: Array,
  ) -> tuple[Array, dict[str, Array]]:
    """Returns the loss f32[] and sums for reports.

    Args:
      params: what `attach` returned, with `net` replaced by the weights that
        gradients are asked for.
      target: the target's parameters. key: randomness of this step.
      progress: f32[] in [0, 1], share of training done.

    Returns:
      The sums hold at least, per drafted position, `weight f32[K]` (places
      counted), `acceptance f32[K]` (sum of `min(p, q)` there) and
      `match f32[K]` (places where both argmaxes are equal).
    """
    ...

  def logits(
      self, params: Any, target: Any, batch: Batch, teacher: Teacher,
      anchors: Array,
  ) -> Array:
    """Returns f32[B,A,K,W]: what training scores, at chosen places.

    Slot k of place a follows the text's token at `anchors[b, a] + k`: what a
    round of decoding that begins there drafts from once the text's own tokens
    were drafted before. Slots beyond the text hold anything.

    Args:
      params, target, batch, teacher: as for `loss`; nothing is random.
      anchors: int32[B,A], pending tokens. EAGLE and heads need a token before
        it in the document: the first one's places hold anything.
    """
    ...

  def source(self) -> Any:
    """Returns the drafter's `drafters.source.Source`."""
    ...


class ModelTask:
  """What tasks share that train a network of `specjax.models`.

  A base of a dataclass with a field `model`, which has `config`, `taps`,
  `init(key)` and `attach(net, target, ids)`. With `num_draft`, `source`,
  `loss` and `logits` it is a `Task`.
  """

  model: Any

  @property
  def taps(self) -> tuple[str, ...]:
    """Hidden states of the target that the drafter reads."""
    return self.model.taps

  @property
  def dtype(self) -> str:
    """What the network computes in; trained weights are float32."""
    config = self.model.config
    return getattr(config, 'decoder', config).dtype

  def init(self, key: Array, target: Any) -> Any:
    """Returns fresh weights, in float32."""
    del target
    return self.model.init(key)

  def attach(self, net: Any, target: Any, ids: Any) -> Any:
    """Returns `params.drafter` for decoding with the drafter's source."""
    return self.model.attach(net, target, ids)

  def computed(self, params: Any) -> Any:
    """Returns parameters whose weights are cast to `dtype`."""
    return {**params, 'net': cast(params['net'], self.dtype)}


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised at each slot.

  Attributes:
    mixture: losses and how they change over training.
    chunk: slots whose logits exist at a time; memory against kernels.
  """

  mixture: Mixture = Mixture(
      first=(('kl', 1.0),), last=(('kl', 0.1), ('l1', 0.9)), hold=0.3)
  chunk: int = 4096

  def sums(
      self, progress: Array, log_p: Array, log_q: Array, weight: Array,
      label: Array,
  ) -> Array:
    """Returns f32[], the weighted sum of the losses over slots.

    Args:
      progress: f32[]. log_p, log_q: [n,W]. weight: f32[n].
      label: int32[n], draft id of the text's token.
    """
    total = jnp.float32(0)
    for name, scale in self.mixture.weights(progress).items():
      if name == 'tvd_pp':
        value = losses.tvd_pp(log_p, log_q, weight) * jnp.sum(weight)
      else:
        kwargs: dict[str, Any] = {'label': label} if name == 'ce' else {}
        value = weighted_sum(
            losses.pointwise(name, log_p, log_q, **kwargs), weight)
      total += scale * value
    return total


def flat(rows: Any, axes: int) -> Any:
  """Returns a tree whose arrays have one axis in place of the first `axes`."""
  return jax.tree.map(lambda x: x.reshape((-1,) + x.shape[axes:]), rows)


def in_chunks(
    fn: Callable[[Any], Any], rows: Any, chunk: int, axes: int = 1
) -> Any:
  """Returns the sum of `fn` over chunks of `rows`, recomputing backwards.

  Args:
    fn: maps a tree of [chunk,...] to a tree of sums; zero rows must add
      nothing (their weight is 0).
    rows: a tree of arrays; their first `axes` axes count the rows.
    chunk: rows at a time.
  """
  rows = flat(rows, axes)
  num = jax.tree.leaves(rows)[0].shape[0]
  chunk = min(chunk, num)
  count = -(-num // chunk)
  fn = jax.checkpoint(fn)
  if count == 1:
    return fn(rows)

  def split(x: Array) -> Array:
    pad = [(0, count * chunk - num)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad).reshape((count, chunk) + x.shape[1:])

  stacked = jax.tree.map(split, rows)
  shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], stacked))
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def body(total, part):
    return jax.tree.map(jnp.add, total, fn(part)), None

  return jax.lax.scan(body, zero, stacked)[0]


def by_position(values: Array, position: Array, num: int) -> Array:
  """Returns f32[num]: sums of `values f32[n]` by `position int32[n]`."""
  hot = position[:, None] == jnp.arange(num)
  return jnp.sum(jnp.where(hot, values[:, None], 0.0), axis=0)


def weighted_sum(value: Array, weight: Array) -> Array:
  """Returns f32[]; places of weight 0 may hold anything."""
  return jnp.sum(jnp.where(weight > 0, value * weight, 0.0))


def cast(net: Any, dtype: Any) -> Any:
  """Returns weights in the compute dtype; norms' vectors stay float32."""
  return jax.tree.map(
      lambda x: x.astype(dtype) if x.ndim >= 2 else x, net)
