"""Why two greedy texts differ: where, and how close the choice was.

At one block shape texts are bitwise equal. Across block shapes (another K,
another batch size) a matrix product may be summed in another order, and a
near-tie may fall the other way. This report tells a near-tie from a bug: it
teacher-forces a text through the model and measures, at each position, how
far the chosen token is from the best one.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from specjax.host.load import Model
from specjax.models.attention import Block


@dataclasses.dataclass(frozen=True)
class Divergence:
  """The first difference between two continuations of a prompt.

  Attributes:
    position: index of the first token that differs, in the new tokens.
    tokens: what the two texts say there.
    top2_gap: best logit minus second best, given the common prefix (logits).
    pair_gap: difference of the two tokens' logits there, >= 0.
    rounding: largest change of a logit at that position between feeding the
      text whole and token by token: what another block shape can change.
  """

  position: int
  tokens: tuple[int, int]
  top2_gap: float
  pair_gap: float
  rounding: float

  @property
  def is_near_tie(self) -> bool:
    """Whether rounding alone explains the difference."""
    return self.pair_gap <= 2 * max(self.rounding, 1e-6)


def logits(model: Model, tokens: Sequence[int], *, chunk: int) -> np.ndarray:
  """Returns float32 logits [T,V] of a text, fed `chunk` tokens at a time."""
  num = len(tokens)
  padded = -(-num // chunk) * chunk
  ids = np.zeros((1, padded), np.int32)
  ids[0, :num] = tokens

  @jax.jit
  def step(params, cache, x, base):
    position = base[:, None] + jnp.arange(x.shape[1])
    out, _, cache = model.lm.forward(
        params, cache, x, Block(base=base, position=position))
    return out, cache

  cache = model.lm.empty(1, padded)['cache']
  parts = []
  for start in range(0, padded, chunk):
    out, cache = step(model.params, cache, ids[:, start:start + chunk],
                      jnp.full((1,), start, jnp.int32))
    parts.append(np.asarray(out[0], np.float32))
  return np.concatenate(parts)[:num]


def first_divergence(
    model: Model, prompt: Sequence[int], a: Sequence[int], b: Sequence[int],
) -> Divergence | None:
  """Compares two greedy continuations `a`, `b` of `prompt` (token ids).

  Returns:
    None when one is a prefix of the other, else the first difference. Later
    ones follow from it: the texts have different prefixes from there on.
  """
  pairs = zip(a, b)
  at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
  if at is None:
    return None
  prefix = [*prompt, *a[:at]]
  wide = min(model.lm.chunk, 16)
  whole = logits(model, prefix, chunk=wide)[-1]
  single = logits(model, prefix, chunk=1)[-1]
  best = np.sort(single)[::-1]
  return Divergence(
      position=at, tokens=(int(a[at]), int(b[at])),
      top2_gap=float(best[0] - best[1]),
      pair_gap=float(abs(single[a[at]] - single[b[at]])),
      rounding=float(np.max(np.abs(whole - single))))


def gaps(
    model: Model, prompt: Sequence[int], tokens: Sequence[int]
) -> np.ndarray:
  """Returns f32[T]: best logit minus the chosen token's, at each new token.

  Zero everywhere for a greedy text that was computed with these bits; small
  (rounding) for one that was computed in another block shape; large where a
  decoder emitted something else than the model's choice.
  """
  text = [*prompt, *tokens]
  rows = logits(model, text[:-1], chunk=1)[len(prompt) - 1:]
  return rows.max(axis=-1) - rows[np.arange(len(tokens)), list(tokens)]
