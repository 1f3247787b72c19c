"""Heads on the target's state: the formula, one head or all, what is bad."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax.models import medusa
from specjax.models.medusa import HeadsConfig, HeadsModel

DIM, VOCAB, NUM = 5, 11, 3
IDS = np.setdiff1d(np.arange(VOCAB), [2, 7])
MEDUSA = HeadsConfig(
    embed_dim=DIM, vocab_size=VOCAB, draft_vocab_size=len(IDS), num_heads=NUM)
HYDRA = dataclasses.replace(
    MEDUSA, kind='hydra', num_layers=2, embed_scale=1.5, final_softcap=3.0)
VARIANTS = {
    'medusa': MEDUSA, 'hydra': HYDRA,
    'shared': dataclasses.replace(HYDRA, head='target'),
    'deep': dataclasses.replace(MEDUSA, num_layers=3)}
TARGET = {'embedding': jnp.asarray(tiny.noise((VOCAB, DIM), 0), jnp.float32),
          'head': jnp.asarray(tiny.noise((VOCAB, DIM), 1), jnp.float32)}
STATE = jnp.asarray(tiny.noise((4, 2, DIM), 2), jnp.float32)
PATH = jnp.asarray(np.random.default_rng(3).integers(0, VOCAB, (4, 2, NUM)))


def fresh(config):
  return HeadsModel(config).init(jax.random.key(0))


def made(config):
  """Returns a model and parameters that matter."""
  model = HeadsModel(config)
  net = {k: x + 0.4 * tiny.noise(x.shape, len(k))
         for k, x in fresh(config).items()}
  return model, model.attach(net, TARGET, IDS)


def laws(model, params, index=None, path=PATH):
  hidden = model.hidden(params, TARGET, STATE, path, index)
  return np.asarray(model.logits(params, hidden, index))


def expected(config, params, b: int, t: int, head: int) -> np.ndarray:
  """Returns f64[W] by the papers' formulas, one node at a time."""
  net = {k: np.asarray(x, np.float64) for k, x in params['net'].items()}
  silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
  state = np.asarray(STATE[b, t], np.float64)
  x, kept = state, state
  if config.kind == 'hydra':
    scale = config.embed_scale
    words = np.asarray(TARGET['embedding'])[PATH[b, t, :head + 1]] * scale
    x = np.concatenate([state, words.reshape(-1)])
    kept = state + x @ net['residual'][head, :len(x)]
  x = kept + silu(x @ net['linear'][head, :len(x)] + net['bias'][head])
  for layer in range(config.num_layers - 1):
    x = x + silu(x @ net['more_linear'][layer, head]
                 + net['more_bias'][layer, head])
  rows = np.asarray(TARGET['head'], np.float64)[IDS]
  if config.head == 'own':
    rows = rows + net['head'][head]
  cap = config.final_softcap
  return rows @ x if cap is None else np.tanh(rows @ x / cap) * cap


@pytest.mark.parametrize('name', VARIANTS)
def test_the_formula(name):
  model, params = made(VARIANTS[name])
  got = laws(model, params)
  assert got.shape == (4, 2, NUM, len(IDS)) and got.dtype == np.float32
  for b, t, head in np.ndindex(4, 2, NUM):
    np.testing.assert_allclose(
        got[b, t, head], expected(VARIANTS[name], params, b, t, head),
        atol=1e-4)


@pytest.mark.parametrize('name', VARIANTS)
def test_one_head_is_that_of_all(name):
  """By number, by a traced number, and with finished matrices."""
  model, params = made(VARIANTS[name])
  want, folded = laws(model, params), model.fold(params)
  one = jax.jit(lambda p, i: laws_traced(model, p, i))
  for head in range(NUM):
    for got in (laws(model, params, head), one(params, head),
                one(folded, head)):
      np.testing.assert_allclose(got, want[:, :, head], atol=1e-5)
  np.testing.assert_allclose(laws(model, folded), want, atol=1e-5)
  assert ('head' in folded['net']) is False


def laws_traced(model, params, index):
  hidden = model.hidden(params, TARGET, STATE, PATH, index)
  return model.logits(params, hidden, index)


def test_a_head_reads_the_path_up_to_its_own_token():
  model, params = made(HYDRA)
  base = laws(model, params)
  for place in range(NUM):
    other = PATH.at[..., place].set((PATH[..., place] + 1) % VOCAB)
    moved = np.abs(laws(model, params, path=other) - base).max((0, 1, 3))
    assert (moved[:place] == 0).all() and (moved[place:] > 1e-3).all()


@pytest.mark.parametrize('name', VARIANTS)
def test_fresh_heads_are_the_targets(name):
  """The whole vocabulary kept: the target's logits, untouched."""
  config = dataclasses.replace(
      VARIANTS[name], draft_vocab_size=VOCAB)
  model = HeadsModel(config)
  params = model.attach(fresh(config), TARGET, np.arange(VOCAB))
  want = np.asarray(STATE @ TARGET['head'].T)
  if config.final_softcap:
    want = np.tanh(want / config.final_softcap) * config.final_softcap
  got = model.logits(params, model.hidden(params, TARGET, STATE, PATH))
  np.testing.assert_array_equal(model.spread(params, got), got)
  for head in range(NUM):
    np.testing.assert_allclose(got[:, :, head], want, atol=1e-5)
  np.testing.assert_allclose(model.teacher(params, STATE), want, atol=1e-5)


def test_heads_for_a_target():
  config = medusa.for_target(tiny.CONFIGS['gemma3'], 20, kind='hydra')
  assert (config.embed_dim, config.vocab_size, config.draft_vocab_size) == (
      16, tiny.VOCAB, 20)
  assert (config.embed_scale, config.final_softcap) == (4.0, 20.0)
  whole = medusa.for_target(tiny.CONFIGS['llama'])
  assert whole.draft_vocab_size == tiny.VOCAB


@pytest.mark.parametrize('change', [
    {'kind': 'x'}, {'head': 'x'}, {'num_heads': 0}, {'num_layers': 0},
    {'draft_vocab_size': 0}, {'draft_vocab_size': VOCAB + 1}])
def test_bad_configurations_are_named(change):
  with pytest.raises(ValueError, match=next(iter(change))):
    dataclasses.replace(MEDUSA, **change)


def test_a_vocabulary_of_another_size_is_refused():
  with pytest.raises(ValueError, match='draft_vocab_size=9'):
    HeadsModel(MEDUSA).attach(fresh(MEDUSA), TARGET, np.arange(VOCAB))
