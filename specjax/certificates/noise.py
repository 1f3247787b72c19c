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

from specjax.certificates import problems
from specjax.certificates.cells import Points, Seen
from specjax.certificates.problems import Problem
from specjax.core import keys as keys_lib
from specjax.core import law as law_lib
from specjax.core import types
from specjax.core.round import emitted
from specjax.core.tree import Topology

Array = jax.Array

# Evaluations in one call of the compiled rule.
CHUNK = 2048


@dataclasses.dataclass(frozen=True)
class Sharing:
  """Noise that is drawn with the same key. Hashable: a rule is compiled for it.

  Attributes:
    draws: pairs `(later, first)` of draws. From the same law they give the
      same token.
    pairs: pairs of noises, uniforms before draws, that are not independent.
  """

  draws: tuple[tuple[int, int], ...] = ()
  pairs: tuple[tuple[int, int], ...] = ()


def find_sharing(uniforms: np.ndarray, draws: np.ndarray) -> Sharing:
  """Finds equal keys. Numbers of one call of `uniform` are independent."""
  num, every = len(uniforms), np.concatenate([uniforms, draws])
  pairs = [(i, j) for i in range(num, len(every)) for j in range(i)
           if (every[i] == every[j]).all()]
  return Sharing(
      draws=tuple((i - num, j - num) for i, j in pairs if j >= num),
      pairs=tuple(pairs))


class _Script:
  """Stands in for the two sources of randomness, in the order of calls.

  Attributes:
    keys: key data of each number asked for: of uniforms, then of draws.
    logits: of the draws, one array [B,R,V] a call.
  """

  def __init__(self, noise: tuple[Array, Array] | None, sharing: Sharing):
    """With `noise=None` it only records what is asked for."""
    self._noise, self._sharing = noise, sharing
    self.keys: tuple[list[Array], list[Array]] = ([], [])
    self.logits: list[Array] = []
    self._used = [0, 0]

  def _take(self, which: int, keys: Array, num: int) -> Array:
    """Returns the next `num` numbers [B,num], and records their keys."""
    begin = self._used[which]
    self._used[which] += num
    data = jax.random.key_data(keys.reshape(keys.shape[0], -1))[0]
    self.keys[which].append(jnp.broadcast_to(data, (num, data.shape[-1])))
    if self._noise is None:
      kind = jnp.float32 if which == 0 else jnp.int32
      return jnp.zeros((keys.shape[0], num), kind)
    return self._noise[which][:, begin:self._used[which]]

  def uniform(self, keys: Array, num: int) -> Array:
    """Replaces `core.keys.uniform`."""
    return self._take(0, keys, num)

  def sample(self, law: law_lib.Categorical, keys: Array) -> Array:
    """Replaces `Categorical.sample`; laws are kept."""
    shape, begin = law.logits.shape[:-1], self._used[1]
    draw = self._take(1, keys, math.prod(shape[1:]))
    logits = law.logits.reshape(draw.shape + (law.vocab_size,))
    self.logits.append(logits)
    for later, first in self._sharing.draws:
      if begin <= first and later < begin + draw.shape[1]:
        i, j = later - begin, first - begin
        same = jnp.all(logits[:, i] == logits[:, j], axis=-1)
        draw = draw.at[:, i].set(jnp.where(same, draw[:, j], draw[:, i]))
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
  sharing: Sharing = Sharing()

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
    """Runs: `(tokens, count, logits of draws, excess)`, and the script."""
    script = _Script(noise, self.sharing)
    draft = self.draft(mode, inputs)
    scores = types.Scores(target_law=inputs.target_law, taps=inputs.taps)
    context = inputs.context.replace(
        keys=jax.random.wrap_key_data(inputs.key_data))
    models = types.Models(target=None, verifier=params)
    with script.installed():
      verdict = self.rule.verify(models, context, draft, scores)
    laws = script.logits or [jnp.zeros(
        (inputs.tokens.shape[0], 0, inputs.target_law.vocab_size))]
    out = (emitted(draft, verdict), verdict.num_accepted,
           jnp.concatenate(laws, axis=1), verdict.excess)
    return out, script


@functools.cache
def _compiled(optimise: bool) -> Any:
  """Returns the compiled form of `_Program.decide`."""
  options = None if optimise else {'xla_backend_optimization_level': 0}
  return jax.jit(lambda program, *args: program.decide(*args)[0],
                 static_argnums=0, compiler_options=options)


@functools.partial(jax.jit, static_argnums=0)
def _asked_for(program: _Program, params, mode, inputs: _Inputs):
  """Returns the keys of all noise, uint32[U,2] and [S,2], for the first row.

  Nothing of the rule but its keys is compiled.
  """
  _, script = program.decide(params, mode, inputs, None)
  nothing = jnp.zeros((0, 2), jnp.uint32)
  return tuple(jnp.concatenate([nothing, *k]) for k in script.keys)


class Runner:
  """Evaluates a rule at any points, a chunk at a time.

  Args:
    rule: a `Verifier`. problem: what is drafted and what the target says.
    made: the drafts of the problem. params: `Models.verifier`.

  Attributes:
    num_uniforms: U. num_draws: S, over all calls of `sample`.
    sharing: which of them are not independent.
  """

  def __init__(
      self, rule: Any, problem: Problem, made: problems.Drafts, params: Any
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
    one = np.zeros(1, int)
    uniforms, draws = jax.device_get(_asked_for(
        self._program, params, self._mode, self._inputs(one, one)))
    self.num_uniforms, self.num_draws = len(uniforms), len(draws)
    self.sharing = find_sharing(uniforms, draws)
    self._program = dataclasses.replace(self._program, sharing=self.sharing)
    # Where it runs for a second, compiling well would take longer.
    self._run = _compiled(len(made.weight) > CHUNK
                          or jax.default_backend() != 'cpu')

  def __call__(self, points: Points) -> Seen:
    num = len(points.row)
    extra = -num % CHUNK
    points = Points(*(np.concatenate([x, np.repeat(x[:1], extra, axis=0)])
                      for x in points))
    parts = []
    for begin in range(0, num, CHUNK):
      part = Points(*(x[begin:begin + CHUNK] for x in points))
      parts.append(jax.device_get(self._run(
          self._program, self._params, self._mode,
          self._inputs(part.row, part.keys), (part.uniform, part.draw))))
    tokens, count, logits, excess = (
        np.concatenate(x)[:num] for x in zip(*parts))
    after = np.arange(tokens.shape[1]) > count[:, None]
    return Seen(np.where(after, -1, tokens), count,
                problems.softmax(logits), excess)

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
