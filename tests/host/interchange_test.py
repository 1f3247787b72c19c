"""Drafters in the formats of others: names, values, both ways."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.host import interchange
from specjax.host.generate import generate
from specjax.host.load import Model
from specjax.io import safetensors
from specjax.io.errors import FormatError
from specjax.io.options import Sampling
from specjax.models.block_model import BlockModel
from specjax.models.causal import CausalLM
from tests import published
from tests.published import (
  ALL,
  CASES,
  SOME,
  edit,
  edit_tensors,
  values,
  write,
)

# As the projects document them, with D=16, F=24, 4 heads and 2 of keys and
# values of 8, V=31, 29 of them kept.
LAYER = {
    'input_layernorm.weight': (16,), 'post_attention_layernorm.weight': (16,),
    'self_attn.q_proj.weight': (32, 16), 'self_attn.k_proj.weight': (16, 16),
    'self_attn.v_proj.weight': (16, 16), 'self_attn.o_proj.weight': (16, 32),
    'mlp.gate_proj.weight': (24, 16), 'mlp.up_proj.weight': (24, 16),
    'mlp.down_proj.weight': (16, 24)}
NORMED = {**LAYER, 'self_attn.q_norm.weight': (8,),
          'self_attn.k_norm.weight': (8,)}
MIDDLE = {**LAYER, 'hidden_norm.weight': (16,),
          'self_attn.q_proj.weight': (32, 32),
          'self_attn.k_proj.weight': (16, 32),
          'self_attn.v_proj.weight': (16, 32)}
FIRST = {k: v for k, v in LAYER.items() if k != 'input_layernorm.weight'}


def at(prefix: str, tensors: dict) -> dict:
  return {prefix + name: shape for name, shape in tensors.items()}


DFLASH = {
    'fc.weight': (16, 32), 'hidden_norm.weight': (16,), 'norm.weight': (16,),
    **at('layers.0.', NORMED), **at('layers.1.', NORMED)}
LENT = {'embed_tokens.weight': (31, 16), 'lm_head.weight': (31, 16)}
MAPS = {'d2t': (29,), 't2d': (31,)}
EAGLE3 = {'fc.weight': (16, 48), 'norm.weight': (16,),
          'lm_head.weight': (29, 16), **MAPS}
GOLDEN = {
    'zlab': DFLASH,
    'deepspec-dflash': {**DFLASH, **LENT},
    'deepspec-dspark': {
        **DFLASH, **LENT, 'markov_head.markov_w1.weight': (31, 6),
        'markov_head.markov_w2.weight': (31, 6),
        'markov_head.gate_proj.weight': (6, 22),
        'markov_head.gate_proj.bias': (6,),
        'confidence_head.proj.weight': (1, 22),
        'confidence_head.proj.bias': (1,)},
    'speculators-dflash': DFLASH,
    'speculators-dspark': {
        **DFLASH, **MAPS, 'lm_head.weight': (29, 16),
        'markov_head.markov_w1.weight': (31, 6),
        'markov_head.markov_w2.weight': (29, 6),
        'confidence_head.proj.weight': (1, 22),
        'confidence_head.proj.bias': (1,)},
    'speculators-eagle3': {
        **EAGLE3, **at('layers.0.', {**NORMED, **MIDDLE})},
    'eagle1': {
        'embed_tokens.weight': (31, 16), 'fc.weight': (16, 32),
        'fc.bias': (16,), **at('layers.0.', FIRST),
        **at('layers.1.', LAYER)},
    'eagle3': {**EAGLE3, **at('midlayer.', MIDDLE)},
    'medusa': {
        '0.0.linear.weight': (16, 16), '0.0.linear.bias': (16,),
        '0.1.weight': (31, 16), '1.0.linear.weight': (16, 16),
        '1.0.linear.bias': (16,), '1.1.weight': (31, 16)},
    'vllm_medusa': {
        'token_map': (29,), **{
            f'{name}.{i}.{rest}': shape for i in (0, 1)
            for name, rest, shape in (
                ('blocks', 'layers.0.weight', (16, 16)),
                ('blocks', 'layers.0.bias', (16,)),
                ('blocks', 'layers.1.weight', (16, 16)),
                ('blocks', 'layers.1.bias', (16,)),
                ('lm_heads', 'weight', (29, 16)))}},
}


def assert_same(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), ours, theirs)


@pytest.mark.parametrize('name', CASES)
def test_what_is_written_is_read(tmp_path, name):
  case = CASES[name]
  read = interchange.read(write(tmp_path, name), published.target())
  assert read.config == case.config
  np.testing.assert_array_equal(read.ids, case.ids)
  net = case.drafter.net
  if 'medusa' in name:  # heads are stored with the target's rows added
    read.net['head'], head = net['head'], read.net['head']
    np.testing.assert_allclose(head, net['head'], atol=1e-6)
  assert_same(read.net, net)
  assert {x.dtype for x in jax.tree.leaves(read.net)} == {jnp.dtype('float32')}


@pytest.mark.parametrize('name', CASES)
def test_names_and_shapes_are_the_documented_ones(tmp_path, name):
  found = safetensors.read(write(tmp_path, name))
  assert {k: x.shape for k, x in found.items()} == GOLDEN[name]


def test_ids_are_stored_as_offsets(tmp_path):
  found = safetensors.read(write(tmp_path, 'eagle3'))
  assert (found['d2t'].dtype, found['t2d'].dtype) == ('I64', 'BOOL')
  offsets = found['d2t'].load()
  # Tokens 3 and 11 are left out.
  np.testing.assert_array_equal(offsets, [0] * 3 + [1] * 7 + [2] * 19)
  np.testing.assert_array_equal(np.arange(29) + offsets, SOME)
  np.testing.assert_array_equal(np.flatnonzero(found['t2d'].load()), SOME)


def test_a_reduced_head_of_the_target_is_its_rows(tmp_path):
  found = safetensors.read(write(tmp_path, 'speculators-dspark'))
  head = np.asarray(published.target().params['head'])
  np.testing.assert_array_equal(found['lm_head.weight'].read(), head[SOME])


def test_layers_are_named_as_each_project_does(tmp_path):
  # Ours are the streams entering layers 1 and 2; layers 0 and 1 leave them.
  zlab = values(write(tmp_path, 'zlab'))
  assert zlab['dflash_config'] == {
      'target_layer_ids': [0, 1], 'mask_token_id': 3}
  assert (zlab['block_size'], zlab['num_target_layers']) == (5, 2)
  deepspec = values(write(tmp_path, 'deepspec-dspark'))
  assert (deepspec['target_layer_ids'], deepspec['block_size']) == ([0, 1], 4)
  plain = values(write(tmp_path, 'speculators-dflash'))
  assert plain['aux_hidden_state_layer_ids'] == [1, 2]
  assert (plain['sample_from_anchor'], plain['block_size']) == (False, 5)
  dspark = values(write(tmp_path, 'speculators-dspark'))
  assert (dspark['sample_from_anchor'], dspark['block_size']) == (True, 4)
  method, = dspark['speculators_config']['proposal_methods']
  assert method['speculative_tokens'] == 4
  eagle = values(write(tmp_path, 'eagle3'))
  assert eagle['eagle_aux_hidden_state_layer_ids'] == [0, 1, 2]
  assert eagle['eagle_config']['eagle_aux_hidden_state_layer_ids'] == [
      -1, 0, 1]


def test_a_config_without_sample_from_anchor_has_the_mask_layout(tmp_path):
  folder = write(tmp_path, 'speculators-dflash')
  edit(folder, sample_from_anchor=None)
  config = interchange.read(folder, published.CONFIG).config
  assert (config.layout, config.num_slots) == ('mask', 4)


def test_layers_of_eagle_3_have_defaults_and_two_spellings(tmp_path):
  folder = write(tmp_path, 'eagle3')
  key = 'eagle_aux_hidden_state_layer_ids'
  edit(folder, **{key: None})
  assert interchange.read(folder, published.CONFIG).config.taps == (0, 1, 2)
  edit(folder, eagle_config=None)
  target = dataclasses.replace(published.CONFIG, num_layers=12)
  assert interchange.read(folder, target).config.taps == (2, 6, 9)


def test_the_target_is_named(tmp_path):
  found = values(write(tmp_path, 'speculators-eagle3'))
  assert found['speculators_config']['verifier'] == {
      'name_or_path': 'owner/target', 'architectures': ['LlamaForCausalLM']}
  assert found['specjax']['revision'] == 'abc'
  assert found['norm_before_residual'] is False


@pytest.mark.parametrize('name', ['zlab', 'speculators-dspark', 'eagle3'])
def test_bfloat16_halves_the_file(tmp_path, name):
  folder = write(tmp_path, name, dtype='bfloat16')
  found = safetensors.read(folder)
  assert {x.dtype for x in found.values()} <= {'BF16', 'I64', 'BOOL'}
  read = interchange.read(folder, published.target())
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2 ** -8),
      read.net, CASES[name].drafter.net)


def test_a_markov_projection_is_written_as_a_table(tmp_path):
  case = CASES['deepspec-dspark']
  config = dataclasses.replace(
      case.config, markov_input='embedding', mask_token=3)
  net, target = published.net(config), published.target()
  folder = interchange.write(
      tmp_path / 'x', config, net, ALL, format='deepspec', target=target)
  found = safetensors.read(folder)['markov_head.markov_w1.weight'].read()
  model = BlockModel(config)
  params = model.attach(net, target.params, ALL)
  want = model.previous(params, target.params, jnp.arange(31))
  np.testing.assert_allclose(found, want, atol=1e-6)
  read = interchange.read(folder, target)
  assert read.config == dataclasses.replace(config, markov_input='table')
  params = read.model.attach(read.net, target.params, ALL)
  np.testing.assert_allclose(
      read.model.previous(params, target.params, jnp.arange(31)), want,
      atol=1e-6)


def test_rows_of_tokens_that_are_not_kept_become_their_mean(tmp_path):
  folder = write(tmp_path, 'speculators-dspark')
  name = 'markov_head.markov_w1.weight'
  edit_tensors(folder, lambda t: t.update({
      name: np.arange(31 * 6, dtype=np.float32).reshape(31, 6)}))
  with pytest.warns(UserWarning, match='2 tokens outside'):
    table = interchange.read(folder, published.target()).net['markov_in']
  np.testing.assert_array_equal(table[:3], np.arange(18).reshape(3, 6))
  np.testing.assert_array_equal(table[-1], 7 * 6 + np.arange(6))


def test_a_mask_row_of_its_own_is_a_trained_vector(tmp_path):
  target = published.target()
  folder = write(tmp_path, 'deepspec-dflash')
  read = interchange.read(folder, target)
  assert read.config.mask_token == 3 and 'mask' not in read.net
  # Without the target's weights nobody knows what its row holds.
  read = interchange.read(folder, published.CONFIG)
  assert read.config.mask_token is None
  np.testing.assert_array_equal(
      read.net['mask'], target.params['embedding'][3])


def test_a_confidence_head_that_reads_states_alone(tmp_path):
  folder = write(tmp_path, 'speculators-dspark')
  edit(folder, confidence_head_with_markov=False)
  name = 'confidence_head.proj.weight'
  edit_tensors(folder, lambda t: t.update({name: t[name][:, :16]}))
  weight = interchange.read(folder, published.target()).net['confidence_out']
  assert weight.shape == (22,) and not weight[16:].any()


def test_frozen_heads_of_medusa(tmp_path):
  config = dataclasses.replace(CASES['vllm_medusa'].config, head='target')
  target, net = published.target(), published.net(config)
  folder = interchange.write(
      tmp_path / 'x', config, net, SOME, format='vllm_medusa', target=target)
  found = safetensors.read(folder)
  assert [n for n in found if n.startswith('lm_heads')] == [
      'lm_heads.0.weight']
  read = interchange.read(folder, target)
  assert read.config == config
  assert_same(read.net, net)


def loaded_of(folder, name):
  model = Model('random', CausalLM(published.CONFIG, chunk=24),
                published.target().params)
  return model, interchange.load(write(folder, name, num_draft=2), model)


@pytest.mark.parametrize(('name', 'kind', 'num_draft'), [
    ('zlab', 'dflash', 4), ('speculators-dspark', 'dspark', 4),
    ('speculators-eagle3', 'eagle3', 2), ('eagle1', 'eagle1', 5),
    ('medusa', 'medusa', 2)])
def test_kind_and_length_are_seen(tmp_path, name, kind, num_draft):
  _, loaded = loaded_of(tmp_path, name)
  assert loaded.facts == {'kind': kind, 'num_draft': num_draft}


@pytest.mark.parametrize('name', ['zlab', 'speculators-eagle3'])
def test_a_published_drafter_decodes(tmp_path, name):
  model, loaded = loaded_of(tmp_path, name)
  prompts, greedy = [[1, 7, 2], [4]], Sampling(max_new_tokens=12)
  plain = generate(model, None, prompts, greedy)
  drafted = generate(
      model, {'method': 'draft_head', 'model': loaded}, prompts, greedy)
  assert [r.tokens for r in drafted] == [r.tokens for r in plain]


@pytest.mark.reference
def test_torch_files_are_read(tmp_path):
  torch = pytest.importorskip('torch')
  folder = write(tmp_path, 'eagle3')
  tensors = {k: torch.from_numpy(np.array(x.load()).reshape(x.shape))
             for k, x in safetensors.read(folder).items()}
  (folder / 'model.safetensors').unlink()
  torch.save(tensors, folder / 'pytorch_model.bin')
  read = interchange.read(folder, published.target())
  assert_same(read.net, CASES['eagle3'].drafter.net)
  folder = write(tmp_path, 'medusa')
  (folder / 'medusa_lm_head.safetensors').unlink()
  read = interchange.read(folder, published.target())
  assert_same(read.net['linear'], CASES['medusa'].drafter.net['linear'])
  (folder / 'medusa_lm_head.pt').write_bytes(b'nothing')
  with pytest.raises(FormatError, match='cannot be read'):
    interchange.read(folder, published.target())
