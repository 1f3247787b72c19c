"""A confidence head in real rounds: what is noted, mended, and decoded with."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.distill import calibrate as scaling
from specjax.distill import confidence, measure
from specjax.distill.blocks import BlockTask
from specjax.drafters import ChainLM
from specjax.drafters.block import BlockSource
from specjax.models.block_drafter import BlockConfig
from specjax.models.block_model import BlockModel
from specjax.models.causal import CausalLM
from specjax.models.transformer_config import TransformerConfig
from specjax.verify import Greedy, Speculative
from tests import tiny, training

LM = CausalLM(tiny.CONFIGS['llama'], chunk=24)
TARGET = tiny.params(tiny.CONFIGS['llama'])
MODEL = BlockModel(BlockConfig(
    decoder=TransformerConfig(
        vocab_size=tiny.VOCAB, num_layers=1, embed_dim=16, mlp_dim=24,
        num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True),
    taps=(1, 2), draft_vocab_size=len(training.IDS), num_slots=3,
    markov_rank=6))
NUM, NEW = 24, 20


def context(seed, temperature=0.0, num=NUM):
  prompts = np.random.default_rng(seed).integers(0, tiny.VOCAB, (num, 4))
  return measure.context(prompts, NEW, temperature=temperature, seed=seed)


@pytest.fixture(scope='module')
def params():
  """A drafter that learnt something, whose head is much too sure of it."""
  tokens = training.written(
      LM, TARGET, tiny.tokens(16, 4), NEW, Speculative(), temperature=1.0)
  net, _, reports = training.run(
      BlockTask(MODEL, num_anchors=8), LM, TARGET, training.IDS,
      training.alone(tokens, 4), 80, 5e-3)
  assert reports[-1]['loss'] < reports[0]['loss']
  net = {**net, 'confidence_out': 4 * net['confidence_out'],
         'confidence_bias': net['confidence_bias'] + 3.0}
  return Models(target=TARGET, drafter=MODEL.attach(
      net, TARGET, training.IDS))


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_rounds_are_those_of_the_decoder(params, temperature):
  start = context(1, temperature)
  seen = confidence.observe(MODEL, LM, params, start, chunk=8)
  engine = Engine(LM, ChainLM(3, BlockSource(MODEL)),
                  Speculative() if temperature else Greedy())
  found = measure.acceptance(engine, params, start, chunk=8)
  assert seen.drafted.any(axis=-1).sum() == found.rounds
  counted = seen.accepted.sum(axis=(0, 1))
  emitted = found.per_position * seen.drafted.sum(axis=(0, 1))
  # The decoder does not count what is accepted behind a text's end.
  beyond = np.rint(counted - emitted)
  assert beyond[0] == 0 <= beyond.min() and beyond.max() < NUM
  assert 0 < counted[0] < found.rounds
  # Nothing is accepted behind a rejection, or that was not drafted.
  assert not (seen.accepted[..., 1:] & ~seen.accepted[..., :-1]).any()
  assert not (seen.accepted & ~seen.drafted).any()


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_chances_come_true_on_other_prompts(params, temperature):
  found = confidence.calibrate(
      MODEL, LM, params, context(2, temperature, 2 * NUM), chunk=8)
  assert len(found.temperatures) == 3 and np.mean(found.after) < (
      0.7 * np.mean(found.before))
  assert found.rounds > 100 and '% before' in found.describe()
  others = confidence.observe(
      MODEL, LM, params, context(3, temperature, 2 * NUM), chunk=8)
  others = others.of(slice(None))
  before = scaling.errors(*others)
  after = scaling.errors(*others, temperatures=found.temperatures)
  assert after.mean() < 0.7 * before.mean()


def test_temperatures_that_do_not_help_are_not_kept(params, monkeypatch):
  monkeypatch.setattr(
      confidence.scaling, 'fit', lambda *seen: np.full(3, 0.01))
  found = confidence.calibrate(MODEL, LM, params, context(2), chunk=8)
  assert found.temperatures == () and found.after == found.before


def test_drafts_end_by_calibrated_chances(params):
  """The threshold cuts where the noted logits over temperatures say."""
  start, lengths = context(1), []
  first = confidence.observe(MODEL, LM, params, start, chunk=8).logits[:, 0]
  given = (8.0, 0.5, 3.0)
  # Half of the rows stop at once.
  threshold = float(np.median(1 / (1 + np.exp(-first / given)), axis=0)[0])
  for temperatures in ((), given):
    model = confidence.calibrated(MODEL, temperatures)
    engine = Engine(LM, ChainLM(
        3, BlockSource(model), acceptance_threshold=threshold), Greedy())
    state = loop.start(engine, params, loop.empty(engine, start),
                       jax.numpy.ones((NUM,), bool), chunk=8)
    draft = jax.jit(lambda s, e=engine: e.drafter.propose(params, s)[0])(
        state)
    chance = 1 / (1 + np.exp(-first / (temperatures or 1.0)))
    want = np.logical_and.accumulate(chance >= threshold, axis=1)
    np.testing.assert_array_equal(draft.valid, want)
    lengths.append(want.sum(axis=1))
  assert len({*lengths[1]}) > 1 and (lengths[0] != lengths[1]).any()


def test_what_cannot_be_calibrated(params):
  plain = BlockModel(dataclasses.replace(
      MODEL.config, markov='none', confidence=False))
  with pytest.raises(ValueError, match='has no confidence head'):
    confidence.calibrate(plain, LM, params, context(1))
  with pytest.raises(ValueError, match='one prompt'):
    confidence.calibrate(MODEL, LM, params, context(1, num=1))
  for model, temperatures in (
      (plain, (1.0, 1.0, 1.0)), (MODEL, (1.0,)), (MODEL, (1.0, 0.0, 1.0))):
    with pytest.raises(ValueError, match='temperatures=.*one for each slot'):
      confidence.calibrated(model, temperatures)
