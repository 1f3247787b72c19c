"""The compiled loop: rounds in a `lax.while_loop`, prompts fed by chunk.

Both programs take and return the whole `SpecState` (donated) and are traced
once for a configuration: the number of rounds, prompt lengths and which rows
are being admitted are data.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import types
from specjax.core.round import Engine
from specjax.core.round import round as one_round
from specjax.core.types import Context, Models, SpecState

Array = jax.Array


def python_loop(
    cond: Callable[[Any], Any], body: Callable[[Any], Any], init: Any
) -> Any:
  """A `lax.while_loop` that a debugger can step through (do not jit)."""
  carry = init
  while bool(cond(carry)):
    carry = body(carry)
  return carry


def empty(engine: Engine, context: Context) -> SpecState:
  """Builds the state around a context: caches, drafter state, counters.

  Args:
    engine: decides sizes: `capacity = S + num_nodes + 1` slots a row.
    context: tokens [B,S], lengths and options of the rows.

  Returns:
    A state whose buffers are all distinct (safe to donate).
  """
  batch, size = context.tokens.shape[:2]
  topology = engine.drafter.topology
  capacity = size + topology.num_nodes + 1
  return SpecState(
      context=context,
      target=engine.target.empty(batch, capacity),
      drafter=engine.drafter.empty(batch, capacity),
      metrics=types.empty_metrics(batch, topology))


def start(
    engine: Engine, params: Models, state: SpecState, rows: Array, *,
    chunk: int, loop_fn=jax.lax.while_loop,
) -> SpecState:
  """Feeds the prompts of `rows bool[B]` to the target and the drafter.

  All tokens but the last of a row (which stays pending) are fed, `chunk` at
  a time. Other rows are untouched, so a slot can be refilled while its
  neighbours are in the middle of their text.
  """
  batch = state.context.length.shape[0]
  longest = jnp.max(jnp.where(rows, state.context.root, 0))
  taps = engine.drafter.taps

  def body(carry):
    offset, state = carry
    position = jnp.broadcast_to(offset + jnp.arange(chunk), (batch, chunk))
    fed = rows[:, None] & (position < state.context.root[:, None])
    state, tapped = engine.target.init(params, state, position, fed, taps)
    state = engine.drafter.init(params, state, position, fed, tapped)
    return offset + chunk, state

  _, state = loop_fn(
      lambda carry: carry[0] < longest, body, (jnp.int32(0), state))
  return state


def admit(
    engine: Engine, params: Models, state: SpecState, rows: Array,
    context: Context, *, chunk: int, loop_fn=jax.lax.while_loop,
) -> SpecState:
  """Replaces `rows bool[B]` by those of `context` and feeds their prompts.

  One select over the state: admissions are rare, and no drafter has to know
  how to forget a row.
  """
  fresh = empty(engine, context)
  state = types.select_rows(rows, fresh, state)
  return start(
      engine, params, state, rows, chunk=chunk, loop_fn=loop_fn)


def step(engine: Engine, params: Models, state: SpecState) -> SpecState:
  """Runs one round, at the block width that the drafter asks for.

  A drafter with `variants` (narrower forms over the same state) is asked
  before the round; one branch runs. Laws live within a branch.
  """
  drafter: Any = engine.drafter
  variants = getattr(drafter, 'variants', ())
  if not variants:
    return one_round(engine, params, state)
  branches = [
      functools.partial(one_round, engine._replace(drafter=v), params)
      for v in variants]
  return jax.lax.switch(drafter.choose(state), branches, state)


def run(
    engine: Engine, params: Models, state: SpecState, num_rounds: Array, *,
    loop_fn=jax.lax.while_loop,
) -> SpecState:
  """Runs up to `num_rounds` rounds, or until every row is done.

  `num_rounds` is data (int32[]): streaming in chunks compiles nothing new.
  """
  def cond(carry):
    count, state = carry
    # Two clauses: the chunk is over; nothing is left to do.
    return (count < num_rounds) & ~jnp.all(state.context.done)

  def body(carry):
    count, state = carry
    return count + 1, step(engine, params, state)

  _, state = loop_fn(cond, body, (jnp.int32(0), state))
  return state


@functools.cache
def compiled(options: tuple[tuple[str, Any], ...] = ()):
  """Returns jitted `(run, admit)`; engines are static, states donated.

  Args:
    options: XLA compiler options as a tuple of pairs, for instance to pin
      autotuning; part of the cache key.

  Returns:
    `run(engine, params, state, num_rounds)` and
    `admit(engine, params, state, rows, context, chunk=...)`.
  """
  kwargs: dict[str, Any] = {}
  if options:
    kwargs['compiler_options'] = dict(options)
  jit_run = jax.jit(
      run, static_argnums=0, static_argnames=('loop_fn',),
      donate_argnums=2, **kwargs)
  jit_admit = jax.jit(
      admit, static_argnums=0, static_argnames=('chunk', 'loop_fn'),
      donate_argnums=2, **kwargs)
  return jit_run, jit_admit
