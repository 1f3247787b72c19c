"""Draft vocabularies of models that were not trained with one."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from specjax.distill import kinds
from specjax.host import drafter as drafter_lib
from specjax.host import methods, tiny, vocab_trim
from specjax.host.generate import generate
from specjax.io.options import Sampling
from specjax.models.small_lm import SmallLMModel
from specjax.models.trimmed import TrimmedLM

IDS = np.arange(0, 257, 2)


@functools.cache
def models():
  """Returns a target and another model of its vocabulary."""
  return tiny.model(seed=1), tiny.model(seed=2)


def test_ids_come_from_lists_files_and_counts(tmp_path):
  np.save(tmp_path / 'ids.npy', IDS[::-1])
  (tmp_path / 'ids.json').write_text(json.dumps(IDS.tolist()))
  for what in (IDS.tolist(), str(tmp_path / 'ids.npy'),
               str(tmp_path / 'ids.json')):
    np.testing.assert_array_equal(vocab_trim.read(what, 257), IDS)
  assert vocab_trim.read([5, 2, 5], 257, always=(7,)).tolist() == [2, 5, 7]
  counts = np.zeros(257, int)
  counts[[9, 4, 100]] = 3, 5, 1
  np.save(tmp_path / 'counts.npy', counts)
  for given in (counts, str(tmp_path / 'counts.npy')):
    got = vocab_trim.read(3, 257, counts=given, always=(256,))
    assert got.tolist() == [4, 9, 256]


@pytest.mark.parametrize('what,kwargs,message', [
    (4, {}, "needs 'draft_vocab_counts'"),
    (4, {'counts': [1, 2]}, r'shape \(2,\)'),
    ([], {}, 'a list of ids'), ([1.5], {}, 'a list of ids'),
    ([1, 300], {}, 'ids 1 to 300'), ('nowhere.npy', {}, 'nowhere.npy: not')])
def test_what_cannot_be_read(what, kwargs, message):
  with pytest.raises(ValueError, match=message):
    vocab_trim.read(what, 257, **kwargs)


def test_a_draft_model_is_trimmed_by_its_configuration(tmp_path):
  target, other = models()
  np.save(tmp_path / 'ids.npy', IDS)
  config = {'method': 'draft_model', 'model': other,
            'num_speculative_tokens': 3}
  drafter, params = methods.build(
      {**config, 'draft_vocab': str(tmp_path / 'ids.npy')}, target)
  assert isinstance(drafter.model, TrimmedLM)
  assert params['head'].shape == (len(IDS), 32)
  sampling = Sampling(max_new_tokens=12, ignore_eos=True)
  asked = [[1, 2, 3], [70, 71]]
  trees = {'use_dynamic_tree': True, 'num_speculative_tokens': 5,
           'tree_depth': 2, 'tree_top_k': 2}
  for extra in ({}, trees):
    got = generate(target, {
        **config, **extra, 'draft_vocab': IDS.tolist()}, asked, sampling)
    plain = generate(target, None, asked, sampling)
    assert [r.tokens for r in got] == [r.tokens for r in plain]
  with pytest.raises(ValueError, match="'draft_vocab_counts' goes with"):
    methods.build({**config, 'draft_vocab': IDS.tolist(),
                   'draft_vocab_counts': 'counts.npy'}, target)
  with pytest.raises(ValueError, match='draft_vocab=1.5'):
    methods.build({**config, 'draft_vocab': 1.5}, target)


def test_all_tokens_are_as_good_as_no_draft_vocabulary():
  target, other = models()
  config = {'method': 'draft_model', 'model': other,
            'num_speculative_tokens': 3}
  sampling = Sampling(max_new_tokens=16, temperature=1.0, ignore_eos=True)
  found = [generate(target, {**config, **extra}, [[1, 2, 3]], sampling)[0]
           for extra in ({}, {'draft_vocab': list(range(257))})]
  assert found[0].tokens == found[1].tokens
  assert found[0].step_lengths == found[1].step_lengths


def test_small_drafters_go_on_from_others(tmp_path):
  """From the whole vocabulary to a part of it, the stages of a small LM."""
  target, _ = models()

  def made(ids, **model):
    task = kinds.build('small_lm', target.lm.config, len(ids), model={
        'num_layers': 1, 'embed_dim': 16, **model})
    return task, jax.jit(task.init)(jax.random.key(len(ids)), target.params)
  for number, values in enumerate(({}, {'tied': False})):
    task, net = made(np.arange(257), **values)
    assert isinstance(task.model, SmallLMModel)
    folder = tmp_path / str(number)
    drafter_lib.save_drafter(
        folder, task.model, net, np.arange(257), target, kind='small_lm',
        num_draft=5, form='float32')
    _, fresh = made(IDS, **values)
    got = drafter_lib.carry_over(folder, fresh, IDS)
    np.testing.assert_array_equal(got['embedding'], net['embedding'])
    if values:
      np.testing.assert_array_equal(got['head'], net['head'][IDS])
    loaded = drafter_lib.load_drafter(folder, target)
    assert loaded.num_draft == 5
  back, small = tmp_path / 'back', made(IDS)
  drafter_lib.save_drafter(
      back, small[0].model, small[1], IDS, target, kind='small_lm',
      num_draft=5, form='float32')
  got = drafter_lib.carry_over(back, made(np.arange(257))[1], np.arange(257))
  np.testing.assert_array_equal(got['embedding'], small[1]['embedding'])


def test_a_small_drafter_is_for_targets_of_any_width(tmp_path):
  target, _ = models()
  task = kinds.build('small_lm', target.lm.config, len(IDS), model={
      'num_layers': 1, 'embed_dim': 16})
  net = jax.jit(task.init)(jax.random.key(0), target.params)
  drafter_lib.save_drafter(
      tmp_path, task.model, net, IDS, target, kind='small_lm', num_draft=3)
  wide = tiny.model(embed_dim=48)
  with pytest.warns(UserWarning, match='other weights'):
    loaded = drafter_lib.load_drafter(tmp_path, wide)
  sampling = Sampling(max_new_tokens=8, ignore_eos=True)
  got = generate(wide, {'method': 'small_lm', 'model': loaded}, [[1, 2]],
                 sampling)
  plain = generate(wide, None, [[1, 2]], sampling)
  assert got[0].tokens == plain[0].tokens
