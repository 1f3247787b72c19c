"""The machinery of rules that accept, or reject and keep what is left.

A rule gives two functions: `numerator` (what u q(x) is compared with, p(x)
for the exact rule) and `left_over` (the law after a rejection). A larger
numerator accepts more; the extra acceptance is reported as `excess`. With the
standard left-over it is, on average, the total variation between the law of
the emitted token and the target's (an upper bound where a node has several
children).

On trees all internal rows are worked on at once: what is left of p after the
first k children of a node were rejected does not depend on the path that led
there, so no step waits for the one above it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core import keys, pipeline, tree
from specjax.core import law as law_lib
from specjax.core.types import (
  IID,
  TOP_PLUS_ONE,
  Context,
  Draft,
  Models,
  Scores,
  Verdict,
)
from specjax.verify import base

Array = jax.Array

# A numerator that passes every test: u < 1 and q <= 1.
ALWAYS = 2.0


class Test(NamedTuple):
  """A candidate as a rule sees it; leading axes [B,N] or [B,M].

  Attributes:
    slot: int32, the drafted slot. row: int32, the row that it follows.
    token: int32. p, q: f32, its probability in what is left of the target's
      law, and in the law that it was drawn from.
    first_p: f32, its probability in the target's law itself.
    p_of: tokens int32[...,k] -> probabilities in what is left, f32[...,k].
  """

  slot: Array
  row: Array
  token: Array
  p: Array
  q: Array
  first_p: Array
  p_of: Callable[[Array], Array]


class Soft(NamedTuple):
  """Temperature-1 probabilities on greedy rows: see `soft_greedy`."""

  rows: Array  # bool, like the test: the row is greedy
  p: Array  # f32, of the candidate
  best: Array  # f32, of the likeliest token
  p_of: Callable[[Array], Array]


def run(
    rule: Any, params: Models, context: Context, draft: Draft, scores: Scores
) -> Verdict:
  """Verifies a chain or a tree; `rule` has `numerator` and `left_over`."""
  if draft.topology.is_chain:
    return _chain(rule, params, context, draft, scores)
  return _tree(rule, params, context, draft, scores)


def extra_acceptance(numerator: Array, p: Array, q: Array) -> Array:
  """Returns min(1, numerator / q) - min(1, p / q), f32 >= 0; 0 for q = 0."""
  def share(x):
    return jnp.minimum(jnp.where(q > 0, x / jnp.where(q > 0, q, 1.0), 0), 1)

  return jnp.maximum(share(numerator) - share(p), 0.0)


def _chain(rule, params, context, draft, scores) -> Verdict:
  """All tests at once; one left-over, at the first rejection."""
  law, num = scores.target_law, draft.topology.num_nodes
  key = keys.row(context, keys.Purpose.RESIDUAL)
  if num == 0:
    count = jnp.zeros(context.length.shape, jnp.int32)
    return base.finish(draft, count, law.at(count).sample(key))
  p = jnp.exp(base.target_log_prob(draft, scores))
  q = jnp.exp(base.draft_log_prob(draft))
  slot = jnp.broadcast_to(jnp.arange(num), p.shape)
  test = Test(slot, slot, draft.tokens, p, q, p, _prob_of(law, slot))
  numerator = rule.numerator(params, context, draft, scores, test)
  u = keys.uniform(keys.row(context, keys.Purpose.ACCEPT), num)
  # No division, strict: right for p = 0, q = 0 and u = 0 alike.
  accept = (u * q < numerator) & draft.valid
  count = jnp.sum(jnp.cumprod(accept, axis=1), axis=1, dtype=jnp.int32)
  next_token = _correct(rule, params, draft, law, test, count, key)
  excess = None
  if rule.lossy:
    extra = extra_acceptance(numerator, p, q)
    tested = (slot <= count[:, None]) & draft.valid
    excess = jnp.sum(jnp.where(tested, extra, 0.0), axis=1)
  return base.finish(draft, count, next_token, excess)


def _correct(rule, params, draft, law, test: Test, count, key) -> Array:
  """Draws the token after `count` drafts: left-over, or plain at the end."""
  if isinstance(law, law_lib.Point):  # greedy rows stay greedy
    return law.at(count).sample(key)
  slot = jnp.minimum(count, draft.topology.num_nodes - 1)
  drafted = jnp.pad(draft.valid, ((0, 0), (0, 1)))
  rejected = jnp.take_along_axis(drafted, count[:, None], axis=1)[:, 0]
  at = lambda x: tree.take_row(x, slot)  # noqa: E731
  here = Test(
      slot=at(test.slot), row=at(test.row), token=at(test.token),
      p=at(test.p), q=at(test.q), first_p=at(test.first_p),
      p_of=_prob_of(law, slot))
  p = law.at(count).probs
  q = law_lib.at_slot(draft, slot, law.vocab_size).probs
  left = rule.left_over(params, here, p, q)
  return law_lib.from_weights(_usable(left, p, rejected)).sample(key)


def _usable(left: Array, p: Array, use: Array) -> Array:
  """Returns `left` where `use` and it has mass, else `p`; f32[...,V].

  Without mass the rejection had probability zero and was a matter of
  rounding.
  """
  mass = left.sum(axis=-1)
  use = use & (mass > 0) & jnp.isfinite(mass)
  return jnp.where(use[..., None], left, p)


def _prob_of(law, row: Array) -> Callable[[Array], Array]:
  """Returns the function from tokens [B,...,k] to their probabilities."""
  return lambda tokens: jnp.exp(law.log_prob_at(row[..., None], tokens))


class Family(NamedTuple):
  """The internal rows of a tree and their children.

  Attributes:
    rows: int32[M]. place: int32[N+1], index of a row among them, or M.
    slots: int32[B,M,C] children in draw order. exists: bool[B,M,C].
    drawn: bool[B,M,C]: drawn from `draft_law` (not a point).
    removed: bool[B,M,C]: later siblings were not to be this token.
  """

  rows: Array
  place: Array
  slots: Array
  exists: Array
  drawn: Array
  removed: Array


def family(draft: Draft) -> Family:
  """Returns who is whose child, and how each child was chosen."""
  topology, batch = draft.topology, draft.tokens.shape[0]
  internal = np.asarray(topology.internal, np.int32)
  place = np.full(topology.num_nodes + 1, len(internal), np.int32)
  place[internal] = np.arange(len(internal))
  slots, exists = tree.children(topology, draft.parents, draft.sibling)
  shape = (batch,) + slots.shape[-2:]
  slots, exists = (jnp.broadcast_to(x, shape) for x in (slots, exists))
  mode = take(jnp.broadcast_to(draft.mode, draft.tokens.shape), slots)
  is_last = exists & ~jnp.pad(exists[..., 1:], ((0, 0), (0, 0), (0, 1)))
  drawn = ~base.is_point(mode) & ((mode != TOP_PLUS_ONE) | is_last)
  return Family(
      jnp.asarray(internal), jnp.asarray(place), slots, exists, drawn,
      removed=~base.is_point(mode) & (mode != IID))


def take(x: Array, index: Array) -> Array:
  """Returns `x[b, index[b]]` for `x [B,N]` and any `index int32[B,...]`."""
  return jax.vmap(lambda row, i: row.at[i].get(mode='clip'))(x, index)


def draft_probs(draft: Draft, kin: Family) -> Array | None:
  """Returns q of every internal row, f32[B,M,V], or None."""
  if draft.draft_law is None:
    return None
  rows = jnp.broadcast_to(base.law_rows(draft), draft.tokens.shape)
  one = jnp.argmax(kin.drawn, axis=-1)[..., None]  # siblings share their law
  slot = jnp.take_along_axis(kin.slots, one, axis=-1)[..., 0]
  return draft.draft_law.at(take(rows, slot)).probs


def sibling_law(
    draft: Draft, kin: Family, q: Array | None, j: int, vocab_size: int
) -> Array:
  """Returns the law of child j given that it was drawn, f32[B,M,V]."""
  token = take(draft.tokens, kin.slots[..., j])
  point = jax.nn.one_hot(token, vocab_size, dtype=jnp.float32)
  if q is None:
    return point
  return jnp.where(kin.drawn[..., j, None], q, point)


def remove(draft: Draft, kin: Family, q: Array | None, j: int):
  """Returns q for the children after j: without replacement, j is out."""
  if q is None:
    return None
  token = take(draft.tokens, kin.slots[..., j])
  out = kin.removed[..., j, None] & (
      jnp.arange(q.shape[-1]) == token[..., None])
  rest = jnp.where(out, 0.0, q)
  mass = rest.sum(axis=-1, keepdims=True)
  return jnp.where(mass > 0, rest / jnp.where(mass > 0, mass, 1.0), q)


def alive_slots(draft: Draft, kin: Family, chosen: Array) -> Array:
  """Returns bool[B,N] from `chosen bool[B,M,C]`."""
  slot = jnp.arange(draft.topology.num_nodes)
  hit = chosen[..., None] & (kin.slots[..., None] == slot)
  return jnp.any(hit, axis=(1, 2))


def _tree(rule, params, context, draft, scores) -> Verdict:
  """Recursive rejection, all internal rows at once."""
  law, kin = scores.target_law, family(draft)
  first = p = law.at(jnp.broadcast_to(
      kin.rows, (draft.tokens.shape[0],) + kin.rows.shape)).probs
  q = draft_probs(draft, kin)
  u = keys.uniform(keys.row(context, keys.Purpose.ACCEPT),
                   draft.topology.num_nodes)
  accepts, extras = [], []
  for j in range(draft.topology.max_children):
    slot = kin.slots[..., j]
    live = kin.exists[..., j] & take(draft.valid, slot)
    test, law_j = _test(draft, kin, first, p, q, j)
    numerator = rule.numerator(params, context, draft, scores, test)
    accepts.append(live & (take(u, slot) * test.q < numerator))
    if rule.lossy:
      extras.append(jnp.where(
          live, extra_acceptance(numerator, test.p, test.q), 0.0))
    left = rule.left_over(params, test, p, law_j)
    left = _usable(left, p, live)
    p = left / left.sum(axis=-1, keepdims=True)
    q = remove(draft, kin, q, j)
  accept = jnp.stack(accepts, axis=-1)
  earlier = jnp.cumsum(accept, axis=-1) - accept > 0
  stop = tree.deepest(draft.topology, draft.parents,
                      alive_slots(draft, kin, accept & ~earlier))
  excess = None
  if rule.lossy:
    path, _ = tree.path_to(draft.topology, draft.parents, stop)
    on_path = jnp.any(kin.rows[:, None] == path[:, None], axis=-1)
    reached = on_path[..., None] & ~earlier
    excess = jnp.sum(
        jnp.where(reached, jnp.stack(extras, axis=-1), 0.0), axis=(1, 2))
  key = keys.row(context, keys.Purpose.RESIDUAL)
  token = law_lib.from_weights(at_stop(law, kin, p, stop)).sample(key)
  return base.finish(draft, stop, token, excess)


def at_stop(law, kin: Family, left: Array, stop: Array) -> Array:
  """Returns weights f32[B,V]: what is left at `stop`, or p at a leaf."""
  place = kin.place[stop]
  is_leaf = place == kin.rows.shape[0]
  return jnp.where(
      is_leaf[:, None], law.at(stop).probs, tree.take_row(left, place))


def _test(draft, kin: Family, first, p, q, j: int) -> tuple[Test, Array]:
  """Returns child j of every internal row as a `Test`, and its law."""
  slot = kin.slots[..., j]
  token = take(draft.tokens, slot)
  law_j = sibling_law(draft, kin, q, j, p.shape[-1])

  def at(x: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(x, tokens, axis=-1)

  row = jnp.broadcast_to(kin.rows, slot.shape)
  one = token[..., None]
  return Test(
      slot, row, token, at(p, one)[..., 0], at(law_j, one)[..., 0],
      at(first, one)[..., 0], lambda tokens: at(p, tokens)), law_j


def soft_greedy(
    context: Context, draft: Draft, scores: Scores, test: Test
) -> Soft:
  """Returns temperature-1 probabilities where rows are greedy.

  A relaxed rule has nothing to relax in a one-hot law; on greedy rows it
  compares the probabilities before the argmax (penalties and bans applied).
  """
  past = tree.history(draft.topology, draft.parents, draft.tokens)
  law = law_lib.Categorical(
      pipeline.shaped(context, scores.taps['logits'], past))
  temperature = context.options.temperature
  shape = test.token.shape
  if temperature is None:
    rows = jnp.ones(shape, bool)
  else:
    greedy = temperature < pipeline.GREEDY_BELOW
    rows = jnp.broadcast_to(
        greedy.reshape((-1,) + (1,) * (len(shape) - 1)), shape)
  best = jnp.exp(law.log_prob(law.mode()))
  row = jnp.broadcast_to(test.row, shape)
  return Soft(rows, jnp.exp(law.log_prob_at(row, test.token)),
              take(best, row), _prob_of(law, row))
