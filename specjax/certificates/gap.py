"""How near a rule comes to the best acceptance at one position.

`measure` runs a rule as it is coded on drawn drafts; `bound` is what no rule
can exceed for drafts drawn in that way.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates import toys
from specjax.core import law as law_lib
from specjax.core import topologies, tree, types
from specjax.core.types import Draft, Models, Scores
from specjax.drafters.tree_lm import draw_children
from specjax.verify import acceptance_upper_bound

Array = jax.Array

# Kind of draft -> the bound's name for it.
BOUNDS = {'iid': 'iid', 'without_replacement': 'without_replacement',
          'top_plus_one': 'top_plus_one', 'point': 'top'}


def bound(p: Array, q: Array, num_drafts: int, kind: str) -> Array:
  """Returns the best acceptance f32[I] for laws f[I,V] and drafts `kind`."""
  return acceptance_upper_bound(p, q, num_drafts, BOUNDS[kind])


def measure(
    rule: Any, kind: str, p: Array, q: Array, num_drafts: int, *,
    num_samples: int = 4096, seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns acceptance and its standard error, [I] each, by simulation.

  Args:
    rule: from `specjax.verify`; takes drafts of that kind.
    kind: 'iid', 'without_replacement', 'top_plus_one' or 'point' (the n
      likeliest tokens).
    p, q: f32[I,V], laws of the target and of the drafter.
    num_drafts: n >= 1, candidates at the position.
    num_samples: rounds simulated for each pair of laws.
    seed: of the simulation.
  """
  keys = jax.random.split(jax.random.key(seed), num_samples)
  hits = np.asarray(_accepted(
      rule, types.MODE_NAMES.index(kind), num_drafts, keys,
      jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)))
  return hits, np.sqrt(hits * (1 - hits) / num_samples)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _accepted(rule, mode: int, count: int, keys, p, q) -> Array:
  """Returns the share of rounds that accept a draft, f32[I]."""
  topology = (tree.chain(1) if count == 1
              else topologies.branching((count,)))
  rows = keys.shape[0]
  context = toys.context([[0]] * rows, size=2, keys=keys)

  def one(laws):
    def rows_of(x, num):
      logits = law_lib.from_weights(x).logits
      return jnp.broadcast_to(logits, (rows, num) + logits.shape)

    drawn = law_lib.Categorical(rows_of(laws[1], 1))
    fold = jax.vmap(jax.random.fold_in, (0, None))
    if mode == types.POINT:
      _, tokens = jax.lax.top_k(drawn.logits, count)
      valid = jnp.ones(tokens.shape, bool)
    else:
      tokens, valid = draw_children(
          mode, drawn, drawn.logits, fold(keys, 2**20)[:, None], count)
    draft = Draft(
        topology=topology, tokens=tokens[:, 0].astype(jnp.int32),
        valid=valid[:, 0], mode=jnp.full((count,), mode, jnp.int32),
        draft_law=None if mode == types.POINT else drawn,
        law_row=jnp.zeros((count,), jnp.int32))
    target = law_lib.Categorical(rows_of(laws[0], count + 1))
    verdict = rule.verify(
        Models(target=None), context, draft, Scores(target_law=target))
    return jnp.mean((verdict.num_accepted > 0).astype(jnp.float32))

  return jax.lax.map(one, (p, q))


def random_laws(
    num: int, vocab_size: int, concentration: float, closeness: float,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns `num` pairs (p, q) of laws f32[num,V].

  p is Dirichlet; q mixes p (share `closeness` in [0, 1]) with another draw.
  """
  rng = np.random.default_rng(seed)
  alpha = np.full(vocab_size, concentration)
  p, other = rng.dirichlet(alpha, num), rng.dirichlet(alpha, num)
  q = closeness * p + (1 - closeness) * other
  return p.astype(np.float32), q.astype(np.float32)
