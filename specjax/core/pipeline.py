"""The one pipeline from logits to laws.

Drafts, corrections, bonus tokens and plain decoding all go through `law`, so
that "lossless" means lossless with respect to exactly what a plain sampler
with the same options would draw. Order of the stages (that of Hugging Face):

  penalties, bias / bans, constraint, minimum length, temperature, top-k,
  top-p (of what top-k left), min-p (of what is left).

Ties at a top-k or top-p threshold are all kept: the law does not depend on
the order of the vocabulary.
"""

from __future__ import annotations

import math
from typing import Protocol

import jax
import jax.numpy as jnp

from specjax.core import law as law_lib
from specjax.core import numerics
from specjax.core.types import Context, Options

Array = jax.Array

# Below this a temperature means greedy: dividing by it would overflow.
GREEDY_BELOW = 1e-5


class Constraint(Protocol):
  """A per-step token mask (a grammar): a pytree with its state per row."""

  def allowed(self, history: Array) -> Array:
    """Returns bool[B,R,V] after `history int32[B,R,D]` (padded with -1)."""
    ...

  def advance(self, tokens: Array, count: Array) -> Constraint:
    """Returns the constraint after the first `count` of `tokens int32[B,T]`."""
    ...

  def admit(self, rows: Array, new: Constraint) -> Constraint:
    """Returns `new`'s state on `rows bool[B]`, this one's elsewhere."""
    ...


def finite(logits: Array) -> Array:
  """Returns bool[B,R]: no NaN or +inf, and something left to choose.

  -inf is a legal way of banning a token, so the largest entry decides (NaN
  propagates through a maximum).
  """
  return jnp.isfinite(jnp.max(logits.astype(jnp.float32), axis=-1))


def law(context: Context, logits: Array, history: Array) -> law_lib.Law:
  """Turns raw logits into the law of the next token.

  Args:
    context: prefix and per-row options. Stages whose option is None are not
      compiled.
    logits: [B,R,V] any float dtype; cast to float32 before anything else.
    history: int32[B,R,D] drafted tokens between the committed prefix and
      each row, padded with -1. Penalties, constraints and the minimum length
      see prefix + history.

  Returns:
    `Point` when every row is greedy, else `Categorical` (greedy rows of a
    mixed batch are one-hot).
  """
  options = context.options
  logits = shaped(context, logits, history)
  if options.temperature is None:
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    alive = finite(logits) if _can_forbid(options) else None
    return law_lib.Point(token, logits.shape[-1], alive)
  return law_lib.Categorical(_tempered(options, logits))


def shaped(context: Context, logits: Array, history: Array) -> Array:
  """Returns f32[B,R,V] after the stages before temperature.

  Penalties, bans, constraint and minimum length applied: what a greedy row
  takes the argmax of, and what deterministic drafters rank by.
  """
  options = context.options
  logits = _penalised(context, logits.astype(jnp.float32), history)
  if options.bias is not None:
    logits = logits + options.bias[:, None]
  if options.constraint is not None:
    logits = jnp.where(
        options.constraint.allowed(history), logits, -jnp.inf)
  if options.min_new is not None:
    logits = _ban_early_eos(context, logits, history)
  return logits


def healthy(context: Context, logits: Array, law: law_lib.Law) -> Array:
  """Returns bool[B,R]: the logits are finite, and some token may be drawn.

  Bans, a constraint and a minimum length can together forbid everything;
  what would be drawn then is not in the law.
  """
  is_fine = finite(logits)
  if not _can_forbid(context.options):
    return is_fine
  if isinstance(law, law_lib.Point):
    return is_fine if law.alive is None else is_fine & law.alive
  return is_fine & finite(law.logits)


def _can_forbid(options: Options) -> bool:
  return not (options.bias is None and options.constraint is None
              and options.min_new is None)


def _tempered(options: Options, logits: Array) -> Array:
  """Applies temperature, top-k, top-p and min-p; f32[B,R,V] to the same."""
  assert options.temperature is not None
  temperature = options.temperature[:, None, None]
  greedy = temperature < GREEDY_BELOW
  kept = logits / jnp.where(greedy, 1.0, temperature)
  if options.top_k is not None:
    kept = top_k(kept, options.top_k[:, None])
  if options.top_p is not None:
    kept = top_p(kept, options.top_p[:, None])
  if options.min_p is not None:
    floor = jnp.log(options.min_p)[:, None, None]
    best = jnp.max(kept, axis=-1, keepdims=True)
    kept = jnp.where(kept >= best + floor, kept, -jnp.inf)
  best = jnp.argmax(logits, axis=-1)
  point = law_lib.one_hot_logits(best, logits.shape[-1])
  return jnp.where(greedy, point, kept)


def _penalised(context: Context, logits: Array, history: Array) -> Array:
  """Applies repetition (prefix), presence and frequency (output) penalties."""
  options = context.options
  rep, pres, freq = (
      options.repetition_penalty, options.presence_penalty,
      options.frequency_penalty)
  if rep is None and pres is None and freq is None:
    return logits
  vocab = logits.shape[-1]
  slot = jnp.arange(context.tokens.shape[1])[None]
  is_prefix = slot < context.length[:, None]
  is_output = is_prefix & (slot >= context.prompt_length[:, None])
  drafted = _counts(history, history >= 0, vocab)  # [B,R,V]
  if rep is not None:
    prefix = _counts(context.tokens, is_prefix, vocab)
    seen = (prefix[:, None] + drafted) > 0
    rep = rep[:, None, None]
    scaled = jnp.where(logits > 0, logits / rep, logits * rep)
    logits = jnp.where(seen, scaled, logits)
  if pres is None and freq is None:
    return logits
  output = _counts(context.tokens, is_output, vocab)
  count = output[:, None] + drafted
  if pres is not None:
    logits = logits - pres[:, None, None] * (count > 0)
  if freq is not None:
    logits = logits - freq[:, None, None] * count
  return logits


def _counts(tokens: Array, mask: Array, vocab: int) -> Array:
  """Counts `tokens int32[..., T]` where `mask`; int32[..., V]."""
  index = jnp.where(mask, tokens, vocab)  # out of range: dropped

  def one(i: Array) -> Array:
    return jnp.zeros((vocab,), jnp.int32).at[i].add(1, mode='drop')

  # Sizes are spelled out: without drafts T is 0 and -1 could be anything.
  flat = index.reshape(math.prod(index.shape[:-1]), index.shape[-1])
  flat = jax.vmap(one)(flat)
  return flat.reshape(tokens.shape[:-1] + (vocab,))


def _ban_early_eos(context: Context, logits: Array, history: Array) -> Array:
  """Excludes end tokens before `min_new` new tokens exist."""
  options = context.options
  assert options.min_new is not None
  if options.eos is None:  # nothing to ban
    return logits
  made = (context.length - context.prompt_length)[:, None]
  made = made + jnp.sum(history >= 0, axis=-1)  # [B,R]
  early = made < options.min_new[:, None]
  vocab = logits.shape[-1]
  is_eos = _counts(options.eos, options.eos >= 0, vocab) > 0
  return jnp.where(early[..., None] & is_eos[:, None], -jnp.inf, logits)


def top_k(logits: Array, k: Array) -> Array:
  """Keeps the `k int32[B,R]` largest of `logits [B,R,V]`; k <= 0 is off."""
  want = k[..., None].astype(jnp.float32)
  threshold = _threshold(logits, jnp.ones_like(logits), want)
  return jnp.where((_ordered(logits) >= threshold) | (want <= 0),
                   logits, -jnp.inf)


def top_p(logits: Array, p: Array) -> Array:
  """Keeps the smallest set of mass >= `p f32[B,R]`; p >= 1 is off."""
  weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  want = p[..., None] * weight.sum(axis=-1, keepdims=True)
  threshold = _threshold(logits, weight, want)
  return jnp.where((_ordered(logits) >= threshold) | (p[..., None] >= 1),
                   logits, -jnp.inf)


def _ordered(x: Array) -> Array:
  """Maps f32 to uint32 so that the order is kept; -0 and 0 are equal."""
  x = jnp.where(x == 0, 0.0, x)  # x + 0 would be simplified away
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  flip = jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF),
                   jnp.uint32(0x80000000))
  return bits ^ flip


def _threshold(logits: Array, weight: Array, want: Array) -> Array:
  """Returns the largest key t with `sum(weight[key >= t]) >= want`.

  A search over the 32 bits of the float: exact, no sort of V entries (a sort
  of [17, 151936] costs more than the forward pass of a small model). On
  accelerators four bits a pass, unrolled.
  """
  key = _ordered(logits)
  bits = 1 if numerics.on_cpu() else 4

  def step(i: Array | int, found: Array) -> Array:
    shift = jnp.asarray(32 - bits - bits * i, jnp.uint32)
    trials = [found | (jnp.uint32(j) << shift) for j in range(1, 2**bits)]
    mass = numerics.sums([
        jnp.where(key >= trial[..., None], weight, 0.0) for trial in trials])
    passed = [(m >= want[..., 0]).astype(jnp.uint32) for m in mass]
    return found | (sum(passed[1:], passed[0]) << shift)

  found = jax.lax.fori_loop(
      0, 32 // bits, step, jnp.zeros(logits.shape[:-1], jnp.uint32),
      unroll=not numerics.on_cpu())
  return found[..., None]
