"""Trained drafters: kept, loaded for the right target, given a shape."""

from __future__ import annotations

import functools
import json
import warnings

import jax
import numpy as np
import pytest

from specjax.core import topologies
from specjax.distill import kinds
from specjax.drafters import ChainLM, GrownLattice, GrownLM, Lattice, TreeLM
from specjax.drafters.copying import Copying
from specjax.host import drafter as drafter_lib
from specjax.host import interchange, methods, tiny
from specjax.host.generate import generate
from specjax.io import checkpoint, safetensors
from specjax.io.errors import FormatError
from specjax.io.options import Sampling

IDS = np.arange(0, 257, 2)
SMALL = {'num_layers': 1, 'num_taps': 2, 'num_slots': 3, 'markov_rank': 4}


@functools.cache
def a_target():
  return tiny.model()


@functools.cache
def trained(kind, taps=None):
  """Returns a task of a kind, and weights."""
  target = a_target()
  small = SMALL if kind in ('dspark', 'dflash') else {}
  task = kinds.build(kind, target.lm.config, len(IDS),
                     model={**small, 'taps': taps})
  net = jax.jit(task.init)(jax.random.key(0), target.params)
  return task, jax.tree.map(lambda x: x + 0.1, net)


def made(folder, kind='dspark', form='float32', taps=None):
  """Saves a drafter of a kind; returns its task and weights."""
  target = a_target()
  task, net = trained(kind, *([taps] if taps else []))
  drafter_lib.save_drafter(
      folder, task.model, net, IDS, target, kind=kind,
      num_draft=task.num_draft, form=form)
  return task, net


@pytest.mark.parametrize('kind', ['dspark', 'eagle1', 'eagle3', 'hydra'])
def test_a_drafter_comes_back(tmp_path, kind):
  task, net = made(tmp_path, kind)
  target = a_target()
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    loaded = drafter_lib.load_drafter(tmp_path, target)
  assert loaded.source == task.source()
  assert loaded.num_draft == task.num_draft
  wanted = task.attach(net, target.params, IDS)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, wanted)


def test_a_drafter_follows_the_dtype_of_its_target(tmp_path):
  made(tmp_path, form='bfloat16')
  target = tiny.model(dtype='bfloat16')
  with pytest.warns(UserWarning, match='other weights'):
    # Random weights drawn in bfloat16 are others.
    loaded = drafter_lib.load_drafter(tmp_path, target)
  assert loaded.source.model.config.decoder.dtype == 'bfloat16'
  kinds_of = {x.dtype.name for x in jax.tree.leaves(loaded.params['net'])
              if x.ndim >= 2}
  assert kinds_of == {'bfloat16'}
  assert loaded.params['net']['mask'].dtype == np.float32


def test_the_fingerprint_tells_weights_apart_not_dtypes():
  model = a_target()
  prints = [drafter_lib.fingerprint(model),
            drafter_lib.fingerprint(tiny.model(seed=1))]
  assert prints[0] != prints[1]
  rounded = jax.tree.map(
      lambda x: x.astype('bfloat16') if x.ndim > 1 else x, model.params)
  import dataclasses
  assert drafter_lib.fingerprint(
      dataclasses.replace(model, params=rounded)) == prints[0]


@pytest.mark.parametrize('change, message', [
    ({'embed_dim': 16, 'head_dim': 4}, 'hidden size 32, random has 16'),
    ({'vocab_size': 260}, 'vocabulary 257, random has 260'),
    ({'num_layers': 1}, r'hidden states \[2\], random has 0 to 1')])
def test_another_target(tmp_path, change, message):
  made(tmp_path, taps=(0, 2))
  with pytest.raises(FormatError, match=message):
    drafter_lib.load_drafter(tmp_path, tiny.model(**change))


def test_damaged_folders(tmp_path):
  made(tmp_path)
  target = a_target()
  path = tmp_path / 'drafter.safetensors'
  whole = {k: np.array(t.read()) for k, t in safetensors.read(path).items()}
  lacking = {k: v for k, v in whole.items() if k != 'fuse'}
  for tensors, message in (
      (lacking, r"missing: \['fuse'\]"),
      ({**whole, 'more': np.zeros(2)}, r"unknown: \['more'\]"),
      ({**whole, 'fuse': whole['fuse'][1:]}, "'fuse' has shape"),
      ({**whole, 'ids': whole['ids'][::-1]}, 'must be ascending')):
    safetensors.write(path, tensors)
    with pytest.raises(FormatError, match=message):
      drafter_lib.load_drafter(tmp_path, target)
  config = json.loads((tmp_path / 'config.json').read_text())
  config['model']['config']['colour'] = 'red'
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='colour'):
    drafter_lib.load_drafter(tmp_path, target)
  del config['model']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(FormatError, match="no 'model'"):
    drafter_lib.load_drafter(tmp_path, target)


def test_shapes_of_a_block_drafter(tmp_path):
  made(tmp_path)
  target = a_target()

  def built(**config):
    return methods.build({'method': 'dspark', 'model': str(tmp_path),
                          **config}, target)[0]
  assert isinstance(built(), Lattice) and built().topology.num_nodes == 3
  assert built(num_speculative_tokens=2).topology.num_nodes == 2
  assert built(num_candidates=4).num_candidates == 4
  assert built().copying == Copying()
  assert built(copy_max=3).copying.shares == Copying.shares[:3]
  assert built(copy_max=0).copying is None
  assert built(num_candidates=1).copying is None
  tree = built(speculative_token_tree='branching:2,2')
  assert tree.topology == topologies.parse('branching:2,2')
  grown = built(use_dynamic_tree=True, num_speculative_tokens=6, tree_depth=3,
                tree_top_k=2)
  assert isinstance(grown, GrownLattice) and grown.topology.num_nodes == 6
  chain = built(draft_acceptance_threshold=0.4)
  assert isinstance(chain, ChainLM) and chain.acceptance_threshold == 0.4
  assert isinstance(built(lattice=False), ChainLM)
  assert isinstance(built(lattice=False, speculative_token_tree='sequences:2'
                          ), TreeLM)
  implied, _ = methods.build({'model': str(tmp_path)}, target)
  assert isinstance(implied, Lattice)


def test_shapes_of_the_others(tmp_path):
  made(tmp_path, 'eagle3')
  target = a_target()
  loaded = drafter_lib.load_drafter(tmp_path, target)

  def built(**config):
    return methods.build(
        {'method': 'eagle3', 'model': loaded, **config}, target)[0]
  assert isinstance(built(), ChainLM) and built().topology.num_nodes == 7
  assert isinstance(built(
      use_dynamic_tree=True, num_speculative_tokens=5, tree_depth=2,
      tree_top_k=2), GrownLM)
  with pytest.raises(ValueError, match='only block drafters'):
    built(lattice=True)
  with pytest.raises(ValueError, match='for a lattice'):
    built(num_candidates=4)
  with pytest.raises(ValueError, match='for a lattice'):
    built(copy_max=4)


@pytest.mark.parametrize('kind, model, axes', [
    ('dspark', SMALL, {'markov_in': 0, 'markov_out': 1}),
    ('eagle3', {'own_head': True}, {'head': 0}),
    ('medusa', {}, {'head': 1}),
    ('small_lm', {'num_layers': 1, 'embed_dim': 32, 'tied': False},
     {'head': 0})])
def test_training_goes_on_with_another_vocabulary(
    tmp_path, kind, model, axes):
  """As many tokens as channels: sizes do not tell the axes apart."""
  target = a_target()
  old, new = np.arange(98, 138), np.arange(90, 122)  # 40, then D = 32

  def fresh(ids, seed):
    task = kinds.build(kind, target.lm.config, len(ids), model=model)
    net = task.init(jax.random.key(seed), target.params)
    return task, jax.tree.map(lambda x: x + 0.1 * (seed + 1), net)
  task, net = fresh(old, 0)
  drafter_lib.save_drafter(
      tmp_path, task.model, net, old, target, kind=kind, num_draft=3,
      form='float32')
  _, other = fresh(new, 1)
  got = drafter_lib.named(drafter_lib.carry_over(tmp_path, other, new))
  other = drafter_lib.named(other)
  for name, before in drafter_lib.named(net).items():
    axis, after = axes.get(name), got[name]
    if axis is None:
      np.testing.assert_array_equal(after, before, name)
      continue
    after, before, first = (np.moveaxis(np.asarray(x), axis, 0)
                            for x in (after, before, other[name]))
    np.testing.assert_array_equal(after[8:32], before[:24], name)
    np.testing.assert_array_equal(after[:8], first[:8], name)
    np.testing.assert_array_equal(after[32:], before[40:], name)
  # And the same tokens again: everything is kept.
  same = drafter_lib.carry_over(tmp_path, fresh(old, 2)[1], old)
  jax.tree.map(np.testing.assert_array_equal, same, net)
  with pytest.raises(FormatError, match=r'is \[.*\] there, \[.*\] here'):
    drafter_lib.carry_over(tmp_path, net, new)


def test_what_cannot_be_gone_on_with(tmp_path):
  target = a_target()
  made(tmp_path / 'x')

  def carry(folder, **changes):
    task = kinds.build('dspark', target.lm.config, len(IDS),
                       model={**SMALL, **changes})
    net = jax.eval_shape(lambda: task.init(jax.random.key(0), target.params))
    drafter_lib.carry_over(folder, net, IDS)
  for changes, said in (
      ({'markov_rank': 5}, r'confidence_out is \[36\] there, \[37\] here'),
      ({'num_layers': 2}, r'layer_1.* is absent there, \[.*\] here'),
      ({'mlp_dim': 48}, r'layer_0.mlp.down is \[64, 32\] there, \[48, 32\] h')):
    with pytest.raises(FormatError, match=f'another size or kind: {said}'):
      carry(tmp_path / 'x', **changes)
  state = tmp_path / 'run' / 'checkpoints' / '00000001'
  checkpoint.save(state, {'a': np.ones(3)}, {})
  for folder in (state, state.parent, tmp_path / 'run'):
    with pytest.raises(FormatError, match=(
        f"{folder}: holds states of training, .* the folder 'drafter' ")):
      carry(folder)
  with pytest.raises(FormatError, match='nowhere: no config.json'):
    carry(tmp_path / 'nowhere')


def test_drafters_of_others_are_loaded_from_their_folder(tmp_path):
  target = a_target()
  task, net = trained('eagle3', (0, 1, 2))
  folder = interchange.write(
      tmp_path / 'foreign', task.model.config, net, IDS, num_draft=3,
      format='speculators', target=interchange.describe(target))
  loaded = drafter_lib.load_drafter(folder, target)
  assert (loaded.facts['kind'], loaded.num_draft) == ('eagle3', 3)
  there = drafter_lib.named(loaded.params['net'])
  for name, x in drafter_lib.named(net).items():
    np.testing.assert_array_equal(there[name], x, name)
  prompts, greedy = [[1, 7, 2]], Sampling(max_new_tokens=8)
  plain = generate(target, None, prompts, greedy)
  # Without a method: a folder that holds a drafter is no small model.
  for more in ({}, {'method': 'eagle3'}):
    got = generate(target, {'model': str(folder), **more}, prompts, greedy)
    assert got[0].tokens == plain[0].tokens
  (folder / 'model.safetensors').unlink()
  with pytest.raises(FormatError, match='config.json has neither "format"'):
    drafter_lib.load_drafter(folder, target)


@pytest.mark.parametrize('config, message', [
    ({'method': 'eagle3'}, "of kind 'dspark'; use that"),
    ({'draft_acceptance_threshold': 0.5, 'lattice': True}, '"lattice": false'),
    ({'tree_top_k': 2}, "for 'use_dynamic_tree'"),
    ({'num_speculative_tokens': 4}, 'proposes 3 in one pass'),
    ({'num_speculative_tokens': 3, 'speculative_token_tree': 'sequences:2'},
     'the tree has 2'),
    ({'use_dynamic_tree': True, 'draft_sample_method': 'iid'}, 'leave out'),
    ({'prompt_lookup_min': 3}, 'unknown for method'),
    ({'copy_max': -1}, r'copy_max=-1: must be in \[0, 16\]'),
    ({'copy_max': 17}, 'copy_max=17: must be in'),
    ({'copy_max': 4, 'num_candidates': 1}, 'must be >= 2'),
    ({'num_speculative_tokens': 0}, "'null' drafts nothing"),
    ({'model': None}, 'the folder of a drafter'),
    ({'model': '/nowhere'}, 'no config.json'),
    ({'lattice': 1}, 'true or false')])
def test_what_cannot_be_drafted(tmp_path, config, message):
  made(tmp_path)
  with pytest.raises(ValueError, match=message):
    methods.build({'method': 'dspark', 'model': str(tmp_path), **config},
                  a_target())
