"""`config.online`: what is read from it, and which drafters can have it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import common
from specjax.distill import kinds
from specjax.distill.online import Settings
from specjax.host import drafter as drafter_lib
from specjax.host import methods, online, tiny

a_target = functools.cache(tiny.model)


def test_the_config_has_every_field():
  names = {f.name for f in dataclasses.fields(Settings)}
  assert set(common.online()) == {'enabled', *names}


def test_off_unless_enabled():
  assert online.settings(None) is None
  assert online.settings(common.online()) is None
  assert online.settings(common.online(enabled=False, every=3)) is None
  assert online.settings(common.online(enabled=True)) == Settings()
  assert online.settings(common.online(
      enabled=True, every=3, learning_rate=0.01)) == Settings(
          every=3, learning_rate=0.01)


@pytest.mark.parametrize('section, said', [
    ({'rate': 1.0}, 'config.online.rate: unknown; known are enabled, every'),
    ({'every': 2}, 'config.online.every: needs config.online.enabled=True'),
    ({'enabled': 1}, 'config.online.enabled=1: must be of type bool'),
    ({'enabled': True, 'every': 0}, 'config.online.every=0: must be > 0'),
    ({'enabled': True, 'steps': 1.5}, 'steps=1.5: must be of type int'),
    ({'enabled': True, 'length': True}, 'length=True: must be of type int'),
    ({'enabled': True, 'clip_norm': '1'}, 'must be of type float')])
def test_settings_that_cannot_be(section, said):
  with pytest.raises(ValueError) as error:
    online.settings(section)
  assert said in str(error.value)


@pytest.mark.parametrize('config', [
    {'method': 'null'}, {'method': 'ngram', 'draft_len_schedule': 'heuristic'},
    {'method': 'draft_model', 'model': 'itself'},
    {'method': 'draft_model', 'model': 'itself', 'draft_vocab': [1, 2, 3]}])
def test_drafters_without_trained_weights(config):
  target = a_target()
  drafter, params = methods.build(config, target, lambda _: target)
  with pytest.raises(ValueError, match='cannot be trained; take one that'):
    online.build(Settings(), drafter, params, target)


@pytest.mark.parametrize('kind, shape, depth', [
    ('dspark', {}, 3), ('dspark', {'lattice': False}, 3),
    ('dspark', {'draft_len_schedule': 'heuristic'}, 3),
    ('dspark', {'use_dynamic_tree': True, 'num_speculative_tokens': 4,
                'tree_depth': 2, 'tree_top_k': 2}, 2),
    ('eagle3', {'speculative_token_tree': 'branching:2,1'}, 2)])
def test_the_model_is_found_in_every_shape(kind, shape, depth):
  target, ids = a_target(), np.arange(0, 257, 2)
  small = {'num_layers': 1, 'num_taps': 2, 'num_slots': 3, 'markov_rank': 4}
  task = kinds.build(kind, target.lm.config, len(ids),
                     model=small if kind == 'dspark' else {})
  net = task.init(jax.random.key(0), target.params)
  loaded = drafter_lib.Loaded(
      task.source(), task.attach(net, target.params, ids),
      {'kind': kind, 'num_draft': 3})
  drafter, params = methods.build(
      {'method': kind, 'model': loaded, **shape}, target)
  made = online.build(Settings(), drafter, params, target)
  assert made.task.model == task.model
  assert drafter.topology.max_depth == depth <= made.task.num_draft
  jax.tree.map(np.testing.assert_array_equal, made.params, params)
  assert made.summary() == {
      'updates': 0, 'skipped': 0, 'first_loss': None, 'last_loss': None,
      'seconds': 0.0}
