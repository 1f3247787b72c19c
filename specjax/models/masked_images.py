"""MAR as a target and as a drafter's source: images token by token.

Text holds the tokens of an image in the order in which they are made, behind
one token that stands for the beginning. `context.condition` holds, by name:

* `order` int32[B,N]: the place in the image of the k-th token that is made.
* `label` int32[B]: the class; `num_classes` for any.
* `guidance` f32[B], or absent: scale; then the head is a `GuidedHead`.

Attention is bidirectional, so nothing is cached and each row of a draft is a
pass of its own (exact: every draft is scored given all drafts before it; N + 1
times the work of one token, which a device that idles does for free).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import density, tree
from specjax.core.types import Context, Models, Scores, SpecState
from specjax.models.diffusion import Diffusion
from specjax.models.mar import MAR

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MaskedImages:
  """A masked decoder with a denoising head. Hashable.

  Serves as a target, and as the model of a `ChainDensity` (a
  `drafters.source.Source`). Parameters are `{'mar': ..., 'head': ...}`.

  Attributes:
    mar: the decoder. process: the denoising chain of its head.
  """

  mar: MAR
  process: Diffusion

  vocab_size = 0
  taps = ()
  follows = False

  def __post_init__(self):
    if self.mar.channels != self.process.channels:
      raise ValueError(
          f'tokens of {self.mar.channels} channels, and a head of '
          f'{self.process.channels}')

  def empty(self, batch: int, capacity: int) -> Any:
    """Nothing is stored."""
    del batch, capacity
    return {}

  # --- What is said of a token ----------------------------------------------

  def features(
      self, params: Any, context: Context, text: Array, known: Array
  ) -> Any:
    """Returns what heads are told of the token that follows, [B,R,...].

    Args:
      params: of this model. text: f32[B,S,C], see the module.
      known: int32[B,R], tokens of the image that are there, in [0, N).
    """
    condition = context.condition
    order, label = condition['order'], condition['label']
    batch, rows = known.shape
    size = self.mar.num_tokens
    known = jnp.clip(known, 0, size - 1)
    turn = jnp.argsort(order, axis=-1)  # when each place is made
    image = tree.take_row(text[:, 1:], turn)
    is_masked = turn[:, None] >= known[..., None]

    def said(label: Array) -> Array:
      flat = lambda x: x.reshape(batch * rows, *x.shape[2:])  # noqa: E731
      z = self.mar(
          params['mar'], flat(jnp.broadcast_to(
              image[:, None], (batch, rows, *image.shape[1:]))),
          flat(is_masked), flat(jnp.broadcast_to(
              label[:, None], (batch, rows))))
      place = tree.take_row(order, known).reshape(-1)
      z = z[jnp.arange(batch * rows), place]
      return z.reshape(batch, rows, -1)

    if 'guidance' not in condition:
      return said(label)
    scale = jnp.broadcast_to(condition['guidance'][:, None], known.shape)
    return {'with': said(label), 'scale': scale, 'without': said(
        jnp.full_like(label, self.mar.num_classes))}

  def law(
      self, params: Any, context: Context, features: Any
  ) -> density.Path:
    """Returns the laws [B,R] of the tokens that follow."""
    assert context.options.temperature is not None
    rows = jax.tree.leaves(features)[0].shape[:2]
    return density.Path(
        self.process, params['head'], features, jnp.broadcast_to(
            context.options.temperature[:, None], rows))

  # --- Target ----------------------------------------------------------------

  def init(
      self, params: Models, state: SpecState, position: Array, fed: Array,
      taps: Any,
  ) -> Any:
    """Nothing to take in: `(state, {})` of a target, the memory of a source.

    A target is called with names of taps, a source with their values.
    """
    del params, position, fed
    return state.drafter if isinstance(taps, dict) else (state, {})

  def score(self, params: Models, state: SpecState, draft, taps):
    """Returns the laws after the root and after each draft."""
    del taps
    context = state.context
    num = draft.topology.num_nodes
    text = _put(context.tokens, context.length, draft.tokens)
    known = context.root[:, None] + jnp.arange(num + 1)
    features = self.features(params.target, context, text, known)
    finite = jnp.all(jnp.stack([
        jnp.all(jnp.isfinite(x.reshape(*known.shape, -1)), axis=-1)
        for x in jax.tree.leaves(features)]), axis=0)
    return Scores(
        target_law=self.law(params.target, context, features),
        finite=finite), state

  def commit(self, state: SpecState, draft, verdict) -> SpecState:
    """Nothing is stored."""
    del draft, verdict
    return state

  # --- Source ----------------------------------------------------------------

  def begin(
      self, params: Models, state: SpecState, *, behind: int, refill: bool
  ) -> tuple[Any, Any]:
    """Returns what is said of the next token, [B,...], and the memory."""
    del behind, refill
    context = state.context
    features = self.features(
        params.drafter, context, context.tokens, context.root[:, None])
    return jax.tree.map(lambda x: x[:, 0], features), {
        'text': context.tokens}

  def grow(
      self, params: Models, context: Context, memory: Any, level: Any
  ) -> tuple[Any, Any]:
    """Returns what is said of the token after each, [B,1,...], memory."""
    text = _put(memory['text'], level.base, level.tokens)
    return self.features(
        params.drafter, context, text, level.base[:, None]), {'text': text}

  def confidence(self, memory: Any) -> None:
    """There is no head for it."""
    del memory

  def sync(self, params, state, draft, scores, verdict, *, own) -> Any:
    """Forgets the drafts: the text is in `context.tokens`."""
    del params, state, draft, scores, verdict, own
    return {}


def _put(text: Array, slot: Array, tokens: Array) -> Array:
  """Returns text [B,S,C] with `tokens [B,T,C]` from `slot int32[B]` on."""
  where = slot[:, None] + jnp.arange(tokens.shape[1])
  return text.at[jnp.arange(text.shape[0])[:, None], where].set(
      tokens, mode='drop')
