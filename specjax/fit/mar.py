"""What a decoder of continuous tokens is trained for: to take noise off.

Li et al. 2024, arXiv:2406.11838, section 3 (the loss of a token's denoising
head), with the learned variances of Nichol and Dhariwal 2021,
arXiv:2102.09672, equation 16; and drafters taught the target's own chain.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import density
from specjax.fit.step import Objective
from specjax.models.causal_images import CausalImages
from specjax.models.diffusion import Diffusion
from specjax.models.diffusion_head import DenoisingMLP, GuidedHead, bare
from specjax.models.masked_images import MaskedImages

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Masks:
  """How many tokens of an image are hidden from a masked decoder in training.

  A share of N is drawn for each image from the normal law of mean 1 and
  deviation `spread`, cut off to [least, 1]; at least one token is hidden.

  Attributes:
    least: in [0, 1). spread: > 0; a large one draws the share uniformly.
      Published: 0.7 and 0.25. Decoding one token at a time ends with nearly
      nothing hidden, which 0 covers.
  """

  least: float = 0.0
  spread: float = 10.0

  def __post_init__(self):
    if not 0 <= self.least < 1 or not self.spread > 0:
      raise ValueError(f'{self}: least must be in [0, 1), spread > 0')

  def draw(self, key: Array, rows: int, size: int) -> Array:
    """Returns bool[B,N], the hidden ones."""
    keys = jax.random.split(key)
    low = (self.least - 1) / self.spread
    share = 1 + self.spread * jax.random.truncated_normal(
        keys[0], low, 0.0, (rows, 1))
    count = jnp.clip(jnp.ceil(size * share), 1, size)
    order = jax.random.uniform(keys[1], (rows, size))
    return jnp.argsort(jnp.argsort(order, axis=-1), axis=-1) < count


def said(
    lm: MaskedImages | CausalImages, params: Any, tokens: Array, label: Array,
    key: Array, masks: Masks,
) -> tuple[Array, Array, Array]:
  """Returns what is said of tokens, those tokens, and which of them count.

  Two decoders of one kind see the same masks or orders under the same key.

  Args:
    lm: the decoder. params: of it, with 'mar'.
    tokens: f32[B,N,C], in raster order. label: int32[B].
    key: of the masks or orders. masks: of masked decoders.

  Returns:
    `(f32[B,N,D], f32[B,N,C], bool[B,N])`.
  """
  rows, size = tokens.shape[:2]
  if isinstance(lm, MaskedImages):
    hidden = masks.draw(key, rows, size)
    return lm.mar(params['mar'], tokens, hidden, label), tokens, hidden
  order = jnp.argsort(jax.random.uniform(key, (rows, size)), axis=-1)
  found = lm.whole(params['mar'], tokens, order, label)
  tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
  return found, tokens, jnp.ones((rows, size), bool)


@dataclasses.dataclass(frozen=True)
class MARObjective(Objective):
  """The squared error of the noise, and a bound that trains variances.

  Levels are drawn uniformly from those of the base schedule that decoding
  reaches; each token is used with `repeats` of them. The bound is in bits a
  channel, does not touch the predicted noise, and is left out where variances
  are not learned.

  Attributes:
    lm: the decoder, without guidance.
    masks: of a masked decoder. repeats: >= 1.
  """

  lm: MaskedImages | CausalImages
  masks: Masks = Masks()
  repeats: int = 4

  def __post_init__(self):
    if self.repeats < 1:
      raise ValueError(f'repeats={self.repeats}: must be >= 1')

  def init(self, key: Array) -> tuple[Any, None]:
    """Returns random weights: `{'mar', 'head'}`."""
    return self.lm.random(key), None

  def loss(
      self, net: Any, memory: None, batch: dict[str, Array], key: Array,
      train: bool = False,
  ) -> tuple[Array, tuple[dict[str, Array], None]]:
    """Returns the loss of `{'codes': f32[B,N,C], 'label': int32[B]}`.

    A label is in [0, num_classes]; the last says nothing. Scalars: 'noise'
    (mean squared error), 'bound' (bits a channel).
    """
    del memory, train
    keys = jax.random.split(key, 3)
    found, tokens, counts = said(
        self.lm, net, batch['codes'], batch['label'], keys[0], self.masks)
    full = base(fast(self.lm.process))
    shape = (self.repeats, *counts.shape)
    level = jax.random.randint(keys[1], shape, 0, reached(self.lm.process))
    noise = jax.random.normal(keys[2], (*shape, tokens.shape[-1]))
    x = full.diffuse(tokens, level, noise)
    guess, between = full.head(net['head'], x, full.time(level), found)
    share = counts / (self.repeats * counts.sum())
    error = jnp.sum(share * jnp.mean(jnp.square(guess - noise), axis=-1))
    bound = jnp.float32(0)
    if full.variance == 'learned':
      bound = jnp.sum(share * _bound(
          full, tokens, x, level, jax.lax.stop_gradient(guess), between))
    return error + bound, ({'noise': error, 'bound': bound}, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilledMAR(MARObjective):
  """A drafter that is taught the target's steps, on states they share.

      task * (the loss above) + distil * mean_t KL(drafter's step || target's)

  in nats a channel, over the steps that decoding takes; the sum of the
  steps' divergences is what decides how many drafts are kept (the expected
  log-ratio of a path). Batches hold the target's parameters: 'teacher'.

  Attributes:
    teacher: the target's decoder, of the drafter's kind; with it the masks or
      orders are shared.
    task, distil: weights, >= 0, not both 0.
    guidance: scale at which both decode; the guided laws are compared.
    most: divergences above are cut (their gradients are scaled), nats a
      channel: the first steps multiply any error by hundreds.
  """

  teacher: MaskedImages | CausalImages
  task: float = 0.1
  distil: float = 1.0
  guidance: float = 1.0
  most: float = 10.0

  def __post_init__(self):
    super().__post_init__()
    if type(self.teacher) is not type(self.lm):
      raise ValueError('a drafter is taught by a decoder of its own kind, '
                       'masked or causal')
    mine, theirs = self.lm.process, self.teacher.process
    for name in ('channels', 'num_levels', 'num_base', 'first', 'variance'):
      if getattr(mine, name) != getattr(theirs, name):
        raise ValueError(f'{name}: {getattr(mine, name)} of the drafter, '
                         f'{getattr(theirs, name)} of the target')
    if min(self.task, self.distil) < 0 or not self.task + self.distil > 0:
      raise ValueError(f'task={self.task}, distil={self.distil}: must be '
                       '>= 0, one of them positive')

  def loss(
      self, net: Any, memory: None, batch: dict[str, Any], key: Array,
      train: bool = False,
  ) -> tuple[Array, tuple[dict[str, Array], None]]:
    """Returns the loss; scalars also 'nats': divergence of a whole path."""
    teacher: Any = self.teacher
    task, (scalars, _) = super().loss(net, memory, batch, key, train)
    keys = jax.random.split(jax.random.fold_in(key, 1), 3)
    process = fast(self.lm.process)
    args = batch['codes'], keys[0]
    mine, tokens, counts = self._told(self.lm, net, *args, batch['label'])
    theirs, _, _ = self._told(
        teacher, batch['teacher'], *args, batch['label'])
    theirs = jax.lax.stop_gradient(theirs)
    level = jax.random.randint(keys[1], counts.shape, 0, process.num_steps)
    noise = jax.random.normal(keys[2], tokens.shape)
    x = process.diffuse(tokens, level, noise)
    index = process.level(level)  # its own inverse
    a = self._guided(process).step(net['head'], x, index, mine)
    b = self._guided(fast(teacher.process)).step(
        batch['teacher']['head'], x, index, theirs)
    apart = divergence(*a, *jax.lax.stop_gradient(b))
    each = jnp.mean(apart, axis=-1)
    cut = jnp.where(each > self.most, self.most * each / jax.lax.stop_gradient(
        jnp.maximum(each, 1e-6)), each)
    share = counts / counts.sum()
    nats = process.num_steps * process.channels * jnp.sum(share * each)
    total = self.task * task + self.distil * jnp.sum(share * cut)
    return total, ({**scalars, 'nats': nats}, None)

  def _told(self, lm, params, tokens, key, label) -> Any:
    """Returns `said`, of the guided law where there is guidance."""
    found, aligned, counts = said(lm, params, tokens, label, key, self.masks)
    if self.guidance == 1:
      return found, aligned, counts
    none = jnp.full_like(label, lm.num_classes)
    free, _, _ = said(lm, params, tokens, none, key, self.masks)
    return {'with': found, 'without': free, 'scale': jnp.full(
        counts.shape, self.guidance)}, aligned, counts

  def _guided(self, process: Diffusion) -> Diffusion:
    if self.guidance == 1:
      return process
    return dataclasses.replace(process, head=GuidedHead(process.head))


def fast(process: Diffusion) -> Diffusion:
  """Returns a chain whose head multiplies as the hardware prefers."""
  head = bare(process.head)
  if isinstance(head, DenoisingMLP):  # others as they are
    head = dataclasses.replace(head, exact=False)
  return dataclasses.replace(process, head=head)


def base(process: Diffusion) -> Diffusion:
  """Returns the schedule that a head is trained on, all its levels."""
  return dataclasses.replace(
      process, num_levels=process.num_base, first=None)


def reached(process: Diffusion) -> int:
  """Returns how many levels of the base schedule chains come through."""
  return int(process.tables['number'][process.num_steps - 1]) + 1


def divergence(
    mean: Array, log_std: Array, other: Array, other_log_std: Array
) -> Array:
  """Returns KL(N(mean, std) || N(other, other std)), elementwise, nats."""
  ratio = log_std - other_log_std
  away = (mean - other) * jnp.exp(-other_log_std)
  return 0.5 * (jnp.exp(2 * ratio) + jnp.square(away) - 1) - ratio


def _bound(
    full: Diffusion, tokens: Array, x: Array, level: Array, guess: Array,
    between: Array,
) -> Array:
  """Returns the bound's term of a level, f32[...], bits a channel."""
  mean, log_std = full.moments(x, level, guess, between)
  at = full.at(level)
  true = at['of_token'] * tokens + at['of_state'] * x
  apart = divergence(true, 0.5 * at['log_posterior'], mean, log_std)
  last = -density.log_normal(tokens, mean, log_std)
  found = jnp.where(level[..., None] == 0, last, apart)
  return jnp.mean(found, axis=-1) / math.log(2)
