"""Steps that train tokenizers and image decoders, on tiny ones."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specjax.distill import optimizer
from specjax.fit.image_lm import ImageObjective
from specjax.fit.step import Fitter
from specjax.fit.vq import VQObjective
from specjax.models import image_lm, vq
from specjax.models.image_lm import ImageLM
from specjax.models.transformer import drop
from specjax.models.vq import VQ, VQConfig

SMALL = VQConfig(num_codes=32, code_dim=4, channels=8, multipliers=(1, 2),
                 num_res_blocks=1, latent_dim=8, attention=False)
GRID = image_lm.shape(1, 2, 16, grid_width=2, vocab_size=11, num_classes=2)


def images(num=8, seed=0):
  """Returns uint8[N,8,8,3] of four colours, two in every image."""
  rng = np.random.default_rng(seed)
  colours = rng.integers(0, 256, (4, 3))
  picks = rng.integers(0, 4, (num, 2))
  found = np.zeros((num, 8, 8, 3), np.uint8)
  found[:, :4], found[:, 4:] = (
      colours[picks[:, i]][:, None, None] for i in range(2))
  return found


def fit(objective, batch, steps, rate=3e-3, **kwargs):
  """Returns `(state, fitter, reports)`."""
  fitter = Fitter(objective, optimizer.make(
      learning_rate=1.0, steps=1, schedule='constant'), **kwargs)
  state, reports = fitter.init(jax.random.key(0)), []
  for _ in range(steps):
    state, report = fitter.step(
        state, batch, jax.random.key(1), np.float32(rate))
    reports.append(jax.device_get(report))
  return state, fitter, reports


def test_a_tokenizer_learns_to_see():
  batch = {'image': jnp.asarray(images())}
  state, fitter, reports = fit(
      VQObjective(SMALL, dead_after=20), batch, 80, decay=0.9)
  assert reports[-1]['psnr'] > reports[0]['psnr'] + 8
  assert reports[-1]['loss'] < 0.3 * reports[0]['loss']
  _, scalars = fitter.evaluate(
      state.average, state.memory, batch, jax.random.key(0))
  assert scalars['psnr'] > reports[0]['psnr'] + 6
  out = VQ(SMALL).apply({'params': state.net}, vq.to_float(
      batch['image']))
  square = np.mean((np.asarray(out.image) / 2 - np.asarray(
      vq.to_float(batch['image'])) / 2) ** 2)
  _, scalars = fitter.evaluate(
      state.net, state.memory, batch, jax.random.key(0))
  np.testing.assert_allclose(
      scalars['psnr'], -10 * np.log10(square), rtol=1e-4)


def test_dead_codes_come_back_as_tokens():
  objective = VQObjective(SMALL, dead_after=3)
  net, memory = objective.init(jax.random.key(0))
  used = jnp.arange(32) < 5
  encoded = vq.unit(jax.random.normal(jax.random.key(1), (7, 4)))
  for _ in range(2):
    new, memory = objective.after(net, memory, (used, encoded),
                                  jax.random.key(2))
    np.testing.assert_array_equal(new['codebook'], net['codebook'])
  new, memory = objective.after(net, memory, (used, encoded),
                                jax.random.key(2))
  np.testing.assert_array_equal(new['codebook'][:5], net['codebook'][:5])
  assert all(any(np.array_equal(row, e) for e in encoded)
             for row in np.asarray(new['codebook'][5:]))
  assert not np.any(memory)
  off = dataclasses.replace(objective, dead_after=0)
  same, age = off.after(net, memory + 9, (used, encoded), jax.random.key(2))
  assert same is net and age[6] == 10 and age[0] == 0


def test_gradients_of_the_codes_are_those_of_the_formula():
  """Codebook and commitment terms against finite differences by hand."""
  batch = {'image': jnp.asarray(images(2))}
  net, memory = VQObjective(SMALL).init(jax.random.key(3))

  def codes(commitment):
    objective = VQObjective(SMALL, commitment=commitment)

    def only(net):
      loss, (scalars, _) = objective.loss(
          net, memory, batch, jax.random.key(0))
      del loss
      return scalars['codes']
    return jax.jit(jax.grad(only))(net)
  without, with_it = codes(0.0), codes(0.25)
  # The first term moves codes alone, the second the encoder alone.
  assert not any(np.any(x) for x in jax.tree.leaves(without['encoder']))
  assert np.any(without['codebook'])
  np.testing.assert_array_equal(without['codebook'], with_it['codebook'])
  assert any(np.any(x) for x in jax.tree.leaves(with_it['encoder']))


def test_features_are_added():
  batch = {'image': jnp.asarray(images(2))}
  net, memory = VQObjective(SMALL).init(jax.random.key(3))
  both = VQObjective(SMALL, features=jnp.square, feature_weight=2.0)
  plain, found = (jax.jit(x.loss)(net, memory, batch, jax.random.key(0))[0]
                  for x in (VQObjective(SMALL), both))
  image = vq.to_float(batch['image'])
  out = jax.jit(VQ(SMALL).apply)({'params': net}, image).image
  np.testing.assert_allclose(
      found - plain, 2 * np.mean((out ** 2 - image ** 2) ** 2), rtol=1e-4)
  with pytest.raises(ValueError, match='go together'):
    VQObjective(SMALL, feature_weight=1.0)
  with pytest.raises(ValueError, match='>= 0'):
    VQObjective(SMALL, l1=0.0, l2=0.0)


def test_a_decoder_learns_codes_by_class():
  codes = jnp.asarray([[1, 2, 3, 4], [7, 8, 9, 10]])
  batch = {'codes': codes, 'label': jnp.asarray([0, 1])}
  state, fitter, reports = fit(
      ImageObjective(GRID), batch, 60, rate=1e-2, decay=0.5)
  assert reports[-1]['accuracy'] == 1 and reports[-1]['loss'] < 0.2
  assert reports[0]['entropy'] > 2 > reports[-1]['entropy']
  # The null class has not been seen: it is no class's.
  loss, _ = fitter.evaluate(
      state.net, None, {**batch, 'label': jnp.asarray([2, 2])},
      jax.random.key(0))
  assert loss > 2 * reports[-1]['loss']


def test_the_pass_is_the_decoders():
  """Teacher-forced logits equal those of the cached decoder."""
  objective = ImageObjective(GRID)
  net, _ = objective.init(jax.random.key(0))
  codes = jnp.asarray([[1, 2, 3, 4], [7, 8, 9, 10]])
  found = objective.logits(net, codes, jnp.asarray([1, 2]))
  lm = ImageLM(GRID, chunk=4)
  tokens = jnp.asarray([[12, 1, 2, 3], [13, 7, 8, 9]])
  state = lm.empty(2, 8)
  for t in range(4):
    logits, state = lm.extend(
        net, state, tokens[:, t:t + 1], jnp.full((2,), t),
        jnp.ones((2, 1), bool))
    np.testing.assert_allclose(logits, found[:, t], atol=1e-5)


def test_dropout_acts_in_training_alone():
  kept = ImageObjective(GRID)
  dropped = ImageObjective(dataclasses.replace(GRID, dropout=0.5))
  net, _ = kept.init(jax.random.key(0))
  batch = {'codes': jnp.asarray([[1, 2, 3, 4]] * 64),
           'label': jnp.zeros(64, int)}

  def loss(objective, seed, train):
    return objective.loss(net, None, batch, jax.random.key(seed), train)[0]
  assert loss(dropped, 0, False) == loss(kept, 0, False)
  assert loss(kept, 0, True) == loss(kept, 1, True)
  assert loss(dropped, 0, True) != loss(dropped, 1, True)
  fitters = [Fitter(objective, optax.adam(1.0)) for objective in (
      kept, dropped)]
  found = [fitter.step(fitter.init(jax.random.key(0)), batch,
                       jax.random.key(1), np.float32(1e-3))[1]['loss']
           for fitter in fitters]
  assert found[0] != found[1]
  evaluated = [fitter.evaluate(net, None, batch, jax.random.key(1))[0]
               for fitter in fitters]
  assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_dropout_keeps_the_mean(rate):
  class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
      return drop(self, rate, x)
  x = jnp.ones((400, 400))
  y = Half().apply({}, x, rngs={'dropout': jax.random.key(0)})
  share = np.mean(np.asarray(y) == 0)
  # In steps of 1/256; five deviations of 160,000 coins.
  assert abs(share - round(256 * rate) / 256) < 5 * np.sqrt(rate / 160_000)
  np.testing.assert_allclose(np.mean(y), 1.0, atol=0.01)
  np.testing.assert_array_equal(Half().apply({}, x), x)


def test_a_step_that_is_not_finite_changes_nothing():
  batch = {'codes': jnp.asarray([[1, 2, 3, 4]]), 'label': jnp.asarray([0])}
  fitter = Fitter(ImageObjective(GRID), optax.adam(1.0))
  state = fitter.init(jax.random.key(0))
  broken = state.replace(net={
      **state.net, 'head': state.net['head'] * jnp.nan})
  before = jax.device_get(broken.net['layer_0'])
  after, report = fitter.step(
      broken, batch, jax.random.key(1), np.float32(1e-2))
  assert report['bad'] == 1 and after.bad == 1
  jax.tree.map(np.testing.assert_array_equal, before,
               jax.device_get(after.net['layer_0']))


def test_what_cannot_be():
  with pytest.raises(ValueError, match='decay'):
    Fitter(ImageObjective(GRID), optax.adam(1.0), decay=1.0)
  with pytest.raises(ValueError, match='classes and a grid'):
    ImageObjective(dataclasses.replace(GRID, grid_width=None))


def test_bytes_and_back():
  every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  np.testing.assert_array_equal(
      vq.to_bytes(vq.to_float(jnp.asarray(every))), every)
  np.testing.assert_array_equal(
      vq.to_bytes(jnp.asarray([-3.0, 3.0])), [0, 255])
