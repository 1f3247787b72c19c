"""Losses of decoders of continuous tokens, and of drafters taught by them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from specjax.core import chains
from specjax.fit import mar as fit
from specjax.fit.mar import DistilledMAR, MARObjective, Masks
from specjax.models.causal_images import CausalImages
from specjax.models.diffusion import Diffusion
from specjax.models.diffusion_head import DenoisingMLP
from specjax.models.mar import MAR
from specjax.models.masked_images import MaskedImages
from specjax.models.transformer_config import TransformerConfig

NUM, CHANNELS, CLASSES = 6, 3, 2


def masked(width=8, **process):
  return MaskedImages(
      MAR(num_tokens=NUM, channels=CHANNELS, num_classes=CLASSES, width=width,
          num_encoder=1, num_decoder=1, num_heads=2, buffer=2),
      Diffusion(DenoisingMLP(CHANNELS, width, 8, 1), CHANNELS, **{
          'num_levels': 10, 'num_base': 40, **process}))


def causal(width=8, **process):
  return CausalImages(
      TransformerConfig(
          vocab_size=1, num_layers=1, embed_dim=width, mlp_dim=16, num_heads=2,
          num_kv_heads=2, head_dim=width // 2, num_conditions=CLASSES + 1),
      NUM, CHANNELS, CLASSES, masked(width, **process).process)


def stirred(lm, seed=0):
  """Returns random parameters, of heads as well (they begin at zero)."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32),
      lm.random(jax.random.key(seed)))


def batch(rows=16, seed=0):
  rng = np.random.default_rng(seed)
  return {'codes': jnp.asarray(
      rng.normal(size=(rows, NUM, CHANNELS)), jnp.float32),
          'label': jnp.asarray(rng.integers(0, CLASSES + 1, rows))}


KINDS = {'masked': masked, 'causal': causal}
by_kind = pytest.mark.parametrize('kind', KINDS)


@pytest.mark.parametrize(('masks', 'mean'), [
    (Masks(), 0.5), (Masks(0.7, 0.25), None), (Masks(0.5, 0.05), None)])
def test_how_many_tokens_are_hidden(masks, mean):
  hidden = np.asarray(masks.draw(jax.random.key(0), 4000, 50))
  share = hidden.mean(axis=1)
  assert share.min() >= max(masks.least, 1 / 50) and share.max() <= 1
  want = mean or stats.truncnorm.mean(
      (masks.least - 1) / masks.spread, 0, 1, masks.spread)
  # Rounded up to a whole number of tokens.
  assert share.mean() - 0.01 == pytest.approx(want, abs=0.012)
  # Which ones is a matter of chance: all places alike.
  assert np.ptp(hidden.mean(axis=0)) < 0.06


@by_kind
def test_before_training_the_error_is_the_noises_power(kind):
  """Heads begin by predicting nothing."""
  objective = MARObjective(KINDS[kind](), repeats=64)
  net, _ = objective.init(jax.random.key(0))
  loss, (scalars, _) = objective.loss(net, None, batch(64), jax.random.key(1))
  assert scalars['noise'] == pytest.approx(1.0, abs=0.02)
  assert loss == scalars['noise'] + scalars['bound']


@by_kind
@pytest.mark.parametrize('first', [None, 6])
def test_the_loss_by_hand(kind, first):
  """The same draws, in numpy; every token that counts has one weight."""
  lm = KINDS[kind](first=first)
  objective, net, key = MARObjective(lm, repeats=3), stirred(lm), (
      jax.random.key(3))
  loss, (scalars, _) = objective.loss(net, None, batch(), key)
  keys = jax.random.split(key, 3)
  z, tokens, counts = map(np.asarray, fit.said(
      lm, net, batch()['codes'], batch()['label'], keys[0], Masks()))
  top = 40 if first is None else 27  # round(6 * 39 / 9) = 26 is the last
  shape = (3, 16, NUM)
  level = np.asarray(jax.random.randint(keys[1], shape, 0, top))
  noise = np.asarray(jax.random.normal(keys[2], (*shape, CHANNELS)))
  grid = np.arange(41) / 40
  bar = np.cos((grid + 0.008) / 1.008 * np.pi / 2)**2
  beta = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
  signal = np.cumprod(1 - beta)
  before = np.append(1.0, signal[:-1])
  x = (np.sqrt(signal)[level][..., None] * tokens
       + np.sqrt(1 - signal)[level][..., None] * noise)
  guess, between = map(np.asarray, lm.process.head(
      net['head'], jnp.asarray(x, jnp.float32),
      fit.base(lm.process).time(jnp.asarray(level)), jnp.asarray(z)))
  mse = np.mean((guess - noise)**2, axis=-1)
  np.testing.assert_allclose(
      scalars['noise'], mse[:, counts].mean(), rtol=1e-4)
  # The bound: true posterior against the model's, in bits a channel.
  lower = beta * (1 - before) / (1 - signal)
  lower[0] = lower[1]
  at = lambda v: v[level][..., None]  # noqa: E731
  share = (between + 1) / 2
  variance = np.exp(share * np.log(at(beta)) + (1 - share) * np.log(at(lower)))
  a = at(beta * np.sqrt(before) / (1 - signal))
  b = at((1 - before) * np.sqrt(1 - beta) / (1 - signal))
  guessed = (x - np.sqrt(1 - at(signal)) * guess) / np.sqrt(at(signal))
  mean, true = a * guessed + b * x, a * tokens + b * x
  kl = 0.5 * (at(lower) / variance + (true - mean)**2 / variance - 1
              + np.log(variance / at(lower)))
  last = -stats.norm.logpdf(tokens, mean, np.sqrt(variance))
  bits = np.where(level[..., None] == 0, last, kl).mean(-1) / np.log(2)
  np.testing.assert_allclose(
      scalars['bound'], bits[:, counts].mean(), rtol=2e-3)
  np.testing.assert_allclose(loss, scalars['noise'] + scalars['bound'])


def test_the_bound_does_not_move_the_predicted_noise():
  """The last layer's noise half gets the squared error's gradient alone."""
  learned, fixed = (MARObjective(masked(variance=v)) for v in (
      'learned', 'lower'))
  net = stirred(learned.lm)
  a, b = (jax.grad(lambda net, o=o: o.loss(
      net, None, batch(), jax.random.key(0))[0])(net)['head'][
          'final_layer.linear.weight'] for o in (learned, fixed))
  np.testing.assert_allclose(a[:, :CHANNELS], b[:, :CHANNELS], atol=1e-6)
  assert np.abs(a[:, CHANNELS:]).max() > 1e-4 and not b[:, CHANNELS:].any()


def test_divergence_is_that_of_normal_laws():
  for mean, std, other, wide in ((0, 1, 0.3, 2), (1, 0.4, -1, 0.7)):
    p, q = stats.norm(mean, std), stats.norm(other, wide)
    want, _ = integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -20, 20)  # noqa: B023
    found = fit.divergence(*map(jnp.float32, (
        mean, np.log(std), other, np.log(wide))))
    assert found == pytest.approx(want, rel=1e-4)


@by_kind
@pytest.mark.parametrize('guidance', [1.0, 3.0])
def test_a_drafter_that_is_the_target_has_nothing_to_learn(kind, guidance):
  lm = KINDS[kind]()
  objective = DistilledMAR(lm, teacher=lm, task=0.0, guidance=guidance)
  net = stirred(lm)
  data = {**batch(), 'teacher': net}
  loss, (scalars, _) = objective.loss(net, None, data, jax.random.key(0))
  assert loss == pytest.approx(0, abs=1e-6)
  assert scalars['nats'] == pytest.approx(0, abs=1e-4)
  other = {**data, 'teacher': stirred(lm, 1)}
  assert objective.loss(net, None, other, jax.random.key(0))[0] > 1e-3


def test_nats_are_the_expected_log_ratio_of_a_path():
  """Against paths that are drawn, where the states are those of training.

  The drafter's head predicts the best noise for standard normal tokens, so
  its paths are the noised tokens of the batch.
  """
  def head(params, x, time, condition):
    del condition
    noise = jnp.sqrt(1 - time.signal)[..., None] * x
    return noise + params['shift'], jnp.zeros_like(x)

  process = Diffusion(head, CHANNELS, num_levels=10, num_base=40, first=7,
                      variance='upper')
  lm = dataclasses.replace(masked(), process=process)
  rows = 4000
  shift = {'mine': {'shift': jnp.float32(0)}, 'theirs': {
      'shift': jnp.float32(0.05)}}
  plain = lm.mar.init(jax.random.key(0))
  objective = DistilledMAR(lm, teacher=lm, task=0.0)
  # The task's loss would ask for learned variances: none here.
  data = {**batch(rows), 'teacher': {'mar': plain, 'head': shift['theirs']}}
  _, (scalars, _) = objective.loss(
      {'mar': plain, 'head': shift['mine']}, None, data, jax.random.key(0))
  laws = [chains.Path(process, shift[who], jnp.zeros((rows, 1)),
                       jnp.ones(rows)) for who in ('mine', 'theirs')]
  path = laws[0].sample(jax.random.split(jax.random.key(1), rows))
  mine, theirs = (law.tail(path[:, 0], 0).log_prob(path[:, 1:])
                  for law in laws)
  want = np.asarray(mine - theirs)
  assert scalars['nats'] == pytest.approx(
      want.mean(), abs=4 * want.std() / np.sqrt(rows) + 0.02 * want.mean())


@by_kind
def test_teacher_and_drafter_see_the_same(kind):
  """Masks or orders are drawn alike, whatever the size of the decoder."""
  small, large = KINDS[kind](8), KINDS[kind](16)
  key = jax.random.key(5)
  (_, a, c), (_, b, d) = (fit.said(
      lm, stirred(lm), batch()['codes'], batch()['label'], key, Masks())
      for lm in (small, large))
  np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(c, d)


@by_kind
def test_gradients_are_finite(kind):
  lm, teacher = KINDS[kind](8), KINDS[kind](16)
  objective = DistilledMAR(lm, teacher=teacher, guidance=2.0)
  data = {**batch(), 'teacher': stirred(teacher)}
  data['codes'] *= 50  # far from anything that was promised
  grads = jax.grad(lambda net: objective.loss(
      net, None, data, jax.random.key(0))[0])(stirred(lm))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(('values', 'message'), [
    ({'repeats': 0}, 'repeats=0'), ({'task': -1.0}, 'task=-1'),
    ({'task': 0.0, 'distil': 0.0}, 'one of them positive'),
    ({'teacher': None}, 'own kind'), ({'teacher': causal()}, 'own kind'),
    ({'teacher': masked(num_levels=8)}, 'num_levels: 10 of the drafter, 8'),
    ({'teacher': masked(first=5)}, 'first: None of the drafter, 5')])
def test_what_cannot_be_taught(values, message):
  with pytest.raises(ValueError, match=message):
    DistilledMAR(masked(), **{'teacher': masked(16), **values})


@pytest.mark.parametrize(('values', 'message'), [
    ({'least': 1.0}, 'least'), ({'least': -0.1}, 'least'),
    ({'spread': 0.0}, 'spread')])
def test_masks_out_of_range(values, message):
  with pytest.raises(ValueError, match=message):
    Masks(**values)


@pytest.mark.parametrize('taught', [False, True])
def test_training_multiplies_as_the_hardware_prefers(taught):
  """Float32 that means float32 is for densities; here it would cost most."""
  lm = causal()
  lm = dataclasses.replace(
      lm, config=dataclasses.replace(lm.config, dtype='bfloat16'))
  net = stirred(lm)
  objective, data = MARObjective(lm), batch()
  if taught:
    objective = DistilledMAR(lm, teacher=lm, guidance=2.0)
    data['teacher'] = net
  trained = str(jax.make_jaxpr(lambda x: objective.loss(
      x, None, data, jax.random.key(0))[0])(net))
  x = jnp.zeros((2, CHANNELS))
  decoded = str(jax.make_jaxpr(lambda p: lm.process.head(
      p, x, lm.process.time(jnp.zeros(2, jnp.int32)), jnp.zeros((2, 8))))(
          net['head']))
  assert 'HIGHEST' in decoded and 'HIGHEST' not in trained
  assert objective.lm.process.head.exact  # what is saved
