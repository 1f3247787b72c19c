"""Training and decoding see one drafter; where they do not, it is found."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from specjax.core import tree
from specjax.core.types import Models
from specjax.distill import gap, kinds
from specjax.drafters import BlockSource, ChainLM, Lattice
from specjax.drafters.eagle import EagleSource
from specjax.models.causal import CausalLM
from specjax.verify import Match
from tests import tiny, training

CONFIG = tiny.CONFIGS['llama']
LM = CausalLM(CONFIG, chunk=16)
IDS = np.setdiff1d(np.arange(CONFIG.vocab_size), [3])
SIZE, NUM, EOS = 32, 3, 5
KINDS = {
    'dspark': {'num_slots': NUM, 'num_layers': 1, 'taps': (0, 2),
               'markov_rank': 8},
    'eagle3': {'taps': (0, 1, 2)},
    'medusa': {'num_heads': NUM}, 'hydra': {'num_heads': NUM}}


@functools.cache
def target():
  """Returns parameters whose texts are neither noise nor a loop."""
  params = dict(tiny.params(CONFIG))
  return {**params, 'head': 1.5 * params['head']}


@functools.cache
def texts() -> np.ndarray:
  """Returns texts that the target wrote, int32[64,SIZE]."""
  prompts = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (64, 2))
  return training.written(
      LM, target(), prompts, SIZE - 2, Match(), temperature=1.0)


@functools.cache
def trained(kind: str):
  """Returns (task, Models) after a few steps: better than chance."""
  task = kinds.build(kind, CONFIG, len(IDS), model=KINDS[kind],
                     task={'steps': NUM} if kind == 'eagle3' else
                     {'num_anchors': 16})
  _, drafter, _ = training.run(
      task, LM, target(), IDS, training.alone(texts(), 0), 100, 0.01)
  return task, Models(target=target(), drafter=drafter)


def prompts(num: int = 40):
  rng = np.random.default_rng(1)
  return [rng.integers(0, CONFIG.vocab_size, rng.integers(2, 9)).tolist()
          for _ in range(num)]


def measured(kind: str, temperature: float, drafter=None) -> gap.Gap:
  task, params = trained(kind)
  return gap.measure(task, LM, params, prompts(), new_tokens=24, eos=(EOS,),
                     temperature=temperature, drafter=drafter, chunk=4)


@pytest.mark.parametrize('kind, temperature', [
    ('dspark', 0.0), ('dspark', 1.0), ('eagle3', 0.0), ('eagle3', 1.0),
    ('medusa', 0.0), ('hydra', 1.0)])
def test_decoding_accepts_what_training_did(kind, temperature):
  """Within 2 points and 2 errors; in float32, place by place."""
  found = measured(kind, temperature)
  assert found.closed()
  assert np.nanmax(found.largest) < 1e-5
  np.testing.assert_array_equal(found.forced.number, found.decoded.number)
  assert found.forced.mean[0] > 0.15 and found.forced.number[1] > 50
  # What the loop did is a draw of what its laws say.
  wide = np.hypot(found.accepted.error, found.decoded.error)
  assert (np.abs(found.accepted.mean - found.decoded.mean) < 4 * wide
          + 1e-6).all()
  if not temperature:  # rounds begin where drafts have just failed
    assert found.everywhere.mean[0] > found.forced.mean[0] + 0.05


@dataclasses.dataclass(frozen=True)
class Stale(EagleSource):
  """Keeps what it drafted from."""

  def sync(self, params, state, draft, scores, verdict, *, own):
    new = super().sync(params, state, draft, scores, verdict, own=own)
    return {name: state.drafter[name] for name in new}


@dataclasses.dataclass(frozen=True)
class Late(BlockSource):
  """Stores what it has seen one position too far."""

  def sync(self, params, state, draft, scores, verdict, *, own):
    context = state.context.replace(length=state.context.length + 1)
    return super().sync(params, state.replace(context=context), draft,
                        scores, verdict, own=own)


@pytest.mark.parametrize('kind, source, temperature', [
    ('eagle3', Stale, 0.0), ('eagle3', Stale, 1.0), ('dspark', Late, 0.0),
    ('dspark', Late, 1.0)])
def test_planted_gaps_are_found(kind, source, temperature):
  """The text is lossless all the same: nothing else would tell."""
  task, _ = trained(kind)
  found = measured(kind, temperature, ChainLM(NUM, source(task.model)))
  assert not found.closed()
  assert np.nanmax(found.largest) > 0.1
  if not temperature:
    right = measured(kind, temperature)
    for one, other in zip(found.texts, right.texts, strict=True):
      np.testing.assert_array_equal(one, other)


@dataclasses.dataclass(frozen=True)
class Ahead(BlockSource):
  """Drafts as if the pending token stood one position further."""

  def _run(self, params, state):
    context = state.context
    pending = tree.take_row(context.tokens, context.root)
    hidden, cache = self.model.draft(
        params.drafter, params.target, state.drafter['cache'], pending,
        context.root + 1)
    return {'cache': cache, 'hidden': hidden}, pending


def test_what_costs_little_shows_place_by_place():
  """One step of rotation: to a small drafter that is nothing, on average."""
  task, _ = trained('dspark')
  found = measured('dspark', 1.0, ChainLM(NUM, Ahead(task.model)))
  assert np.nanmax(found.largest) > 0.05


def test_a_lattice_of_few_candidates_is_told_from_the_drafter():
  """What is decoded is another drafter than the one that was trained."""
  task, _ = trained('dspark')
  all_of_them = Lattice(task.source(), len(IDS))
  assert measured('dspark', 1.0, all_of_them).closed()
  assert not measured('dspark', 1.0, Lattice(task.source(), 2)).closed()


def test_a_text_that_is_cut_is_no_rejection():
  """Accepted or not is known of each draft within the text alone."""
  found = measured('medusa', 0.0)
  task, params = trained('medusa')
  short = gap.measure(task, LM, params, prompts(), new_tokens=1, chunk=4)
  assert short.forced.number.tolist() == [0, 0, 0] or (
      short.forced.number[0] == 40 and short.forced.number[1] == 0)
  assert any(t[-1] == EOS for t in found.texts)
  assert found.tokens == sum(len(t) - len(p) for t, p in zip(
      found.texts, prompts(), strict=True))


def test_bad_arguments_are_named():
  task, params = trained('medusa')
  measure_it = functools.partial(gap.measure, task, LM, params)
  with pytest.raises(ValueError, match='temperature=0.5'):
    measure_it([[1, 2]], temperature=0.5)
  for bad in ([], [[1]]):
    with pytest.raises(ValueError, match='prompts'):
      measure_it(bad)
  with pytest.raises(ValueError, match='up to 3'):
    measure_it([[1, 2]], drafter=ChainLM(4, task.source()))
