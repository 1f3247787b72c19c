"""Adaptation from rejected drafts: which places count, and what it gains."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from specjax.core.types import Models
from specjax.distill import kinds, online
from specjax.distill.online import OnlineAdaptation, Settings, rejected
from specjax.drafters import ChainLM
from specjax.host.generate import generate
from specjax.host.load import Model
from specjax.io.options import Sampling
from specjax.models.attention import Block
from specjax.models.causal import CausalLM
from specjax.models.small_lm import SmallLMModel
from tests import tiny, training

CONFIG = tiny.CONFIGS['llama']
VOCAB = CONFIG.vocab_size
IDS = training.IDS
NUM = 3


def test_rejected_places_are_where_rounds_ended_early():
  # Rounds of 2, 4 (all accepted), 1, 3 tokens; the last may have been cut.
  found = rejected((2, 4, 1, 3, 2), prompt_length=5, num_draft=3)
  # Pending tokens: 4, then 6, 10, 11.
  assert found.anchors.tolist() == [4, 10, 11]
  assert found.slots.tolist() == [1, 0, 2]
  # The token that the target said instead ends its round.
  ends = 5 + np.cumsum((2, 4, 1, 3, 2)) - 1
  assert (found.anchors + found.slots + 1).tolist() == [
      ends[0], ends[2], ends[3]]
  assert not len(rejected((4, 4, 2), 1, 3).anchors)
  assert not len(rejected((), 1, 3).anchors)


@functools.cache
def a_target():
  """Returns a target whose laws are far from uniform."""
  params = dict(tiny.params(CONFIG))
  params['head'] = 3 * params['head']
  return Model('sharp', CausalLM(CONFIG, chunk=64), params)


def adapted(kind, **settings):
  """Returns an adaptation of a fresh drafter, and its source."""
  target = a_target()
  small = {'dspark': {'num_layers': 1, 'num_taps': 2, 'num_slots': NUM,
                      'markov_rank': 4},
           'small_lm': {'num_layers': 1, 'embed_dim': 12}}.get(kind, {})
  task = kinds.build(kind, target.lm.config, len(IDS), model=small)
  net = jax.jit(task.init)(jax.random.key(0), target.params)
  given = online.task_of(task.model, NUM)
  values = {'every': 4, 'length': 32, 'places': 24, 'learning_rate': 0.01,
            'steps': 12, **settings}
  return OnlineAdaptation(
      given, target.lm, target.params, net, IDS,
      settings=Settings(**values)), task.source()


def test_only_rejected_drafts_move_the_weights():
  """The loss is the mean divergence at these places, from scratch."""
  made, _ = adapted('small_lm')
  target, rng = a_target(), np.random.default_rng(0)
  rows = []
  for length, steps in ((30, (1, 2, 4, 3, 2)), (20, (4, 4, 1, 1))):
    text = rng.integers(0, VOCAB, length).astype(np.int32)
    rows.append((text, rejected(steps, 9, NUM)))
  rows += [rows[0], (rows[0][0], rejected((4, 4), 9, NUM))]
  batch, anchors, slots, weight = online._arrays(rows, made.settings)
  net = made.params['net']
  got = jax.jit(made._loss)(
      net, made._shared, target.params, batch, anchors, slots, weight)
  model = made.task.model
  bare = CausalLM(model.config.decoder, chunk=64)
  assert isinstance(model, SmallLMModel)
  value = []
  for text, found in rows:
    p, q = (full(lm, params, text) for lm, params in (
        (target.lm, target.params), (bare, net)))
    p = jax.nn.log_softmax(p, axis=-1)[:, IDS]
    q = jax.nn.log_softmax(q[:, IDS], axis=-1)
    for at in found.anchors + found.slots:
      value.append(float(np.sum(np.exp(p[at]) * (p[at] - q[at]))))
  assert len(value) == int(weight.sum()) == 7
  np.testing.assert_allclose(got, np.mean(value), rtol=1e-4)


def full(lm, params, text):
  """Returns logits [T,V] of a forward pass from scratch."""
  block = Block(base=np.zeros(1, np.int32),
                position=np.arange(len(text))[None])
  cache = lm.empty(1, len(text))['cache']
  return np.asarray(jax.jit(lm.forward)(
      params, cache, text[None], block)[0][0])


@pytest.mark.parametrize('kind', [
    'small_lm', 'dspark', pytest.param('eagle3', marks=pytest.mark.slow)])
def test_acceptance_rises_and_texts_stay(kind):
  """A fresh drafter, and requests of a narrow kind: three questions."""
  made, source = adapted(kind)
  asked = [tiny.tokens(1, 4, seed=s)[0].tolist() for s in range(3)]
  prompts = [asked[i % 3] for i in range(48)]
  sampling = Sampling(max_new_tokens=24, ignore_eos=True)
  results = generate(
      a_target(), ChainLM(NUM, model=source), prompts, sampling,
      batch_size=2, online=made)
  tau = [len(r.tokens) / r.rounds for r in results]
  assert made.updates + made.skipped >= 8 and not made.skipped
  assert np.mean(tau[-6:]) > np.mean(tau[:6]) + 0.3
  assert made.losses[-1] < made.losses[0]
  plain = generate(a_target(), None, asked, sampling)
  for index, result in enumerate(results):
    assert result.tokens == plain[index % 3].tokens


def test_a_loss_that_is_not_finite_changes_nothing():
  made, _ = adapted('small_lm', every=1)
  before = jax.device_get(made.params['net'])
  made._net = jax.tree.map(lambda x: x.at[0].set(np.nan), made._net)
  text = np.arange(20)
  assert not made.add(text, 5, (1, 1, 1, 1), NUM)
  assert made.skipped == 1 and not made.updates
  jax.tree.map(np.testing.assert_array_equal, made.params['net'], before)


def test_nothing_rejected_is_nothing_to_learn():
  made, _ = adapted('small_lm', every=1)
  assert not made.add(np.arange(20), 5, (4, 4, 4, 2), NUM)
  assert made.updates == made.skipped == 0


def test_settings_out_of_range():
  for name in ('every', 'steps', 'learning_rate', 'length', 'places'):
    with pytest.raises(ValueError, match=f'{name}=0'):
      dataclasses.replace(Settings(), **{name: 0})


def test_parameters_keep_their_dtypes():
  made, _ = adapted('small_lm')
  half = jax.tree.map(lambda x: x.astype('bfloat16') if x.ndim > 1 else x,
                      made.params['net'])
  made = OnlineAdaptation(made.task, made.lm, made.target, half, IDS)
  assert jax.tree.map(lambda x: x.dtype, made.params['net']) == (
      jax.tree.map(lambda x: x.dtype, half))
  assert isinstance(Models(target=made.target, drafter=made.params), Models)
