"""Invariants of the loop, on toys: what rounds may and may not change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import toys
from specjax.core import control, loop
from specjax.core.automaton import Automaton
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters import Adaptive, ChainLM, InputGuided, Lookup, Null
from specjax.verify import Block, Greedy, Match, Speculative

VOCAB, SIZE, NUM, BATCH = 6, 36, 3, 12
LM = toys.ToyLM(VOCAB)
SMALL = ChainLM(num_speculative_tokens=NUM, model=LM)
RULES = toys.ByRow((Greedy(), Match(), Block()))
MAIN = Engine(LM, SMALL, RULES)
# A spoilt copy of the target: every draft position is both kept and lost.
TARGET = toys.table(0, VOCAB)
PARAMS = Models(
    target={'table': jnp.asarray(TARGET)},
    drafter={'table': jnp.asarray(TARGET + toys.table(1, VOCAB, 0.5))})
PROMPTS = [[1], [2, 0, 5], [3, 3], [4, 1, 0, 2, 5]] * (BATCH // 4)
RUN, ADMIT = loop.compiled()


def make_context(
    prompts=None, seed=0, eos=-1, new=20, rule=None, temperature=1.0,
):
  """Returns a context; its structure is always the same."""
  options = toys.sampled(BATCH, temperature=temperature).replace(
      eos=jnp.full((BATCH, 2), eos, jnp.int32))
  rule = np.arange(BATCH) // 4 if rule is None else np.full(BATCH, rule)
  made = toys.context(
      prompts or PROMPTS, size=SIZE, seed=seed, options=options,
      condition={'rule': jnp.asarray(rule, jnp.int32)})
  limit = jnp.minimum(made.length + jnp.asarray(new, jnp.int32), SIZE)
  return made.replace(limit=jnp.broadcast_to(limit, (BATCH,)))


def begin(engine, context, params=PARAMS):
  copy = lambda: jax.tree.map(jnp.array, context)  # noqa: E731  (donated)
  state = loop.empty(engine, copy())
  return ADMIT(engine, params, state, ~copy().done, copy(), chunk=4)


def finish(engine, context, params=PARAMS):
  state = RUN(engine, params, begin(engine, context, params), np.int32(99))
  assert np.asarray(state.context.done).all()
  return state


def texts(state) -> list[list[int]]:
  tokens, length = (np.asarray(x) for x in (
      state.context.tokens, state.context.length))
  return [list(t[:n]) for t, n in zip(tokens, length)]


def same(a, b, rows=slice(None)) -> None:
  """Compares all leaves that lead with the batch, bit for bit."""
  def plain(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    return np.asarray(x)[rows]
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(plain(x), plain(y)),
               a, b)


def greedy_text(prompt, new: int, eos=()) -> list[int]:
  """Plain greedy decoding in numpy."""
  text = list(prompt)
  for _ in range(new):
    before = text[-2] if len(text) > 1 else 0
    text.append(int(TARGET[before, text[-1]].argmax()))
    if text[-1] in eos:
      break
  return text


OTHERS = {
    'plain': Null(0), 'padded': Null(NUM), 'longer': Lookup(NUM + 2),
    'input guided': InputGuided(NUM),
    'widths': Adaptive(Lookup(NUM), control.Heuristic(1), exact_shape=False,
                       widths=(0, 1)),
}
# Cheaper to compile: no residuals, no model in the drafter.
COUPLED = toys.ByRow((Greedy(), Match()))
LOOKUP = Engine(LM, Lookup(NUM), COUPLED)


def test_every_draft_position_is_kept_and_lost():
  """What the comparisons below stand on: all outcomes occur, in each rule."""
  state = finish(MAIN, make_context())
  histogram = np.asarray(state.metrics.histogram).reshape(3, 4, -1).sum(1)
  assert (histogram > 0).all(), histogram


@pytest.mark.parametrize('name', OTHERS)
def test_greedy_and_match_ignore_the_drafter(name):
  """Any drafter and any K: the text of plain decoding, with its noise."""
  want = finish(MAIN, make_context())
  got = finish(LOOKUP._replace(drafter=OTHERS[name]), make_context())
  assert texts(want)[:8] == texts(got)[:8]
  for prompt, text in zip(PROMPTS[:4], texts(got)):
    assert text == greedy_text(prompt, 20)


def test_committed_text_is_never_rewritten_and_finished_rows_are_frozen():
  """Round by round; rows finish at different times, by limit and by EOS."""
  context = make_context(eos=2, new=np.arange(BATCH) + 3)
  state = begin(MAIN, context)
  before = jax.tree.map(np.asarray, (texts(state), state.context.done,
                                     state.metrics, state.context.rounds))
  unequal_finish = 0
  for _ in range(40):
    state = RUN(MAIN, PARAMS, state, np.int32(1))
    now = jax.tree.map(np.asarray, (texts(state), state.context.done,
                                    state.metrics, state.context.rounds))
    for old, new, done in zip(before[0], now[0], before[1]):
      assert new[:len(old)] == old
      assert not done or len(new) == len(old)
      assert done or len(new) > len(old)
    same(before[2:], now[2:], np.flatnonzero(before[1]))
    unequal_finish += 0 < now[1].sum() < BATCH
    before = now
  assert before[1].all() and unequal_finish > 1


@pytest.mark.parametrize('eos', [-1, 2])
def test_end_and_limit_inside_a_block(eos):
  """Nothing after them; the counts say what was emitted.

  The drafter is the target, all is greedy: blocks are as long as can be.
  """
  params = Models(target=PARAMS.target, drafter=PARAMS.target)
  new = np.arange(BATCH) + 1
  context = make_context([[4, 1]] * BATCH, eos=eos, new=new, temperature=0.0)
  state = finish(MAIN, context, params)
  stale = np.asarray(state.context.tokens)
  for b, text in enumerate(texts(state)):
    assert text == greedy_text([4, 1], new[b], {eos})
    assert (stale[b, len(text):] == 0).all()
    made = len(text) - 2
    # Full blocks, and a last one cut where the text ends.
    assert state.context.rounds[b] == -(-made // (NUM + 1))
    histogram = np.asarray(state.metrics.histogram)[b]
    assert histogram.sum() == state.context.rounds[b]
    counted = (histogram * np.arange(1, NUM + 2)).sum()
    assert counted - made == (0 if made % (NUM + 1) == 0 else 1)
    assert state.metrics.accepted[b].sum() == counted - histogram.sum()
  assert (eos < 0) or any(t[-1] == eos for t in texts(state))


def test_rows_do_not_see_their_neighbours():
  """Other prompts, seeds and slots around a row; or nobody. Bitwise."""
  base = make_context()
  want = texts(finish(MAIN, base))
  order = np.random.default_rng(0).permutation(BATCH)
  moved = texts(finish(MAIN, jax.tree.map(lambda x: x[order], base)))
  assert [want[i] for i in order] == moved
  other = make_context([[5, 5, 5, 5]] * BATCH, seed=9, eos=3, new=7)
  rows = jnp.arange(BATCH) % 5 == 1
  mixed = loop.types.select_rows(rows, base, other)
  alone = mixed.replace(done=~rows)
  for context in (mixed, alone):
    got = texts(finish(MAIN, context))
    for b in np.flatnonzero(np.asarray(rows)):
      assert got[b] == want[b]


def test_chunks_of_rounds_equal_one_go():
  """Streaming changes nothing, also not the counters."""
  want = finish(MAIN, make_context())
  state = begin(MAIN, make_context())
  for num in (0, 1, 3, 2, 99):
    state = RUN(MAIN, PARAMS, state, np.int32(num))
  same(want, state)


def test_python_loop_equals_the_compiled_one(monkeypatch):
  """A loop that can be stepped through computes the same."""
  want = finish(LOOKUP, make_context())
  monkeypatch.setattr(loop, 'step', jax.jit(loop.step, static_argnums=0))
  got = loop.run(LOOKUP, PARAMS, begin(LOOKUP, make_context()), 99,
                 loop_fn=loop.python_loop)
  same(want, got)


def test_admission_leaves_other_rows_alone():
  """A slot is refilled in the middle of its neighbours' texts."""
  want = texts(finish(MAIN, make_context()))
  state = RUN(MAIN, PARAMS, begin(MAIN, make_context()), np.int32(2))
  before = jax.tree.map(np.asarray, state.replace(
      context=state.context.replace(keys=jnp.zeros(BATCH))))
  fresh = make_context([[2, 4, 1, 1, 3, 0]] * BATCH, seed=5)
  rows = jnp.arange(BATCH) == 5
  state = ADMIT(MAIN, PARAMS, state, rows, fresh, chunk=4)
  others = np.flatnonzero(~np.asarray(rows))
  same(before, state.replace(
      context=state.context.replace(keys=jnp.zeros(BATCH))), others)
  got = texts(RUN(MAIN, PARAMS, state, np.int32(99)))
  alone = texts(finish(MAIN, make_context(
      [[2, 4, 1, 1, 3, 0]] * BATCH, seed=5)))
  for b in range(BATCH):
    assert got[b] == (alone if b == 5 else want)[b]


TRACES = []


@dataclasses.dataclass(frozen=True)
class Counting(toys.ToyLM):
  """Says when it is traced."""

  def score(self, *args):
    TRACES.append(self)
    return super().score(*args)


def test_equal_engines_trace_once():
  """Equal configurations, other numbers: nothing is traced again."""
  def engine():
    return Engine(Counting(VOCAB), Lookup(NUM), Match())
  finish(engine(), make_context())
  assert len(TRACES) == 1
  state = begin(engine(), make_context(seed=3, new=5, eos=1))
  RUN(engine(), PARAMS, state, np.int32(2))
  assert len(TRACES) == 1
  assert hash(engine()) == hash(engine())


def test_nan_stops_its_row_only():
  """The row stays as it was, and says in which round it happened."""
  table = TARGET.copy()
  table[5, 5, 1] = np.nan  # after two fives, which others never say
  table[:, :, 5] = -np.inf
  params = Models(target={'table': jnp.asarray(table)},
                  drafter={'table': jnp.asarray(np.nan_to_num(table))})
  prompts = [[5, 5] if b % 4 == 0 else [1, 2] for b in range(BATCH)]
  state = finish(MAIN, make_context(prompts), params)
  for b, text in enumerate(texts(state)):
    bad = b % 4 == 0
    assert state.metrics.bad_round[b] == (0 if bad else -1)
    assert len(text) == (2 if bad else 22)


def test_constraint_in_the_loop():
  """Text keeps to an automaton that the drafter knows nothing of."""
  table = np.full((2, 3, VOCAB), -1)
  table[0, 0, [1, 2]], table[0, 1, [3, 4]] = [1, 2], [0, 0]
  table[0, 2, 5], table[1, 0] = 0, 0  # the second forbids nothing
  which = np.arange(BATCH) % 2
  context = make_context()
  context = context.replace(options=context.options.replace(
      constraint=Automaton(
          table=jnp.asarray(table, jnp.int32), state=jnp.zeros(BATCH, int),
          which=jnp.asarray(which))))
  rules = toys.ByRow((Speculative(), Match(), Block()))
  state = finish(LOOKUP._replace(verifier=rules), context)
  for b in np.flatnonzero(which == 0):
    at = 0
    for token in texts(state)[b][len(PROMPTS[b]):]:
      at = table[0, at, token]
      assert at >= 0
    assert state.context.options.constraint.state[b] == at
  assert state.metrics.accepted.sum() > 0
