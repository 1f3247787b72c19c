"""Rules for tokens of real numbers, whose laws are densities.

Chains only. Drafts come with the law that they were drawn from and with the
event that laws score (`Draft.event`): of diffusion heads the denoising path.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from specjax.core import chains, density, keys, tree
from specjax.core.types import (
  IID,
  Context,
  Draft,
  Models,
  Scores,
  Verdict,
)
from specjax.verify import base
from specjax.verify.base import Array


@dataclasses.dataclass(frozen=True)
class Continuous(base.Rule, abc.ABC):
  """What rules of densities share: tests in order, then one correction."""

  modes: ClassVar[tuple[int, ...]] = (IID,)
  chains_only: ClassVar[bool] = True
  continuous: ClassVar[bool] = True
  advice: ClassVar[str] = 'use a chain of a drafter of real numbers'

  @abc.abstractmethod
  def tests(
      self, context: Context, draft: Draft, p: Any, q: Any
  ) -> tuple[Array, Array | None, Any]:
    """Returns the log-ratio f32[B,N] that each draft is tested with.

    Also the probability f32[B,N] that acceptance exceeds the exact rule's by,
    or None, and what `correct` is handed.

    Args:
      p, q: laws [B,N] of target and drafter. draft: with its events.
    """

  @abc.abstractmethod
  def correct(
      self, draft: Draft, p: Any, q: Any, key: Array, slot: Array,
      use: Array, aux: Any,
  ) -> tuple[Array, Array]:
    """Draws the token after the accepted drafts.

    Args:
      p: law [B] of the target there. q: law [B] of the draft in `slot`.
      key: key[B]. slot: int32[B]. use: bool[B], the draft was rejected;
        elsewhere the token is drawn from p.
      aux: of `tests`.

    Returns:
      `(token f32[B,C], gave_up bool[B])`.
    """

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Tests the drafts in order; corrects the first rejection, or its set."""
    del params
    num, law = draft.topology.num_nodes, scores.target_law
    batch = context.length.shape[0]
    key = keys.row(context, keys.Purpose.RESIDUAL)
    if draft.draft_law is None and scores.sets is not None:
      nothing = jnp.zeros((batch, num), bool)
      return self._by_sets(
          context, draft, scores, nothing, None, None, None)
    if num == 0 or draft.draft_law is None:  # nothing is drafted
      count = jnp.zeros((batch,), jnp.int32)
      event = law.at(count).sample(key)
      return base.finish(draft, count, law.token(event))
    row = jnp.broadcast_to(jnp.arange(num), (batch, num))
    p = law.at(row)
    q = draft.draft_law.at(
        jnp.broadcast_to(base.law_rows(draft), (batch, num)))
    log_ratio, extra, aux = self.tests(context, draft, p, q)
    u = keys.uniform(keys.row(context, keys.Purpose.ACCEPT), num)
    # 1 - u is in (0, 1]; a ratio that is not a number is a rejection.
    kept = (jnp.log1p(-u) <= log_ratio) & draft.valid
    if scores.sets is not None:
      return self._by_sets(context, draft, scores, kept, q, aux, extra)
    count = jnp.sum(jnp.cumprod(kept, axis=1), axis=1, dtype=jnp.int32)
    slot = jnp.minimum(count, num - 1)
    refused = tree.take_row(draft.valid, slot) & (count < num)
    token, gave_up = self.correct(
        draft, law.at(count), q.at(slot), key, slot,
          refused & ~context.done, aux)
    excess = _excess(extra, draft, count)
    return base.finish(draft, count, token, excess, gave_up)

  def _by_sets(
      self, context: Context, draft: Draft, scores: Scores, kept: Array,
      q: Any, aux: Any, extra: Array | None,
  ) -> Verdict:
    """Corrects all rejections of the first set that has one.

    Tokens of a set are independent given what is before it, so its other
    drafts stand. Emits up to the set's end; what was not drafted is drawn.
    """
    law, sets = scores.target_law, scores.sets
    assert sets is not None
    num = draft.topology.num_nodes
    shape = batch, rows = sets.shape
    last = ((0, 0), (0, 1))
    kept = jnp.pad(kept, last)
    first = jnp.argmin(kept & (sets >= 0), axis=1)
    at = tree.take_row(sets, first)[:, None]
    here = (sets == at) & (at >= 0)
    row = jnp.arange(rows)
    # A set that was not scored begins behind accepted drafts only.
    count = jnp.where(
        at[:, 0] >= 0,
        jnp.max(jnp.where(here, row, 0), axis=1), first - 1)
    key = base.row_keys(keys.row(context, keys.Purpose.RESIDUAL), rows)
    index = jnp.broadcast_to(row, shape)
    p, key = law.at(index).flat(), key.reshape(-1)
    if q is None:
      made, gave_up = p.token(p.sample(key)), jnp.zeros(batch * rows, bool)
    else:
      slot = jnp.minimum(index, num - 1)
      use = here & ~kept & jnp.pad(draft.valid, last) & ~context.done[:, None]
      flat = lambda x: tree.take_row(x, slot).reshape(  # noqa: E731
          -1, 1, *x.shape[2:])
      aux = _rows(aux, slot)
      made, gave_up = self.correct(
          draft.replace(
              tokens=flat(draft.tokens),
              event=None if draft.event is None else flat(draft.event)),
          p, q.at(slot).flat(), key, jnp.zeros(batch * rows, jnp.int32),
          use.reshape(-1), aux)
    made = made.reshape(*shape, -1)
    drafted = jnp.pad(draft.tokens, (*last, (0, 0)))
    tokens = jnp.where(kept[..., None], drafted, made)
    gave_up = jnp.any(here & gave_up.reshape(shape), axis=1)
    verdict = base.finish(
        draft, count, tree.take_row(tokens, count),
        _excess(extra, draft, count), gave_up)
    return verdict.replace(tokens=tokens[:, :num], kept=kept[:, :num])


@dataclasses.dataclass(frozen=True)
class PathExact(Continuous):
  """Accepts an event y with probability min(1, p(y) / q(y)).

  Lossless. Of Gaussian heads and mixtures y is the token. Of diffusion heads
  it is the end of the draft's own path: the last `last_steps` states are
  scored by both models. The target arrives at its own state before them by
  the noise that the drafter used, so that both ends begin close to each
  other. Given that noise, which is standard normal whatever happens, the ends
  are drawn by exact speculative sampling; so the token has the target's law.
  Fewer steps are compared, fewer differences count; but the ends begin
  further apart, and the target's steps before them are taken one by one (for
  all drafts at once). With all steps acceptance is 1 - TV of the laws of
  paths given their start.

  After a rejection ends are drawn from the target until one is kept with
  probability max(0, 1 - q / p): one a token on average.

  Attributes:
    last_steps: states compared, or None for the whole path.
    max_tries: ends drawn after a rejection, or None for as many as it takes.
      A cap changes the law by no more than the share of rounds that reach it
      (`gave_up` in summaries).

  References: the rule of Leviathan et al. 2023, arXiv:2211.17192, on paths;
  Wang et al. 2024, arXiv:2411.11925, section 3, for the noise that is shared
  (`cspd.CSpD` is their rule).
  """

  last_steps: int | None = None
  max_tries: int | None = None

  name = 'path_exact'

  def __post_init__(self):
    for field in ('last_steps', 'max_tries'):
      value = getattr(self, field)
      if value is not None and value < 1:
        raise ValueError(f'{field}={value}: must be >= 1, or None')

  def tests(self, context, draft, p, q):
    """Returns log p - log q of each event."""
    del context
    event = event_of(draft)
    if not isinstance(p, chains.Path):
      return p.log_prob(event) - q.log_prob(event), None, (p, q)
    mine, theirs, end = ends(p, q, event, self.last_steps)
    return mine.log_prob(end) - theirs.log_prob(end), None, (mine, theirs)

  def correct(self, draft, p, q, key, slot, use, aux):
    """Draws from what is left of p once q is taken off."""
    del draft
    mine, theirs = (law.at(slot) for law in aux)
    if isinstance(p, chains.Path):
      mine = begin(p, mine, use, keys.fold(key, 1))
    else:
      mine = p
    event, gave_up = mine.residual(
        theirs, keys.fold(key, 0), use, most=self.max_tries)
    return mine.token(event), gave_up


@dataclasses.dataclass(frozen=True)
class Reflection(PathExact):
  """`PathExact` for normal laws of equal deviations, without a loop.

  A rejected draft is mirrored at the plane halfway between the means, which
  has exactly the law of the residual. Accepts 2 Phi(-d / 2), d being the
  distance of the means in deviations. For Gaussian heads, and for the steps
  of a denoising chain drafted by a cheaper head. Where deviations differ the
  residual is drawn as in `PathExact`.

  References: De Bortoli et al. 2025, arXiv:2501.05370, algorithm 3.
  """

  name = 'reflection'

  def correct(self, draft, p, q, key, slot, use, aux):
    """Mirrors the rejected event."""
    if not isinstance(p, density.Gaussian):
      raise ValueError("verify='reflection' is for normal laws, and this "
                       "model's are not: use 'path_exact'")
    y = tree.take_row(event_of(draft), slot)
    away = (q.mean - p.mean) * jnp.exp(-p.log_std)
    noise = (y - q.mean) * jnp.exp(-p.log_std)
    # Equal means reject nothing: any direction will do.
    length = jnp.maximum(jnp.sum(away**2, axis=-1), 1e-24)
    along = jnp.sum(noise * away, axis=-1) / length
    mirrored = p.mean + jnp.exp(p.log_std) * (
        noise - 2 * along[:, None] * away)
    alike = jnp.all(p.log_std == q.log_std, axis=-1)
    other, gave_up = super().correct(
        draft, p, q, key, slot, use & ~alike, aux)
    return jnp.where((use & alike)[:, None], mirrored, other), gave_up


def _excess(extra: Array | None, draft: Draft, count: Array) -> Array | None:
  """Returns f32[B], what drafts up to `count` were accepted too often."""
  if extra is None:
    return None
  tested = (jnp.arange(extra.shape[1]) <= count[:, None]) & draft.valid
  return jnp.sum(jnp.where(tested, extra, 0.0), axis=1)


def _rows(aux: Any, slot: Array) -> Any:
  """Returns what `tests` handed on, of slots int32[B,R], as [B*R,1]."""
  def one(x: Any) -> Any:
    if isinstance(x, density.Density):
      return x.at(slot).flat()._each(lambda leaf: leaf[:, None])
    return tree.take_row(x, slot).reshape(-1, 1)
  return tuple(one(x) for x in aux)


def event_of(draft: Draft) -> Array:
  """Returns what the laws of a draft score: its events, or its tokens."""
  return draft.tokens if draft.event is None else draft.event


def ends(
    p: chains.Path, q: chains.Path, event: Array, last: int | None,
    noise: Array | None = None,
) -> tuple[chains.Tail, chains.Tail, Array]:
  """Returns the laws of the last states under both models, and the states.

  Args:
    p, q: laws [B,N] of target and drafter. event: f32[B,N,T+1,C], the
      drafter's paths. last: how many states, or None for all but the start.
    noise: what the target's steps before are made of; None: of the drafter's.

  Raises:
    ValueError: chains of different lengths, or more states than there are.
  """
  total = p.process.num_steps
  if q.process.num_steps != total:
    raise ValueError(f'the target takes {total} denoising steps and the '
                     f'drafter {q.process.num_steps}: paths of equal length '
                     'are compared')
  if last is not None and last > total:
    raise ValueError(f'last_steps={last}: there are {total} steps')
  first = total - (total if last is None else last)
  state = event[..., 0, :]
  if first:
    given = q.noise(event, first) if noise is None else noise
    state = p.run(state, given)[..., -1, :]
  return (p.tail(state, first), q.tail(event[..., first, :], first),
          event[..., first + 1:, :])


def begin(
    p: chains.Path, mine: chains.Tail, use: Array, key: Array
) -> chains.Tail:
  """Returns the law [B] of the target's end, where `use bool[B]` `mine`.

  Elsewhere of a chain of its own, which follows the accepted drafts.
  """
  noise = density.normal(key, (mine.first + 1, p.process.channels))
  state = noise[..., 0, :]
  if mine.first:
    state = p.run(state, noise[..., 1:, :])[..., -1, :]
  return p.tail(jnp.where(use[:, None], mine.state, state), mine.first)
