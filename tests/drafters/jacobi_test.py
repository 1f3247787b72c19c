"""Jacobi windows: the law of the text, greedy bits, what is kept and guessed.

The law of whole texts is certified on ragged rows with mixed options; here on
one program the window itself is looked at.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import one_step
import pytest
import toy_text

from specjax import Sampling, generate
from specjax.certificates import sampled, toys
from specjax.certificates.setting import Setting
from specjax.core import control, loop
from specjax.core import law as law_lib
from specjax.core.round import Engine
from specjax.core.types import Models, Scores
from specjax.drafters import Adaptive, Jacobi, Null
from specjax.host import methods
from specjax.host.generate import choose_rule
from specjax.verify import (
  Block,
  Greedy,
  Grouped,
  Match,
  Speculative,
  Traversal,
)

VOCAB, ROWS, WINDOW = 5, 64, 4
LM = toys.ToyLM(VOCAB)
PARAMS = Models(target=toys.toy_params(3, VOCAB, 1.0))
PROMPTS = [[1], [0, 2, 0], [3, 1, 2, 3], [2, 2]] * (ROWS // 4)
REDRAFTS = ('fresh', 'coupled')
by_redraft = pytest.mark.parametrize('redraft', REDRAFTS)


def jacobi(window: int = WINDOW, **kwargs) -> Jacobi:
  return Jacobi(window, VOCAB, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def decode(engine, params, context):
  state = loop.empty(engine, context)
  state = loop.start(engine, params, state, ~context.done, chunk=4)
  return loop.run(engine, params, state, jnp.int32(100))


def rows(options=None, **kwargs):
  return toys.context(PROMPTS, new=20, options=options, **kwargs)


@by_redraft
def test_greedy_text_is_that_of_plain_decoding(redraft):
  """Bit for bit at one block shape, in fewer rounds."""
  plain = decode(Engine(LM, Null(WINDOW), Greedy()), PARAMS, rows())
  for rule in (Greedy(), Speculative()):
    state = decode(
        Engine(LM, jacobi(redraft=redraft), rule), PARAMS, rows())
    np.testing.assert_array_equal(state.context.tokens, plain.context.tokens)
    assert (state.context.rounds <= plain.context.rounds).all()
    assert state.context.rounds.sum() < 0.9 * plain.context.rounds.sum()


@by_redraft
def test_greedy_rows_among_sampled_ones(redraft):
  """Every second row has temperature 0: the same text, in no more rounds."""
  options = toys.sampled(ROWS)
  options = options.replace(
      temperature=options.temperature.at[::2].set(0.0))
  plain = decode(Engine(LM, Null(WINDOW), Greedy()), PARAMS, rows())
  state = decode(Engine(LM, jacobi(redraft=redraft), Speculative()), PARAMS,
                 rows(options))
  np.testing.assert_array_equal(
      state.context.tokens[::2], plain.context.tokens[::2])
  assert (state.context.rounds[::2] <= plain.context.rounds[::2]).all()


def test_matched_text_does_not_depend_on_the_window():
  """Noise by position: any drafter says what plain sampling says."""
  options = toys.sampled(ROWS)
  plain = decode(Engine(LM, Null(WINDOW), Match()), PARAMS, rows(options))
  for drafter in (jacobi(), jacobi(redraft='coupled', guess='repeat')):
    state = decode(Engine(LM, drafter, Match()), PARAMS, rows(options))
    np.testing.assert_array_equal(state.context.tokens, plain.context.tokens)
    assert state.context.rounds.sum() < plain.context.rounds.sum()


@dataclasses.dataclass(frozen=True)
class Widths(control.Fixed):
  """A limit that goes round: 0, 1, ..., W, 0, ..."""

  def limit(self, state, context, width):
    return context.rounds % (width + 1)


SETTING = Setting(filters=False)


def certified(drafter, rule=None, seed: int = 0):
  program = sampled.Program(
      SETTING, SETTING.target, drafter, (rule or Speculative(),),
      SETTING.models())
  return sampled.certify(program, 0, 'text', seed=seed, batches=2)


@pytest.mark.parametrize('exact_shape', [True, False])
def test_law_of_texts_where_the_block_narrows(exact_shape):
  """Windows of 0 to 3, also in blocks of their own over one state."""
  drafter = Adaptive(
      Jacobi(3, SETTING.vocab_size, redraft='coupled'), Widths(),
      exact_shape=exact_shape, widths=(0, 1, 2))
  row = certified(drafter)
  assert row.passed, row
  assert row.accepted >= 0


def test_coupling_is_refused_where_the_rule_looks_ahead():
  """What a rejection says about the drafts behind it would bias them."""
  for rule in (Block(), Traversal()):
    with pytest.raises(ValueError, match='match drafts: .*use .*match'):
      drafter = jacobi(redraft='coupled')
      rule.check(drafter.topology, drafter.modes, VOCAB, None)
  Traversal().check(jacobi().topology, jacobi().modes, VOCAB, None)
  for redraft in REDRAFTS:
    rule = choose_rule('auto', jacobi(redraft=redraft), [])
    assert rule.name in ('speculative', 'greedy')


def first_round(redraft: str, scale: float, rule=None, num: int = 4096):
  """Returns a window before and after a round, and the verdict.

  All rows are in one place; only what they drew differs.
  """
  rule = rule or Speculative()
  drafter = Jacobi(WINDOW, 40, redraft=redraft)
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.normal(size=(WINDOW, 40)) * scale, jnp.float32)
  p = jnp.asarray(rng.normal(size=(WINDOW + 1, 40)) * scale, jnp.float32)
  context = toys.context([[1]] * num, options=toys.sampled(num))

  @jax.jit
  def step(context, p, q):
    law = law_lib.Categorical(jnp.broadcast_to(q, (num, WINDOW, 40)))
    x = law.sample(jax.random.split(jax.random.key(5), (num, WINDOW)))
    state = loop.empty(Engine(LM, drafter, Speculative()), context)
    state = state.replace(drafter={
        'tokens': x, 'logits': law.logits,
        'held': jnp.full((num,), WINDOW)})
    draft, state = drafter.propose(None, state)
    scores = Scores(target_law=law_lib.Categorical(
        jnp.broadcast_to(p, (num, WINDOW + 1, 40))))
    verdict = rule.verify(Models(target=None), context, draft, scores)
    return draft, verdict, drafter.sync(
        None, state, draft, scores, verdict).drafter

  draft, verdict, new = step(context, p, q)
  return np.asarray(q), np.asarray(p), draft, verdict, new


def deviations(p, verdict, new) -> list[float]:
  """Returns how far the new tokens are off `p`: by verdict and slot.

  In standard deviations of a chi-square statistic.
  """
  count = np.asarray(verdict.num_accepted)
  tokens, logits = np.asarray(new['tokens']), np.asarray(new['logits'])
  np.testing.assert_array_equal(new['held'], WINDOW - count)
  law, free, found = one_step.softmax(p), p.shape[1] - 1, []
  for j in range(WINDOW):
    here = count == j
    if here.sum() < 400:
      continue
    for s in range(WINDOW - j):
      np.testing.assert_array_equal(
          logits[here, s],
          np.broadcast_to(p[s + j + 1], (here.sum(), p.shape[1])))
      want = law[s + j + 1] * here.sum()
      got = np.bincount(tokens[here, s], minlength=len(want))
      found.append((((got - want)**2 / want).sum() - free)
                   / np.sqrt(2 * free))
  assert len(found) >= WINDOW
  return found


@pytest.mark.parametrize('redraft,rule', [
    ('fresh', Speculative()), ('coupled', Speculative()),
    ('fresh', Traversal()), ('coupled', Grouped(6))], ids=str)
def test_what_is_drawn_again_has_the_law_that_is_stated(redraft, rule):
  """At each place, whatever the verdict was."""
  _, p, _, verdict, new = first_round(redraft, 0.7, rule)
  assert max(deviations(p, verdict, new)) < 5


def test_why_coupling_is_refused_where_the_rule_looks_ahead():
  """A path is rejected for what stands at its end: that end is biased."""
  _, p, _, verdict, new = first_round('coupled', 0.7, Traversal(), 16384)
  assert max(deviations(p, verdict, new)) > 10


def test_coupling_keeps_tokens():
  """As many as it can: the overlap of the laws. Fresh ones: by chance."""
  share = {}
  for redraft in REDRAFTS:
    q, p, draft, verdict, new = first_round(redraft, 0.3)
    count = np.asarray(verdict.num_accepted)
    rest = count < WINDOW - 1
    old = np.take_along_axis(
        np.asarray(draft.tokens), np.minimum(count + 1, WINDOW - 1)[:, None],
        axis=1)[:, 0]
    share[redraft] = np.mean(
        (old == np.asarray(new['tokens'])[:, 0])[rest])
    overlap = np.minimum(one_step.softmax(p[:-1]), one_step.softmax(q))
    overlap = overlap.sum(axis=-1)[np.minimum(count + 1, WINDOW - 1)]
  assert share['coupled'] == pytest.approx(overlap[rest].mean(), abs=0.03)
  assert share['coupled'] > 0.7 and share['fresh'] < 0.1


def test_coupling_needs_fewer_rounds_on_a_flat_law():
  """Large flat laws: a token that changes spoils those behind it."""
  vocab = 64
  target = {'table': jnp.asarray(toys.table(1, vocab, 0.7))}
  taken = {}
  for redraft in REDRAFTS:
    state = decode(
        Engine(toys.ToyLM(vocab), Jacobi(16, vocab, redraft=redraft),
               Speculative()), Models(target=target),
        toys.context([[1]] * 128, size=80, new=60,
                     options=toys.sampled(128)))
    taken[redraft] = np.asarray(state.context.rounds).mean()
  assert taken['coupled'] < 0.85 * taken['fresh'] < 25


def test_refilled_slots():
  """An admitted row starts from guesses, and its neighbours go on."""
  engine = Engine(LM, jacobi(redraft='coupled'), Speculative())
  run, admit = loop.compiled()
  key = jax.random.split(jax.random.key(2), 3)

  def batch(order):
    return toys.context(
        [PROMPTS[i] for i in order], size=40, new=20,
        options=toys.sampled(2), keys=key[jnp.asarray(order)])

  def text(state, slot):
    stop = int(state.context.length[slot])
    return np.asarray(state.context.tokens)[slot, :stop].tolist()

  both = jnp.ones(2, bool)
  state = loop.empty(engine, batch([2, 1]))
  alone = run(engine, PARAMS, admit(
      engine, PARAMS, state, both, batch([2, 1]), chunk=4), jnp.int32(99))
  state = loop.empty(engine, batch([0, 1]))
  state = admit(engine, PARAMS, state, both, batch([0, 1]), chunk=4)
  state = run(engine, PARAMS, state, jnp.int32(4))
  assert int(state.drafter['held'][0]) > 0
  first = jnp.asarray([True, False])
  state = admit(engine, PARAMS, state, first, batch([2, 1]), chunk=4)
  np.testing.assert_array_equal(state.drafter['held'] > 0, [False, True])
  state = run(engine, PARAMS, state, jnp.int32(99))
  for slot in range(2):
    assert text(state, slot) == text(alone, slot)


def test_requests_of_the_public_function():
  """More requests than slots, sampled and greedy: neighbours change nothing."""
  model = toy_text.model()
  drafter, _ = methods.build(
      {'method': 'jacobi', 'num_speculative_tokens': 5, 'init': 'repeat',
       'redraft': 'coupled'}, model)
  prompts = ['a', 'bc', 'def', 'gh', 'i']
  options = [Sampling(temperature=0.5 * (i % 2), max_new_tokens=6 + 5 * i,
                      seed=i) for i in range(5)]
  few, many = (generate(model, drafter, prompts, options, batch_size=n,
                        capacity=64) for n in (2, 5))
  for one, other, prompt, option in zip(few, many, prompts, options):
    assert one.tokens == other.tokens and one.rounds == other.rounds
    assert len(one.tokens) == option.max_new_tokens or (
        one.finish_reason == 'eos')
    if option.temperature == 0:
      ids = model.tokenizer.encode(prompt)
      assert list(one.tokens) == toy_text.greedy(
          model, ids, len(one.tokens))
  assert sum(r.accepted.sum() for r in few) > 0
