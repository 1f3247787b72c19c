"""Rules and drafts with one thing wrong, on purpose: each must be found.

All of them are mistakes that public implementations have made. A certificate
that lets one pass proves nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax.certificates import exact, problems
from specjax.core import keys, pipeline, topologies, tree
from specjax.core import law as law_lib
from specjax.core.tree import Topology
from specjax.core.types import (
  IID,
  POINT,
  WITHOUT_REPLACEMENT,
  Context,
  Draft,
  Scores,
  Verdict,
)
from specjax.verify import Block, Match, Speculative, base, block

Array = Any


def _redraw(
    context: Context, draft: Draft, scores: Scores, count: Array, *,
    row: Array | None = None, rejected: Array | None = None,
    scale: Array | None = None,
) -> Verdict:
  """Accepts `count int32[B]` drafts of a chain and draws the next token.

  As `Speculative`, but for what is given: the target's row, whether a draft
  was rejected there, the weight of the target's law.
  """
  law = scores.target_law
  if rejected is None:
    rejected = _rejected(draft, count)
  token, _ = law.at(count if row is None else row).residual(
      law_lib.at_slot(draft, count, law.vocab_size),
      keys.row(context, keys.Purpose.RESIDUAL), rejected, scale)
  return base.finish(draft, count, token)


def _rejected(draft: Draft, count: Array) -> Array:
  """Returns bool[B]: a draft was rejected after `count`, none was missing."""
  return tree.take_row(jnp.pad(draft.valid, ((0, 0), (0, 1))), count)


def _prefix(passed: Array, draft: Draft) -> Array:
  """Returns int32[B], how many tests pass before the first that fails."""
  passed = jnp.cumprod(passed & draft.valid, axis=1)
  return jnp.sum(passed, axis=1, dtype=jnp.int32)


class SaysIndependent(Speculative):
  """Takes whatever is drafted for independent draws from the stated law."""

  def verify(self, params, context, draft, scores):
    """As `Speculative`, on drafts whose kind is a lie."""
    lie = draft.replace(mode=jnp.full_like(draft.mode, IID))
    return super().verify(params, context, lie, scores)


class AcceptsAtEquality(Speculative):
  """Tests u q <= p: at u = 0 a token of probability 0 passes."""

  def numerator(self, params, context, draft, scores, test):
    """The smallest number above p that is still one for the processor."""
    return jnp.maximum(jnp.nextafter(test.p, 2.0), 1e-37)


class NoResidual(Speculative):
  """Corrects a rejection with a plain draw from the target."""

  def left_over(self, params, test, p, q):
    """All of p."""
    return p


class ResidualOfNextRow(Speculative):
  """Corrects a rejection with the target's law one position later."""

  def verify(self, params, context, draft, scores):
    """For chains."""
    count = super().verify(params, context, draft, scores).num_accepted
    late = jnp.where(_rejected(draft, count), count + 1, count)
    return _redraw(context, draft, scores, count, row=late)


class BonusOfLastDraft(Speculative):
  """Draws the bonus from the law that the last draft was tested against."""

  def verify(self, params, context, draft, scores):
    """For chains."""
    count = super().verify(params, context, draft, scores).num_accepted
    early = jnp.where(_rejected(draft, count), count, count - 1)
    return _redraw(context, draft, scores, count, row=early)


class OneUniform(Speculative):
  """Tests all drafts of a round against the same uniform."""

  def verify(self, params, context, draft, scores):
    """For chains."""
    u = keys.uniform(keys.row(context, keys.Purpose.ACCEPT), 1)
    p = jnp.exp(base.target_log_prob(draft, scores))
    passed = u * jnp.exp(base.draft_log_prob(draft)) < p
    return _redraw(context, draft, scores, _prefix(passed, draft))


class SortedChildren(Speculative):
  """Visits children by probability, not in the order they were drawn."""

  def verify(self, params, context, draft, scores):
    """For trees."""
    order = jnp.argsort(-base.draft_log_prob(draft), axis=1)
    rank = jnp.argsort(order, axis=1).astype(jnp.int32)
    return super().verify(
        params, context, draft.replace(sibling=rank), scores)


class PrunedChildren(Speculative):
  """Drops the least likely of the children after looking at them."""

  def verify(self, params, context, draft, scores):
    """For trees of depth 1."""
    worst = jnp.argmin(base.draft_log_prob(draft), axis=1)
    kept = jnp.arange(draft.topology.num_nodes) != worst[:, None]
    return super().verify(
        params, context, draft.replace(valid=draft.valid & kept), scores)


class FreshCorrection(Match):
  """Tests drafts against one draw, and emits another one on a mismatch."""

  def verify(self, params, context, draft, scores):
    """For chains."""
    count = super().verify(params, context, draft, scores).num_accepted
    return _redraw(context, draft, scores, count,
                   rejected=jnp.zeros(count.shape, bool))


def _path_weight(draft: Draft, scores: Scores, count: Array) -> Array:
  """Returns f32[B], the weight that block verification gives the path."""
  log_w = block._log_weights(draft, scores)
  return jnp.exp(tree.take_row(jnp.pad(log_w, ((0, 0), (1, 0))), count))


class TokenwiseBlock(Block):
  """Accepts token by token, and corrects as block verification does."""

  def verify(self, params, context, draft, scores):
    """For chains."""
    num = draft.topology.num_nodes
    u = keys.uniform(keys.row(context, keys.Purpose.ACCEPT), num)
    p = jnp.exp(base.target_log_prob(draft, scores))
    passed = u * jnp.exp(base.draft_log_prob(draft)) < p
    count = _prefix(passed, draft)
    return _redraw(context, draft, scores, count,
                   scale=_path_weight(draft, scores, count))


class PrefixBlock(Block):
  """Stops at the first test that fails, not after the last that passes."""

  def verify(self, params, context, draft, scores):
    """For chains."""
    num = draft.topology.num_nodes
    last = jnp.sum(jnp.cumprod(draft.valid, axis=1), axis=1)
    hazards = block._hazards(
        draft, scores.target_law, block._log_weights(draft, scores), last)
    u = keys.uniform(keys.row(context, keys.Purpose.ACCEPT), num)
    count = _prefix(u < hazards, draft)
    return _redraw(context, draft, scores, count,
                   scale=_path_weight(draft, scores, count))


@dataclasses.dataclass(frozen=True)
class Fault:
  """What is wrong, and where it shows.

  Attributes:
    name: in words. rule: verifies. topology, kind: of the drafts.
    options: values of sampling options, repeated over the problems.
    laws: changes of `problems.Problem` that plant a fault in a law.
  """

  name: str
  rule: Any
  topology: Topology
  kind: int = IID
  options: dict[str, tuple[float, ...]] = dataclasses.field(
      default_factory=lambda: {'temperature': (0.6, 1.0, 1.5)})
  laws: dict[str, Any] = dataclasses.field(default_factory=dict)

  def problem(self, num_problems: int = 6, seed: int = 0) -> problems.Problem:
    """Returns random problems over three tokens with the fault."""
    made = problems.random_problem(
        self.topology, self.kind, 3, num_problems=num_problems, seed=seed,
        options={name: np.resize(values, num_problems)
                 for name, values in self.options.items()})
    return dataclasses.replace(made, **self.laws)

  def examine(self, num_problems: int = 6, seed: int = 0) -> exact.ExactRow:
    """Returns the certificate of the faulty rule; it must not pass."""
    row = exact.certify_problem(
        self.rule, self.problem(num_problems, seed))
    return dataclasses.replace(row, note=self.name)


def _unfiltered(context: Context, logits: Array, history: Array):
  """Makes the plain softmax, whatever the options are."""
  del context, history
  return law_lib.Categorical(logits)


def _top_p_first(context: Context, logits: Array, history: Array):
  """Filters before temperature is applied."""
  del history
  options = context.options
  assert options.top_p is not None and options.temperature is not None
  kept = pipeline.top_p(logits, options.top_p[:, None])
  return law_lib.Categorical(kept / options.temperature[:, None, None])


def _blind_penalties(context: Context, logits: Array, history: Array):
  """Penalises what is committed, and not the drafts before a row."""
  return pipeline.law(context, logits, jnp.full_like(history, -1))


_WIDE = topologies.branching((3,))
FAULTS: tuple[Fault, ...] = (
    Fault('softmax law for argmax drafts', SaysIndependent(), tree.chain(2),
          POINT),
    Fault('top-k drafts with the unfiltered law', Speculative(),
          tree.chain(2), options={'temperature': (1.0,), 'top_k': (2,)},
          laws={'stated_law': _unfiltered}),
    Fault('top-p before temperature on one side', Speculative(),
          tree.chain(2),
          options={'temperature': (0.5, 2.0, 1.5), 'top_p': (0.7,)},
          laws={'target_law': _top_p_first}),
    Fault('penalties that do not see the drafts', Speculative(),
          tree.chain(2),
          options={'temperature': (1.0,), 'presence_penalty': (1.0,)},
          laws={'target_law': _blind_penalties}),
    Fault('u q <= p', AcceptsAtEquality(), tree.chain(2),
          options={'temperature': (1.0,), 'top_k': (2,)},
          laws={'same_options': False}),
    Fault('correction from p', NoResidual(), tree.chain(2)),
    Fault('residual of the wrong row', ResidualOfNextRow(), tree.chain(2)),
    Fault('bonus from the wrong row', BonusOfLastDraft(), tree.chain(2)),
    Fault('one uniform for all drafts', OneUniform(), tree.chain(2)),
    Fault('siblings not renormalised', SaysIndependent(),
          topologies.branching((2,)), WITHOUT_REPLACEMENT),
    Fault('children visited by probability', SortedChildren(),
          topologies.branching((2,)), WITHOUT_REPLACEMENT),
    Fault('children pruned after the draw', PrunedChildren(), _WIDE),
    Fault('fresh draw on a mismatch', FreshCorrection(), tree.chain(2)),
    Fault('token tests with the residual of block', TokenwiseBlock(),
          tree.chain(2)),
    Fault('block stops at the first failure', PrefixBlock(), tree.chain(3)),
)
