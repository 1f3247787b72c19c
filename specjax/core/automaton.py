"""A finite automaton over tokens: the general form of a token constraint.

A grammar, a word list, "k tokens and no end before" are all tables of next
states. Tables are shared by the batch; a row holds which one it follows and
where it is.
"""

from __future__ import annotations

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Automaton(struct.PyTreeNode):
  """Allows a token where the table has a next state (`pipeline.Constraint`).

  A row that is off the table (state -1) may say anything. Committed text
  never gets there; a row of `Scores` behind a forbidden draft does, and such
  rows are never reached: any law will do, but it must be one.

  Attributes:
    table: int32[A,Q,V], the next state, or -1 for a forbidden token.
    which: int32[B], the automaton that a row follows.
    state: int32[B], the state after the text so far.
  """

  table: Array
  which: Array
  state: Array

  def allowed(self, history: Array) -> Array:
    """Returns bool[B,R,V]: what may follow `history int32[B,R,D]`."""
    state = jnp.broadcast_to(self.state[:, None], history.shape[:2])
    for i in range(history.shape[2]):
      token = history[..., i]
      state = jnp.where(token >= 0, self._next(state, token), state)
    which = self.which[:, None]
    exits = self.table[which, jnp.maximum(state, 0)] >= 0
    return exits | (state < 0)[..., None]

  def advance(self, tokens: Array, count: Array) -> Automaton:
    """Returns the automaton after the first `count` of `tokens [B,T]`."""
    state = self.state[:, None]
    for i in range(tokens.shape[1]):
      moved = self._next(state, tokens[:, i, None])
      state = jnp.where(i < count[:, None], moved, state)
    return self.replace(state=state[:, 0])

  def admit(self, rows: Array, new: Automaton) -> Automaton:
    """Returns `new`'s place on `rows bool[B]`; the table is shared."""
    return self.replace(
        which=jnp.where(rows, new.which, self.which),
        state=jnp.where(rows, new.state, self.state))

  def _next(self, state: Array, token: Array) -> Array:
    """Steps `state int32[B,R]` by `token int32[B,R]`; -1 stays."""
    following = self.table[
        self.which[:, None], jnp.maximum(state, 0), jnp.maximum(token, 0)]
    return jnp.where(state < 0, -1, following)


def check(table: np.ndarray) -> None:
  """Checks `table int[A,Q,V]` on the host.

  Raises:
    ValueError: a next state does not exist, or a state that can be reached
      from state 0 allows no token (give it an end token that leads to
      itself): its law would not be one.
  """
  table = np.asarray(table)
  if table.ndim != 3:
    raise ValueError(f'table has shape {table.shape}: must be [A,Q,V]')
  num = table.shape[1]
  if table.min() < -1 or table.max() >= num:
    raise ValueError(
        f'next states are in [{table.min()}, {table.max()}]: must be in '
        f'[-1, {num - 1}]')
  for which, one in enumerate(table):
    todo, seen = [0], {0}
    while todo:
      state = todo.pop()
      following = {int(s) for s in one[state] if s >= 0}
      if not following:
        raise ValueError(
            f'state {state} of automaton {which} allows no token')
      todo += sorted(following - seen)
      seen |= following
