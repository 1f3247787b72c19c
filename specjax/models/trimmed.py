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

from specjax.models import draft_vocab
from specjax.models.attention import Block
from specjax.models.causal import CausalLM
from specjax.models.draft_vocab import rows, scores

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
    return draft_vocab.spread(
        scores(self.config, params['head'], x), params['inverse'])


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
