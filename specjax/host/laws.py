"""Pairs of real next-token laws, to try acceptance rules on."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from specjax.host.load import Model
from specjax.models.attention import Block


def model_laws(
    model: Model, texts: Sequence[Sequence[int]], *, window: int,
    temperature: float = 1.0, top_k: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns pairs (p, q) of a model's next-token laws, f32[I,2 top_k].

  p follows the whole text before a position, q only its last `window`
  tokens; both at `temperature` and cut to their `top_k` likeliest tokens.
  Only tokens of either are kept (others have probability 0 in both), so that
  rows of any vocabulary are short.

  Args:
    model: a `specjax.Model` without a sliding window shorter than a text.
    texts: token ids; every position after the first `window` gives a pair.
  """
  pairs = []
  for text in texts:
    whole = logits(model, [list(text)])[0]
    starts = range(1, len(text) - window + 1)
    short = logits(model, [list(text[i:i + window]) for i in starts])
    pairs += [(whole[i + window - 1], row[-1])
              for i, row in zip(starts, short, strict=True)]
  p: list[np.ndarray] = []
  q: list[np.ndarray] = []
  for target, draft in pairs:
    laws = [_cut(x / temperature, top_k) for x in (target, draft)]
    ids = np.union1d(*(np.nonzero(law)[0] for law in laws))
    for out, law in zip((p, q), laws, strict=True):
      out.append(np.pad(law[ids], (0, 2 * top_k - len(ids))))
  return np.asarray(p, np.float32), np.asarray(q, np.float32)


def logits(model: Model, rows: list[list[int]]) -> np.ndarray:
  """Returns f32[B,T,V] of equally long rows of ids, 32 at a time."""
  # A whole text is one call, however long.
  lm = dataclasses.replace(model.lm, chunk=max(model.lm.chunk, len(rows[0])))

  @jax.jit
  def run(params, tokens):
    batch, size = tokens.shape
    position = jnp.broadcast_to(jnp.arange(size), (batch, size))
    cache = lm.empty(batch, size)['cache']
    block = Block(base=jnp.zeros((batch,), jnp.int32), position=position)
    return lm.forward(params, cache, tokens, block)[0]

  out = []
  for i in range(0, len(rows), 32):
    part = np.asarray(rows[i:i + 32], np.int32)
    short = np.pad(part, ((0, min(32, len(rows)) - len(part)), (0, 0)))
    out.append(np.asarray(run(model.params, short), np.float32)[:len(part)])
  return np.concatenate(out)


def _cut(logits: np.ndarray, top_k: int) -> np.ndarray:
  """Returns the law over the `top_k` likeliest tokens, f64[V]."""
  logits = logits.astype(np.float64)
  floor = np.sort(logits)[-top_k]
  weight = np.where(logits >= floor, np.exp(logits - logits.max()), 0.0)
  keep = np.argsort(-weight, kind='stable')[:top_k]
  law = np.zeros_like(weight)
  law[keep] = weight[keep]
  return law / law.sum()
