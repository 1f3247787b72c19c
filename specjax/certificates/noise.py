"""Runs a rule on given noise, whatever it is and however often it draws.

While a rule is traced, the two functions that all rules draw with,
`core.keys.uniform` and `Categorical.sample`, are replaced by ones that hand
out numbers from a script, in the order of calls.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates import enumeration
from specjax.certificates.cells import NotEnumerable, Points, Seen
from specjax.certificates.problems import Problem
from specjax.core import keys as keys_lib
from specjax.core import law as law_lib
from specjax.core import types
from specjax.core.round import emitted
from specjax.core.tree import Topology

Array = jax.Array

# Evaluations in one call of the compiled rule.
CHUNK = 512
# Most uniforms, and most draws, of a round.
_WIDTH = 32
# With more drafts than this the rule runs for so long that it is worth
# compiling well; on a CPU, compiling is otherwise most of the time.
_MANY = 5000


class _Script:
  """Stands in for the two sources of randomness, in the order of calls.

  Attributes:
    keys: of each number asked for, uniforms and draws: the key's data in
      the first row of the batch, and a number that tells calls apart.
    logits: of the draws, one array [B,R,V] a call.
  """

  def __init__(self, uniforms: Array, draws: Array):
    """Takes f32[B,W] and int32[B,W], W at least what is asked for."""
    self._noise = (uniforms, draws)
    self._used = [0, 0]
    self.keys: tuple[list[Array], list[Array]] = ([], [])
    self.logits: list[Array] = []

  def _take(self, which: int, keys: Array, num: int) -> Array:
    """Returns the next `num` numbers [B,num], and records their keys."""
    begin, end = self._used[which], self._used[which] + num
    if end > _WIDTH:
      raise NotEnumerable(f'more than {_WIDTH} numbers are drawn in a round')
    self._used[which] = end
    data = jax.random.key_data(keys[:1]).reshape(-1, 2)
    data = jnp.broadcast_to(data, (num, 2))
    call = jnp.full((num, 1), len(self.keys[which]), jnp.uint32)
    self.keys[which].append(jnp.concatenate([data, call], axis=1))
    return self._noise[which][:, begin:end]

  def uniform(self, keys: Array, num: int) -> Array:
    """Replaces `core.keys.uniform`."""
    return self._take(0, keys, num)

  def sample(self, law: law_lib.Categorical, keys: Array) -> Array:
    """Replaces `Categorical.sample`; laws are kept."""
    shape = law.logits.shape[:-1]
    num = math.prod(shape[1:])
    draw = self._take(1, keys, num)
    logits = law.logits.reshape(shape[0], num, law.vocab_size)
    self.logits.append(logits)
    if num > 1:
      draw = _alike(draw, logits, jax.random.key_data(
          keys).reshape(shape[0], num, 2))
    return draw.reshape(shape)

  @contextlib.contextmanager
  def installed(self) -> Iterator[None]:
    """Puts it in place while a rule is traced."""
    uniform, sample = keys_lib.uniform, law_lib.Categorical.sample
    law_type: Any = law_lib.Categorical
    keys_lib.uniform = self.uniform
    law_type.sample = lambda law, keys: self.sample(law, keys)
    try:
      yield
    finally:
      keys_lib.uniform, law_type.sample = uniform, sample


def _alike(draw: Array, logits: Array, keys: Array) -> Array:
  """Draws from one law with one key are one draw: the first of them.

  Args:
    draw: int32[B,R]. logits: f32[B,R,V]. keys: uint32[B,R,2].
  """
  same = jnp.all(keys[:, :, None] == keys[:, None], axis=-1)
  same &= jnp.all(logits[:, :, None] == logits[:, None], axis=-1)
  same |= jnp.eye(draw.shape[1], dtype=bool)  # NaN is not equal to itself
  return jnp.take_along_axis(draw, jnp.argmax(same, axis=2), axis=1)


class _Inputs(NamedTuple):
  """What a rule is handed, besides noise; leaves lead with the batch."""

  tokens: Any
  valid: Any
  target_law: Any
  draft_law: Any
  taps: Any
  context: Any
  key_data: Any  # uint32[m,2]


@dataclasses.dataclass(frozen=True)
class _Program:
  """What a rule is compiled for. Hashable: equal ones compile once."""

  rule: Any
  topology: Topology
  is_dynamic: bool

  def draft(self, mode: Array, inputs: _Inputs) -> types.Draft:
    """Returns the drafts, laws by internal row of the topology."""
    topology = self.topology
    assert topology.parents is not None
    place = {row: i for i, row in enumerate(topology.internal)}
    law_row = jnp.asarray([place[r] for r in topology.parents], jnp.int32)
    parents = None
    if self.is_dynamic:
      parents = jnp.broadcast_to(
          jnp.asarray(topology.parents, jnp.int32), inputs.tokens.shape)
      topology = dataclasses.replace(topology, parents=None, is_chain=False)
    return types.Draft(
        topology=topology, tokens=inputs.tokens, valid=inputs.valid,
        mode=mode, draft_law=inputs.draft_law, parents=parents,
        law_row=None if topology.is_chain else law_row)

  def decide(self, params, mode, inputs: _Inputs, noise):
    """Runs: `(tokens, count, logits of draws, excess)`, and all keys."""
    script = _Script(*noise)
    draft = self.draft(mode, inputs)
    scores = types.Scores(target_law=inputs.target_law, taps=inputs.taps)
    context = inputs.context.replace(keys=jax.random.wrap_key_data(
        inputs.key_data, impl='threefry2x32'))
    models = types.Models(target=None, verifier=params)
    with script.installed():
      verdict = self.rule.verify(models, context, draft, scores)
    laws = script.logits or [jnp.zeros(
        (inputs.tokens.shape[0], 0, inputs.target_law.vocab_size))]
    out = (emitted(draft, verdict), verdict.num_accepted,
           jnp.concatenate(laws, axis=1), verdict.excess)
    nothing = jnp.zeros((0, 3), jnp.uint32)
    return out, tuple(jnp.concatenate([nothing, *k]) for k in script.keys)


@functools.cache
def _compiled(optimise: bool) -> Any:
  """Returns the compiled form of `_Program.decide`."""
  options = None if optimise else {'xla_backend_optimization_level': 0}
  return jax.jit(lambda program, *args: program.decide(*args),
                 static_argnums=0, compiler_options=options)


class Runner:
  """Evaluates a rule at any points, a chunk at a time.

  Args:
    rule: a `Verifier`. problem: what is drafted and what the target says.
    made: the drafts of the problem. params: `Models.verifier`.

  Attributes:
    num_uniforms: U. num_draws: S, over all calls of `sample`.
    shared: pairs of noises, uniforms before draws, that are drawn with one
      key, and so not independent.
  """

  def __init__(
      self, rule: Any, problem: Problem, made: enumeration.Drafts, params: Any
  ):
    self._made, self._params = made, params
    self._program = _Program(rule, problem.topology, problem.is_dynamic)
    said = problem.kinds if problem.claimed is None else problem.claimed
    self._mode = np.asarray(said, np.int32)
    # Only rules that relax the law look at options: fewer programs.
    context = made.context.replace(keys=None)
    if not rule.lossy:
      context = context.replace(options=types.Options())
    self._context = jax.tree.map(np.asarray, context)
    self._run = _compiled(len(made.weight) > _MANY
                          or jax.default_backend() != 'cpu')
    _, (uniforms, draws) = self._evaluate(Points(
        np.zeros(CHUNK, int), np.zeros((CHUNK, 0), np.float32),
        np.zeros((CHUNK, 0), np.int32), np.zeros(CHUNK, int)))
    self.num_uniforms, self.num_draws = len(uniforms), len(draws)
    self.shared = _shared(uniforms, draws)

  def __call__(self, points: Points) -> Seen:
    num = len(points.row)
    extra = -num % CHUNK
    points = Points(*(np.concatenate([x, np.repeat(x[:1], extra, axis=0)])
                      for x in points))
    parts = [
        self._evaluate(Points(*(x[begin:begin + CHUNK] for x in points)))[0]
        for begin in range(0, num, CHUNK)]
    tokens, accepted, logits, excess = (
        np.concatenate(x)[:num] for x in zip(*parts))
    after = np.arange(tokens.shape[1]) > accepted[:, None]
    return Seen(np.where(after, -1, tokens), accepted,
                enumeration.softmax(logits), excess)

  def _evaluate(self, points: Points) -> Any:
    """Runs the rule on CHUNK points."""
    noise = tuple(
        np.pad(x, ((0, 0), (0, _WIDTH - x.shape[1])))
        for x in (points.uniform, points.draw))
    return jax.device_get(self._run(
        self._program, self._params, self._mode,
        self._inputs(points.row, points.keys), noise))

  def _inputs(self, row: np.ndarray, keys: np.ndarray) -> _Inputs:
    """Gathers drafts and their laws, on the host: shapes stay the same."""
    made, program = self._made, self._program
    problem, after = made.problem[row], made.after[row]
    at = lambda law, rows: jax.tree.map(  # noqa: E731
        lambda x: x[problem[:, None], rows], law)
    return _Inputs(
        tokens=made.tokens[row], valid=made.valid[row],
        target_law=at(made.target_law, after),
        draft_law=at(made.draft_law, after[:, list(program.topology.internal)]),
        taps={name: made.raw[problem[:, None], after]
              for name in program.rule.taps},
        context=jax.tree.map(lambda x: x[problem], self._context),
        key_data=np.stack([keys, row], axis=1).astype(np.uint32))


def _shared(uniforms: np.ndarray, draws: np.ndarray) -> list[tuple[int, int]]:
  """Returns pairs of noises with one key; see `_Script.keys`.

  The numbers of one call of `uniform` are independent all the same.
  """
  every, num = np.concatenate([uniforms, draws]), len(uniforms)
  return [
      (i, j) for i in range(len(every)) for j in range(i)
      if (every[i, :2] == every[j, :2]).all()
      and not (i < num and every[i, 2] == every[j, 2])]
