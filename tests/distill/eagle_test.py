"""EAGLE's training: places, exact sums, and what a short run achieves."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.distill import eagle, objective, teacher
from specjax.distill.eagle import EagleTask, published
from specjax.distill.objective import Mixture
from specjax.distill.task import Objective
from specjax.models.causal import CausalLM
from specjax.models.eagle import EagleConfig
from specjax.models.eagle_model import EagleModel
from specjax.models.transformer_config import TransformerConfig
from tests import tiny, training

CONFIG = tiny.CONFIGS['llama']
LM, TARGET = CausalLM(CONFIG, chunk=24), tiny.params(CONFIG)
VOCAB, STEPS = CONFIG.vocab_size, 3
IDS = training.IDS
ALL = np.arange(VOCAB)
DECODER = TransformerConfig(
    vocab_size=VOCAB, num_layers=1, embed_dim=16, mlp_dim=24, num_heads=4,
    num_kv_heads=2, head_dim=8)
THIRD = EagleModel(EagleConfig(DECODER, len(IDS), taps=(0, 1, 2)))
FIRST = EagleModel(EagleConfig(DECODER, len(IDS), '1', fuse_bias=True))
KL = Objective(Mixture(), chunk=7)  # several chunks, one of them cut short


BATCH = training.packed()


@functools.cache
def shared(model, every: bool = False):
  """Returns (params, teacher) of random weights that matter."""
  if every:
    model = EagleModel(dataclasses.replace(
        model.config, draft_vocab_size=VOCAB))
  task = EagleTask(model)
  net = training.moved(task.init(jax.random.key(0), TARGET), 0.2)
  params = task.attach(net, TARGET, ALL if every else IDS)
  return params, teacher.observe(LM, TARGET, BATCH, model.taps)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(task, params, seen, progress=0.0):
  return task.loss(
      params, TARGET, BATCH, seen, jax.random.key(1), progress)


def counted(b: int, t: int, step: int) -> bool:
  """Whether step `step` of row t counts, read off the definition."""
  label = t + 2 + step
  if label >= 16 or BATCH.document[b, t] == 0:
    return False
  labels = range(t + 2, label + 1)
  return (BATCH.document[b, label] == BATCH.document[b, t]
          and all(BATCH.supervised[b, i] for i in labels)
          and all(int(BATCH.tokens[b, i]) in IDS for i in labels[:-1]))


def test_places_are_those_that_decoding_gets_to():
  params, _ = shared(THIRD)
  got = eagle.places(BATCH, params['inverse'], len(IDS), STEPS)
  want = np.zeros((2, 16, STEPS))
  for b in range(2):
    for t in range(16):
      for step in range(STEPS):
        if counted(b, t, step):
          want[b, t + 1 + step, step] = 1
  np.testing.assert_array_equal(got['valid'], want)
  assert (want.sum(axis=(0, 1)) > [14, 9, 5]).all()
  for b, u in np.argwhere(want[..., 0]):
    token = int(BATCH.tokens[b, u + 1])
    label = int(got['label'][b, u])
    assert IDS[label] == token if token in IDS else label == -1


@functools.partial(jax.jit, static_argnums=0)
def dense(task, params, seen):
  """Returns (log p [B,S,V], log q [B,K,S,V], outputs) by row, all at once."""
  out = task._unroll(params, TARGET, BATCH, seen, jax.random.key(1))
  q = jax.nn.log_softmax(task.model.spread(
      params, task.model.logits(params, out)), axis=-1)
  p = jax.nn.log_softmax(LM.head(TARGET, seen.final), axis=-1)
  return p, q, out


@pytest.mark.parametrize('recipe,model,renormalise', [
    ('ttt', THIRD, False), ('ttt', THIRD, True), ('hass', FIRST, False)])
def test_sums_are_those_of_dense_laws(recipe, model, renormalise):
  """Acceptance over the whole vocabulary, whatever the loss is."""
  extra = dict(feature_weight=0.7, top_k_weight=0.5, top_k=4)
  task = EagleTask(model, STEPS, recipe, KL, renormalise=renormalise,
                   **(extra if recipe == 'hass' else {}))
  params, seen = shared(model)
  loss, sums = evaluate(task, params, seen)
  p, q, out = (np.asarray(x, np.float64)
               for x in dense(task, params, seen))
  total = weights = 0.0
  want = {k: np.zeros(STEPS) for k in ('weight', 'acceptance', 'match')}
  for b in range(2):
    for t in range(16):
      for s in range(STEPS):
        if not counted(b, t, s):
          continue
        a, d = p[b, t + 1 + s], q[b, s, t]
        want['weight'][s] += 1
        want['acceptance'][s] += np.minimum(np.exp(a), np.exp(d)).sum()
        want['match'][s] += a.argmax() == d.argmax()
        a, d = a[IDS], d[IDS]
        if renormalise:
          a = a - np.log(np.exp(a).sum())
        value = (np.exp(a) * (a - d)).sum()
        if recipe == 'hass':
          top = np.argsort(-a)[:4]
          value -= 0.5 * (np.exp(a) * d)[top].sum()
          gap = np.abs(out[b, s, t] - np.asarray(seen.final)[b, t + 1 + s])
          value += 0.7 * np.where(gap < 1, gap ** 2 / 2, gap - 0.5).mean()
        total += 0.8 ** s * value
        weights += 0.8 ** s
  np.testing.assert_allclose(loss, total / weights, rtol=1e-4)
  for name, value in want.items():
    np.testing.assert_allclose(sums[name], value, rtol=1e-4)


def test_the_whole_vocabulary_needs_no_map():
  """W = V: renormalising changes nothing, nor does a map that keeps all."""
  params, seen = shared(THIRD, True)
  model = EagleModel(dataclasses.replace(
      THIRD.config, draft_vocab_size=VOCAB))
  task = EagleTask(model, STEPS, objective=KL)
  exact, _ = evaluate(task, params, seen)
  other, _ = evaluate(dataclasses.replace(task, renormalise=True), params,
                      seen)
  np.testing.assert_allclose(other, exact, rtol=1e-5)
  np.testing.assert_array_equal(params['head'], TARGET['head'])
  logits = jnp.asarray(tiny.noise((3, VOCAB), 1))
  np.testing.assert_array_equal(
      model.spread(params, logits),
      logits[:, params['inverse']])


def test_noise_moves_the_states_alone():
  """`noise * 256 / S` either way; another key, another loss."""
  params, seen = shared(FIRST)
  task = EagleTask(FIRST, 1, 'plain', KL, noise=0.2)
  out = [task._unroll(params, TARGET, BATCH, seen, jax.random.key(k))
         for k in (1, 1, 2)]
  np.testing.assert_array_equal(out[0], out[1])
  assert (out[0] != out[2]).any(axis=-1).all()
  still = dataclasses.replace(task, noise=0.0)
  assert evaluate(task, params, seen)[0] != evaluate(still, params, seen)[0]


def test_a_short_training_raises_acceptance():
  """The loss falls, and so do rejections when decoding with the source."""
  prompts = [[i, 2 * i % VOCAB] for i in range(1, 9)]
  texts = training.written(LM, TARGET, prompts, 22)
  task = EagleTask(EagleModel(EagleConfig(
      DECODER, VOCAB, taps=(0, 1, 2), own_head=True)), STEPS)
  fresh = task.attach(task.init(jax.random.key(0), TARGET), TARGET, ALL)
  _, drafter, reports = training.run(
      task, LM, TARGET, ALL, training.alone(texts, 2), 120, 1e-2)
  assert 'head' not in drafter

  def tau(params):
    return training.tau(
        LM, TARGET, task.source(), STEPS, params, prompts, 20)

  first, last = reports[0], reports[-1]
  assert last['loss'] < 0.5 * first['loss']
  rate = lambda r: r['acceptance'] / r['weight']  # noqa: E731
  assert (rate(last) > rate(first) + 0.2).all()
  before = tau(fresh)
  assert before < 1.5 and tau(drafter) > before + 0.8


def test_published_recipes():
  """Losses and passes of the papers; what can be changed."""
  plain, hass = (published(r, FIRST) for r in ('plain', 'hass'))
  ttt = published('ttt', THIRD, steps=5)
  assert (plain.num_draft, hass.num_draft, ttt.num_draft) == (1, 3, 5)
  assert plain.noise and plain.feature_weight == hass.feature_weight == 1
  assert hass.top_k_weight and hass.decay == 1 and ttt.renormalise
  np.testing.assert_allclose(
      objective.ttt_decay(5, ttt.decay), 0.8 ** np.arange(5), rtol=1e-6)
  for task in (plain, hass):
    params, seen = shared(FIRST)
    loss, sums = evaluate(task, params, seen)
    assert np.isfinite(loss) and (sums['feature_loss'] > 0).all()


@pytest.mark.parametrize('change', [
    {'recipe': 'x'}, {'steps': 0}, {'steps': 2, 'recipe': 'plain'},
    {'decay': 0.0}, {'decay': 1.1}, {'noise': -1.0}, {'top_k': 0},
    {'feature_weight': 1.0}])
def test_bad_values_raise(change):
  with pytest.raises(ValueError, match=next(iter(change))):
    EagleTask(THIRD, **change)
