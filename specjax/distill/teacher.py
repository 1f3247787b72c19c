"""What the target shows a drafter in training: its states on its own text.

Nothing is stored: the target runs in the same program as the drafter's step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from specjax.models.attention import Block
from specjax.models.causal import CausalLM
from specjax.models.guided import Guided

Array = jax.Array


class Batch(struct.PyTreeNode):
  """Packed texts (`data.packing`).

  Attributes:
    tokens: int32[B,S]. document: int32[B,S], 0 is padding, then 1, 2, ...
    position: int32[B,S], within the document.
    supervised: bool[B,S], tokens that the target generated.
  """

  tokens: Array
  document: Array
  position: Array
  supervised: Array


class Teacher(struct.PyTreeNode):
  """The target's states at every position of a batch.

  Attributes:
    taps: {name: [B,S,D]}. final: [B,S,D], what its head multiplies.
    log_z: f32[B,S], log of the sum of exp of all V logits.
    top: int32[B,S], its likeliest next token.
  """

  taps: dict[str, Array]
  final: Array
  log_z: Array
  top: Array


def batch_of(arrays: Any) -> Batch:
  """Returns a `Batch` of a dict of numpy arrays."""
  return Batch(
      tokens=jnp.asarray(arrays['tokens'], jnp.int32),
      document=jnp.asarray(arrays['document'], jnp.int32),
      position=jnp.asarray(arrays['position'], jnp.int32),
      supervised=jnp.asarray(arrays['supervised'], bool))


def observe(
    lm: CausalLM | Guided, params: Any, batch: Batch, taps: tuple[str, ...], *,
    chunk: int = 2048,
) -> Teacher:
  """Runs the target over whole texts; documents do not see each other.

  Args:
    lm: the target. Of a `Guided` one the states are those of the view with
      the condition, as in decoding; `final`, `log_z` and `top` are of the
      guided law.
    params: its parameters; no gradient flows into them.
    batch: texts. taps: hidden states to return.
    chunk: positions whose V logits exist at a time.
  """
  size = batch.tokens.shape[1]
  params = jax.lax.stop_gradient(params)
  guided = lm if isinstance(lm, Guided) else None
  bare: CausalLM = lm.lm if isinstance(lm, Guided) else lm
  tokens, document, position = batch.tokens, batch.document, batch.position
  if guided is not None:
    tokens = guided.views(tokens)
    document, position = (jnp.repeat(x, 2, axis=0)
                          for x in (document, position))
  same = document[:, :, None] == document[:, None]
  mask = same & jnp.tril(jnp.ones((size, size), bool))
  block = Block(base=jnp.zeros(tokens.shape[:1], jnp.int32),
                position=position, ancestors=mask, whole=True)
  model = dataclasses.replace(bare, chunk=size)
  cache = model.empty(tokens.shape[0], 1)['cache']  # never touched
  _, found, _ = model.forward(
      params, cache, tokens, block, taps=taps + ('final',), with_head=False)
  found = dict(jax.lax.stop_gradient(found))
  final = found.pop('final')
  if guided is not None:
    final = guided.hidden(final, batch.position)
    found = {name: x[::2] for name, x in found.items()}
  log_z, top = _normaliser(lm, params, final, chunk)
  return Teacher(taps=found, final=final, log_z=log_z, top=top)


def _normaliser(lm: CausalLM | Guided, params: Any, final: Array, chunk: int):
  """Returns log-normalisers and likeliest tokens, [B,S] each."""
  shape = final.shape[:2]
  flat = final.reshape(-1, final.shape[-1])
  num = flat.shape[0]
  chunk = min(chunk, num)
  flat = jnp.pad(flat, ((0, -num % chunk), (0, 0)))

  def one(rows: Array):
    logits = lm.head(params, rows[None])[0]
    return (jax.nn.logsumexp(logits, axis=-1),
            jnp.argmax(logits, axis=-1).astype(jnp.int32))

  log_z, top = jax.lax.map(one, flat.reshape(-1, chunk, flat.shape[-1]))
  return (log_z.reshape(-1)[:num].reshape(shape),
          top.reshape(-1)[:num].reshape(shape))
