"""Training of heads: what is ahead of what, what counts, what is learnt."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import toys
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.distill import measure
from specjax.distill.medusa import ON_TEXT, HeadsTask
from specjax.distill.objective import Mixture
from specjax.distill.task import Objective
from specjax.distill.teacher import Batch, Teacher
from specjax.drafters import ChainLM
from specjax.models import medusa
from specjax.models.causal import CausalLM
from specjax.models.medusa import HeadsConfig, HeadsModel
from specjax.verify import Greedy
from tests import tiny, training

RING, NUM, SURE = 13, 3, 50.0
RINGS = HeadsConfig(embed_dim=RING, vocab_size=RING, draft_vocab_size=RING,
                    num_heads=NUM)
# The token after each: one cycle through all of them.
NEXT = np.empty(RING, np.int64)
NEXT[np.random.default_rng(0).permutation(RING)] = np.roll(
    np.random.default_rng(0).permutation(RING), -1)


@dataclasses.dataclass(frozen=True)
class Ring(toys.ToyLM):
  """A target that shows its logits as its state, in prompts too."""

  vocab_size: int = RING

  def init(self, params, state, position, fed, taps):
    state, _ = super().init(params, state, position, fed, taps)
    tokens = jnp.take_along_axis(state.context.tokens, jnp.minimum(
        position, state.context.tokens.shape[1] - 1), axis=1)
    return state, {'final': params.target['table'][0, tokens]}


def ring_params(shift: int):
  """Returns Models whose head i says what is `i + shift` ahead of t + 1."""
  step = np.eye(RING)[NEXT]  # row x is the one-hot of what follows x
  table = jnp.broadcast_to(
      jnp.asarray(SURE * step, jnp.float32), (RING,) * 3)
  target = {'table': table, 'embedding': jnp.eye(RING)}
  model = HeadsModel(RINGS)
  net = HeadsTask(model).init(jax.random.key(0), target)
  ahead = [np.linalg.matrix_power(step, i + shift).T for i in range(NUM)]
  net['head'] = jnp.asarray(np.stack(ahead) - np.eye(RING), jnp.float32)
  return Models(target=target,
                drafter=model.attach(net, target, np.arange(RING)))


def ring_batch():
  """Returns texts of the ring, two documents a row, and their teacher."""
  tokens = np.zeros((2, 12), np.int32)
  tokens[:, 0], tokens[:, 7] = [1, 5], [8, 2]
  for t in (*range(1, 7), *range(8, 12)):
    tokens[:, t] = NEXT[tokens[:, t - 1]]
  document = np.asarray([[1] * 7 + [2] * 4 + [0]] * 2)
  position = np.asarray([[*range(7), *range(5)]] * 2)
  batch = Batch(tokens=jnp.asarray(tokens), document=jnp.asarray(document),
                position=jnp.asarray(position),
                supervised=jnp.asarray(document > 0))
  final = jnp.asarray(SURE * np.eye(RING)[NEXT[tokens]], jnp.float32)
  return batch, Teacher(
      taps={}, final=final, log_z=jax.nn.logsumexp(final, axis=-1),
      top=jnp.argmax(final, axis=-1).astype(jnp.int32))


def ring_loss(params, batch, seen, **kwargs):
  task = HeadsTask(HeadsModel(RINGS), num_anchors=12, **kwargs)
  loss, sums = task.loss(params.drafter, params.target, batch, seen,
                         jax.random.key(0), jnp.float32(0))
  return float(loss), jax.tree.map(np.asarray, sums)


@pytest.mark.parametrize('shift', [0, 1, 2])
def test_a_head_speaks_of_the_token_after_the_pending_one(shift):
  """Only shift 1 is right, in training and in decoding."""
  params = ring_params(shift)
  right = shift == 1
  loss, sums = ring_loss(params, *ring_batch())
  # Pending tokens at 1 to 5 and at 8 to 9; head i needs token a + 1 + i.
  np.testing.assert_array_equal(sums['weight'], 2 * np.asarray([7, 5, 3]))
  share = 1.0 if right else 0.0
  np.testing.assert_allclose(
      sums['acceptance'] / sums['weight'], share, atol=1e-6)
  np.testing.assert_array_equal(sums['match'], share * sums['weight'])
  assert (loss < 1e-6) == right
  lm = Ring()
  source = HeadsTask(HeadsModel(RINGS)).source()
  engine = Engine(lm, ChainLM(NUM, source), Greedy())
  start = measure.context(
      [[1, int(NEXT[1])], [5, int(NEXT[5]), int(NEXT[NEXT[5]])]], 12)
  found = measure.acceptance(engine, params, start, chunk=4)
  assert found.tau == (NUM + 1 if right else 1)


def test_what_counts():
  """Prompts, other documents and tokens that cannot be drafted do not."""
  params = ring_params(1)
  batch, seen = ring_batch()
  late = batch.replace(supervised=batch.supervised.at[:, :4].set(False))
  _, sums = ring_loss(params, late, seen)
  np.testing.assert_array_equal(sums['weight'], 2 * np.asarray([5, 3, 1]))
  # Row 0 cannot be drafted beyond its token 4, which comes after pending 3.
  missing = int(batch.tokens[0, 4])
  ids = np.setdiff1d(np.arange(RING), [missing])
  model = HeadsModel(dataclasses.replace(RINGS, draft_vocab_size=RING - 1))
  task = HeadsTask(model, num_anchors=12)
  anchors = jnp.broadcast_to(jnp.arange(12), (2, 12))
  inverse = model.attach({}, params.target, ids)['inverse']
  rows = task.rows(batch, seen, anchors, anchors >= 0, inverse)
  valid = np.asarray(rows['valid'][0])
  np.testing.assert_array_equal(valid[0], 0)  # no state before it
  np.testing.assert_array_equal(valid[7], 0)  # another document's state
  np.testing.assert_array_equal(valid[2], [1, 1, 0])
  np.testing.assert_array_equal(valid[3], [1, 0, 0])
  np.testing.assert_array_equal(valid[4], [1, 1, 0])
  assert rows['label'][0, 3, 0] == -1


def test_heads_weigh_less_the_further_they_look():
  """Loss of wrong heads alone, by the share of their weights."""
  params, (batch, seen) = ring_params(1), ring_batch()
  far = params.drafter['net']['head'].at[2].set(0.0)
  drafter = {**params.drafter, 'net': {**params.drafter['net'], 'head': far}}
  losses = [ring_loss(params.replace(drafter=drafter), batch, seen,
                      decay=decay, objective=ON_TEXT)[0]
            for decay in (1.0, 0.5)]
  shares = [3 * d**2 / (7 + 5 * d + 3 * d**2) for d in (1.0, 0.5)]
  np.testing.assert_allclose(losses, SURE * np.asarray(shares), rtol=1e-5)


def test_chunks_change_nothing():
  params, (batch, seen) = ring_params(2), ring_batch()
  whole, sums = ring_loss(params, batch, seen)
  parts, other = ring_loss(
      params, batch, seen, objective=Objective(chunk=5 * NUM))
  np.testing.assert_allclose(whole, parts, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
               sums, other)


LM = CausalLM(tiny.CONFIGS['llama'], chunk=40)
PROMPTS = [[i, (3 * i) % tiny.VOCAB] for i in range(8)]


@pytest.mark.parametrize('kind,head,objective', [
    ('medusa', 'own', Objective(Mixture())), ('hydra', 'target', ON_TEXT)])
def test_training_raises_acceptance(kind, head, objective):
  target = tiny.params(LM.config)
  model = HeadsModel(medusa.for_target(
      LM.config, num_heads=NUM, kind=kind, head=head))
  task = HeadsTask(model, num_anchors=16, objective=objective)
  fresh = task.attach(
      task.init(jax.random.key(0), target), target, np.arange(tiny.VOCAB))
  batch = training.alone(training.written(LM, target, PROMPTS, 30), 2)
  _, drafter, reports = training.run(
      task, LM, target, np.arange(tiny.VOCAB), batch, 100, 1e-2)

  def tau(params):
    return training.tau(
        LM, target, task.source(), NUM, params, PROMPTS, 30)

  assert reports[-1]['loss'] < 0.5 * reports[0]['loss']
  assert tau(drafter) > tau(fresh) + 0.25
  # What training reports is what is accepted: the texts are greedy ones.
  assert (reports[-1]['match'] / reports[-1]['weight'] > 0.5).all()


@pytest.mark.parametrize('change', [
    {'num_anchors': 0}, {'decay': 0.0}, {'decay': 1.1}])
def test_bad_values_are_named(change):
  with pytest.raises(ValueError, match=next(iter(change))):
    HeadsTask(HeadsModel(RINGS), **change)
