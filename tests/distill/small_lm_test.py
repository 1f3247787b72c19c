"""Training of small causal drafters: places, sums, stages, own texts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specjax.distill import losses, on_policy, small_lm, teacher
from specjax.distill.objective import Mixture
from specjax.distill.on_policy import OnPolicy
from specjax.distill.small_lm import SmallLMTask
from specjax.distill.task import Objective
from specjax.distill.trainer import Trainer
from specjax.models.causal import CausalLM
from specjax.models.small_lm import SmallLMConfig, SmallLMModel
from tests import tiny, training

CONFIG = tiny.CONFIGS['llama']
LM, TARGET = CausalLM(CONFIG, chunk=24), tiny.params(CONFIG)
VOCAB, STEPS = CONFIG.vocab_size, 3
IDS = training.IDS
MODEL = SmallLMModel(SmallLMConfig(dataclasses.replace(
    CONFIG, num_layers=1, embed_dim=12, tied=True), len(IDS)))


BATCH = training.packed()


@functools.cache
def fresh():
  """Returns (params, teacher), weights that matter."""
  net = training.moved(MODEL.init(jax.random.key(0)), 0.2)
  params = SmallLMTask(MODEL).attach(net, TARGET, IDS)
  return params, teacher.observe(LM, TARGET, BATCH, ())


@functools.partial(jax.jit, static_argnums=0)
def evaluate(task, params, seen):
  return task.loss(params, TARGET, BATCH, seen, jax.random.key(1), 0.0)


def counted(b: int, t: int, depth: int, every: bool) -> bool:
  """Whether place t counts at a depth, read off the definition."""
  def scored(i):
    return (i + 1 < 16 and i >= 0 and BATCH.document[b, i] > 0
            and BATCH.document[b, i] == BATCH.document[b, i + 1]
            and (every or bool(BATCH.supervised[b, i + 1])))
  return scored(t) and all(
      scored(i) and int(BATCH.tokens[b, i + 1]) in IDS
      for i in range(t - depth, t))


@pytest.mark.parametrize('every', [False, True])
def test_places(every):
  params, _ = fresh()
  got = small_lm.places(
      BATCH, params['inverse'], len(IDS), STEPS, every=every)
  want = [[[counted(b, t, k, every) for k in range(STEPS)]
           for t in range(16)] for b in range(2)]
  np.testing.assert_array_equal(got['valid'], want)
  assert np.sum(want, axis=(0, 1))[-1] > 3
  for b, t in np.argwhere(np.asarray(got['joined']) > 0):
    token = int(BATCH.tokens[b, t + 1])
    label = int(got['label'][b, t])
    assert IDS[label] == token if token in IDS else label == -1


@functools.partial(jax.jit, static_argnums=0)
def dense(stage, params, seen):
  """Returns (log p, log q [B,S,V]) of all places at once."""
  task = SmallLMTask(MODEL, stage)
  states = task._states(params, BATCH)
  logits = MODEL.lm.head(MODEL.lm_params(params), states)
  return (jax.nn.log_softmax(LM.head(TARGET, seen.final), axis=-1),
          jax.nn.log_softmax(logits, axis=-1))


@pytest.mark.parametrize('name', [
    'kl', 'reverse_kl', 'jsd', 'tvd', 'tvd_pp', 'nla', 'lk', 'ce'])
def test_sums_are_those_of_dense_laws(name):
  params, seen = fresh()
  task = SmallLMTask(MODEL, objective=Objective(
      Mixture(((name, 1.0),)), chunk=64), steps=STEPS)
  loss, sums = evaluate(task, params, seen)
  p, q = dense('align', params, seen)
  want = small_lm.places(BATCH, params['inverse'], len(IDS), STEPS)
  valid = np.asarray(want['valid'])
  alpha = np.minimum(np.exp(p), np.exp(q)).sum(axis=-1)
  match = np.argmax(p, axis=-1) == np.argmax(q, axis=-1)
  for key, value in (('weight', 1.0), ('acceptance', alpha),
                     ('match', match)):
    np.testing.assert_allclose(
        sums[key], (valid * np.broadcast_to(value, (2, 16))[..., None]).sum(
            axis=(0, 1)), rtol=1e-4)
  expected = losses.loss(
      name, p[..., IDS], q[..., IDS], jnp.asarray(valid[..., 0]),
      **({'label': want['label']} if name == 'ce' else {}))
  np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_before_alignment_the_text_is_the_teacher():
  """The loss of 'pretrain' is cross-entropy; no teacher is looked at."""
  params, _ = fresh()
  task = SmallLMTask(MODEL, 'pretrain', steps=STEPS)
  broken = teacher.Teacher(
      {}, jnp.full((2, 16, 16), jnp.nan), jnp.full((2, 16), jnp.nan),
      jnp.zeros((2, 16), jnp.int32))
  loss, sums = evaluate(task, params, broken)
  _, q = dense('pretrain', params, fresh()[1])
  places = small_lm.places(
      BATCH, params['inverse'], len(IDS), STEPS, every=True)
  label = np.asarray(BATCH.tokens)[:, 1:]
  taken = np.take_along_axis(
      np.asarray(q)[:, :-1], label[..., None], axis=-1)[..., 0]
  valid = np.asarray(places['valid'])[:, :-1]
  kept = valid[..., 0] * np.isin(label, IDS)
  np.testing.assert_allclose(
      loss, -(np.where(kept > 0, taken, 0)).sum() / valid[..., 0].sum(),
      rtol=1e-4)
  np.testing.assert_allclose(
      sums['acceptance'], (valid * np.exp(taken)[..., None]).sum((0, 1)),
      rtol=1e-4)
  match = np.argmax(q, axis=-1)[:, :-1] == label
  np.testing.assert_array_equal(
      sums['match'], (valid * match[..., None]).sum((0, 1)))
  program = jax.jit(
      lambda p: Trainer(task, LM, optax.sgd(1.0)).loss(
          p['net'], TARGET, {k: p[k] for k in ('ids', 'inverse')}, BATCH,
          jax.random.key(0), 0.0)).lower(params).compile()
  aligned = jax.jit(
      lambda p: Trainer(SmallLMTask(MODEL), LM, optax.sgd(1.0)).loss(
          p['net'], TARGET, {k: p[k] for k in ('ids', 'inverse')}, BATCH,
          jax.random.key(0), 0.0)).lower(params).compile()
  flops = [x.cost_analysis()['flops'] for x in (program, aligned)]
  assert flops[0] < 0.6 * flops[1]  # the target does not run


def test_text_beside_the_targets_laws():
  """`text_weight` adds cross-entropy where the target has nothing to say."""
  params, seen = fresh()
  alone, _ = evaluate(SmallLMTask(MODEL), params, seen)
  both, _ = evaluate(SmallLMTask(MODEL, text_weight=0.5), params, seen)
  _, q = dense('align', params, seen)
  places = small_lm.places(BATCH, params['inverse'], len(IDS), 1)
  other = np.asarray(places['joined'] - places['valid'][..., 0])
  label = np.asarray(places['label'])
  taken = np.take_along_axis(np.asarray(q)[..., IDS], np.maximum(
      label, 0)[..., None], axis=-1)[..., 0]
  extra = -np.where((label >= 0) & (other > 0), taken, 0).sum() / other.sum()
  np.testing.assert_allclose(both - alone, 0.5 * extra, rtol=1e-4)


def test_chosen_places_have_the_laws_of_training():
  params, seen = fresh()
  anchors = jnp.asarray([[1, 8], [4, 12]])
  got = jax.jit(SmallLMTask(MODEL, steps=STEPS).logits)(
      params, TARGET, BATCH, seen, anchors)
  _, q = dense('align', params, seen)
  for b in range(2):
    for a in range(2):
      at = int(anchors[b, a])
      np.testing.assert_allclose(
          jax.nn.log_softmax(got[b, a]), q[b, at:at + STEPS][:, IDS],
          atol=1e-4)


def test_stages_lead_to_acceptance():
  """Each stage goes on from the one before; the decoder accepts more."""
  prompts = [tiny.tokens(1, 3, seed=s)[0] for s in range(16)]
  batch = training.alone(training.written(LM, TARGET, prompts, 21), 3)

  def run(task, num, net=None):
    found, _, reports = training.run(
        task, LM, TARGET, IDS, batch, num, 0.02, net)
    return found, reports

  def tau(net):
    return training.tau(
        LM, TARGET, SmallLMTask(MODEL).source(), STEPS,
        MODEL.attach(net, TARGET, IDS), prompts, 21)

  first, plain = run(SmallLMTask(MODEL, 'pretrain', steps=STEPS), 40)
  assert plain[-1]['loss'] < 0.7 * plain[0]['loss']
  second, aligned = run(SmallLMTask(MODEL, steps=STEPS), 60, first)
  # Sampled drafts: the text alone shows one token of each law.
  share = [r['acceptance'][0] / r['weight'][0] for r in aligned]
  assert share[-1] > share[0] + 0.05
  assert tau(second) > tau(MODEL.init(jax.random.key(0))) + 0.25


def test_own_texts_are_answers_to_the_batchs_prompts():
  task = SmallLMTask(MODEL, on_policy=0.5, every=3, max_new=5)
  rows = {name: np.asarray(getattr(BATCH, name)) for name in (
      'tokens', 'document', 'position', 'supervised')}
  asked = on_policy.prompts(rows)
  assert [len(p) for p in asked] == [2, 2, 2]  # one document is a prompt
  own = OnPolicy(task, length=16, eos=(), seed=3)
  assert own.mix(0, rows) is rows
  params, _ = fresh()
  own.refresh(0, rows, params)
  mixed = own.mix(1, rows)
  assert {k: v.shape for k, v in mixed.items()} == {
      k: v.shape for k, v in rows.items()}
  np.testing.assert_array_equal(mixed['tokens'][1], rows['tokens'][1])
  heads = {tuple(p) for p in asked}
  assert {tuple(p) for p in on_policy.prompts(
      {k: v[:1] for k, v in mixed.items()})} <= heads
  answered = mixed['tokens'][0][mixed['supervised'][0]]
  assert len(answered) >= 5 and set(answered.tolist()) <= set(IDS.tolist())
  before = own.rows
  own.refresh(2, rows, params)
  assert own.rows is before
  own.refresh(3, rows, params)
  assert own.rows is not before
  loss, _ = jax.jit(lambda b: task.loss(
      params, TARGET, b, teacher.observe(LM, TARGET, b, ()),
      jax.random.key(0), 0.0))(teacher.batch_of(mixed))
  assert np.isfinite(loss)


@pytest.mark.parametrize('values,message', [
    ({'stage': 'finish'}, 'known are pretrain'), ({'steps': 0}, 'steps=0'),
    ({'on_policy': 1.0}, 'on_policy=1.0'), ({'every': 0}, 'every=0'),
    ({'stage': 'pretrain', 'on_policy': 0.5}, 'only stage "align"'),
    ({'objective': Objective(Mixture((('ce', 1.0),))), 'on_policy': 0.5},
     'its own text')])
def test_what_cannot_be(values, message):
  with pytest.raises(ValueError, match=message):
    SmallLMTask(MODEL, **values)
