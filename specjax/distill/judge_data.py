"""What a judge head learns from: labels and hidden states of tokens.

A label says whether a token is correct where it stands (1) or an error (0);
a feature is the target's hidden state *after* it has consumed the token, so
both stand at the token's own position. (The logits that score the token stand
one position earlier.)

References: Bachmann et al. 2025, arXiv:2501.19309 (annotated answers); Garipov
et al. 2025, arXiv:2504.20039 (labels without annotators).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from specjax.models.attention import Block
from specjax.models.causal import CausalLM

Array = jax.Array

# The hidden state that heads are trained on, and must be given in decoding.
TAP = 'final'


class Swap(NamedTuple):
  """One mismatch that was tried with the drafter's token.

  Attributes:
    tokens: the text up to and including that token; its feature is the hidden
      state at the last position.
    label: 1 when the final answer stayed the same, else 0.
  """

  tokens: list[int]
  label: int


def labels(
    length: int, first_error: int | None = None, error_length: int = 1
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.bool_]]:
  """Labels the tokens of one annotated answer.

  Args:
    length: T >= 1, tokens of the answer (not of the prompt).
    first_error: index of the first wrong token, in [0, T); None for a correct
      answer.
    error_length: tokens that the error spans, >= 1, all within the answer.

  Returns:
    `(label int8[T], keep bool[T])`. Before the error 1, at the error 0. What
    follows the error hangs on a wrong prefix: `keep` is False there (and the
    label 0), and True everywhere else.

  Raises:
    ValueError: the span does not lie within the answer, or is empty.
  """
  if length < 1:
    raise ValueError(f'length={length}: must be >= 1')
  if error_length < 1:
    raise ValueError(f'error_length={error_length}: must be >= 1')
  if first_error is None:
    return np.ones(length, np.int8), np.ones(length, np.bool_)
  end = first_error + error_length
  if first_error < 0 or end > length:
    raise ValueError(
        f'the error spans tokens {first_error} to {end - 1}, the answer '
        f'0 to {length - 1}')
  index = np.arange(length)
  return (index < first_error).astype(np.int8), index < end


def features(
    target: CausalLM, params: Any, tokens: npt.ArrayLike,
    lengths: npt.ArrayLike
) -> Array:
  """Returns the target's final hidden state after each token.

  This is the tap `'final'`: the stream *after* the final norm, which is what
  the head turns into logits. A judge that decodes must read the same tap.
  Texts longer than `target.chunk` are fed in chunks; in reduced precision the
  last bits may therefore differ from those that decoding computes.

  Args:
    target: the decoder.
    params: its bare parameters.
    tokens: int[B,T], prompt and answer; anything past a row's length.
    lengths: int[B] in [0, T].

  Returns:
    f32[B,T,D]; entry t depends on tokens 0 to t only. Zero past the length.

  Raises:
    ValueError: on other shapes or lengths, or token ids out of range.
  """
  tokens, lengths = np.asarray(tokens), np.asarray(lengths)
  if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
    raise ValueError(
        f'tokens {tokens.shape} and lengths {lengths.shape}: must be [B,T] '
        'and [B]')
  batch, size = tokens.shape
  if not tokens.size or lengths.min() < 0 or lengths.max() > size:
    raise ValueError(f'lengths must be in [0, T], and B, T >= 1; T={size}')
  fed = np.arange(size) < lengths[:, None]
  tokens = np.where(fed, tokens, 0)
  if tokens.min() < 0 or tokens.max() >= target.vocab_size:
    raise ValueError(
        f'token ids must be in [0, {target.vocab_size}); found '
        f'{tokens.min()} to {tokens.max()}')
  return _features(target, params, jnp.asarray(tokens, jnp.int32),
                   jnp.asarray(fed))


@functools.partial(jax.jit, static_argnums=0)
def _features(target: CausalLM, params: Any, tokens: Array, fed: Array):
  """Feeds a batch of texts chunk by chunk; see `features`."""
  batch, size = tokens.shape
  chunk = min(target.chunk, size)
  count = -(-size // chunk)
  pad = ((0, 0), (0, count * chunk - size))

  def split(x: Array) -> Array:
    return jnp.pad(x, pad).reshape(batch, count, chunk).swapaxes(0, 1)

  def step(cache, inputs):
    base, x, keep = inputs
    base = jnp.full((batch,), base)
    position = base[:, None] + jnp.arange(chunk)
    block = Block(base=base, position=position, fed=keep)
    _, found, cache = target.forward(
        params, cache, x, block, taps=(TAP,), with_head=False)
    return cache, found[TAP].astype(jnp.float32)

  cache = target.empty(batch, count * chunk)['cache']
  base = chunk * jnp.arange(count)
  _, hidden = jax.lax.scan(step, cache, (base, split(tokens), split(fed)))
  hidden = hidden.swapaxes(0, 1).reshape(batch, count * chunk, -1)[:, :size]
  return jnp.where(fed[..., None], hidden, 0.0)


def swap_labels(
    prompt: Sequence[int],
    continue_from: Callable[[list[int]], tuple[Sequence[int], Any]],
    draft: Callable[[list[int]], Sequence[int]],
) -> list[Swap]:
  """Labels mismatches by whether the drafter's token changes the answer.

  The target's text is walked from left to right. At each token where the
  drafter would have said something else, its token is swapped in and the
  target continues. An equal answer labels the swap 1 and the new text
  replaces the old one, so that later swaps are judged on top of those that a
  judge would have let through; otherwise it is labelled 0 and undone.

  Args:
    prompt: token ids, at least one.
    continue_from: takes a text, returns `(the whole text with the target's
      continuation, its final answer)`. Deterministic and of bounded length; a
      text that has ended already is returned as it is. Answers are compared
      with `==`.
    draft: takes a text, returns as many tokens: entry t is what the drafter
      says after `text[:t]`. Entries of the prompt are not read.

  Returns:
    The swaps in order. Their features are those of the *drafter's* token:
    `features(...)[i, len(tokens) - 1]`.

  Raises:
    ValueError: the prompt is empty, or a callback breaks its contract.

  Reference: the search of Garipov et al. 2025, arXiv:2504.20039, algorithm 1.
  """
  if not prompt:
    raise ValueError('the prompt is empty')
  text, reference = _continue(continue_from, list(prompt))
  swaps: list[Swap] = []
  said: Sequence[int] | None = None
  t = len(prompt)
  while t < len(text):
    if said is None:
      said = draft(list(text))
      if len(said) != len(text):
        raise ValueError(f'draft returned {len(said)} tokens for a text of '
                         f'{len(text)}')
    if said[t] != text[t]:
      tokens = [*text[:t], int(said[t])]
      new, answer = _continue(continue_from, tokens)
      unchanged = bool(answer == reference)
      swaps.append(Swap(tokens, int(unchanged)))
      if unchanged:
        text, said = new, None
    t += 1
  return swaps


def _continue(continue_from, tokens: list[int]) -> tuple[list[int], Any]:
  """Calls back and checks that what comes back starts with `tokens`."""
  text, answer = continue_from(list(tokens))
  text = [int(token) for token in text]
  if text[:len(tokens)] != tokens:
    raise ValueError('continue_from must return the whole text: it does not '
                     'start with the tokens that were given')
  return text, answer
