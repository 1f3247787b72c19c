"""Every chain rule, as coded, emits exactly the target's joint law.

And the checker that says so must reject rules with known faults.
"""

import dataclasses

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.core import keys, pipeline
from specjax.core import law as law_lib
from specjax.core.types import IID, MATCH, POINT
from specjax.verify import Block, Match, Speculative, chains
from specjax.verify import block as block_lib
from specjax.verify import speculative as speculative_lib

# Laws are float32; sums of up to 256 terms. Seen: below 5e-7.
CLOSE = 3e-6
# A fault must stand out from rounding by orders of magnitude.
WRONG = 1e-2
VOCAB, DEPTH, NUM = 3, 3, 16
RULES = [Speculative(), Block()]
by_rule = pytest.mark.parametrize('rule', RULES, ids=lambda r: r.name)


def options(num: int = NUM, greedy: int = 3):
  """Returns columns that mix all filters; the last rows are greedy."""
  rng = np.random.default_rng(7)
  pick = lambda *values: rng.choice(values, num)  # noqa: E731
  temperature = pick(0.6, 1.0, 1.5)
  temperature[num - greedy:] = 0.0
  return {
      'temperature': temperature, 'top_k': pick(0, 0, 2),
      'top_p': pick(1.0, 1.0, 0.8), 'min_p': pick(0.0, 0.0, 0.25),
      'repetition_penalty': pick(1.0, 1.3),
      'presence_penalty': pick(0.0, 0.4),
      'frequency_penalty': pick(0.0, 0.3)}


PLAIN = {'temperature': np.resize([0.6, 1.0, 1.5], NUM)}


def problems(columns=None, depth: int = DEPTH, vocab: int = VOCAB, **kwargs):
  columns = options() if columns is None else columns
  num = len(columns['temperature'])
  return enumeration.random_problems(
      11, num, vocab, depth, columns, **kwargs)


def check(found) -> None:
  assert np.abs(found.target.sum(axis=1) - 1).max() < 1e-12
  assert found.error < CLOSE
  assert not found.forbidden


@by_rule
@pytest.mark.parametrize('same', [True, False], ids=['same', 'own'])
def test_drawn_drafts(rule, same):
  """All filters, penalties and greedy rows; drafts with the same options or
  with none (any stated law is legal)."""
  check(enumeration.exact(rule, problems(), same_options=same))


@by_rule
@pytest.mark.parametrize('modes', [
    [POINT] * 3, [IID, POINT, IID], [POINT, IID, MATCH]], ids=str)
def test_fixed_and_mixed_drafts(rule, modes):
  """A deterministic slot stands for its one-hot law, whatever its row."""
  check(enumeration.exact(rule, problems(), modes=modes))


@by_rule
def test_drafts_cut_short(rule):
  """How much is drafted may depend on the tokens drafted so far."""
  check(enumeration.exact(rule, problems(cut=0.4)))


@by_rule
def test_larger_vocabulary(rule):
  """V = 4, N = 2, sharper laws with zeros in draft and target."""
  check(enumeration.exact(
      rule, problems(depth=2, vocab=4, scale=3.0)))


@pytest.mark.parametrize('modes', [[IID] * 3, [POINT, IID, MATCH]], ids=str)
def test_match(modes):
  """Sample-and-match needs no law, and cuts change nothing."""
  check(enumeration.exact_match(Match(), problems(cut=0.3), modes=modes))


A, B, C = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [1 / 3, 2 / 3]
NUMBERS = [
    (Speculative(), A, B, (0.7, 1.19, 1.533, 1.7731)),
    (Block(), A, B, (0.7, 1.25, 1.695, 2.0635)),
    (Speculative(), C, C[::-1], (None, 10 / 9)),
    (Block(), C, C[::-1], (None, 11 / 9)),
    (Speculative(), [.1, .2, .3, .4], [.4, .3, .2, .1], (0.6,)),
    (Speculative(), [.5, .25, .15, .1], [.3, .4, .2, .1], (0.8,)),
]


@pytest.mark.parametrize('rule,p,q,lengths', NUMBERS)
def test_expected_acceptance(rule, p, q, lengths):
  """Published and derived figures; Sun et al. 2025 for the second pair."""
  for depth, want in enumerate(lengths, 1):
    if want is None:
      continue
    found = enumeration.exact(
        rule, enumeration.context_free(p, q, depth, NUM if depth == 3 else 1))
    check(found)
    np.testing.assert_allclose(found.num_accepted, want, atol=1e-5)


def test_hazards_of_the_published_example():
  """The four drafts of the two-token example, accept test by accept test."""
  made = enumeration.build(enumeration.context_free(C, C[::-1], 2))

  @jax.jit
  def both(draft, scores):
    log_w = block_lib._log_weights(draft, scores)
    last = jnp.full(4, 2)
    return log_w, block_lib._hazards(draft, scores.target_law, log_w, last)

  log_w, h = both(made.draft, made.scores)
  np.testing.assert_allclose(
      jnp.exp(log_w), [[.5, .25], [.5, 1], [1, .5], [1, 1]], atol=1e-6)
  np.testing.assert_allclose(h, [[0, .25], [0, 1], [1, .5], [1, 1]], atol=1e-6)


def test_block_accepts_no_less_than_speculative():
  """Never below token-wise tests, problem by problem."""
  made = problems(PLAIN)
  block, token = (enumeration.exact(r, made).num_accepted
                  for r in (Block(), Speculative()))
  assert (block >= token - 1e-6).all()
  assert (block > token + 1e-3).any()


@by_rule
def test_degenerate_laws(rule):
  """p = q accepts all; disjoint supports accept nothing and emit p."""
  same = enumeration.exact(rule, enumeration.context_free(A, A, 3, NUM))
  check(same)
  np.testing.assert_allclose(same.num_accepted, 3, atol=1e-5)
  apart = enumeration.exact(
      rule, enumeration.context_free([1, 0, 0], [0, .5, .5], 3, NUM))
  check(apart)
  assert (apart.num_accepted == 0).all()
  sure = enumeration.exact(rule, enumeration.context_free([0, 1, 0], A, 3, NUM))
  check(sure)


def test_rows_that_forbid_everything_are_never_reached():
  """Behind an excluded draft a law may be no law (NaN): block stops before.

  A mask that allows nothing there must not make the draft acceptable.
  """
  made = enumeration.build(enumeration.context_free([.5, .5, 0], A, 2))
  logits = np.array(made.scores.target_law.logits)
  logits[np.asarray(made.draft.tokens)[:, 0] == 2, 1:] = -np.inf
  scores = made.scores.replace(target_law=law_lib.Categorical(logits))
  for rule in RULES:
    _, count, last = enumeration.decide(
        rule, made.context, made.draft, scores,
        np.zeros((9, 2), np.float32), 1)
    first = np.asarray(made.draft.tokens)[:, 0]
    np.testing.assert_array_equal(np.asarray(count)[first == 2], 0)
    np.testing.assert_array_equal(np.asarray(last)[:, 2], 0)


# Planted faults: what public implementations got wrong.


@dataclasses.dataclass(frozen=True)
class AcceptsAtEquality(Speculative):
  """u <= p / q: at u = 0 a forbidden token passes."""

  def verify(self, params, context, draft, scores):
    law = scores.target_law
    p = jnp.exp(chains.target_log_prob(draft, scores))
    q = jnp.exp(chains.draft_log_prob(draft))
    u = keys.uniform(None, draft.topology.num_nodes)
    count = chains.num_accepted(u * q <= p, draft.valid)
    token, _ = speculative_lib._correct(context, draft, law, count)
    return chains.verdict(draft, count, token)


@dataclasses.dataclass(frozen=True)
class Redrawn(Speculative):
  """Replaces how the token after the accepted prefix is drawn."""

  fault: str = ''

  def verify(self, params, context, draft, scores):
    law = scores.target_law
    count = Speculative.verify(
        self, params, context, draft, scores).num_accepted
    rejected = chains.cut_or_rejected(draft, count)
    row, slot = count, count
    if self.fault == 'no residual':
      rejected = jnp.zeros_like(rejected)
    elif self.fault == 'residual of the wrong row':
      row = jnp.where(rejected, row + 1, row)
    elif self.fault == 'residual of the wrong draft':
      slot = jnp.maximum(slot - 1, 0)
    elif self.fault == 'bonus from the wrong row':
      row = jnp.where(rejected, row, row - 1)
    token, _ = law.at(row).residual(
        chains.draft_law_at(draft, slot, law.vocab_size), context.keys,
        rejected)
    return chains.verdict(draft, count, token)


@dataclasses.dataclass(frozen=True)
class PrefixBlock(Block):
  """The longest passing prefix instead of the last passing index."""

  def verify(self, params, context, draft, scores):
    law, num = scores.target_law, draft.topology.num_nodes
    log_w = block_lib._log_weights(draft, scores)
    last = jnp.sum(draft.valid, axis=1)
    h = block_lib._hazards(draft, law, log_w, last)
    u = keys.uniform(None, num)
    count = chains.num_accepted(u < h, draft.valid)
    scale = jnp.exp(jnp.take_along_axis(
        jnp.pad(log_w, ((0, 0), (1, 0))), count[:, None], axis=1))[:, 0]
    token, _ = law.at(count).residual(
        law_lib.at_slot(draft, count, law.vocab_size), context.keys,
        count < last, scale)
    return chains.verdict(draft, count, token)


def test_the_checker_sees_nothing_wrong_in_an_equal_rewrite():
  """`Redrawn` without a fault is the rule: what follows is not its doing."""
  check(enumeration.exact(Redrawn(), problems(PLAIN)))


@pytest.mark.parametrize('fault', [
    'no residual', 'residual of the wrong row', 'residual of the wrong draft',
    'bonus from the wrong row'])
def test_fault_in_the_last_token_is_caught(fault):
  assert enumeration.exact(Redrawn(fault), problems(PLAIN)).error > WRONG


def test_fault_prefix_of_block_is_caught():
  assert enumeration.exact(PrefixBlock(), problems(PLAIN)).error > WRONG


def test_fault_acceptance_at_equality_is_caught():
  """The law is off by 2^-23 only; the support gives it away."""
  made = enumeration.context_free([.5, .5, 0], A, 2)
  assert enumeration.exact(AcceptsAtEquality(), made).forbidden
  assert not enumeration.exact(Speculative(), made).forbidden


@by_rule
def test_fault_soft_law_of_argmax_drafts_is_caught(rule):
  """Deterministic tokens that claim to be drawn from the softmax."""
  found = enumeration.exact(
      rule, problems(PLAIN), modes=[POINT] * 3, claimed=[IID] * 3)
  assert found.error > WRONG


@by_rule
def test_fault_filter_before_temperature_is_caught(rule):
  """Top-p of the untempered law on the target's side only."""
  columns = {'temperature': np.resize([0.5, 2.0, 0.6, 1.5], NUM),
             'top_p': np.full(NUM, 0.7)}

  def score(context, logits, history):
    p = pipeline.top_p(logits, context.options.top_p[:, None])
    return law_lib.Categorical(
        p / context.options.temperature[:, None, None])

  assert enumeration.exact(rule, problems(columns), score=score).error > WRONG
  check(enumeration.exact(rule, problems(columns)))


@by_rule
def test_fault_penalties_that_miss_the_drafts_is_caught(rule):
  """The prefix alone is not what a plain sampler would have seen."""
  columns = {'temperature': np.ones(NUM), 'presence_penalty': np.ones(NUM)}

  def score(context, logits, history):
    return pipeline.law(context, logits, jnp.full_like(history, -1))

  assert enumeration.exact(rule, problems(columns), score=score).error > WRONG
