"""Drafters in the formats of others: bad input."""

from __future__ import annotations

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.host import interchange
from specjax.io import safetensors
from specjax.io.errors import FormatError, OutputError
from specjax.models import interchange as formats
from tests import published
from tests.published import ALL, CASES, SOME, edit, edit_tensors, write


def refused(folder, match, target=None):
  with pytest.raises(FormatError, match=match):
    interchange.read(folder, target or published.target())


def test_files_that_do_not_fit(tmp_path):
  wide = dataclasses.replace(published.CONFIG, embed_dim=32)
  more = dataclasses.replace(published.CONFIG, vocab_size=32)
  for name in CASES:
    folder = write(tmp_path, name)
    if name != 'medusa':
      lost = ('blocks.1.layers.0.bias' if name == 'vllm_medusa' else
              f'{"midlayer" if name == "eagle3" else "layers.0"}.'
              'mlp.down_proj.weight')
      shutil.copytree(folder, tmp_path / f'{name}-cut')
      edit_tensors(tmp_path / f'{name}-cut', lambda t, n=lost: t.pop(n))
      refused(tmp_path / f'{name}-cut', f'missing: {lost}')
      edit_tensors(folder, lambda t: t.update({'odd.weight': np.ones(2)}))
      refused(folder, r'odd\.weight')
    refused(folder, '(hidden_size|width).*16.*32', formats.Target('t', wide))
    refused(folder, '(vocab_size|vocabulary).*31.*32',
            formats.Target('t', more))


@pytest.mark.parametrize(('name', 'changes', 'match'), [
    ('zlab', {'dflash_config': {'mask_token_id': 3}}, 'target_layer_ids'),
    ('zlab', {'dflash_config': {'mask_token_id': 31,
                                'target_layer_ids': [0, 1]}},
     'mask_token_id=31'),
    ('zlab', {'dflash_config': {'mask_token_id': 3,
                                'target_layer_ids': [0, 2]}},
     r'target_layer_ids.*\[1, 3\].*\[0, 2\]'),
    ('zlab', {'num_target_layers': 36}, 'num_target_layers=36'),
    ('zlab', {'block_size': None}, 'block_size is missing'),
    ('zlab', {'layer_types': ['sliding_attention'] * 2}, 'sliding'),
    ('zlab', {'hidden_act': 'relu'}, 'relu'),
    ('zlab', {'attention_bias': True}, 'attention_bias'),
    ('zlab', {'dflash_config': None}, "'DFlashDraftModel'"),
    ('zlab', {'head_dim': 4}, r'q_proj\.weight.*\(32, 16\).*\(16, 16\)'),
    ('deepspec-dspark', {'markov_head_type': 'rnn'}, 'rnn'),
    ('deepspec-dspark', {'markov_rank': 4}, r'markov_w1.*\(31, 6\)'),
    ('speculators-dspark', {'speculators_model_type': 'mtp'}, 'mtp'),
    ('speculators-dspark', {'draft_vocab_size': 28}, 'd2t'),
    ('speculators-dspark', {'aux_hidden_state_layer_ids': [1, 3]},
     r'\[1, 3\]'),
    ('speculators-eagle3', {'norm_before_residual': True},
     'norm_before_residual'),
    ('eagle3', {'num_hidden_layers': 2}, 'more than one layer'),
    ('eagle3', {'eagle_aux_hidden_state_layer_ids': [2, 1, 0]}, 'ascend'),
    ('vllm_medusa', {'medusa_fc_bias': False}, 'medusa_fc_bias'),
])
def test_configurations_that_are_refused(tmp_path, name, changes, match):
  folder = write(tmp_path, name)
  edit(folder, **changes)
  refused(folder, match)


@pytest.mark.parametrize(('name', 'change', 'match'), [
    ('eagle3', lambda t: t.update(d2t=t['d2t'][::-1]), 'ascend'),
    ('eagle3', lambda t: t.update(d2t=t['d2t'] + 9), 'ascend and be in'),
    ('eagle3', lambda t: t.update(t2d=~t['t2d']), 'different tokens'),
    ('eagle3', lambda t: t.pop('d2t'), "'d2t' is missing"),
    ('eagle1', lambda t: t['embed_tokens.weight'].__imul__(2),
     'not the embedding of owner/target'),
    ('speculators-dspark', lambda t: t['lm_head.weight'].__imul__(2),
     'not the head of owner/target'),
    ('vllm_medusa', lambda t: t.pop('token_map'), 'token_map'),
])
def test_tensors_that_are_refused(tmp_path, name, change, match):
  folder = write(tmp_path, name)
  edit_tensors(folder, change)
  refused(folder, match)


def test_folders_that_are_none(tmp_path):
  refused(tmp_path, 'no config.json')
  (tmp_path / 'config.json').write_text('{}')
  refused(tmp_path, 'neither a .safetensors file nor pytorch_model.bin')


@pytest.mark.parametrize(('name', 'changes', 'format', 'match'), [
    ('zlab', {}, 'eagle', 'known are zlab, deepspec, speculators'),
    ('zlab', {'draft_vocab_size': 29}, 'zlab', 'no reduced vocabulary'),
    ('zlab', {}, 'deepspec', "layout 'anchor'"),
    ('zlab', {'mask_token': None}, 'zlab', 'trained mask vector'),
    ('zlab', {'mask_token': None}, 'speculators', 'mask_token=None'),
    ('zlab', {'markov': 'vanilla'}, 'zlab', 'Markov'),
    ('eagle1', {}, 'speculators', 'EAGLE-3 alone'),
    ('eagle1', {'draft_vocab_size': 29}, 'eagle', 'no reduced vocabulary'),
    ('speculators-eagle3', {}, 'eagle', 'qk_norm'),
    ('medusa', {'kind': 'hydra'}, 'medusa', 'hydra'),
    ('vllm_medusa', {}, 'medusa', 'no reduced vocabulary'),
    ('vllm_medusa', {'final_softcap': 9.0}, 'vllm_medusa', 'final_softcap'),
])
def test_drafters_that_a_format_cannot_hold(
    tmp_path, name, changes, format, match):
  config = dataclasses.replace(CASES[name].config, **changes)
  ids = ALL[:config.draft_vocab_size]
  with pytest.raises(ValueError, match=match):
    interchange.write(
        tmp_path / 'x', config, published.net(config), ids, format=format,
        target=published.target())
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('option', 'value'), [
    ('final_softcap', 20.0), ('embed_scale', 4.0), ('query_scale', 0.3),
    ('post_norms', True), ('local_layers', (True, False)),
    ('qk_norm', False)])
def test_options_of_layers_are_never_dropped(tmp_path, option, value):
  config = CASES['speculators-dspark'].config
  decoder = dataclasses.replace(config.decoder, **{option: value})
  with pytest.raises(ValueError, match=f'decoder.{option}='):
    # Some are refused by the config, the others by the format.
    config = dataclasses.replace(config, decoder=decoder)
    interchange.write(
        tmp_path / 'x', config, {}, SOME, format='speculators',
        target=published.target())


def test_weights_that_do_not_fit(tmp_path):
  c, net, ids = CASES['zlab'].drafter
  def attempt(net, ids=ids, target=None):
    interchange.write(tmp_path / 'x', c, net, ids, format='zlab',
                      target=target or published.target())
  with pytest.raises(ValueError, match='fuse'):
    attempt({k: v for k, v in net.items() if k != 'fuse'})
  with pytest.raises(ValueError, match=r'fuse has shape \(2, 2\)'):
    attempt({**net, 'fuse': jnp.zeros((2, 2))})
  with pytest.raises(ValueError, match='fuse: holds values'):
    attempt({**net, 'fuse': net['fuse'].at[0, 0].set(jnp.nan)})
  with pytest.raises(ValueError, match='draft_vocab_size=31'):
    attempt(net, SOME)
  wide = dataclasses.replace(published.CONFIG, embed_dim=32)
  with pytest.raises(ValueError, match='width 16, t has 32'):
    attempt(net, target=formats.Target('t', wide))
  assert not list(tmp_path.iterdir())


def test_the_parameters_of_the_target_are_asked_for(tmp_path):
  bare = formats.Target('t', published.CONFIG)
  with pytest.raises(ValueError, match="parameters are needed.*deepspec"):
    write(tmp_path, 'deepspec-dflash', bare)
  folder = write(tmp_path, 'medusa')
  with pytest.raises(ValueError, match='parameters are needed'):
    interchange.read(folder, published.CONFIG)
  write(tmp_path, 'zlab', bare)  # holds nothing of the target


def test_nothing_is_overwritten_or_left_half_written(tmp_path, monkeypatch):
  write(tmp_path, 'zlab')
  with pytest.raises(OutputError, match='exists'):
    write(tmp_path, 'zlab')

  def full(*args):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(safetensors, 'write', full)
  with pytest.raises(OutputError, match='No space'):
    write(tmp_path, 'eagle3')
  assert [p.name for p in tmp_path.iterdir()] == ['zlab']
