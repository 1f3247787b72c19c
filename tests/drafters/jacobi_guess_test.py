"""Jacobi windows: what is guessed, bad values, and how they are named."""

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import toys
from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import IID, MATCH, POINT, Models
from specjax.drafters import Jacobi
from specjax.drafters.jacobi import MOST_ENTRIES
from specjax.host import methods
from specjax.verify import Match, Speculative

LM = toys.ToyLM(5)


def window(drafter, context, held: int, tokens=(7, 8, 9, 10)):
  """Returns what is proposed: tokens, modes."""
  num = len(context.length)
  state = loop.empty(Engine(LM, drafter, Speculative()), context)
  state = state.replace(drafter={
      **state.drafter, 'held': jnp.full((num,), held),
      'tokens': jnp.tile(jnp.asarray(tokens, jnp.int32), (num, 1))})
  draft, _ = drafter.propose(None, state)
  return np.asarray(draft.tokens), np.asarray(draft.mode)


IMAGE = [[16, 1, 2, 3, 4, 5]]  # a start token and five codes


def image(**kwargs):
  """Returns a row behind a prompt of one token."""
  context = toys.context(IMAGE, options=toys.sampled(1), **kwargs)
  return context.replace(prompt_length=jnp.ones(1, jnp.int32))


@pytest.mark.parametrize('guess,width,held,want', [
    ('repeat', None, 0, [5, 5, 5, 5]), ('repeat', None, 2, [7, 8, 8, 8]),
    # Rows of three: 1 2 3 / 4 5 . / . . .
    ('raster', 3, 0, [3, 4, 5, 3]), ('raster', 3, 1, [7, 4, 5, 7]),
    ('raster', 1, 0, [5, 5, 5, 5]), ('raster', 2, 3, [7, 8, 9, 8]),
    # The first row is not full yet: the token before.
    ('raster', 7, 0, [5, 5, 1, 2]), ('raster', 9, 1, [7, 7, 7, 7])], ids=str)
def test_guesses(guess, width, held, want):
  drafter = Jacobi(4, 16, guess, width)
  tokens, mode = window(drafter, image(), held)
  np.testing.assert_array_equal(tokens[0], want)
  np.testing.assert_array_equal(mode[0], [IID] * held + [POINT] * (4 - held))


def test_guess_behind_a_start_token_is_an_entry_of_the_vocabulary():
  context = toys.context([[16]], options=toys.sampled(1))
  for drafter in (Jacobi(4, 16, 'repeat'), Jacobi(4, 16, 'raster', 3)):
    assert window(drafter, context, 0)[0].max() == 15


def test_uniform_guesses():
  """All tokens alike; other rounds and rows have others."""
  num = 2048
  context = toys.context([[1]] * num, options=toys.sampled(num))
  drafter = Jacobi(4, 16, redraft='coupled')
  tokens, mode = window(drafter, context, 1)
  assert (tokens[:, 0] == 7).all()
  np.testing.assert_array_equal(mode[0], [IID] + [MATCH] * 3)
  for s in range(1, 4):
    got = np.bincount(tokens[:, s], minlength=16)
    assert ((got - num / 16)**2 / (num / 16)).sum() < 15 + 5 * np.sqrt(30)
  again, _ = window(drafter, context.replace(rounds=context.rounds + 1), 1)
  assert 0.02 < (again[:, 1:] == tokens[:, 1:]).mean() < 0.1


def test_nothing_is_drafted_behind_an_end_token():
  options = toys.sampled(1).replace(eos=jnp.asarray([[8]], jnp.int32))
  context = toys.context([[1]], options=options)
  drafter = Jacobi(4, 16, 'repeat')
  state = loop.empty(Engine(LM, drafter, Speculative()), context)
  state = state.replace(drafter={
      **state.drafter, 'held': jnp.full((1,), 3),
      'tokens': jnp.asarray([[7, 8, 9, 1]], jnp.int32)})
  draft, _ = drafter.propose(None, state)
  np.testing.assert_array_equal(draft.valid[0], [True, True, False, False])


@pytest.mark.parametrize('kwargs,match', [
    (dict(num_speculative_tokens=0), 'needs >= 1'),
    (dict(vocab_size=1), 'vocab_size=1'), (dict(guess='noise'), "'noise'"),
    (dict(redraft='keep'), "redraft='keep'"), (dict(guess='raster'), 'width'),
    (dict(width=3), 'width=3'), (dict(guess='raster', width=0), 'width=0')],
    ids=str)
def test_bad_values_raise(kwargs, match):
  with pytest.raises(ValueError, match=match):
    Jacobi(**{'num_speculative_tokens': 4, 'vocab_size': 8, **kwargs})


def test_laws_that_take_too_much_memory_are_refused():
  rows_that_fit = MOST_ENTRIES // (16 * 2**17)
  with pytest.raises(ValueError, match='2.0 GiB.*fewer rows'):
    Jacobi(16, 2**17).empty(rows_that_fit + 1, 8)


def test_another_vocabulary_is_refused():
  engine = Engine(LM, Jacobi(2, 6), Match())
  params = Models(target=toys.toy_params(3, 5))
  context = toys.context([[1]], options=toys.sampled(1))
  with pytest.raises(ValueError, match='vocab_size=6: the target scores 5'):
    loop.step(engine, params, loop.empty(engine, context))


class FakeModel:
  vocab_size = 16


def test_by_name():
  """The configuration's `init` is the drafter's `guess`."""
  drafter, params = methods.build(
      {'method': 'jacobi', 'num_speculative_tokens': 8, 'init': 'raster',
       'width': 4, 'redraft': 'coupled'}, FakeModel())
  assert params is None
  assert drafter == Jacobi(8, 16, 'raster', 4, 'coupled')
  assert methods.build({'method': 'jacobi'}, FakeModel())[0] == Jacobi(16, 16)
  with pytest.raises(ValueError, match='prefer'):
    methods.build({'method': 'jacobi', 'prefer': 'newest'}, FakeModel())
  with pytest.raises(ValueError, match='init=3'):
    methods.build({'method': 'jacobi', 'init': 3}, FakeModel())
