"""One pipeline makes all laws; here it meets a plain sampler in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import reference as numpy_law
from specjax.certificates import toys
from specjax.core import automaton, keys, pipeline
from specjax.core import law as law_lib
from specjax.core.types import Options

VOCAB, ROWS, DEPTH, BATCH = 9, 3, 2, 480
# Softmax of float32 logits of size 5, after divisions by 0.6.
CLOSE = dict(atol=3e-6, rtol=0)
EOS = (2, 5)
law = jax.jit(pipeline.law)

GRID = {
    'temperature': (0.0, 1e-6, 0.6, 1.0, 1.5), 'top_k': (0, 1, 2, 4, 99, -1),
    'top_p': (1.0, 0.9, 0.5, 0.05), 'min_p': (0.0, 0.1, 0.5, 1.0),
    'repetition_penalty': (1.0, 1.3, 0.7),
    'presence_penalty': (0.0, 0.5, -0.4),
    'frequency_penalty': (0.0, 0.25), 'min_new': (0, 2, 4)}


def random_rows(seed: int = 0):
  """Returns (prompts, outputs, history, logits, option columns, bias)."""
  rng = np.random.default_rng(seed)
  prompts = [list(rng.integers(0, VOCAB, rng.integers(1, 4)))
             for _ in range(BATCH)]
  outputs = [list(rng.integers(0, VOCAB, rng.integers(0, 4)))
             for _ in range(BATCH)]
  history = rng.integers(0, VOCAB, (BATCH, ROWS, DEPTH))
  for row in range(ROWS):  # a chain: row r has r drafted tokens before it
    history[:, row, row:] = -1
  logits = rng.normal(0, 1.6, (BATCH, ROWS, VOCAB)).astype(np.float32)
  # Every other row on a grid: ties everywhere, also at the thresholds.
  logits[::2] = np.round(2 * logits[::2]) / 2
  columns = {k: rng.choice(v, BATCH) for k, v in GRID.items()}
  bias = rng.choice([0.0, 0.0, 0.0, 1.0, -np.inf], (BATCH, VOCAB))
  bias[:, 7:] = 0.0  # something is always left
  return prompts, outputs, history, logits, columns, bias


def to_options(columns, bias=None, **kwargs) -> Options:
  whole = ('top_k', 'min_new')
  arrays = {k: jnp.asarray(v, jnp.int32 if k in whole else jnp.float32)
            for k, v in columns.items()}
  if bias is not None:
    arrays['bias'] = jnp.asarray(bias, jnp.float32)
  eos = jnp.asarray([EOS + (-1,)] * BATCH, jnp.int32)
  return Options(eos=eos, **arrays, **kwargs)


def to_context(prompts, outputs, options):
  made = toys.context(
      [p + o for p, o in zip(prompts, outputs)], size=8, options=options)
  stale = jnp.arange(8) >= made.length[:, None]
  return made.replace(  # stale slots are not history
      tokens=jnp.where(stale, VOCAB - 1, made.tokens),
      prompt_length=jnp.asarray([len(p) for p in prompts], jnp.int32))


def expected(rows, row: int, use_bias: bool = True) -> np.ndarray:
  prompts, outputs, history, logits, columns, bias = rows
  out = [numpy_law.law(
      logits[row, r], prompts[row],
      outputs[row] + [t for t in history[row, r] if t >= 0],
      bias=bias[row] if use_bias else None, eos=EOS,
      **{k: v[row] for k, v in columns.items()}) for r in range(ROWS)]
  return np.stack(out)


def test_all_options_together_against_numpy():
  """Every stage, in the stated order, rows of all kinds in one batch."""
  rows = random_rows()
  prompts, outputs, history, logits, columns, bias = rows
  context = to_context(prompts, outputs, to_options(columns, bias))
  got = np.asarray(law(context, logits, jnp.asarray(history)).probs)
  for row in range(BATCH):
    want = expected(rows, row)
    np.testing.assert_allclose(got[row], want, **CLOSE, err_msg=str(row))
    np.testing.assert_array_equal(got[row] > 0, want > 1e-12)


@pytest.mark.parametrize('stage', sorted(GRID))
def test_each_option_alone_against_numpy(stage):
  """A stage that is compiled alone does what it does among others."""
  rows = random_rows(1)
  prompts, outputs, history, logits, columns, _ = rows
  alone = {k: columns[k] for k in {'temperature', stage}}
  context = to_context(prompts, outputs, to_options(alone))
  got = np.asarray(law(context, logits, jnp.asarray(history)).probs)
  rows = (*rows[:4], alone, rows[5])
  for row in range(0, BATCH, 2):
    np.testing.assert_allclose(
        got[row], expected(rows, row, False), **CLOSE, err_msg=str(row))


def test_neutral_values_are_exactly_off():
  """top_p = 1, top_k = 0, ...: bit for bit as if the stage were absent."""
  prompts, outputs, history, logits, columns, _ = random_rows(2)
  temperature = {'temperature': columns['temperature']}
  neutral = {k: np.full(BATCH, v) for k, v in numpy_law.NEUTRAL.items()
             if k != 'temperature'}
  plain = to_context(prompts, outputs, to_options(temperature))
  full = to_context(prompts, outputs, to_options(
      {**temperature, **neutral}, np.zeros((BATCH, VOCAB))))
  history = jnp.asarray(history)
  np.testing.assert_array_equal(
      law(plain, logits, history).logits, law(full, logits, history).logits)


def test_all_greedy_is_a_point_with_the_same_token():
  """Without temperatures: the argmax after penalties and bans, lowest id."""
  rows = random_rows(3)
  prompts, outputs, history, logits, columns, bias = rows
  keep = {k: v for k, v in columns.items() if 'penalty' in k or k == 'min_new'}
  context = to_context(prompts, outputs, to_options(keep, bias))
  got = law(context, logits, jnp.asarray(history))
  assert isinstance(got, law_lib.Point)
  rows = (*rows[:4], keep, bias)
  for row in range(BATCH):
    want = expected(rows, row).argmax(axis=-1)
    np.testing.assert_array_equal(got.value[row], want)


@pytest.mark.parametrize('zero', [0.0, -0.0])
def test_ties_are_kept(zero):
  """No rank among equals: minus zero equals zero, too."""
  logits = jnp.asarray([[[0.0, zero, -1.0, 0.0, -2.0]]])
  for kept in (pipeline.top_k(logits, jnp.asarray([[1]])),
               pipeline.top_k(logits, jnp.asarray([[2]])),
               pipeline.top_p(logits, jnp.asarray([[0.2]])),
               pipeline.top_p(logits, jnp.asarray([[0.5]]))):
    np.testing.assert_array_equal(
        np.isfinite(kept[0, 0]), [True, True, False, True, False])


def test_top_p_with_rounding_keeps_at_least_one_and_its_mass():
  """The kept set has the mass asked for, at a vocabulary of real size."""
  logits = jax.random.normal(jax.random.key(0), (4, 2, 20011)) * 3
  p = jnp.asarray([[1e-6, 0.3], [0.9, 0.95], [0.999, 1 - 1e-6], [1.0, 1.0]])
  kept = np.asarray(pipeline.top_p(logits, p), np.float64)
  full = numpy_law.softmax(np.asarray(logits, np.float64))
  mass = np.where(np.isfinite(kept), full, 0).sum(-1)
  # Sums of 20011 float32 weights.
  assert (mass >= np.asarray(p) - 2e-6).all()
  least = np.where(np.isfinite(kept), full, 2).min(-1)
  assert (mass - least < np.asarray(p) + 2e-6).all()
  assert np.isfinite(kept[3]).all()


def test_banned_tokens_are_never_drawn():
  """A bias of -inf, and what top-k left out, have no noise that lifts them."""
  logits = jnp.asarray(np.tile([9.0, 1.0, 0.0, -1.0], (2000, 1, 1)))
  options = toys.sampled(2000, temperature=1.5).replace(
      bias=jnp.asarray([[-jnp.inf, 0, 0, 0]] * 2000))
  context = toys.context([[1]] * 2000, options=options)
  row = jnp.full((2000, 1, 1), -1)
  made = law(context, logits, row).at(jnp.zeros(2000, jnp.int32))
  drawn = np.asarray(made.sample(context.keys))
  assert set(drawn) == {1, 2, 3}
  # Log-probabilities agree with what is drawn.
  assert np.exp(made.log_prob(jnp.zeros(2000, jnp.int32))).max() == 0


def test_constraint_hook():
  """An automaton masks every row after its own drafted prefix."""
  table = np.full((2, 3, 4), -1)
  table[0, 0, [0, 1]] = [0, 1]  # any number of 0, then 1, then 2s and 3s
  table[0, 1, 2], table[0, 2, [2, 3]] = 2, [2, 2]
  table[1, :, 3] = 0
  automaton.check(table)
  made = automaton.Automaton(
      table=jnp.asarray(table), which=jnp.asarray([0, 0, 1]),
      state=jnp.asarray([0, 1, 0]))
  history = jnp.asarray([
      [[-1, -1], [1, -1], [1, 2], [3, -1]],
      [[-1, -1], [2, -1], [2, 3], [0, -1]],
      [[-1, -1], [3, -1], [3, 3], [0, 0]]])
  want = [[{0, 1}, {2}, {2, 3}, {0, 1, 2, 3}],
          [{2}, {2, 3}, {2, 3}, {0, 1, 2, 3}],
          [{3}, {3}, {3}, {0, 1, 2, 3}]]
  options = toys.sampled(3).replace(constraint=made)
  context = toys.context([[0]] * 3, options=options)
  probs = np.asarray(pipeline.law(
      context, jnp.zeros((3, 4, 4)), history).probs)
  for b, r in np.ndindex(3, 4):
    assert set(np.flatnonzero(probs[b, r])) == want[b][r], (b, r)
  later = made.advance(jnp.asarray([[0, 1, 2]] * 3), jnp.asarray([2, 0, 1]))
  np.testing.assert_array_equal(later.state, [1, 1, -1])
  mixed = later.admit(jnp.asarray([True, False, False]), made)
  np.testing.assert_array_equal(mixed.state, [0, 1, -1])


@pytest.mark.parametrize('bad', [
    np.zeros((2, 2), int), np.full((1, 2, 3), 2), np.full((1, 2, 3), -2),
    np.array([[[1, -1], [-1, -1]]])])
def test_bad_automata_raise(bad):
  with pytest.raises(ValueError, match='table|states|allows no token'):
    automaton.check(bad)


def test_finite_sees_nan_and_nothing_left():
  """-inf is a ban; NaN, +inf and a row of nothing but -inf are faults."""
  rows = np.zeros((1, 5, 3), np.float32)
  rows[0, 1, 1] = -np.inf
  rows[0, 2, 1] = np.nan
  rows[0, 3, 1] = np.inf
  rows[0, 4] = -np.inf
  got = pipeline.finite(jnp.asarray(rows))
  np.testing.assert_array_equal(got[0], [True, True, False, False, False])


def test_row_alone_equals_row_in_a_batch():
  """Per-row options do not leak to neighbours (bitwise)."""
  prompts, outputs, history, logits, columns, bias = random_rows(4)
  context = to_context(prompts, outputs, to_options(columns, bias))
  history, logits = jnp.asarray(history), jnp.asarray(logits)
  order = np.random.default_rng(0).permutation(BATCH)
  shuffled = jax.tree.map(lambda x: x[order], context)
  np.testing.assert_array_equal(
      law(context, logits, history).logits[order],
      law(shuffled, logits[order], history[order]).logits)
  noise = keys.gumbel(context.keys, 3)
  np.testing.assert_array_equal(
      noise[order], keys.gumbel(context.keys[order], 3))
