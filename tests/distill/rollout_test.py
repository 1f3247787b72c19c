"""Rollouts: the target's law, rows that come and go, resumption."""

import compilations
import numpy as np
import pytest
import toy_text

from specjax.distill import rollout
from specjax.distill.rollout import Settings
from specjax.host import tiny
from specjax.parallel import make_mesh

ENDS = toy_text.model(end=2.0)  # says so often
EOS = (toy_text.END,)


def prompts(num: int, longest: int = 20) -> list[list[int]]:
  rng = np.random.default_rng(3)
  return [rng.integers(0, 60, n).tolist()
          for n in rng.integers(1, longest + 1, num)]


def settings(**kwargs) -> Settings:
  return Settings(**{**dict(
      max_new=24, batch=4, refill=0.5, rounds=5, chunk=16,
      buckets=(20,), temperatures=(0.0, 0.8)), **kwargs})


def by_index(model, texts, options, **kwargs):
  records = list(rollout.generate(
      model.lm, model.params, texts, eos=EOS, settings=options, **kwargs))
  found = {r.prompt_index: r for r in records}
  assert len(found) == len(records)
  return found


def assert_same(one, other) -> None:
  assert one.keys() == other.keys()
  for i in one:
    np.testing.assert_array_equal(one[i].tokens, other[i].tokens)
    assert one[i][1:] == other[i][1:]


def test_records_are_the_targets_texts():
  texts = prompts(23)
  seen = []
  before = compilations.counts()
  found = by_index(
      ENDS, texts, settings(buckets=(8, 20)), on_progress=seen.append)
  grown = compilations.counts() - before
  # One program for each of the two buckets: refills are data.
  assert grown['jit(run)'] == grown['jit(_admit)'] == 2
  assert sorted(found) == list(range(23))
  for i, record in found.items():
    assert record.tokens.dtype == np.int32
    assert record.tokens[:record.prompt_length].tolist() == texts[i]
    answer = record.answer.tolist()
    assert 1 <= len(answer) <= 24
    assert record.finished == (answer[-1] == toy_text.END)
    assert record.finished or len(answer) == 24
    assert toy_text.END not in answer[:-1]
    if record.temperature == 0:
      assert answer == toy_text.greedy(ENDS, texts[i], len(answer))
  assert {r.temperature for r in found.values()} == {0.0, np.float32(0.8)}
  assert {r.finished for r in found.values()} == {True, False}
  assert seen[-1].num_done == seen[-1].num_prompts == 23
  assert seen[-1].new_tokens == sum(len(r.answer) for r in found.values())
  assert 0 < seen[-1].share <= 1
  counts = [p.new_tokens for p in seen]
  assert counts == sorted(counts)


def test_a_record_depends_on_seed_and_index_only():
  texts = prompts(17)
  full = by_index(ENDS, texts, settings())
  other_seed = by_index(ENDS, texts, settings(seed=1))
  assert any(full[i].tokens.tolist() != other_seed[i].tokens.tolist()
             for i in full)
  # Other slots, other neighbours, other times of looking.
  assert_same(full, by_index(
      ENDS, texts, settings(batch=7, refill=0.1, rounds=2)))
  done = set(list(full)[:9])
  rest = by_index(ENDS, texts, settings(), skip=done)
  assert_same(rest, {i: r for i, r in full.items() if i not in done})
  # Some of the prompts, by index; another turn.
  some = {i: texts[i] for i in (12, 3, 7)}
  assert_same({i: full[i] for i in some}, by_index(ENDS, some, settings()))
  later = by_index(ENDS, texts, settings(), turn=1)
  assert [r.temperature for r in full.values()] == [
      later[i].temperature for i in full]
  assert any(later[i].tokens.tolist() != full[i].tokens.tolist()
             for i in full if full[i].temperature)
  with pytest.raises(ValueError, match='turn=-1'):
    by_index(ENDS, texts, settings(), turn=-1)
  # Equal prompts are answered with noise of their own.
  same = by_index(ENDS, [texts[0]] * 17, settings())
  assert len({tuple(r.tokens.tolist()) for r in same.values()}) > 1


def test_sampled_answers_follow_the_law():
  start, num = [5, 9], 4000
  found = by_index(
      toy_text.model(), [start] * num,
      settings(max_new=1, batch=500, refill=1.0, temperatures=(0.7,),
               rounds=1, top_p=0.9))
  counts = np.bincount(
      [r.answer[0] for r in found.values()], minlength=toy_text.VOCAB) / num
  logits = toy_text.raw_logits(toy_text.model(), start)[-1].astype(float) / .7
  law = np.exp(logits - logits.max())
  law /= law.sum()
  order = np.argsort(-law)
  keep = order[:np.searchsorted(np.cumsum(law[order]), 0.9) + 1]
  kept = np.zeros_like(law)
  kept[keep] = law[keep] / law[keep].sum()
  assert counts[kept == 0].sum() == 0
  # Expected total variation of an empirical law: sum sqrt(2 p / (pi n)) / 2.
  expected = 0.5 * np.sqrt(2 * kept / (np.pi * num)).sum()
  assert 0.5 * np.abs(counts - kept).sum() < 2 * expected


def test_a_mesh_changes_nothing():
  texts, options = prompts(10), settings(max_new=8)
  alone = by_index(ENDS, texts, options)
  mesh = make_mesh((2, 1))
  assert_same(alone, by_index(ENDS, texts, options, mesh=mesh))


def test_user_turns_from_the_template():
  prefixes, suffix = [[70, 71], [72]], [33, 80, 81]
  options = settings(temperatures=(1.0,))
  found = dict(rollout.self_prompts(
      ENDS.lm, ENDS.params, 30, prefixes=prefixes, suffix=suffix, eos=EOS,
      settings=options))
  assert 5 < len(found) <= 30 and set(found) <= set(range(30))
  ended_by = set()
  for i, prompt in found.items():
    head = prefixes[i % 2]
    assert prompt[:len(head)].tolist() == head
    assert prompt[-3:].tolist() == suffix
    turn = prompt[len(head):-3].tolist()
    assert turn and 33 not in turn and toy_text.END not in turn
    ended_by.add(len(turn))
  assert len(ended_by) > 1
  # The noise of a turn is not that of the answer with the same index.
  texts = [prefixes[i % 2] for i in range(30)]
  answers = by_index(ENDS, texts, options)
  assert any(answers[i].answer[0] != found[i][len(texts[i])] for i in found)


def test_plan():
  options = settings(batch=4, buckets=(8, 20, 50))
  groups = rollout.plan([3, 3, 9, 30, 40, 31, 32, 33, 35], options)
  # Three that are short join the longer ones; none is lost.
  assert [(g.longest, sorted(g.indices)) for g in groups] == [
      (50, list(range(9)))]
  groups = rollout.plan([30, 9, 3, 4, 5, 6, 7], options)
  assert [(g.longest, g.indices, g.batch) for g in groups] == [
      (8, [2, 3, 4, 5, 6], 4), (50, [1, 0], 2)]
  groups = rollout.plan(
      [30] * 40, settings(batch=16, buckets=(40,), cache_tokens=640), 4)
  assert [(g.size, g.batch, g.refill) for g in groups] == [(64, 12, 8)]


@pytest.mark.parametrize('kwargs, text', [
    (dict(max_new=0), 'max_new=0'),
    (dict(temperatures=()), 'temperatures=()'),
    (dict(temperatures=(-0.1,)), 'temperatures='),
    (dict(refill=0.0), 'refill=0.0'),
    (dict(buckets=(8, 4)), 'buckets='),
    (dict(top_p=0.0), 'top_p=0.0'),
    (dict(batch=0), 'batch=0'),
])
def test_settings_refuse(kwargs, text):
  with pytest.raises(ValueError, match=text):
    settings(**kwargs)


@pytest.mark.parametrize('bad, text', [
    ([1] * 21, 'prompt 1: shape .21.*1 to 20'),
    ([], 'prompt 1: shape .0'),
    ([1, toy_text.VOCAB], 'prompt 1: token ids 1 to 264'),
    ([-1], 'prompt 1: token ids -1'),
])
def test_prompts_refused(bad, text):
  with pytest.raises(ValueError, match=text):
    next(rollout.generate(ENDS.lm, ENDS.params, [[1], bad], eos=EOS,
                          settings=settings()))


def test_prompts_longer_than_the_context():
  """With their answers they must fit; so must the user turns."""
  model = tiny.model(num_layers=1, max_length=40)
  asked = settings(max_new=24)
  assert rollout.room(model.lm, asked) == 16
  assert rollout.room(ENDS.lm, asked) is None
  with pytest.raises(ValueError, match=(
      'prompt 1: 17 tokens and max_new=24; the context of .* is 40')):
    next(rollout.generate(model.lm, model.params, [[1] * 16, [1] * 17],
                          eos=EOS, settings=asked))
  with pytest.raises(ValueError, match='prompt 0: 17 tokens and max_new=24'):
    next(rollout.self_prompts(
        model.lm, model.params, 2, prefixes=[[1] * 17], suffix=[2], eos=EOS,
        settings=settings(max_new=24, temperatures=(1.0,))))


def test_nan_is_told_with_its_prompt():
  model = toy_text.model()
  table = np.array(model.params['now'])
  table[50] = np.nan
  with pytest.raises(FloatingPointError, match='prompt 2: NaN'):
    list(rollout.generate(
        model.lm, {**model.params, 'now': table}, [[1], [2], [50]], eos=EOS,
        settings=settings(max_new=1, rounds=1, temperatures=(0.0,))))


def test_user_turns_refuse():
  with pytest.raises(ValueError, match='greedy user turns'):
    next(rollout.self_prompts(
        ENDS.lm, ENDS.params, 2, prefixes=[[1]], suffix=[2], eos=EOS,
        settings=settings()))
  with pytest.raises(ValueError, match='a prefix and a suffix'):
    next(rollout.self_prompts(
        ENDS.lm, ENDS.params, 2, prefixes=[[1]], suffix=[], eos=EOS))
