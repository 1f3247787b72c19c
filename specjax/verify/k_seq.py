"""k-SEQ: several independent drafts, one test for all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.core import keys, tree
from specjax.core import law as law_lib
from specjax.core.types import IID, Context, Draft, Models, Scores, Verdict
from specjax.verify import base, rejection
from specjax.verify.bound import kseq_rho

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class KSeq(base.Rule):
  """Tests every candidate with probability min(1, p(x) / (rho q(x))).

  Lossless for candidates drawn independently from q. rho is the smallest
  value for which the correction is a law; it depends on p, q and the number
  of candidates, and acceptance is at least 1 - (1 - 1/n)^n of the best
  possible. Candidates at one position are all children of nodes that share
  the accepted prefix: independent draft sequences (`topologies.sequences`)
  that agree so far are kept together, as in SpecTr.

  References: Sun et al. 2023 (SpecTr), arXiv:2310.15141, algorithm 3.
  """

  name = 'k_seq'
  modes = (IID,)
  advice = ("draft with draft_sample_method 'iid', or use 'speculative' or "
            "'greedy_multi_draft'")

  def check(self, topology, modes, vocab_size: int, params: Any) -> None:
    """Also: there is more than one candidate."""
    super().check(topology, modes, vocab_size, params)
    if topology.max_children < 2:
      raise ValueError(
          "verify='k_seq' is for two or more candidates at a position, and "
          'this drafter proposes a single chain: use '
          "'speculative' or 'block'")

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Keeps the longest path of accepted candidates."""
    del params
    law, topology = scores.target_law, draft.topology
    num, batch = topology.num_nodes, draft.tokens.shape[0]
    key = keys.row(context, keys.Purpose.RESIDUAL)
    if num == 0:
      row = jnp.zeros((batch,), jnp.int32)
      return base.finish(draft, row, law.at(row).sample(key))
    # Below a slot that was not drafted nothing is a candidate.
    draft = draft.replace(valid=base.reached(draft))
    rivals = _rivals(draft)
    count = jnp.sum(rivals & draft.valid[:, None], axis=-1)  # [B,N]
    kin = rejection.family(draft)
    p = law.at(jnp.broadcast_to(kin.rows, (batch,) + kin.rows.shape)).probs
    q = rejection.draft_probs(draft, kin)
    number = rejection.take(count, kin.slots[..., 0])  # of a row's candidates
    assert q is not None  # the kind is 'iid'
    rho, beta = kseq_rho(p, q, jnp.maximum(number, 1))
    accept = _accept(context, draft, scores, kin, rho)
    # The first accepted candidate of a group names the token; all candidates
    # with that token go on.
    first = jnp.min(jnp.where(
        rivals & accept[:, None], jnp.arange(num), num), axis=-1)
    named = rejection.take(draft.tokens, jnp.minimum(first, num - 1))
    alive = (first < num) & (draft.tokens == named) & draft.valid
    # Of the nodes at the end of the path, one that was drafted on from: its
    # candidates, and those of its twins, were all rejected.
    is_open = _is_open(draft, kin)
    stop = tree.deepest(topology, draft.parents, alive,
                        tie=is_open[:, 1:].astype(jnp.float32))
    place = jnp.minimum(kin.place[stop], kin.rows.shape[0] - 1)
    at = lambda x: tree.take_row(x, place)  # noqa: E731
    left = _correction(at(p), at(q), at(rho), at(beta), at(number))
    weight = jnp.where(
        tree.take_row(is_open, stop)[:, None], left, law.at(stop).probs)
    return base.finish(draft, stop, law_lib.from_weights(weight).sample(key))


def _rivals(draft: Draft) -> Array:
  """Returns bool[B,N,N]: the two slots are candidates for one position.

  That is, at the same depth after the same drafted tokens.
  """
  topology = draft.topology
  past = tree.history(topology, draft.parents, draft.tokens)  # [B,N+1,D]
  parents = jnp.broadcast_to(base.parent_rows(draft), draft.tokens.shape)
  prefix = tree.take_row(past, parents)
  return jnp.all(prefix[:, :, None] == prefix[:, None], axis=-1)


def _accept(
    context: Context, draft: Draft, scores: Scores, kin, rho: Array
) -> Array:
  """Returns bool[B,N], the outcome of each candidate's own test."""
  log_p = base.target_log_prob(draft, scores)
  log_q = base.draft_log_prob(draft)
  parents = jnp.broadcast_to(base.parent_rows(draft), log_p.shape)
  scale = rejection.take(rho, kin.place[parents])
  u = keys.uniform(keys.row(context, keys.Purpose.ACCEPT), log_p.shape[1])
  return (u * jnp.exp(log_q) * scale < jnp.exp(log_p)) & draft.valid


def _correction(p, q, rho, beta, number) -> Array:
  """Returns weights f32[B,V] of the token after no candidate passed.

  p - min(q, p / rho) p_acc / beta, where p_acc = 1 - (1 - beta)^n; its factor
  tends to n as beta tends to 0.
  """
  safe = jnp.where(beta > 0, beta, 1.0)
  log_miss = number * jnp.log1p(-jnp.minimum(safe, 1.0))
  factor = jnp.where(beta > 0, -jnp.expm1(log_miss) / safe, number)
  left = p - jnp.minimum(q, p / rho[:, None]) * factor[:, None]
  left = jnp.maximum(left, 0.0)
  mass = left.sum(axis=-1, keepdims=True)
  return jnp.where((mass > 1e-7) & jnp.isfinite(mass), left, p)


def _is_open(draft: Draft, kin) -> Array:
  """Returns bool[B,N+1]: some candidate was drafted after the row."""
  some = kin.exists & rejection.take(draft.valid, kin.slots)
  some = jnp.pad(jnp.any(some, axis=-1), ((0, 0), (0, 1)))
  return some[:, kin.place]
