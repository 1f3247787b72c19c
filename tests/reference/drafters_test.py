"""Exported drafters, computed from their files alone, against our networks.

Block drafters and EAGLE-3 written down again in torch, as their papers and
files describe them: matrices (out, in), keys of context and block in one row.
"""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.host import interchange
from specjax.io import safetensors
from tests import published, tiny

torch = pytest.importorskip('torch')

pytestmark = pytest.mark.reference

TOLERANCE = 1e-4
LENGTH = 9


class Stored:
  """What a folder holds: tensors by name, and `config.json`."""

  def __init__(self, folder):
    self._tensors = {
        name: torch.from_numpy(x.read())
        for name, x in safetensors.read(folder).items()}
    values = json.loads((folder / 'config.json').read_text())
    self.values = values
    self.layers = values.get('transformer_layer_config', values)

  def __getitem__(self, name):
    return self._tensors[name]

  def has(self, name):
    return name in self._tensors

  def linear(self, name, x):
    out = x @ self[f'{name}.weight'].T
    return out + self[f'{name}.bias'] if self.has(f'{name}.bias') else out

  def norm(self, name, x):
    size = torch.rsqrt((x * x).mean(-1, keepdim=True)
                       + self.layers['rms_norm_eps'])
    return x * size * self[f'{name}.weight']


def turned(x, position, base):
  """Rotates `x [T,heads,H]`, first half against second half."""
  half = x.shape[-1] // 2
  speed = base ** (-torch.arange(half, dtype=torch.float64) / half)
  angle = torch.as_tensor(position, dtype=torch.float64)[:, None] * speed
  cos = angle.cos().float()[:, None]
  sin = angle.sin().float()[:, None]
  left, right = x[..., :half], x[..., half:]
  return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def attention(file, at, rows, query_position, others, position, seen):
  """Attention of `rows` over `others`; `seen bool[T,S]`."""
  c = file.layers
  heads, groups = c['num_attention_heads'], c['num_key_value_heads']
  q = file.linear(f'{at}q_proj', rows).reshape(len(rows), heads, -1)
  k = file.linear(f'{at}k_proj', others).reshape(len(others), groups, -1)
  v = file.linear(f'{at}v_proj', others).reshape(len(others), groups, -1)
  if file.has(f'{at}q_norm.weight'):
    q, k = file.norm(f'{at}q_norm', q), file.norm(f'{at}k_norm', k)
  q = turned(q, query_position, c['rope_theta'])
  k = turned(k, position, c['rope_theta'])
  out = []
  for head in range(heads):
    group = head // (heads // groups)
    scores = q[:, head] @ k[:, group].T / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    out.append(torch.softmax(scores, -1) @ v[:, group])
  return file.linear(f'{at}o_proj', torch.cat(out, -1))


def mlp(file, at, x):
  gate = torch.nn.functional.silu(file.linear(f'{at}gate_proj', x))
  return file.linear(f'{at}down_proj', gate * file.linear(f'{at}up_proj', x))


def block_states(file, features, anchor, position, embedding, mask_token):
  """States [b,D] of one block behind `features [T,mD]`."""
  size = file.values['block_size']
  z = embedding[[anchor] + [mask_token] * (size - 1)]
  context = file.norm('hidden_norm', file.linear('fc', features))
  here = np.arange(position, position + size)
  everywhere = np.concatenate([np.arange(len(context)), here])
  seen = torch.ones((size, len(everywhere)), dtype=torch.bool)
  for i in range(file.layers['num_hidden_layers']):
    at = f'layers.{i}.'
    u = file.norm(f'{at}input_layernorm', z)
    z = z + attention(file, f'{at}self_attn.', u, here,
                      torch.cat([context, u]), everywhere, seen)
    z = z + mlp(file, f'{at}mlp.',
                file.norm(f'{at}post_attention_layernorm', z))
  return file.norm('norm', z)


def ours_of_block(drafter, target, features, token, previous):
  """States [G,D], logits [G,W], the confidence's logit [G] by our code."""
  model = drafter.model
  params = model.attach(drafter.net, target.params, drafter.ids)
  position = len(features)
  states = model.blocks(
      params, jnp.asarray(features)[None], jnp.arange(position)[None],
      model.embed(target.params, jnp.full((1, 1), token)),
      jnp.full((1, 1), position), jnp.ones((1, 1, position), bool),
      model.mask(target.params))[0, 0]
  logits, sure = model.logits(params, states), None
  before = model.previous(params, target.params, jnp.asarray(previous))
  if before is not None:
    logits += model.bias(params, states, before)
  if model.config.confidence:
    sure = model.confidence_logit(params, states, before)
  return states, logits, sure


@pytest.mark.parametrize('name', [
    'zlab', 'deepspec-dflash', 'deepspec-dspark', 'speculators-dflash',
    'speculators-dspark'])
def test_a_block_from_its_file(tmp_path, name):
  case, target = published.CASES[name], published.target()
  folder = interchange.write(
      tmp_path / 'x', *case.drafter, format=case.format, target=target,
      **case.options)
  features = tiny.noise((LENGTH, 2 * 16), 5).astype(np.float32)
  previous = [4, 7, 11, 30]
  states, logits, sure = ours_of_block(
      case.drafter, target, features, 4, previous)

  file = Stored(folder)
  lent = {key: torch.from_numpy(target.matrix(key, ''))
          for key in ('embedding', 'head')}
  embedding = (file['embed_tokens.weight']
               if file.has('embed_tokens.weight') else lent['embedding'])
  head = (file['lm_head.weight'] if file.has('lm_head.weight')
          else lent['head'])
  token = {**file.values, **file.values.get('dflash_config', {})}[
      'mask_token_id']
  found = block_states(
      file, torch.from_numpy(features), 4, LENGTH, embedding, token)
  found = found[-case.config.num_slots:]
  np.testing.assert_allclose(found, states, atol=TOLERANCE)
  scores = found @ head.T
  if file.has('markov_head.markov_w1.weight'):
    before = file['markov_head.markov_w1.weight'][previous]
    both = torch.cat([found, before], -1)
    np.testing.assert_allclose(
        file.linear('confidence_head.proj', both)[:, 0], sure, atol=TOLERANCE)
    gate = 1.0
    if file.has('markov_head.gate_proj.weight'):
      gate = torch.sigmoid(file.linear('markov_head.gate_proj', both))
    scores = scores + file.linear('markov_head.markov_w2', gate * before)
  np.testing.assert_allclose(scores, logits, atol=TOLERANCE)


def rows_of_eagle(file, at, given, embedding, position):
  """Outputs [T,D] of rows one after another."""
  u = torch.cat([file.norm(f'{at}input_layernorm', embedding),
                 file.norm(f'{at}hidden_norm', given)], -1)
  seen = torch.ones((len(u), len(u)), dtype=torch.bool).tril()
  h = given + attention(
      file, f'{at}self_attn.', u, position, u, position, seen)
  return h + mlp(file, f'{at}mlp.',
                 file.norm(f'{at}post_attention_layernorm', h))


@pytest.mark.parametrize('name', ['eagle3', 'speculators-eagle3'])
def test_eagle_3_from_its_file(tmp_path, name):
  case, target = published.CASES[name], published.target()
  folder = interchange.write(
      tmp_path / 'x', *case.drafter, format=case.format, target=target)
  features = tiny.noise((LENGTH, 3 * 16), 6).astype(np.float32)
  tokens = tiny.tokens(1, LENGTH)[0]
  model = case.drafter.model
  params = model.attach(case.drafter.net, target.params, case.ids)
  seen = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
  outputs = model.unroll(
      params, target.params, jnp.asarray(features)[None],
      jnp.asarray(tokens)[None], jnp.arange(LENGTH)[None], seen, 2)
  logits = model.logits(params, outputs)[0]

  file = Stored(folder)
  at = 'midlayer.' if name == 'eagle3' else 'layers.0.'
  embedding = torch.from_numpy(target.matrix('embedding', ''))
  # Row t reads what was seen at t and the token after it.
  given = file.linear('fc', torch.from_numpy(features))[:-1]
  position = np.arange(LENGTH - 1)
  found = rows_of_eagle(file, at, given, embedding[tokens[1:]], position)
  scores = file.norm('norm', found) @ file['lm_head.weight'].T
  np.testing.assert_allclose(scores, logits[0, :-1], atol=TOLERANCE)

  # Then each row goes on from its own output, here the fifth.
  row = 4
  given = torch.cat([given[:row + 1], found[row:row + 1]])
  found = rows_of_eagle(
      file, at, given, embedding[tokens[1:row + 3]], np.arange(row + 2))
  scores = file.norm('norm', found[-1]) @ file['lm_head.weight'].T
  np.testing.assert_allclose(scores, logits[1, row], atol=TOLERANCE)
  tokens_of = np.arange(len(case.ids)) + file['d2t'].numpy().astype(int)
  np.testing.assert_array_equal(tokens_of, case.ids)


def test_eagle_1_from_its_file(tmp_path):
  case, target = published.CASES['eagle1'], published.target()
  folder = interchange.write(
      tmp_path / 'x', *case.drafter, format='eagle', target=target)
  features = tiny.noise((LENGTH, 16), 7).astype(np.float32)
  tokens = tiny.tokens(1, LENGTH)[0]
  model = case.drafter.model
  params = model.attach(case.drafter.net, target.params, case.ids)
  seen = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
  outputs = model.unroll(
      params, target.params, jnp.asarray(features)[None],
      jnp.asarray(tokens)[None], jnp.arange(LENGTH)[None], seen, 1)
  logits = model.logits(params, outputs)[0, 0]

  file = Stored(folder)
  embedding = file['embed_tokens.weight'][tokens[1:]]
  z = file.linear(
      'fc', torch.cat([embedding, torch.from_numpy(features)[:-1]], -1))
  position = np.arange(LENGTH - 1)
  causal = torch.ones((LENGTH - 1,) * 2, dtype=torch.bool).tril()
  for i in range(2):
    at = f'layers.{i}.'
    u = file.norm(f'{at}input_layernorm', z) if i else z
    z = z + attention(
        file, f'{at}self_attn.', u, position, u, position, causal)
    z = z + mlp(file, f'{at}mlp.',
                file.norm(f'{at}post_attention_layernorm', z))
  scores = z @ torch.from_numpy(target.matrix('head', '')).T
  np.testing.assert_allclose(scores, logits[:-1], atol=TOLERANCE)


@pytest.mark.parametrize('name', ['medusa', 'vllm_medusa'])
def test_heads_from_their_file(tmp_path, name):
  case, target = published.CASES[name], published.target()
  folder = interchange.write(
      tmp_path / 'x', *case.drafter, format=name, target=target)
  state = tiny.noise((LENGTH, 16), 8).astype(np.float32)
  model = case.drafter.model
  params = model.attach(case.drafter.net, target.params, case.ids)
  logits = model.logits(params, model.hidden(
      params, target.params, jnp.asarray(state), None))

  file = Stored(folder)
  for head in range(2):
    x = torch.from_numpy(state)
    if name == 'medusa':
      blocks, last = [f'{head}.0.linear'], f'{head}.1'
    else:
      blocks = [f'blocks.{head}.layers.{i}' for i in (0, 1)]
      last = f'lm_heads.{head}'
    for block in blocks:
      x = x + torch.nn.functional.silu(file.linear(block, x))
    np.testing.assert_allclose(
        file.linear(last, x), logits[:, head], atol=TOLERANCE)
