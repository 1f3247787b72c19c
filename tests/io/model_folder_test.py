"""Folders of a model: written whole, read back, told apart by their kind."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.io import forms, model_folder
from specjax.io.errors import FormatError, OutputError

PARAMS = {'head': {'linear': jnp.arange(6.0).reshape(2, 3) / 7,
                   'bias': jnp.ones(3)}, 'scale': jnp.zeros(2)}


@pytest.mark.parametrize('form', ['float32', 'bfloat16', 'int8'])
def test_what_is_saved_is_loaded(tmp_path, form):
  folder = model_folder.save(
      tmp_path / 'x', 'specjax-x', PARAMS, {'width': 2}, form)
  assert model_folder.save(
      folder, 'specjax-x', PARAMS, {'width': 3}, form) == folder  # replaced
  values, arrays = model_folder.load(folder, 'specjax-x')
  assert values == {'format': 'specjax-x', 'form': form, 'width': 3}
  assert sorted(arrays) == ['head.bias', 'head.linear', 'scale']
  found = model_folder.fitted(
      folder, arrays, jax.eval_shape(lambda: PARAMS))
  assert jax.tree.structure(found) == jax.tree.structure(PARAMS)
  # bfloat16 has 8 bits, int8 a step of 1/127 of a column's largest.
  jax.tree.map(lambda x, y: np.testing.assert_allclose(
      x, y, atol=0 if form == 'float32' else 5e-3), found, PARAMS)


@pytest.mark.parametrize('name, shape, scale', [
    ('out', (6, 5), (1, 5)), ('attention.out', (2, 3, 4, 5), (1, 1, 1, 5)),
    ('in.kernel', (6, 5), (1, 5)), ('kernel', (3, 3, 4, 5), (1, 1, 1, 5)),
    ('qkv', (4, 2, 3, 5), (1, 2, 3, 5)), ('embedding', (7, 4), (7, 1)),
    ('place_in', (7, 4), (7, 1)), ('mlp.down', (6, 5), (1, 5))])
def test_every_matrix_has_a_scale_for_each_output(name, shape, scale):
  array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  found = forms.pack({name: array}, 'int8')
  assert found[name].dtype == np.int8
  assert found[name + '.int8_scale'].shape == scale
  again = found[name] * found[name + '.int8_scale']
  assert np.all(np.abs(again - array) <= 0.501 * found[
      name + '.int8_scale'])


def test_what_is_refused(tmp_path):
  folder = model_folder.save(tmp_path / 'x', 'specjax-x', PARAMS, {})
  with pytest.raises(OutputError, match='holds something else'):
    model_folder.save(folder, 'specjax-y', PARAMS, {})
  with pytest.raises(FormatError, match='"specjax-y"; it has \'specjax-x\''):
    model_folder.load(folder, 'specjax-y')
  with pytest.raises(FormatError, match='no config.json with'):
    model_folder.load(tmp_path, 'specjax-x')
  with pytest.raises(ValueError, match='not finite'):
    model_folder.save(tmp_path / 'y', 'specjax-x', {'a': np.nan}, {})
  assert not (tmp_path / 'y').exists()
  arrays = model_folder.flat(PARAMS)
  like = jax.eval_shape(lambda: {**PARAMS, 'scale': jnp.zeros(3)})
  with pytest.raises(FormatError, match=r"'scale' is \(2,\).*asks for \(3,"):
    model_folder.fitted(folder, arrays, like)
  del like['scale']
  with pytest.raises(FormatError, match="'scale' is .* asks for none"):
    model_folder.fitted(folder, arrays, like)
  del arrays['head.bias']
  with pytest.raises(FormatError, match="'head.bias' is absent"):
    model_folder.fitted(folder, arrays, like)
  (folder / 'config.json').write_text(json.dumps([1]))
  with pytest.raises(FormatError, match='a JSON object'):
    model_folder.load(folder, 'specjax-x')
