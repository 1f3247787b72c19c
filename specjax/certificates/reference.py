"""The law of a plain sampler in float64 numpy, written by sorting.

Shares no code with `core.pipeline`: one row at a time, token lists instead of
masks. What "lossless" means in these tests is what this file computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NEUTRAL: dict[str, Any] = {
    'temperature': 0.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0,
    'repetition_penalty': 1.0, 'presence_penalty': 0.0,
    'frequency_penalty': 0.0, 'min_new': 0}


def law(
    logits, prompt: Sequence[int], output: Sequence[int], *,
    bias=None, eos: Sequence[int] = (), allowed=None, **options,
) -> np.ndarray:
  """Returns the probabilities f64[V] of the next token.

  Args:
    logits: [V]. prompt, output: what stands before it.
    bias: [V] or None. eos: end tokens. allowed: bool[V] or None.
    **options: those of `NEUTRAL`, per row.
  """
  o = {k: float(np.float32(options.pop(k, v))) for k, v in NEUTRAL.items()}
  assert not options, options
  z = np.array(logits, np.float64)
  text = list(prompt) + list(output)
  for token in range(len(z)):
    if token in text:
      r = o['repetition_penalty']
      z[token] = z[token] / r if z[token] > 0 else z[token] * r
    times = list(output).count(token)
    z[token] -= o['presence_penalty'] * (times > 0)
    z[token] -= o['frequency_penalty'] * times
  if bias is not None:
    z = z + np.asarray(bias, np.float64)
  if allowed is not None:
    z[~np.asarray(allowed)] = -np.inf
  if len(output) < o['min_new']:
    z[list(eos)] = -np.inf
  if o['temperature'] < 1e-5:
    return np.eye(len(z))[int(np.argmax(z))]
  z = z / o['temperature']
  if o['top_k'] > 0:
    z[z < np.sort(z)[::-1][:int(o['top_k'])][-1]] = -np.inf
  if o['top_p'] < 1:
    p = softmax(z)
    order = np.sort(p)[::-1]
    enough = np.cumsum(order) >= o['top_p']
    z[p < order[np.argmax(enough)]] = -np.inf
  if o['min_p'] > 0:
    p = softmax(z)
    z[p < o['min_p'] * p.max() * (1 - 1e-12)] = -np.inf
  return softmax(z)


def softmax(z: np.ndarray) -> np.ndarray:
  """Returns exp(z) / sum(exp(z)) over the last axis."""
  e = np.exp(z - z.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)
