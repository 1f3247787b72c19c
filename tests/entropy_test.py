"""How unsure targets are, of laws that are known and of random models."""

import json

import jax
import jax.numpy as jnp
from matplotlib import image
import numpy as np
import pytest

from sample import entropy
from specjax.host import image_sampling


def test_figures_of_known_laws():
  p = np.asarray([[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [1.0, 0, 0, 0]])
  with np.errstate(divide='ignore'):
    found = entropy.figures(jnp.asarray(np.log(p)), jnp.asarray([2, 1, 0]))
  np.testing.assert_allclose(found['entropy'], [
      np.log(4), -0.7 * np.log(0.7) - 0.3 * np.log(0.1), 0.0], atol=1e-6)
  np.testing.assert_allclose(found['top'], [0.25, 0.7, 1.0], rtol=1e-6)
  np.testing.assert_allclose(found['there'], [0.25, 0.1, 1.0], rtol=1e-6)
  np.testing.assert_array_equal(found['half'], [2, 1, 1])


def test_guidance_sharpens_what_the_class_says():
  model, _, _ = image_sampling.random_models()
  codes = np.asarray(jax.random.randint(jax.random.key(0), (3, 16), 0, 16))
  labels = np.asarray([0, 1, 1])
  plain = entropy.of_images(model, codes, labels, 1.0)
  assert plain['entropy'].shape == (48,)
  null = np.full(3, model.lm.config.num_conditions - 1)
  # Of the class that says nothing, guidance changes nothing.
  for name, values in entropy.of_images(model, codes, null, 1.0).items():
    np.testing.assert_allclose(
        entropy.of_images(model, codes, null, 3.0)[name], values, rtol=1e-5)
  assert np.abs(entropy.of_images(
      model, codes, labels, 3.0)['entropy'] - plain['entropy']).max() > 1e-3


def test_the_program(tmp_path, capsys):
  assert entropy.main([
      '--target', 'random', '--text', 'random', '--images', '4',
      '--questions', '2', '--new_tokens', '5', '--out', str(tmp_path)]) == 0
  rows = json.loads((tmp_path / 'entropy.json').read_text())['laws']
  assert len(rows) == 3 and capsys.readouterr().out.count('nats') == 3
  pictures, _, text = rows.values()
  assert pictures['positions'] == 64 and 2 <= text['positions'] <= 10
  assert 0 < pictures['entropy'] < np.log(16)
  assert image.imread(tmp_path / 'entropy.png').std() > 0


def test_a_missing_target(tmp_path):
  with pytest.raises((ValueError, OSError), match='nowhere'):
    entropy.main(['--target', '/nowhere', '--out', str(tmp_path)])
