"""MAR as a target and as a drafter's source: images token by token.

Text holds the tokens of an image in the order in which they are made, behind
one token that stands for the beginning. `context.condition` holds, by name:

* `order` int32[B,N]: the place in the image of the k-th token that is made.
* `label` int32[B]: the class; `num_classes` for any.
* `guidance` f32[B,N], or absent: scale at the k-th token that is made (one
  value for drafting and for scoring it); then the head is a `GuidedHead`.

Attention is bidirectional, so nothing is cached, and what is said given one
prefix is a pass of its own. By default every draft is scored given all drafts
before it: N + 1 passes for N drafts, which a device that idles does for free.

MAR makes several tokens at a time (`num_iterations`): those of one iteration
are independent given all before it, in any decoder of that many iterations,
so that a window needs a pass for each iteration that it touches. Fewer
iterations are another law, and the cheaper one: what drafts are verified
against, and what plain decoding (a `Null` drafter as wide as the largest
iteration) draws from.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core import tree
from specjax.core.types import Context, Models, Scores, SpecState
from specjax.models import mar as mar_lib
from specjax.models.denoised_images import DenoisedImages
from specjax.models.diffusion import Diffusion
from specjax.models.diffusion_head import bare
from specjax.models.mar import MAR

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MaskedImages(DenoisedImages):
  """A masked decoder with a denoising head. Hashable.

  Serves as a target, and as the model of a `ChainDensity` (a
  `drafters.source.Source`). Parameters are `{'mar': ..., 'head': ...}`.

  Attributes:
    mar: the decoder. process: the denoising chain of its head.
    num_iterations: S, in which an image is made, in [1, N]; None is N.
    schedule: tokens of each iteration: 'cosine', as MAR does, or 'even'.
    num_passes: most prefixes of a window that are scored in a round; drafts
      behind them wait for the next. None scores all.
  """

  mar: MAR
  process: Diffusion
  num_iterations: int | None = None
  schedule: str = 'cosine'
  num_passes: int | None = None

  chunk = 1 << 20  # nothing is fed, so calls may be as long as they like

  def __post_init__(self):
    if self.mar.channels != self.process.channels:
      raise ValueError(
          f'tokens of {self.mar.channels} channels, and a head of '
          f'{self.process.channels}')
    if self.num_passes is not None and self.num_passes < 1:
      raise ValueError(f'num_passes={self.num_passes}: must be >= 1')
    mar_lib.iteration_starts(
        self.num_tokens, self.num_iterations, self.schedule)

  @functools.cached_property
  def iterations(self) -> np.ndarray:
    """int[N]: tokens that are there when the k-th one is made."""
    starts = mar_lib.iteration_starts(
        self.num_tokens, self.num_iterations, self.schedule)
    return np.repeat(starts[:-1], np.diff(starts))

  @property
  def largest(self) -> int:
    """Most tokens that an iteration makes."""
    return int(np.bincount(self.iterations).max())

  @property
  def scoring(self) -> str:
    """What is verified against, in words: it decides law and cost."""
    if self.num_iterations is None and self.num_passes is None:
      return 'a pass for each draft (masked, one token an iteration)'
    count = self.num_iterations or self.num_tokens
    most = '' if self.num_passes is None else f', {self.num_passes} at most'
    return (f'a pass for each iteration{most} (masked, {count} iterations, '
            f'{self.schedule})')

  @property
  def num_tokens(self) -> int:
    """N, tokens of an image."""
    return self.mar.num_tokens

  @property
  def num_classes(self) -> int:
    """Classes; as a label, any of them."""
    return self.mar.num_classes

  def random(self, key: Array) -> dict[str, Any]:
    """Returns parameters as training begins with them."""
    one, other = jax.random.split(key)
    return {'mar': self.mar.init(one), 'head': bare(
        self.process.head).init(other)}

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
      known: int32[B,R], tokens of the image that are there, in [0, N); of
        them those are read that earlier iterations made.
    """
    known = jnp.clip(known, 0, self.num_tokens - 1)
    seen = jnp.asarray(self.iterations)[known]
    row = jnp.broadcast_to(jnp.arange(known.shape[1]), known.shape)
    return self._told(params, context, text, seen, known, row)

  def _told(
      self, params: Any, context: Context, text: Array, seen: Array,
      known: Array, which: Array,
  ) -> Any:
    """Returns what heads are told, [B,R,...].

    Args:
      seen: int32[B,P], tokens that each pass reads.
      known: int32[B,R], in [0, N): which token each row is about.
      which: int32[B,R], the pass that each row is read off.
    """
    condition = context.condition
    order, label = self.conditions(context)
    batch, passes = seen.shape
    turn = jnp.argsort(order, axis=-1)  # when each place is made
    image = tree.take_row(text[:, 1:], turn)
    is_masked = turn[:, None] >= seen[..., None]
    place = tree.take_row(order, known)

    def said(label: Array) -> Array:
      flat = lambda x: x.reshape(batch * passes, *x.shape[2:])  # noqa: E731
      z = self.mar(
          params['mar'], flat(jnp.broadcast_to(
              image[:, None], (batch, passes, *image.shape[1:]))),
          flat(is_masked), flat(jnp.broadcast_to(
              label[:, None], (batch, passes))))
      z = z.reshape(batch, passes, *z.shape[1:])
      return z[jnp.arange(batch)[:, None], which, place]

    if not self.is_guided:
      return said(label)
    scale = tree.take_row(condition['guidance'], known)
    return {'with': said(label), 'scale': scale, 'without': said(
        jnp.full_like(label, self.mar.num_classes))}

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
    if self.num_iterations is None and self.num_passes is None:
      features, sets = self.features(
          params.target, context, text, known), None
    else:
      features, sets = self._window(params.target, context, text, known)
    finite = jnp.all(jnp.stack([
        jnp.all(jnp.isfinite(x.reshape(*known.shape, -1)), axis=-1)
        for x in jax.tree.leaves(features)]), axis=0)
    return Scores(
        target_law=self.law(params.target, context, features), sets=sets,
        finite=finite), state

  def _window(
      self, params: Any, context: Context, text: Array, known: Array
  ) -> tuple[Any, Array]:
    """Returns what is said of a window's tokens, and `Scores.sets`."""
    starts = self.iterations
    number = jnp.asarray(np.cumsum(np.diff(starts, prepend=0) > 0))
    inside = known < self.num_tokens
    known = jnp.minimum(known, self.num_tokens - 1)
    sets = number[known]
    first = sets[:, :1]
    passes = known.shape[1]
    if self.num_passes is not None:
      passes = min(self.num_passes, passes)
    sets = jnp.where(
        inside & (sets - first < passes), sets - first, -1)
    begins = jnp.asarray(np.append(np.unique(starts), 0))
    seen = begins[jnp.minimum(
        first + jnp.arange(passes), len(begins) - 2)]
    return self._told(params, context, text, seen, known, jnp.maximum(
        sets, 0)), sets

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
