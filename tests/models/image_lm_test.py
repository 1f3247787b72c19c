"""LlamaGen's decoder against a plain one in numpy, and guidance by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.distill import measure
from specjax.drafters import ChainLM, Null
from specjax.models import image_lm, rope, weights
from specjax.models.guided import Guided
from specjax.models.image_lm import ImageLM
from specjax.verify import Greedy, Speculative
from tests import tiny

WIDTH, CODES, CLASSES = 4, 23, 3
CLASS = image_lm.shape(2, 2, 32, grid_width=WIDTH, vocab_size=CODES,
                       num_classes=CLASSES)
CAPTION = image_lm.shape(2, 2, 32, grid_width=WIDTH, vocab_size=CODES,
                         num_classes=None, caption=(5, 12))


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def official(config, w, tokens, cells, hidden, mask=None):
  """Returns logits [T,V] of one text, in the published layout of weights.

  Args:
    config: the shape. w: tensors by published names.
    tokens: ids of the image. cells: of all places, negative in the prefix.
    hidden: [P,D], the prefix. mask: bool[T,T], what each place sees.
  """
  c = config
  x = np.concatenate([hidden, w['tok_embeddings.weight'][tokens]])
  half, size = c.head_dim // 2, len(x)
  inv = 1 / 10000.0 ** (np.arange(0, half, 2) / half)
  place = np.stack([cells // c.grid_width, cells % c.grid_width], -1)
  angle = (place[..., None] * inv).reshape(size, 1, half)
  cos, sin = (np.where((cells >= 0)[:, None, None], f(angle), 0.0)
              for f in (np.cos, np.sin))

  def norm(x, name):
    power = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(power + 1e-5) * w[f'{name}.weight']

  def rotate(x):  # [T,heads,H], pairs side by side
    a, b = x[..., ::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(
        x.shape)

  seen = np.tril(np.ones((size, size), bool))
  if mask is not None:
    seen &= mask
  for i in range(c.num_layers):
    at = f'layers.{i}.'
    h = norm(x, at + 'attention_norm') @ w[at + 'attention.wqkv.weight'].T
    q, k, v = (t.reshape(size, c.num_heads, -1) for t in np.split(h, 3, -1))
    scores = np.einsum('qhd,khd->hqk', rotate(q), rotate(k))
    scores = np.where(seen, scores / np.sqrt(c.head_dim), -np.inf)
    h = np.einsum('hqk,khd->qhd', softmax(scores), v).reshape(size, -1)
    x = x + h @ w[at + 'attention.wo.weight'].T
    h = norm(x, at + 'ffn_norm')
    gate = h @ w[at + 'feed_forward.w1.weight'].T
    h = gate / (1 + np.exp(-gate)) * (h @ w[at + 'feed_forward.w3.weight'].T)
    x = x + h @ w[at + 'feed_forward.w2.weight'].T
  return norm(x, 'norm') @ w['output.weight'].T


def of_class(config, w, tokens, label):
  cells = np.arange(-1, len(tokens))
  hidden = w['cls_embedding.embedding_table.weight'][[label]]
  return official(config, w, tokens, cells, hidden)


def of_caption(config, w, tokens, features, length, is_null=False):
  """The caption is padded on its left; its columns are not seen."""
  prefix = config.grid_prefix
  if is_null:
    features = w['cls_embedding.uncond_embedding']
  h = features @ w['cls_embedding.cap_proj.fc1.weight'].T
  h = h / 2 * (1 + np.tanh(
      np.sqrt(2 / np.pi) * (h + 0.044715 * h ** 3)))
  h = h @ w['cls_embedding.cap_proj.fc2.weight'].T
  size = prefix + len(tokens)
  mask = np.arange(size)[None] >= prefix - length
  mask = mask | np.eye(size, dtype=bool)
  return official(config, w, tokens, np.arange(size) - prefix, h, mask)


def raw(lm, params, tokens, condition=None):
  """Returns the raw logits [B,V] after prompts [B,T], through the cache."""
  context = measure.context(tokens, 4).replace(condition=condition)
  engine = Engine(lm, Null(0), Greedy())

  @jax.jit
  def run(context, models):
    state = loop.empty(engine, context)
    state = loop.start(engine, models, state,
                       jnp.ones((len(tokens),), bool), chunk=4)
    draft, state = Null(0).propose(models, state)
    return lm.raw(models, state, draft, ())[0][:, 0]
  return np.asarray(run(context, Models(target=params)))


@pytest.fixture(scope='module', params=['class', 'caption'])
def kind(request):
  config = CLASS if request.param == 'class' else CAPTION
  params = tiny.params(config)
  return config, params, weights.export(config, params, 'llamagen')


def test_cells_are_rotated_by_row_and_column():
  cos, sin = rope.grid_tables(jnp.asarray([[-2, 0, 6]]), 8, 10000.0, WIDTH)
  assert not np.any(cos[0, 0]) and not np.any(sin[0, 0])
  np.testing.assert_array_equal(cos[0, 1], np.ones(4))
  # Cell 6 is row 1, column 2; frequencies 1 and 0.01.
  np.testing.assert_allclose(
      sin[0, 2], np.sin([1, 0.01, 2, 0.02]), rtol=1e-6)


def test_weights_go_back_and_forth(kind):
  config, params, tensors = kind
  found = image_lm.from_llamagen(tensors, grid_width=WIDTH)
  expected = dataclasses.replace(
      config, num_heads=found.num_heads, num_kv_heads=found.num_heads,
      head_dim=found.head_dim)
  assert found == expected
  again = weights.load(
      config, tensors.__getitem__, tensors, scheme='llamagen')
  for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(again),
                      strict=True):
    if old.shape == new.shape and config.caption_dim is None:
      np.testing.assert_array_equal(old, new)
  for name in tensors:
    np.testing.assert_array_equal(
        tensors[name], weights.export(config, again, 'llamagen')[name])


def test_logits_are_the_published_architectures(kind):
  config, params, tensors = kind
  lm, tokens = ImageLM(config, chunk=8), tiny.tokens(2, 6, seed=3) % CODES
  if config.caption_dim is None:
    prompt = np.concatenate([[[CODES + 1], [CODES + 3]], tokens], axis=1)
    found = raw(lm, params, prompt)
    expected = [of_class(config, tensors, t, label)[-1]
                for t, label in zip(tokens, (1, 3), strict=True)]
  else:
    features = tiny.noise((2, 5, 12), 1).astype(np.float32)
    lengths = np.asarray([5, 2], np.int32)
    prompt = np.concatenate([np.full((2, 5), CODES), tokens], axis=1)
    found = raw(lm, params, prompt, {
        'caption': jnp.asarray(features),
        'caption_length': jnp.asarray(lengths)})
    expected = [of_caption(config, tensors, t, f, n)[-1]
                for t, f, n in zip(tokens, features, lengths, strict=True)]
  np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize('scale', [0.0, 1.0, 3.0])
def test_guided_logits_are_two_views(kind, scale):
  config, params, tensors = kind
  lm = Guided(ImageLM(config, chunk=8), scale=scale)
  tokens = tiny.tokens(2, 3, seed=5) % CODES
  condition = None
  if config.caption_dim is None:
    prompt = np.concatenate([[[CODES], [CODES + 2]], tokens], axis=1)
    views = [(of_class(config, tensors, t, label)[-1],
              of_class(config, tensors, t, CLASSES)[-1])
             for t, label in zip(tokens, (0, 2), strict=True)]
  else:
    features = tiny.noise((2, 5, 12), 1).astype(np.float32)
    lengths = np.asarray([4, 1], np.int32)
    prompt = np.concatenate([np.full((2, 5), CODES), tokens], axis=1)
    condition = {'caption': jnp.asarray(features),
                 'caption_length': jnp.asarray(lengths)}
    views = [(of_caption(config, tensors, t, f, n)[-1],
              of_caption(config, tensors, t, f, n, True)[-1])
             for t, f, n in zip(tokens, features, lengths, strict=True)]
  expected = [u + scale * (w - u) for w, u in views]
  np.testing.assert_allclose(
      raw(lm, params, prompt, condition), expected, atol=1e-3)
  own = {**(condition or {}), 'guidance': jnp.asarray([scale, 1.0])}
  expected[1] = views[1][0]
  np.testing.assert_allclose(
      raw(dataclasses.replace(lm, scale=9.0), params, prompt, own),
      expected, atol=1e-3)


def test_guidance_ends_after_its_steps():
  params = tiny.params(CLASS)
  prompt = np.asarray([[CODES + 1, 4, 7]])
  plain = raw(ImageLM(CLASS, chunk=8), params, prompt)
  both = [raw(Guided(ImageLM(CLASS, chunk=8), 3.0, steps), params, prompt)
          for steps in (2, 3)]  # token 2 is next
  np.testing.assert_allclose(both[0], plain, atol=1e-5)
  assert np.abs(both[1] - plain).max() > 0.1


@pytest.mark.parametrize('rule', ['greedy', 'sampled'])
def test_drafts_leave_the_guided_text_as_it_is(rule):
  """Chains of a guided drafter; a text of 16 cells from the class alone."""
  params = tiny.params(CLASS)
  lm = Guided(ImageLM(CLASS, chunk=8), scale=2.5)
  prompts = np.asarray([[CODES], [CODES + 2]])
  temperature = 0.0 if rule == 'greedy' else 1.0
  found = {}
  for name, drafter in (('null', Null(3)), ('own', ChainLM(
      model=lm, num_speculative_tokens=3))):
    out = measure.acceptance(
        Engine(lm, drafter, Greedy() if rule == 'greedy' else Speculative()),
        Models(target=params, drafter=params),
        measure.context(prompts, 16, temperature=temperature, size=24),
        chunk=4)
    found[name] = out
    assert all((t < CODES).all() for t in map(np.asarray, (
        row[1:] for row in out.texts)))
  if rule == 'greedy':
    for a, b in zip(found['null'].texts, found['own'].texts, strict=True):
      np.testing.assert_array_equal(a, b)
  # The model is its own drafter: whatever it drafts is accepted.
  assert found['own'].tau > 3.5


def test_errors():
  with pytest.raises(ValueError, match='no conditions'):
    Guided(ImageLM(tiny.CONFIGS['llama']))
  with pytest.raises(ValueError, match="size='Q'"):
    image_lm.config_of('Q')
  with pytest.raises(ValueError, match='grid_width'):
    dataclasses.replace(CLASS, grid_width=0)
  with pytest.raises(Exception, match='cls_embedding'):
    image_lm.from_llamagen({'output.weight': np.zeros((3, 4)),
                            'layers.0.x': np.zeros(1)})
  with pytest.raises(ValueError, match='caption'):
    raw(ImageLM(CAPTION, chunk=8), tiny.params(CAPTION),
        np.asarray([[CODES] * 5 + [1]]))


@pytest.mark.parametrize('size,millions', [
    ('B', 110.9), ('L', 342.9), ('XL', 774.7), ('XXL', 1411), ('3B', 3100)])
def test_published_sizes(size, millions):
  found = image_lm.config_of(size).num_params / 1e6
  np.testing.assert_allclose(found, millions, rtol=2e-3)
