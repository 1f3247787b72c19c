"""Drafters for guided image decoders: what they are taught, what they meet."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.core.types import Models
from specjax.distill import gap, kinds, teacher
from specjax.host import drafter
from specjax.host.load import Model
from specjax.models import image_lm
from specjax.models.guided import Guided
from specjax.models.image_lm import ImageLM
from tests import tiny

CODES, CLASSES = 23, 3
SHAPE = image_lm.shape(2, 2, 32, grid_width=4, vocab_size=CODES,
                       num_classes=CLASSES)
TAP = 'resid_1'
LM = Guided(ImageLM(SHAPE, chunk=8), scale=2.5)
KINDS = {'eagle3': ({'taps': (0, 1, 2)}, {'steps': 3}),
         'dspark': ({'num_slots': 3, 'num_layers': 1, 'taps': (0, 2),
                     'markov_rank': 8}, {'num_anchors': 8})}


def target():
  """Returns weights whose laws are far from flat."""
  params = dict(tiny.params(SHAPE))
  return {**params, 'head': 6 * params['head']}


def batch():
  """Returns two images a row, the class in front of each."""
  codes = np.asarray(tiny.tokens(2, 8, seed=3)) % CODES
  rows = np.concatenate([
      [[CODES + 1], [CODES]], codes[:, :4],
      [[CODES + 2], [CODES + 1]], codes[:, 4:]], axis=1)
  return teacher.batch_of({
      'tokens': rows, 'document': np.tile([1] * 5 + [2] * 5, (2, 1)),
      'position': np.tile(np.arange(5), (2, 2)),
      'supervised': np.tile([False] + [True] * 4, (2, 2))}), codes


def test_the_teacher_is_the_guided_law():
  rows, codes = batch()
  params = target()
  seen = teacher.observe(LM, params, rows, (TAP,), chunk=7)
  plain = teacher.observe(LM.lm, params, rows, (TAP,))
  np.testing.assert_allclose(
      seen.taps[TAP], plain.taps[TAP], atol=1e-5)
  logits = LM.lm.head(params, seen.final)
  np.testing.assert_allclose(
      seen.log_z, jax.nn.logsumexp(logits, axis=-1), atol=1e-4)
  assert (seen.top == jnp.argmax(logits, axis=-1)).all()
  assert np.abs(seen.final - plain.final).max() > 0.1
  for row, start, label in ((0, 0, 1), (0, 5, 2), (1, 5, 1)):
    text = codes[row:row + 1, :4] if start == 0 else codes[row:row + 1, 4:]
    with_it, without = (LM.lm.whole(
        params, jnp.asarray(text), jnp.asarray([one]))[0]
                        for one in (label, CLASSES))
    np.testing.assert_allclose(
        logits[row, start:start + 4],
        without + 2.5 * (with_it - without), atol=1e-3)


@pytest.mark.parametrize('kind', KINDS)
def test_training_and_decoding_agree(kind, monkeypatch):
  """And where training leaves guidance out, that is seen."""
  model, options = KINDS[kind]
  task = kinds.build(kind, SHAPE, CODES, model=model, task=options)
  params = target()
  net = task.init(jax.random.key(1), params)
  models = Models(target=params, drafter=task.attach(
      net, params, np.arange(CODES)))
  prompts = [[CODES + i % CLASSES, i % CODES] for i in range(24)]

  def measured():
    return gap.measure(task, LM, models, prompts, new_tokens=14,
                       temperature=1.0, chunk=4)
  found = measured()
  assert found.closed() and found.rounds > 100
  assert np.nanmax(found.largest) < 1e-4
  monkeypatch.setattr(Guided, 'hidden', lambda self, final, _: final[::2])
  jax.clear_caches()
  assert np.nanmax(measured().largest) > 0.02


def test_another_guidance_is_told(tmp_path):
  model, options = KINDS['eagle3']
  task = kinds.build('eagle3', SHAPE, CODES, model=model, task=options)
  params = target()
  whole = Model(name='images', lm=LM, params=params)
  drafter.save_drafter(
      tmp_path / 'd', task.model, task.init(jax.random.key(1), params),
      np.arange(CODES), whole, kind='eagle3', num_draft=3)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    drafter.load_drafter(tmp_path / 'd', whole)
  for lm, said in ((LM.lm, 'used at 1'), (Guided(LM.lm, 4.0), 'used at 4')):
    with pytest.warns(UserWarning, match=f'for guidance 2.5, {said}'):
      drafter.load_drafter(tmp_path / 'd', dataclasses.replace(whole, lm=lm))
