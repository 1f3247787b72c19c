"""Images whose denoising steps are guessed ahead, through the public calls."""

import dataclasses
import json

import numpy as np
import pytest

import specjax
from specjax.host import latent_sampling, mar

TINY = mar.tiny()
SIZE = TINY.lm.num_tokens
SAMPLING = specjax.Sampling(temperature=1.0, max_new_tokens=SIZE)


def changed(**kwargs):
  return dataclasses.replace(TINY, lm=mar.changed(TINY.lm, **kwargs))


def test_it_can_be_taken_back():
  assert changed(ahead=3).lm.process.ahead.num == 3
  assert changed(ahead=0).lm == TINY.lm == mar.changed(changed(ahead=3).lm)


def test_folders_do_not_keep_it(tmp_path):
  model = changed(ahead=3)
  folder = mar.save(tmp_path / 'm', model.lm, model.params, {}, 'float32')
  values = json.loads((folder / 'config.json').read_text())
  assert 'ahead' not in str(values)
  assert mar.load(folder)[0].lm == TINY.lm
  assert mar.load(folder, ahead=3)[0].lm == model.lm


@pytest.mark.parametrize('guidance', [1.0, 2.0])
@pytest.mark.parametrize('drafted', [False, True])
def test_images(guidance, drafted):
  """With drafts of tokens and without; guidance reaches the guesses."""
  target = changed(ahead=3)
  scales = latent_sampling.scales(SIZE, guidance, 'constant')
  if scales is not None:
    target = dataclasses.replace(target, lm=mar.guided(target.lm))
  drafter = {'method': 'draft_model', 'model': TINY,
             'num_speculative_tokens': 2} if drafted else None
  orders = latent_sampling.orders_of('random', 3, SIZE, 0)
  found = specjax.generate(
      target, drafter,
      latent_sampling.begin(target.lm, [0, 1, 1], orders, scales), SAMPLING,
      batch_size=2)
  made = np.asarray([r.tokens for r in found])
  assert made.shape == (3, SIZE, 2) and np.isfinite(made).all()


def test_what_cannot_be_guessed():
  with pytest.raises(ValueError, match='ahead=-1: must be >= 0'):
    changed(ahead=-1)
  with pytest.raises(ValueError, match='last_noise=True'):
    changed(ahead=2, last_noise=False)
