"""A causal decoder whose head scores a part of the vocabulary.

For drafting: the head of a small model costs more than its layers. Any model
can be trimmed without training; inputs keep the whole vocabulary, as every
accepted token is fed. Tokens that are not kept get the logit -inf, so the law
that is handed over is the law that drafts are drawn from.

References: VocabTrim, arXiv:2506.22694.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.models import draft_vocab
from specjax.models.attention import Block
from specjax.models.causal import CausalLM
from specjax.models.transformer import TransformerConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TrimmedLM(CausalLM):
  """`CausalLM` with a head of W rows.

  Parameters are `{'lm', 'head', 'ids', 'inverse'}` (`trim`). With W = V the
  logits are those of the whole model, bit for bit.
  """

  def forward(
      self, params: Any, cache: Any, x: Array, block: Block, **kwargs
  ) -> tuple[Array | None, dict[str, Array], Any]:
    """See `CausalLM.forward`; logits are f32[B,T,V], -inf outside of W."""
    scored = kwargs.pop('with_head', True) and kwargs.get('stop') is None
    taps = tuple(kwargs.pop('taps', ()))
    wanted = (*taps, 'final') if scored and 'final' not in taps else taps
    _, found, cache = super().forward(
        params['lm'], cache, x, block, taps=wanted, with_head=False, **kwargs)
    if not scored:
      return None, found, cache
    logits = self.head(params, found['final'])
    return logits, {name: found[name] for name in taps}, cache

  def head(self, params: Any, x: Array) -> Array:
    """Returns f32[B,T,V] of states [B,T,D] after the last norm."""
    logits = scores(self.config, params['head'], x)
    if logits.shape[-1] == self.vocab_size:
      return logits  # ids are ascending: all of them, in order
    return draft_vocab.spread(logits, params['inverse'])


def trim(lm: CausalLM, params: Any, ids: Any) -> tuple[TrimmedLM, Any]:
  """Returns a model that scores some tokens only, and its parameters.

  Args:
    lm, params: a causal model.
    ids: int[W], ascending, the tokens to keep.

  Raises:
    ValueError: ids that are empty, not ascending or out of range.
  """
  table = draft_vocab.table(ids, lm.vocab_size)
  # A head of its own is left out: the decoder is then as if it were tied.
  body = {k: v for k, v in params.items() if k != 'head'}
  config = dataclasses.replace(lm.config, tied=True)
  return (TrimmedLM(config, lm.chunk, lm.exact_trees),
          {'lm': body, 'head': rows(params, table['ids']), **table})


def rows(params: Any, ids: Array) -> Array:
  """Returns the rows [W,D] of a model's head, its embedding if it is tied."""
  head = params['head'] if 'head' in params else params['embedding']
  if ids.shape[0] == head.shape[0]:
    return head  # not a second copy of it
  return jnp.take(head, ids, axis=0)


def scores(config: TransformerConfig, head: Array, x: Array) -> Array:
  """Returns f32[...,W] of normed states [...,D] and rows [W,D] of a head."""
  logits = jnp.einsum('...d,vd->...v', x, head, precision=config.precision,
                      preferred_element_type=jnp.float32)
  if config.final_softcap is not None:
    logits = jnp.tanh(logits / config.final_softcap) * config.final_softcap
  return logits
