"""A tiny causal decoder of images: weights, texts, what a round does."""

from __future__ import annotations

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates import walks
from specjax.core import loop
from specjax.core.types import Models
from specjax.models.causal_images import CausalImages
from specjax.models.diffusion import Diffusion
from specjax.models.diffusion_head import DenoisingMLP, GuidedHead
from specjax.models.transformer_config import TransformerConfig

NUM, CHANNELS, CLASSES, WIDTH, ROWS = 6, 2, 3, 16, 8
HEAD = DenoisingMLP(CHANNELS, WIDTH, 12, 1)
# Compiling takes longer than running.
jit = functools.partial(jax.jit, static_argnums=0, compiler_options={
    'xla_backend_optimization_level': 0})


def model(guided=False, layers=2, chunk=4, variance='lower', window=None,
          dtype='float32'):
  """Returns a tiny model, from a level where untrained heads behave."""
  config = TransformerConfig(
      vocab_size=1, num_conditions=CLASSES + 1, num_layers=layers,
      embed_dim=WIDTH, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8,
      window=window, dtype=dtype,
      local_layers=(True, False)[:layers] if window else ())
  return CausalImages(config, NUM, CHANNELS, CLASSES, Diffusion(
      GuidedHead(HEAD) if guided else HEAD, CHANNELS, num_levels=4,
      num_base=4, first=2, variance=variance), chunk)


@functools.cache
def weights(layers=2, seed=0):
  """Returns parameters that matter; smaller models share those they have."""
  def draw(path, x):
    name = f'{seed} {jax.tree_util.keystr(path)}'
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(
        0, 0.25 if x.ndim > 1 else 0.1, x.shape)
    return jnp.asarray(values + ('scale' in name or 'ln.weight' in name),
                       jnp.float32)
  return jax.tree_util.tree_map_with_path(
      draw, jax.eval_shape(model(layers=layers).random, jax.random.key(0)))


# A drafter that lacks a layer of the target's, and is off in the other.
NEAR = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, weights(1), weights(1, 1))
PARAMS = Models(target=weights(), drafter=NEAR)


def context(guidance=None, begun=True):
  """Returns images of all classes and several orders; some are begun."""
  rng = np.random.default_rng(0)
  have = np.arange(ROWS) % 3 * begun
  condition = {
      'order': jnp.asarray(np.stack(
          [rng.permutation(NUM) for _ in range(ROWS)]), jnp.int32),
      'label': jnp.asarray(np.arange(ROWS) % (CLASSES + 1), jnp.int32)}
  if guidance is not None:
    condition['guidance'] = jnp.broadcast_to(jnp.asarray(
        guidance, jnp.float32).reshape(ROWS, -1), (ROWS, NUM))
  return walks.context(
      rng.normal(size=(ROWS, 3, CHANNELS)), 1 + have, NUM - have,
      np.linspace(0.8, 1.0, ROWS), jax.random.split(jax.random.key(0), ROWS),
      room=NUM + 1, condition=condition)


class Spy:
  """Leaves behind what was proposed and scored, within one trace."""

  def __init__(self, inner):
    self.inner = inner

  def __getattr__(self, name):
    return getattr(self.inner, name)

  def propose(self, *args):
    self.caught, state = self.inner.propose(*args)
    return self.caught, state

  def score(self, *args):
    self.caught, state = self.inner.score(*args)
    return self.caught, state


@jit
def begin(engine, params, start):
  return loop.start(engine, params, loop.empty(engine, start),
                    ~start.done, chunk=2)


@jit
def step(engine, params, state):
  """Returns a round's draft, its scores, and the state after it."""
  spies = Spy(engine.drafter), Spy(engine.target)
  state = loop.step(
      engine._replace(drafter=spies[0], target=spies[1]), params, state)
  return spies[0].caught, spies[1].caught, state


@jit
def whole(lm, params, image, c, label):
  """Returns what is said, f32[ROWS,NUM,WIDTH], in one pass."""
  return lm.whole(params['mar'], image, c.condition['order'], label)


@jit
def score(lm, params, state, draft):
  return lm.score(params, state, draft, ())


def drafted(context, draft):
  """Returns texts with their drafts behind, and all places of images."""
  text = np.asarray(context.tokens).copy()
  image = np.full((ROWS, NUM, CHANNELS), 5.0, np.float32)
  for b, places in enumerate(np.asarray(context.condition['order'])):
    end = int(context.length[b]) + draft.tokens.shape[1]
    text[b, int(context.length[b]):end] = draft.tokens[b]
    made = text[b, 1:end][:NUM]
    image[b, places[:len(made)]] = made
  return text, image
