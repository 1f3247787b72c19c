"""Laws: the probability laws that drafts come from and rules compare.

A law is batched natively: leaves are `[B, R, ...]`, or `[B, ...]` after
`at`. It lives within a round. All arithmetic is float32.

Every law has `at(index)`, `log_prob(event)`, `sample(keys)`, `mode()`,
`token(event)`, `residual(other, keys, use, scale)` and `concat(other)`. Laws
over a finite vocabulary also have `probs`.
"""

from __future__ import annotations

from flax import struct
import jax
import jax.numpy as jnp

from specjax.core import keys as keys_lib
from specjax.core import tree, types

Array = jax.Array


@struct.dataclass
class Categorical:
  """A law over V tokens, given by logits up to a constant; -inf excludes.

  Attributes:
    logits: f32[B,R,V] or [B,V]. At least one finite entry a row.
  """

  logits: Array

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.logits.shape[-1]

  @property
  def probs(self) -> Array:
    """Returns f32[..., V]. Materialises V entries a row."""
    return jax.nn.softmax(self.logits, axis=-1)

  def at(self, index: Array) -> Categorical:
    """Returns the law of row `index int32[B]`, without the R axis.

    With `index int32[B,M]`, the laws of those rows.
    """
    return Categorical(tree.take_row(self.logits, index))

  def log_prob(self, event: Array) -> Array:
    """Returns the natural log-probability f32 of `event int32[B(,R)]`."""
    log_z = jax.nn.logsumexp(self.logits, axis=-1)
    picked = jnp.take_along_axis(
        self.logits, event[..., None], axis=-1, mode='clip')[..., 0]
    return picked - log_z

  def log_prob_at(self, row: Array, event: Array) -> Array:
    """Returns log-probabilities of events under rows of their own.

    Args:
      row: int32[T...] or [B,T...]. event: int32[B,T...].

    Returns:
      f32[B,T...]. No row of size V is gathered.
    """
    log_z = jax.nn.logsumexp(self.logits, axis=-1)
    row = jnp.broadcast_to(row, event.shape)
    pick = jax.vmap(lambda x, z, r, e: x.at[r, e].get(mode='clip')
                    - z.at[r].get(mode='clip'))
    return pick(self.logits, log_z, row, event)

  def entropy(self) -> Array:
    """Returns the entropy f32[B(,R)] in nats."""
    log_p = jax.nn.log_softmax(self.logits, axis=-1)
    p = jnp.exp(log_p)
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)

  def sample(self, keys: Array) -> Array:
    """Draws int32 tokens with key[B(,R)] (consumed), by Gumbel argmax."""
    noise = keys_lib.gumbel(keys, self.logits.shape[-1])
    return jnp.argmax(self.logits + noise, axis=-1).astype(jnp.int32)

  def mode(self) -> Array:
    """Returns the likeliest token; the lowest index on ties."""
    return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

  def token(self, event: Array) -> Array:
    """Maps an event to the token that is fed on: the event itself."""
    return event

  def residual(
      self, other: Law, keys: Array, use: Array, scale: Array | None = None
  ) -> tuple[Array, Array]:
    """Draws from `norm(relu(scale * self - other))`, row by row.

    Args:
      other: the draft's law at the rejected slots, batched as `self`.
      keys: key[B(,R)], consumed.
      use: bool[B(,R)]; where unset, draws from `self` (bonus, cut draft).
      scale: f32[B(,R)] or None (1): path weight of block verification.

    Returns:
      `(token int32[B(,R)], gave_up bool[B(,R)])`. A residual without mass
      (possible by rounding only, since rejection then has probability zero)
      falls back to `self`. Closed form, so `gave_up` is always False.
    """
    probs = self.probs
    scaled = probs if scale is None else probs * scale[..., None]
    left = jnp.maximum(scaled - other.probs, 0.0)
    mass = left.sum(axis=-1)
    usable = use & (mass > 0) & jnp.isfinite(mass)
    weight = jnp.where(usable[..., None], left, probs)
    return from_weights(weight).sample(keys), jnp.zeros_like(use)

  def concat(self, other: Law) -> Law:
    """Stacks rows of another law over the same vocabulary along R."""
    other = other if isinstance(other, Categorical) else other.soften()
    return Categorical(jnp.concatenate([self.logits, other.logits], axis=1))


@struct.dataclass
class Point:
  """A law that puts all mass on one token: greedy rows, fixed drafts.

  Attributes:
    value: int32[B,R] or [B].
    vocab_size: V, static.
    alive: bool like `value`, or None (all): some token could be chosen.
  """

  value: Array
  vocab_size: int = struct.field(pytree_node=False)
  alive: Array | None = None

  @property
  def probs(self) -> Array:
    """Returns the one-hot f32[..., V]; fuses into its consumer."""
    return jax.nn.one_hot(self.value, self.vocab_size, dtype=jnp.float32)

  def at(self, index: Array) -> Point:
    """Returns the law of row `index int32[B]`."""
    return Point(tree.take_row(self.value, index), self.vocab_size)

  def log_prob(self, event: Array) -> Array:
    """Returns 0 where the event is the token, else -inf."""
    return jnp.where(event == self.value, 0.0, -jnp.inf)

  def log_prob_at(self, row: Array, event: Array) -> Array:
    """Returns 0 where the event is the token of its row, else -inf."""
    row = jnp.broadcast_to(row, event.shape)
    value = jax.vmap(lambda x, r: x.at[r].get(mode='clip'))(self.value, row)
    return jnp.where(event == value, 0.0, -jnp.inf)

  def entropy(self) -> Array:
    """Returns 0."""
    return jnp.zeros(self.value.shape, jnp.float32)

  def sample(self, keys: Array) -> Array:
    """Returns the token; `keys` are not used."""
    del keys
    return self.value

  def mode(self) -> Array:
    """Returns the token."""
    return self.value

  def token(self, event: Array) -> Array:
    """Maps an event to the token that is fed on: the event itself."""
    return event

  def residual(
      self, other: Law, keys: Array, use: Array, scale: Array | None = None
  ) -> tuple[Array, Array]:
    """Returns the token: what is left of a point mass is that point mass."""
    del other, keys, scale
    return self.value, jnp.zeros_like(use)

  def soften(self) -> Categorical:
    """Returns the same law as a `Categorical`."""
    return Categorical(one_hot_logits(self.value, self.vocab_size))

  def concat(self, other: Law) -> Law:
    """Stacks rows of another law over the same vocabulary along R."""
    if isinstance(other, Point):
      value = jnp.concatenate([self.value, other.value], axis=1)
      return Point(value, self.vocab_size)
    return self.soften().concat(other)


Law = Categorical | Point


def from_weights(weight: Array) -> Categorical:
  """Returns the law with probabilities proportional to `weight >= 0`."""
  return Categorical(jnp.where(weight > 0, jnp.log(weight), -jnp.inf))


def one_hot_logits(token: Array, vocab_size: int) -> Array:
  """Returns f32[..., V]: 0 at the token, -inf elsewhere."""
  hit = jnp.arange(vocab_size) == token[..., None]
  return jnp.where(hit, 0.0, -jnp.inf)


def at_slot(draft, slot: Array, vocab_size: int) -> Law:
  """Returns the law that drafted slot `slot int32[B]` stands for.

  A `POINT` or `MATCH` slot is the point mass on its token, whatever
  `draft_law` holds at its row; slots out of range are clipped (mask them).
  """
  token = tree.take_row(draft.tokens, slot)
  if draft.draft_law is None:
    return Point(token, vocab_size)
  batch, num = draft.tokens.shape[:2]
  row = jnp.arange(num) if draft.law_row is None else draft.law_row
  rows = jnp.broadcast_to(row, (batch, num))
  mode = tree.take_row(jnp.broadcast_to(draft.mode, (batch, num)), slot)
  stated = draft.draft_law.at(tree.take_row(rows, slot))
  fixed = (mode == types.POINT) | (mode == types.MATCH)
  if isinstance(stated, Point):
    return Point(jnp.where(fixed, token, stated.value), vocab_size)
  point = one_hot_logits(token, vocab_size)
  return Categorical(jnp.where(fixed[:, None], point, stated.logits))
