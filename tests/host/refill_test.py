"""More requests than slots: rows come and go, texts stay what they are."""

import dataclasses

import compilations
import numpy as np
import pytest
import toy_text

from specjax import Prompt, Sampling, generate
from specjax.drafters import Lookup

MODEL = toy_text.model()
ENDS = toy_text.model(end=3.0)  # says so often
LOOKUP = Lookup(3, 2, 1)


def mixture(num: int, **kwargs):
  """Returns prompts and options of very different lengths, each seeded."""
  rng = np.random.default_rng(7)
  prompts = []
  for size in rng.integers(1, 20, num):
    start = rng.integers(0, 60, 2).tolist()  # and what lookup will copy
    prompts.append(start + toy_text.greedy(ENDS, start, size) + start)
  options = [
      Sampling(temperature=0.4 * (i % 3), max_new_tokens=1 + 7 * i % 23,
               seed=i, log_probs=True, **kwargs)
      for i in range(num)]
  return prompts, options


def decode(prompts, options, model=MODEL, **kwargs):
  kwargs = {'batch_size': 2, 'capacity': 128, 'verify': 'match', **kwargs}
  return generate(model, LOOKUP, prompts, options, **kwargs)


def assert_same(one, other, atol: float = 0.0) -> None:
  assert one.tokens == other.tokens and one.text == other.text
  assert one.finish_reason == other.finish_reason
  assert one.rounds == other.rounds
  np.testing.assert_array_equal(one.histogram, other.histogram)
  np.testing.assert_array_equal(one.accepted, other.accepted)
  for name, values in one.log_probs.items():
    np.testing.assert_allclose(
        values, other.log_probs[name], rtol=0, atol=atol)
    assert len(values) == len(one.tokens)


def test_slots_and_order_change_nothing():
  before = compilations.counts()
  prompts, options = mixture(9)
  few = decode(prompts, options, ENDS)
  # Which rows are admitted, how often, and how far a chunk runs are data.
  grown = compilations.counts() - before
  assert grown['jit(run)'] == grown['jit(admit)'] == 1
  order = np.random.default_rng(0).permutation(9)
  shuffled = decode([prompts[i] for i in order],
                    [options[i] for i in order], ENDS, rounds_per_chunk=2)
  for i, result in zip(order, shuffled):
    assert_same(few[i], result)
  many = decode(prompts, options, ENDS, batch_size=9)
  for one, other in zip(few, many):
    assert_same(one, other, atol=1e-5)  # sums in another order
  assert {r.finish_reason for r in few} == {'eos', 'length'}
  assert sum(r.accepted.sum() for r in few) > 0


def test_shares_of_useful_rows():
  prompts, options = mixture(9)
  prompts, options = [p[:2] for p in prompts[:6]], [
      dataclasses.replace(s, max_new_tokens=n, ignore_eos=True)
      for s, n in zip(options, (20, 4, 4, 4, 4, 4))]
  for each in (1, 16):
    results = decode(prompts, options, rounds_per_chunk=each)
    share = results.summary()['useful_row_share']
    assert 0 < share <= 1
    assert results.row_rounds == sum(r.rounds for r in results)
    # Looking after every round, the second slot is never idle for long.
    assert each > 1 or share > 0.8
  alone = decode(prompts[:1], options[:1])
  assert alone.slot_rounds == 2 * alone.row_rounds


def test_greedy_waves_with_stop_strings_turns_and_hooks():
  before = compilations.counts()
  ids = MODEL.tokenizer.encode('ab')
  answer = MODEL.tokenizer.decode(toy_text.greedy(MODEL, ids, 30))
  talk = Prompt(id='talk', turns=('hello', 'and then?', 'is that all?'))
  prompts = ['ab', talk, 'ab' + answer + 'ab', 'cd', 'ef', 'a', 'gh']
  options = [Sampling(max_new_tokens=30, stop=(answer[20:23],))] * 7
  pieces, seen, done = {}, [], []
  def on_text(request, piece):
    key = request.prompt_index, request.turn
    pieces[key] = pieces.get(key, '') + piece
  results = decode(
      prompts, options, verify='greedy', rounds_per_chunk=4, on_text=on_text,
      on_result=done.append, on_progress=seen.append, capacity=192)
  grown = compilations.counts() - before
  assert grown['jit(run)'] == grown['jit(admit)'] == 1
  assert results[0].text == answer[:answer.index(answer[20:23])]
  assert [r.request.turn for r in results if r.request.id[:4] == 'talk'] == [
      0, 1, 2]
  # A turn waits behind those that were there before it.
  finished = [r.request.id for r in done]
  assert finished.index('talk.1') > finished.index('3')
  assert len(results) == len(done) == 9 == seen[-1].num_done
  for r in results:
    key = r.request.prompt_index, r.request.turn
    assert pieces.get(key, '') == r.text
    assert list(r.tokens) == toy_text.greedy(
        MODEL, r.request.tokens, len(r.tokens))
    assert 0 < r.ttft_s <= r.wall_s <= results.wall_s
  for field in ('num_done', 'num_requests', 'new_tokens', 'row_rounds',
                'elapsed_s'):
    values = [getattr(p, field) for p in seen]
    assert values == sorted(values), field
  assert seen[-1].new_tokens == sum(len(r.tokens) for r in results)
  assert seen[-1].row_rounds == results.row_rounds
  # The same again compiles nothing at all, whatever is asked.
  before = compilations.counts()
  decode(prompts[::-1], Sampling(max_new_tokens=5), verify='greedy',
         rounds_per_chunk=3, capacity=192, on_text=on_text)
  assert compilations.counts() == before


def test_a_dialogue_that_outgrows_its_slot_ends_and_the_others_go_on():
  talk = Prompt(id='long', turns=('hello', 'x' * 80))
  with pytest.warns(UserWarning, match='long.1 .turn 2.*more than.*ends'):
    results = decode([talk, 'ab'], Sampling(max_new_tokens=30, seed=1),
                     verify='greedy', capacity=96)
  assert [r.request.id for r in results] == ['long', '1']
