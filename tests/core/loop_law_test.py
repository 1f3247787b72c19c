"""The law of whole texts out of the compiled loop: G-tests, and their teeth.

Rows of four kinds (ragged prompts, own temperatures, filters, penalties, end
tokens and limits; one kind greedy) run in one batch, 24000 rows a rule. The
joint law of the first three new tokens is compared with the exact one. A
total variation of 0.04 in three kinds has noncentrality 4 n TV^2 = 115 at
some 150 degrees of freedom: seen with near certainty. Planted faults prove it.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_law
import pytest
from scipy import stats

from specjax.core import control, keys, loop
from specjax.core.keys import Purpose
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters import Adaptive, InputGuided, Lookup, Null, SmallLM
from specjax.verify import Block, Match, Speculative, chains
from specjax.verify import block as block_lib
import toys

VOCAB, END = 4, 4
ROWS = 24000  # of each rule, a quarter of each kind
PROMPTS = [[1], [0, 2, 0], [3, 1, 2, 3], [2, 2]]
COLUMNS = {
    'temperature': (1.0, 0.7, 1.4, 0.0), 'top_k': (0, 3, 0, 0),
    'top_p': (1.0, 1.0, 0.9, 1.0), 'min_p': (0.0, 0.0, 0.02, 0.0),
    'presence_penalty': (0.0, 0.6, 0.0, 0.5),
    'repetition_penalty': (1.0, 1.0, 1.2, 1.0)}
ALL, FEW = tuple(COLUMNS), ('temperature', 'presence_penalty')
EOS, NEW = [-1, -1, 3, -1], [3, 6, 5, 4]
# Bonferroni over the p-values of this file.
ALPHA = 1e-4 / 40

# A drafter that is often wrong: with a good one faults hide.
PARAMS = Models(target=toys.toy_params(0, VOCAB, 0.5),
                drafter=toys.toy_params(15, VOCAB, 1.5))
LM = toys.ToyLM(VOCAB)
SMALL = SmallLM(num_speculative_tokens=3, model=LM)
STOPS = dataclasses.replace(SMALL, confidence_threshold=0.5)
# Drafts, gives up, probes: with these prices rows go on and off.
ON_AND_OFF = control.Tracking(draft_cost=0.15, decay=0.6, probe_every=2)


def make_context(seed: int, num_rules: int = 1, names=FEW, rows: int = ROWS):
  total = rows * num_rules
  options = toys.sampled(total).replace(
      eos=jnp.asarray(np.resize(EOS, (total, 1)), jnp.int32),
      **{k: jnp.asarray(np.resize(COLUMNS[k], total),
                        jnp.int32 if k == 'top_k' else jnp.float32)
         for k in names})
  context = toys.context(
      PROMPTS * (total // len(PROMPTS)), size=10, seed=seed, options=options,
      condition={'rule': jnp.asarray(np.repeat(np.arange(num_rules), rows))})
  return context.replace(limit=context.length + np.resize(NEW, total))


@functools.partial(jax.jit, static_argnums=0)
def decode(engine, params, context):
  """Returns the final state; as `compiled`, in one program."""
  state = loop.empty(engine, context)
  rows = ~context.done
  state = loop.start(engine, params, state, rows, chunk=2)
  return loop.run(engine, params, state, jnp.int32(1000))


def first_three(state) -> np.ndarray:
  """Returns int[B, 3]; END stands for "nothing, the text is over"."""
  tokens = np.asarray(state.context.tokens)
  start = np.asarray(state.context.prompt_length)[:, None]
  where = start + np.arange(3)
  made = np.take_along_axis(tokens, where, axis=1)
  return np.where(where < np.asarray(state.context.length)[:, None],
                  made, END)


@functools.cache
def exact_laws(names) -> np.ndarray:
  """Returns f64[kinds, 5, 5, 5], the law of the first three new tokens."""
  table = np.asarray(PARAMS.target['table'])
  out = np.zeros((len(PROMPTS),) + (VOCAB + 1,) * 3)
  for kind, prompt in enumerate(PROMPTS):
    options = {k: COLUMNS[k][kind] for k in names}

    @functools.cache
    def after(made, kind=kind, prompt=tuple(prompt), options=options):
      if EOS[kind] in made or END in made:
        return np.eye(VOCAB + 1)[END]
      text = (0,) * (len(prompt) == 1) + prompt + made
      p = numpy_law.law(table[text[-2], text[-1]], prompt, made, **options)
      return np.append(p, 0)

    for triple in itertools.product(range(VOCAB + 1), repeat=3):
      out[kind][triple] = np.prod(
          [after(triple[:i])[triple[i]] for i in range(3)])
  return out


def g_test(made: np.ndarray, names=FEW) -> float:
  """Returns the p-value of three tokens a row against the exact laws."""
  statistic, freedom = 0.0, 0
  for kind, law in enumerate(exact_laws(names)):
    rows = made[kind::len(PROMPTS)]
    seen = np.zeros(law.shape)
    np.add.at(seen, tuple(rows.T), 1)
    want = law * len(rows)
    if seen[want == 0].any():
      return 0.0  # something impossible was said
    big = want >= 20
    small = (want > 0) & ~big
    seen = np.append(seen[big], seen[small].sum())
    want = np.append(want[big], want[small].sum())
    if want[-1] < 20:  # too little left over: into the largest cell
      at = np.argmax(want)
      seen[at] += seen[-1]
      want[at] += want[-1]
      seen, want = seen[:-1], want[:-1]
    hit = seen > 0
    statistic += 2 * (seen[hit] * np.log(seen[hit] / want[hit])).sum()
    freedom += len(want) - 1
  return float(stats.chi2.sf(statistic, freedom))


def neighbours(made: np.ndarray) -> float:
  """Returns the p-value of independence of rows of one kind side by side."""
  kinds = len(PROMPTS)
  a, b = made[0::2 * kinds, 0], made[kinds::2 * kinds, 0]
  table = np.zeros((VOCAB, VOCAB))
  np.add.at(table, (a, b), 1)
  return float(stats.chi2_contingency(table).pvalue)


# Planted faults.


@dataclasses.dataclass(frozen=True)
class StaleSlot(toys.ToyLM):
  """Does not store the pending token: a rejected draft stays in its slot."""

  def _put(self, cache, slot, tokens, fed):
    if tokens.shape[1] == SMALL.topology.num_nodes + 1:
      fed = fed.at[:, 0].set(False)
    return super()._put(cache, slot, tokens, fed)


@dataclasses.dataclass(frozen=True)
class DraftNoiseAgain(Speculative):
  """Draws the correction with the noise that drew the rejected draft."""

  def verify(self, params, context, draft, scores):
    law = scores.target_law
    count = Speculative.verify(
        self, params, context, draft, scores).num_accepted
    token, _ = law.at(count).residual(
        chains.draft_law_at(draft, count, VOCAB),
        keys.row(context, Purpose.DRAFT, count),
        chains.cut_or_rejected(draft, count))
    return chains.verdict(draft, count, token)


@dataclasses.dataclass(frozen=True)
class BlockByPosition(Block):
  """Keys accept tests by position: a rejected tail's noise is used again."""

  def verify(self, params, context, draft, scores):
    law, num = scores.target_law, draft.topology.num_nodes
    log_w = block_lib._log_weights(draft, scores)
    last = jnp.sum(draft.valid, axis=1)
    h = block_lib._hazards(draft, law, log_w, last)
    position = context.length[:, None] + jnp.arange(num)
    key = keys.position(context, position, Purpose.ACCEPT)
    u = keys.uniform(key.reshape(-1), 1).reshape(h.shape)
    count = jnp.max(
        jnp.where(u < h, jnp.arange(1, num + 1), 0), axis=1)
    scale = jnp.exp(jnp.take_along_axis(
        jnp.pad(log_w, ((0, 0), (1, 0))), count[:, None], axis=1))[:, 0]
    token, _ = law.at(count).residual(
        chains.draft_law_at(draft, count, VOCAB),
        keys.row(context, Purpose.RESIDUAL), count < last, scale)
    return chains.verdict(draft, count, token)


@dataclasses.dataclass(frozen=True)
class WrongPosition(Match):
  """Draws at the wrong position: texts depend on how they were cut."""

  def verify(self, params, context, draft, scores):
    stuck = context.replace(length=context.length // 2)
    return Match.verify(self, params, stuck, draft, scores)


RIGHT = (Speculative(), Block(), Match())
FAULTY = (DraftNoiseAgain(), BlockByPosition(), WrongPosition())


def run_case(drafter, rules, names=FEW, target=LM):
  """Decodes rows of each rule: {rule: (three tokens, rows)}, and the state."""
  engine = Engine(target=target, drafter=drafter, verifier=toys.ByRow(rules))
  state = decode(engine, PARAMS, make_context(1, len(rules), names))
  made = first_three(state)
  return [made[i * ROWS:(i + 1) * ROWS] for i in range(len(rules))], state


def check_counts(state, rules) -> None:
  """A case in which nothing is accepted or rejected would show nothing."""
  assert np.asarray(state.context.done).all()
  np.testing.assert_array_equal(
      np.asarray(state.metrics.histogram).sum(axis=1), state.context.rounds)
  for i in range(len(rules)):
    part = slice(i * ROWS, (i + 1) * ROWS)
    drafted = int(np.asarray(state.metrics.drafted)[part].sum())
    accepted = int(np.asarray(state.metrics.accepted)[part].sum())
    assert ROWS // 20 < accepted < drafted


def test_small_lm_under_all_rules_and_their_faults():
  """All filters and penalties; right rules pass, wrong ones do not."""
  made, state = run_case(SMALL, RIGHT + FAULTY, ALL)
  for rule, rows in zip(RIGHT, made):
    assert g_test(rows, ALL) > ALPHA, rule
    assert neighbours(rows) > ALPHA, rule
  for rule, rows in zip(FAULTY, made[len(RIGHT):]):
    assert g_test(rows, ALL) < ALPHA / 100, rule
  check_counts(state, RIGHT)


CASES = {
    'lookup': (Lookup(3, prompt_lookup_max=2), (Speculative(), Match())),
    'input guided': (InputGuided(2), (Speculative(), Match())),
    'stop and heuristic': (
        Adaptive(STOPS, control.Heuristic(1)), (Speculative(), Block())),
    'confidence': (
        Adaptive(SMALL, control.Confidence()), (Speculative(), Block())),
    'off and on': (
        Adaptive(SMALL.resyncing(), ON_AND_OFF, exact_shape=False,
                 widths=(0, 1)), (Speculative(), Block())),
}


@pytest.mark.parametrize('case', CASES)
def test_law_with_other_drafters(case):
  """Every drafter under the rules that it can be used with."""
  drafter, rules = CASES[case]
  made, state = run_case(drafter, rules)
  for rule, rows in zip(rules, made):
    assert g_test(rows) > ALPHA, rule
    assert neighbours(rows) > ALPHA, rule
  check_counts(state, rules)


def test_plain_decoding_and_shared_keys():
  """No drafts, all options; and rows that share a key are found out."""
  engine = Engine(LM, Null(0), toys.ByRow((Match(), Block())))
  context = make_context(2, 2, ALL)
  made = first_three(decode(engine, PARAMS, context))
  for rows in (made[:ROWS], made[ROWS:]):
    assert g_test(rows, ALL) > ALPHA
    assert neighbours(rows) > ALPHA
  kinds, every = len(PROMPTS), np.arange(2 * ROWS)
  pair = every // (2 * kinds) * kinds + every % kinds
  shared = context.replace(keys=context.keys[pair])
  made = first_three(decode(engine, PARAMS, shared))
  assert neighbours(made[:ROWS]) < 1e-12


def test_fault_stale_target_slot_is_caught():
  """The pending token must overwrite the rejected draft in its slot."""
  made, _ = run_case(SMALL, (Speculative(), Block()), target=StaleSlot(VOCAB))
  for rows in made:
    assert g_test(rows) < 1e-12
