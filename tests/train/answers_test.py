"""Answers to several turns, on the tiny model."""

from collections import Counter
import dataclasses

import numpy as np
import pytest

from specjax.data import filters
from specjax.data.dialogues import Dialogue
from specjax.data.packing import Packed
from specjax.distill import rollout
from specjax.distill.rollout import Settings
from specjax.host import tiny
from train import answers

NEW = 12
SETTINGS = Settings(
    max_new=NEW, batch=4, temperatures=(0.0, 1.0), buckets=(64, 256))
LATER = ('and then?', 'why?')


@pytest.fixture(scope='module')
def model():
  return tiny.model()


def begun(model, num: int):
  """Returns first prompts, and the dialogues of all but the first two."""
  prompts, dialogues = [], {}
  for i in range(num):
    messages = ({'role': 'user', 'content': f'question {i}'},)
    prompts.append(np.asarray(answers.encode(model, messages), np.int32))
    if i > 1:
      # The third asks once more only.
      dialogues[prompts[-1].tobytes()] = Dialogue(
          messages, LATER[:1] if i == 2 else LATER)
  return prompts, dialogues


def writer(model, out, **kwargs) -> answers.Writer:
  options = dict(
      settings=SETTINGS, origin={'target': 'tiny'}, out=out, part_size=4,
      longest=256, limits=filters.Limits(max_period=0), quiet=True)
  return answers.Writer(model, **{**options, **kwargs})


def same(one: answers.Answers, other: answers.Answers) -> None:
  for a, b in zip(one.turns, other.turns, strict=True):
    assert [(r.tokens.tolist(), *r[1:]) for r in a] == [
        (r.tokens.tolist(), *r[1:]) for r in b]


def test_the_answer_is_part_of_the_next_prompt(model, tmp_path):
  prompts, dialogues = begun(model, 8)
  dropped = Counter()
  found = writer(model, tmp_path)(prompts, dialogues, 3, dropped)
  text = model.tokenizer
  assert [[r.prompt_index for r in turn] for turn in found.turns] == [
      list(range(8)), [2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7]]
  assert not dropped and found.tokens_per_s > 0
  before = {r.prompt_index: f'<|user|>question {r.prompt_index}\n'
            f'<|assistant|>{text.decode(r.answer)}' for r in found.turns[0]}
  temperatures = {r.prompt_index: r.temperature for r in found.turns[0]}
  assert set(temperatures.values()) == {0.0, 1.0}
  for turn, question in zip(found.turns[1:], LATER, strict=True):
    for record in turn:
      index = record.prompt_index
      prompt = record.tokens[:record.prompt_length]
      before[index] += f'\n<|user|>{question}\n<|assistant|>'
      assert text.decode(prompt) == before[index]
      assert record.temperature == temperatures[index]
      before[index] += text.decode(record.answer)


def test_only_the_answer_of_a_turn_is_supervised(model, tmp_path):
  found = writer(model, tmp_path)(*begun(model, 4), 3, Counter())
  records = [r for turn in found.turns for r in turn]
  assert len(records) == 4 + 2 + 1
  packed = Packed.from_records(records, 512)
  assert packed.supervised.sum() == sum(len(r.answer) for r in records)
  assert {len(r.answer) for r in found.turns[1]} <= set(range(1, NEW + 1))
  for record in records:
    row = next(
        (row, at) for row in range(len(packed))
        for at in range(512 - len(record.tokens) + 1)
        if np.array_equal(packed.tokens[row, at:at + len(record.tokens)],
                          record.tokens))
    mask = packed.supervised[row[0], row[1]:row[1] + len(record.tokens)]
    want = np.arange(len(record.tokens)) >= record.prompt_length
    np.testing.assert_array_equal(mask, want)


def test_conversations_that_end_early_are_counted(model, tmp_path):
  prompts, dialogues = begun(model, 6)
  long = len(prompts[0]) + NEW + 20
  dropped = Counter()
  found = writer(model, tmp_path / 'a', longest=long)(
      prompts, dialogues, 3, dropped)
  assert len(found.turns) == 1 and dropped == {'turn 2: too long': 4}
  dropped.clear()
  # One token over and over is a loop of period 1.
  found = writer(
      model, tmp_path / 'b', limits=filters.Limits(max_period=6, repeats=2),
      settings=dataclasses.replace(SETTINGS, temperatures=(0.0,)))(
          prompts, dialogues, 2, dropped)
  loops = [r.prompt_index for r in found.turns[0] if r.prompt_index > 1
           and filters.trailing_loop(r.answer, 6, 2)]
  assert loops and dropped == {'turn 2: after a loop': len(loops)}
  later = [r.prompt_index for turn in found.turns[1:] for r in turn]
  assert sorted([*loops, *later]) == [2, 3, 4, 5]
  dropped.clear()
  # Every answer is its end.
  silent = dataclasses.replace(model, eos=tuple(range(257)))
  found = writer(silent, tmp_path / 'c')(prompts, dialogues, 2, dropped)
  assert len(found.turns) == 1
  assert dropped == {'turn 2: after no answer': 4}


def test_an_interruption_in_the_second_turn(model, tmp_path, monkeypatch):
  prompts, dialogues = begun(model, 8)
  whole = writer(model, tmp_path / 'whole')(prompts, dialogues, 3, Counter())
  make = rollout.generate

  def stops(*args, turn, **kwargs):
    for number, record in enumerate(make(*args, turn=turn, **kwargs)):
      if turn == 1 and number == 3:
        raise KeyboardInterrupt
      yield record

  with monkeypatch.context() as patch:
    patch.setattr(rollout, 'generate', stops)
    with pytest.raises(KeyboardInterrupt):
      writer(model, tmp_path / 'cut')(prompts, dialogues, 3, Counter())
  assert not (tmp_path / 'cut' / 'parts-3').exists()
  skipped = []

  def looks(*args, turn, skip, **kwargs):
    skipped.append(len(skip))
    return make(*args, turn=turn, skip=skip, **kwargs)

  monkeypatch.setattr(rollout, 'generate', looks)
  found = writer(model, tmp_path / 'cut')(prompts, dialogues, 3, Counter())
  assert skipped == [8, 3, 0]
  same(found, whole)
  with pytest.raises(ValueError, match='other settings .prompts'):
    writer(model, tmp_path / 'cut')(prompts[1:], dialogues, 3, Counter())


def test_a_conversation_is_held_out_whole(model, tmp_path):
  prompts, dialogues = begun(model, 12)
  found = writer(model, tmp_path)(prompts, dialogues, 2, Counter())
  train, held_out = answers.split(found, prompts, 0.4, seed=1)
  sides = [{r.prompt_index for r in side} for side in (train, held_out)]
  assert all(sides) and not sides[0] & sides[1]
  assert len(train) + len(held_out) == 12 + 10
  assert sides[1] == {i for i, p in enumerate(prompts)
                      if filters.is_held_out(p, 0.4, 1)}
  assert {r.prompt_index for r in found.turns[1]} & sides[1]
