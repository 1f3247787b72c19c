"""A Markov chain over bytes, as `specjax.generate` takes a model.

Compiles in a fifth of the time of the tiny transformer; its logits are sums
of two rows of numbers, so that a test can say what a text should have been.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from specjax.certificates import toys
from specjax.core import tree
from specjax.host import tiny
from specjax.host.load import Model

VOCAB, END = 264, 256  # padded, so that meshes divide it
_PRINTABLE = 94  # ids 0 to 93 are the bytes '!' to '~'


@dataclasses.dataclass(frozen=True)
class PairLM(toys.ToyLM):
  """Logits are `now[x_t] + before[x_t-1]`, the latter from the cache."""

  vocab_size: int = VOCAB
  chunk: int = 16

  def _logits(self, params, cache, slot, parent_slot):
    now = jnp.clip(tree.take_row(cache, slot), 0)
    before = jnp.clip(tree.take_row(cache, parent_slot), 0)
    before = jnp.where(parent_slot >= 0, before, 0)
    return params['now'][now] + params['before'][before]


def params(seed: int = 0, end: float = -5.0):
  """Returns parameters; `end` is added to the end token's logits."""
  rng = np.random.default_rng(seed)
  now, before = rng.normal(0, 1.5, (2, VOCAB, VOCAB)).astype(np.float32)
  now[:, _PRINTABLE:] -= 30
  now[:, END] += 30 + end
  return {'now': jnp.asarray(now), 'before': jnp.asarray(before)}


def model(seed: int = 0, *, end: float = -5.0, **kwargs) -> Model:
  """Returns a model with the tiny model's byte tokenizer."""
  text = tiny.tokenizer()
  return Model(**{**dict(
      name=f'toy-{seed}', lm=PairLM(), params=params(seed, end),
      tokenizer=text, eos=text.eos_ids), **kwargs})


def raw_logits(model: Model, tokens) -> np.ndarray:
  """Returns f32[T,V] of the model after each token, computed by itself."""
  tokens = np.asarray(tokens)
  before = np.concatenate([[0], tokens[:-1]])
  table = {k: np.asarray(v) for k, v in model.params.items()}
  return table['now'][tokens] + table['before'][before]


def greedy(model: Model, tokens, num: int) -> list[int]:
  """Returns the `num` likeliest next tokens, one after another."""
  tokens, start = list(tokens), len(tokens)
  while len(tokens) < start + num:
    tokens.append(int(raw_logits(model, tokens[-2:])[-1].argmax()))
  return tokens[start:]
