"""The EAGLE network against its papers' formulas, written out."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.models import eagle, rope
from specjax.models.eagle import EagleConfig
from specjax.models.eagle_model import EagleModel
from specjax.models.transformer_config import TransformerConfig
from tests import tiny

CONFIG = tiny.CONFIGS['llama']
VOCAB, SIZE, STEPS = CONFIG.vocab_size, 10, 3
# Compiled once, run for milliseconds.
_COMPILE = {'xla_backend_optimization_level': 0}
DECODER = TransformerConfig(
    vocab_size=VOCAB, num_layers=1, embed_dim=16, mlp_dim=24, num_heads=4,
    num_kv_heads=2, head_dim=8)
THIRD = EagleConfig(DECODER, VOCAB, taps=(0, 1, 2), own_head=True)
FIRST = EagleConfig(DECODER, VOCAB, version='1', fuse_bias=True)
CASES = {
    'eagle': FIRST, 'eagle3': THIRD,
    'deepspec': dataclasses.replace(
        THIRD, own_head=False, taps=(1,), decoder=dataclasses.replace(
            DECODER, qk_norm=True, qkv_bias=True, query_scale=0.3))}


@functools.cache
def made(config):
  """Returns (model, parameters, target, taps [2,S,m*D], tokens)."""
  target, model = tiny.params(CONFIG), EagleModel(config)
  net = jax.tree.map(
      lambda x: jnp.asarray(x + 0.3 * tiny.noise(x.shape, x.size), x.dtype),
      model.init(jax.random.key(0)))
  params = model.attach(net, target, np.arange(VOCAB))
  features = tiny.noise((2, SIZE, 16 * max(len(config.taps), 1)), 5)
  return (model, params, target, jnp.asarray(features, jnp.float32),
          jnp.asarray(tiny.tokens(2, SIZE)))


def norm(x, scale):
  power = jnp.mean(x * x, axis=-1, keepdims=True)
  return x / jnp.sqrt(power + DECODER.norm_eps) * scale['scale']


def literal(config, net, x, emb, attend):
  """One layer as the papers have it; `x, emb [S,D]`, one row each.

  `attend(q [S,4,8], k [S,2,8], v)` sees rotated queries and keys.
  """
  p, d = net['layer_0'], config.decoder
  if config.version == '1':
    x = jnp.concatenate([emb, x], -1) @ net['fuse'] + net['fuse_bias']
    u = x
  else:
    u = jnp.concatenate([norm(emb, p['embedding_norm']),
                         norm(x, p['attention_norm'])], -1)
  mixed = jnp.einsum('sd,dgqh->sgqh', u, p['attention']['qkv'])
  if d.qkv_bias:
    mixed = mixed + p['attention']['qkv_bias']
  q, k, v = mixed[:, :, :2], mixed[:, :, 2], mixed[:, :, 3]
  if d.qk_norm:
    q = norm(q, p['attention']['q_norm'])
    k = norm(k, p['attention']['k_norm'])
  h = x + attend(q.reshape(-1, 4, 8), k, v).reshape(-1, 32) @ (
      p['attention']['out'].reshape(32, 16))
  z = norm(h, p['mlp_norm'])
  gate, up = z @ p['mlp']['gate_up'][:, 0], z @ p['mlp']['gate_up'][:, 1]
  return h + (jax.nn.silu(gate) * up) @ p['mlp']['down']


def passes(config, net, given, emb):
  """HASS: passes over a whole text, [K,S,D], each shifted by one more.

  Pass F takes the predictions of pass F - 1, one row later, and sees true
  rows up to i - F + 1 and one row of every pass in between.
  """
  size, sets, out = given.shape[0], [], []
  i, j = np.arange(size)[:, None], np.arange(size)
  table = rope.tables(jnp.arange(size)[None], 8, config.decoder.rope_base)
  for depth in range(STEPS):  # F - 1
    seen = jnp.concatenate(
        [jnp.asarray(j <= i - depth)] + [
            jnp.asarray(j == i - depth + r) for r in range(1, depth + 1)], 1)

    def attend(q, k, v, seen=seen):
      sets.append((rope.rotate(k[None], table)[0], v))
      q = rope.rotate(q[None], table)[0]
      k, v = (jnp.repeat(jnp.concatenate(x), 2, axis=1)
              for x in zip(*sets, strict=True))
      scale = config.decoder.query_scale or 8 ** -0.5
      scores = jnp.einsum('shd,thd->hst', q, k) * scale
      probs = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
      return jnp.einsum('hst,thd->shd', probs, v)

    out.append(literal(config, net, given, emb, attend))
    later = jax.lax.stop_gradient(out[-1])
    given = jnp.concatenate([given[:1], later[:-1]])
  return jnp.stack(out)


@pytest.mark.parametrize('name', CASES)
@jax.default_matmul_precision('highest')
def test_unrolled_rows_are_the_passes_of_hass(name):
  """Outputs and, detached, gradients: row t, step s is row t + s of s + 1."""
  config = CASES[name]
  model, params, target, features, tokens = made(config)
  weight = jnp.asarray(tiny.noise((STEPS, SIZE, 16), 3))
  # The last row has no successor; early rows of late passes no past.
  i, depth = np.arange(SIZE), np.arange(STEPS)[:, None]
  live = ((i >= depth) & (i < SIZE - 1))[..., None]

  def written(net):
    observed = features[0]
    if config.version == '3':
      observed = observed @ net['fuse']
    emb = target['embedding'][jnp.roll(tokens[0], -1)]
    out = passes(config, net, observed, emb)
    return jnp.sum(jnp.where(live, out * weight, 0)), out

  def unrolled(net):
    seen = jnp.broadcast_to(jnp.tril(jnp.ones((SIZE, SIZE), bool)),
                            (2, SIZE, SIZE))
    out = model.unroll(
        {**params, 'net': net}, target, features, tokens,
        jnp.broadcast_to(jnp.arange(SIZE), (2, SIZE)), seen, STEPS, True)
    out = jnp.stack([jnp.roll(out[0, s], s, axis=0) for s in range(STEPS)])
    return jnp.sum(jnp.where(live, out * weight, 0)), out

  both = [jax.jit(jax.value_and_grad(f, has_aux=True),
                  compiler_options=_COMPILE)(params['net'])
          for f in (written, unrolled)]
  ((_, want), want_grad), ((_, got), got_grad) = both
  np.testing.assert_allclose(np.where(live, got, 0), np.where(live, want, 0),
                             atol=1e-4)
  for path, a in jax.tree.leaves_with_path(want_grad):
    b = functools.reduce(lambda x, k: x[k.key], path, got_grad)
    np.testing.assert_allclose(b, a, atol=1e-3 * max(1, np.abs(a).max()))
  assert np.abs(want).max() > 1


@functools.partial(jax.jit, static_argnums=0, compiler_options=_COMPILE)
def unroll(config, features, tokens, document):
  model, params, target, _, _ = made(config)
  seen = jnp.broadcast_to(jnp.tril(jnp.ones((SIZE, SIZE), bool)),
                          (2, SIZE, SIZE))
  seen &= document[:, None] == document[None]
  position = jnp.broadcast_to(jnp.arange(SIZE), (2, SIZE))
  return model.unroll(
      params, target, features, tokens, position, seen, STEPS)


ONE = jnp.ones((SIZE,), jnp.int32)


@pytest.mark.parametrize('name', ['eagle', 'eagle3'])
def test_rows_know_the_past_alone(name):
  """Step s of row t reads features up to t, tokens up to t + 1 + s."""
  _, _, _, features, tokens = made(CASES[name])
  base = unroll(CASES[name], features, tokens, ONE)
  moved = np.asarray(
      unroll(CASES[name], features.at[0, 5].add(1), tokens, ONE) != base)
  assert not moved[0, :, :5].any() and moved[0, :, 5:].any(axis=-1).all()
  other = tokens.at[0, 5].set((tokens[0, 5] + 1) % VOCAB)
  moved = unroll(CASES[name], features, other, ONE) != base
  moved = np.asarray(moved).any(axis=-1)
  for step in range(STEPS):
    assert not moved[0, step, :4 - step].any()
    assert moved[0, step, 4 - step:].all()
  assert not moved[1].any()


@pytest.mark.parametrize('name', ['eagle', 'eagle3'])
def test_packed_texts_do_not_see_each_other(name):
  """A second text of a row is as it is alone."""
  _, _, _, features, tokens = made(CASES[name])
  document = jnp.asarray([1] * 4 + [2] * 6)
  base = unroll(CASES[name], features, tokens, document)
  moved = unroll(CASES[name], features.at[:, :4].add(1), tokens, document)
  np.testing.assert_array_equal(base[:, :, 4:], moved[:, :, 4:])
  assert (base[:, :, :4] != moved[:, :, :4]).any(axis=-1).all()


def test_detached_outputs_change_gradients_only():
  model, params, target, features, tokens = made(THIRD)
  seen = jnp.broadcast_to(jnp.tril(jnp.ones((SIZE, SIZE), bool)),
                          (2, SIZE, SIZE))
  position = jnp.broadcast_to(jnp.arange(SIZE), (2, SIZE))

  def last(net, detach):
    out = model.unroll({**params, 'net': net}, target, features, tokens,
                       position, seen, STEPS, detach)
    return jnp.sum(out[:, -1] ** 2)

  whole, cut = (
      jax.jit(jax.value_and_grad(last), static_argnums=1,
              compiler_options=_COMPILE)(params['net'], detach)
      for detach in (False, True))
  np.testing.assert_allclose(whole[0], cut[0], rtol=1e-5)
  # With true states the last step alone reaches `fuse`, through its keys.
  gap = np.abs(whole[1]['fuse'] - cut[1]['fuse']).max()
  assert gap > 1e-2 * np.abs(whole[1]['fuse']).max()


def test_the_head_is_the_target_s_or_its_own():
  """Row order of a reduced vocabulary, the last norm, the soft cap."""
  ids = np.asarray([2, 3, 11, 30])
  target, hidden = tiny.params(CONFIG), jnp.asarray(tiny.noise((3, 16), 1))
  scale = jnp.asarray(1 + tiny.noise((16,), 2) / 4)
  capped = dataclasses.replace(DECODER, final_softcap=2.0)
  for version, own in (('1', False), ('3', False), ('3', True)):
    config = EagleConfig(
        capped, 4, version, taps=() if version == '1' else (1,), own_head=own)
    own_rows = jnp.asarray(tiny.noise((4, 16), 7))
    model = EagleModel(config)
    net = {**model.init(jax.random.key(0)),
           'final_norm': {'scale': scale}, 'head': own_rows}
    params = model.attach(net, target, ids)
    rows = np.asarray(own_rows if own else target['head'][ids])
    state = hidden if version == '1' else norm(hidden, {'scale': scale})
    want = np.asarray(state) @ rows.T
    want = want if own else 2 * np.tanh(want / 2)
    got = model.logits(params, hidden)
    np.testing.assert_allclose(got, want, atol=1e-4)
    wide = np.full((3, VOCAB), -np.inf)
    wide[:, ids] = want
    np.testing.assert_allclose(model.spread(params, got), wide, atol=1e-4)
    np.testing.assert_allclose(
        model.target_logits(params, target, hidden),
        2 * np.tanh(np.asarray(hidden @ target['head'][ids].T) / 2),
        atol=1e-4)
    with pytest.raises(ValueError, match='draft_vocab_size=4'):
      model.attach(net, target, ids[:3])


@pytest.mark.parametrize('num_layers', [12, 24, 30, 36])
def test_default_taps_are_the_published_ones(num_layers):
  assert eagle.default_taps(num_layers) == (
      2, num_layers // 2, num_layers - 3)


@pytest.mark.parametrize('change', [
    {'version': '2'}, {'taps': ()}, {'taps': (2, 1)}, {'taps': (1, 1)},
    {'draft_vocab_size': 0}, {'draft_vocab_size': 99},
    {'own_head': True, 'version': '1', 'taps': ()},
    {'decoder': dataclasses.replace(DECODER, post_norms=True)},
    {'decoder': dataclasses.replace(
        DECODER, local_layers=(True,), window=4)}])
def test_bad_configurations_are_named(change):
  with pytest.raises(ValueError, match=next(iter(change))):
    dataclasses.replace(THIRD, **change)
