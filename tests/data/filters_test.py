"""What is fit to learn from."""

import time

import numpy as np
import pytest

from specjax.data import filters
from specjax.data.filters import Filter, Limits
from specjax.data.store import Record


def record(answer, prompt=(1, 2), finished=False, index=0) -> Record:
  tokens = np.asarray([*prompt, *answer], np.int32)
  return Record(tokens, len(prompt), 0.0, finished, index)


def text(num: int, seed: int = 0, vocab: int = 50000) -> list[int]:
  return np.random.default_rng(seed).integers(0, vocab, num).tolist()


def test_held_out_is_a_share_of_the_prompts_and_stays():
  prompts = [text(5, seed) for seed in range(2000)]
  held = [filters.is_held_out(p, 0.1) for p in prompts]
  assert 150 < sum(held) < 250  # 200 expected, standard deviation 13
  assert held == [filters.is_held_out(np.asarray(p, np.int64), 0.1)
                  for p in prompts]
  more = [filters.is_held_out(p, 0.2) for p in prompts]
  assert all(m for h, m in zip(held, more) if h)  # none moves back
  other = [filters.is_held_out(p, 0.1, seed=1) for p in prompts]
  assert sum(a & b for a, b in zip(held, other)) < 50
  # A value of this function decides a split for ever.
  assert [i for i in range(40) if filters.is_held_out([i], 0.1)] == [
      1, 3, 5, 26, 28, 34]
  assert not filters.is_held_out([1], 0) and filters.is_held_out([1], 1)
  with pytest.raises(ValueError, match='share=1.5'):
    filters.is_held_out([1], 1.5)


def test_split_keeps_equal_prompts_together():
  records = [record(text(9, i), prompt=(i % 30,)) for i in range(300)]
  train, held = filters.split(records, 0.1)
  assert len(train) + len(held) == 300
  assert {r.tokens[0] for r in held} == {1, 3, 5, 26, 28}
  assert not {r.tokens[0] for r in held} & {r.tokens[0] for r in train}


@pytest.mark.parametrize('n', [1, 4, 8])
def test_ngrams_tell_apart_what_differs(n):
  tokens = np.asarray(text(300, vocab=3))
  hashes = filters.ngrams(tokens, n)
  grams = [tuple(tokens[i:i + n].tolist()) for i in range(301 - n)]
  assert len(hashes) == len(grams)
  pairs = set(zip(grams, hashes.tolist()))
  assert len(pairs) == len(set(grams)) == len(set(hashes.tolist()))
  share = 1 - len(set(grams)) / len(grams)
  assert filters.repeated_share(tokens, n) == pytest.approx(share)


def test_repeated_share_of_short_texts():
  assert filters.repeated_share(np.arange(3), 4) == 0
  assert filters.repeated_share(np.zeros(0, np.int32), 1) == 0
  assert filters.repeated_share(np.zeros(5, np.int32), 4) == 0.5


@pytest.mark.parametrize('period', [1, 2, 7, 64])
@pytest.mark.parametrize('rest', [0, 1, 5])
def test_trailing_loops(period, rest):
  loop = text(period, 1)
  before = text(30, 2)
  said = loop * 3 + loop[:rest % period]
  tokens = np.asarray(before + said, np.int32)
  assert filters.trailing_loop(tokens) == (30, period)
  assert filters.trailing_loop(tokens, repeats=4) is None
  assert filters.trailing_loop(np.asarray(said)) == (0, period)
  # One token short of three times, and a loop that was left.
  assert filters.trailing_loop(
      np.asarray(before + (loop * 3)[:-1])) is None or period == 1
  assert filters.trailing_loop(np.asarray(before + said + [9])) is None
  assert filters.trailing_loop(tokens, max_period=period - 1) is None


def test_trailing_loop_of_almost_nothing():
  for size in range(3):
    assert filters.trailing_loop(np.zeros(size, np.int32)) is None
  assert filters.trailing_loop(np.zeros(3, np.int32)) == (0, 1)
  assert filters.trailing_loop(np.zeros(9, np.int32), max_period=0) is None


def test_reasons_are_counted():
  good, loop = text(60), text(5, 1)
  block = text(24, 2)
  repeats = [x for i in range(8) for x in block + text(2, 10 + i)]
  records = [
      record(good),
      record(good, prompt=(3,)),  # the same answer to another question
      record(good[:40] + text(20, 3)),
      record(good[:31] + text(29, 4)),  # as like as may be
      record([5, 6], prompt=text(50)),
      record(text(30, 5) + loop * 5),
      record(repeats),
      record(text(30, 6) + loop * 3 + [9], finished=True),
  ]
  found = Filter(Limits(cut=False))
  assert [id(r) for r in found(records)] == [
      id(records[0]), id(records[3])]
  assert found.reasons == {
      'kept': 2, 'duplicate': 1, 'near duplicate': 1, 'short': 1, 'loop': 2,
      'repeated 4-grams': 1}
  assert sum(found.reasons.values()) == len(records)
  # What one filter has seen, it still knows.
  assert not list(found(records[:1]))


def test_a_loop_is_cut_after_it_was_said_twice():
  loop, before = text(5, 1), text(30, 5)
  for end in ([], [9]):
    one = record(before + loop * 4 + loop[:3] + end, finished=bool(end))
    found = Filter()
    (kept,) = found([one])
    assert kept.answer.tolist() == before + loop * 2
    assert kept.prompt_length == 2 and not kept.finished
    assert found.reasons == {'kept': 1, 'cut': 1}
  found = Filter()
  assert not list(found([record([7] * 50)]))  # two sevens are left
  assert found.reasons == {'short': 1, 'cut': 1}


@pytest.mark.parametrize('kwargs', [
    dict(least_new=0), dict(head=-1), dict(max_period=-1), dict(repeats=1),
    dict(repeated=((0, 0.5),)), dict(repeated=((4, 1.5),))])
def test_limits_refuse(kwargs):
  with pytest.raises(ValueError):
    Limits(**kwargs)


def test_a_million_tokens_take_seconds():
  records = [record(text(300, i)) for i in range(1000)]
  best = np.inf
  for _ in range(3):  # others may be busy
    begin = time.process_time()
    assert len(list(Filter()(records))) == 1000
    best = min(best, time.process_time() - begin)
  assert best < 1.5  # measured: 0.15 s


def test_texts_that_share_a_question():
  question = text(30, 1)
  texts = [text(100, 2), [*text(20, 3), *question[5:18], *text(20, 4)],
           [*text(20, 3), *question[5:17], *text(20, 4)], question[:12], []]
  questions = [np.asarray(question, np.int32), np.asarray(text(12, 2))]
  found = filters.sharing([np.asarray(t, np.int64) for t in texts], questions)
  assert found.tolist() == [False, True, False, False, False]
  assert filters.sharing([np.asarray(question)], []).tolist() == [False]
  # A text of fewer than n tokens is in nothing.
  assert filters.sharing(
      [np.asarray(text(100, 2))], questions, n=12).tolist() == [True]
