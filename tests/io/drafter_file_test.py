"""Folders of trained drafters: what is written is read, or refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from specjax.io import drafter_file, safetensors
from specjax.io.errors import FormatError, OutputError

RNG = np.random.default_rng(0)
ARRAYS = {
    'layer_0.attention.qkv': RNG.normal(size=(16, 2, 4, 8)),
    'layer_0.attention.out': RNG.normal(size=(2, 2, 8, 16)),
    'layer_0.mlp_norm.scale': RNG.normal(size=(16,)),
    'markov_in': RNG.normal(size=(9, 4)) * np.arange(9)[:, None],
    'linear': RNG.normal(size=(3, 16, 16)),
    'bias': RNG.normal(size=(3, 16)),
    'confidence_bias': np.asarray(0.5)}
IDS = np.asarray([1, 4, 5])


def write(path, form):
  return drafter_file.write(path, ARRAYS, IDS, {'kind': 'x'}, form=form)


@pytest.mark.parametrize('form, step', [
    ('float32', 0.0), ('bfloat16', 2**-8), ('int8', 0.5 / 127)])
def test_what_is_written_is_read(tmp_path, form, step):
  folder = write(tmp_path / 'd', form)
  arrays, ids, facts = drafter_file.read(folder)
  assert set(arrays) == set(ARRAYS) and facts['kind'] == 'x'
  np.testing.assert_array_equal(ids, IDS)
  assert [p.name for p in tmp_path.iterdir()] == ['d']
  for name, array in ARRAYS.items():
    exact = np.float32(array)
    if array.ndim < 2 or name == 'bias':
      np.testing.assert_array_equal(arrays[name], exact)
    elif form == 'int8':  # half a step of each channel's own scale
      axes = {'out': (0, 1, 2), 'markov_in': (1,), 'linear': (1,)}.get(
          name.split('.')[-1], (0,))
      most = np.abs(exact).max(axis=axes, keepdims=True)
      assert (np.abs(arrays[name] - exact) <= most * step * 1.001).all()
      assert np.abs(arrays[name] - exact).max() > 0
    else:
      np.testing.assert_allclose(arrays[name], exact, rtol=step)


def test_int8_takes_a_quarter(tmp_path):
  sizes = []
  for form in ('float32', 'bfloat16', 'int8'):
    folder = drafter_file.write(
        tmp_path / form, {'a': np.ones((256, 256))}, IDS, {}, form=form)
    sizes.append((folder / 'drafter.safetensors').stat().st_size)
  assert sizes[0] > 1.9 * sizes[1] > 3.7 * sizes[2]
  arrays, _, _ = drafter_file.read(tmp_path / 'int8')
  np.testing.assert_allclose(arrays['a'], 1.0, rtol=1e-6)


def test_zeros_stay_zeros(tmp_path):
  folder = drafter_file.write(
      tmp_path / 'd', {'a': np.zeros((4, 4))}, IDS, {}, form='int8')
  np.testing.assert_array_equal(drafter_file.read(folder)[0]['a'], 0)


def test_what_is_refused(tmp_path):
  with pytest.raises(ValueError, match="form='int4'"):
    write(tmp_path / 'd', 'int4')
  with pytest.raises(ValueError, match='w: holds values'):
    drafter_file.write(tmp_path / 'd', {'w': np.asarray([np.nan])}, IDS, {})
  other = tmp_path / 'other'
  other.mkdir()
  with pytest.raises(FormatError, match='no config.json'):
    drafter_file.read(other)
  (other / 'config.json').write_text('{"model_type": "llama"}')
  with pytest.raises(FormatError, match='not a drafter that specjax'):
    drafter_file.read(other)
  with pytest.raises(OutputError, match='other exists and holds something'):
    write(other, 'int8')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['other']


@pytest.mark.parametrize('gone', ['ids', 'markov_in.int8_scale'])
def test_missing_tensors(tmp_path, gone):
  folder = write(tmp_path / 'd', 'int8')
  path = folder / 'drafter.safetensors'
  tensors = {
      k: t.read().astype(np.int8 if t.dtype == 'I8' else np.float32)
      for k, t in safetensors.read(path).items() if k != gone}
  safetensors.write(path, tensors)
  with pytest.raises(FormatError, match=f"'{gone}' is missing"):
    drafter_file.read(folder)


@pytest.mark.parametrize('name, values, tensors, there', [
    ('drafter', {'format': 'specjax-drafter'}, {}, 'own'),
    ('model', {'dflash_config': {}}, {'fc.weight': np.zeros((2, 4))}, 'other'),
    ('medusa_lm_head', {'medusa_num_heads': 2}, {}, 'other'),
    ('model', {'model_type': 'medusa'}, {'x': np.zeros(2)}, 'other'),
    ('model', {'model_type': 'llama'}, {'x.fc.weight': np.zeros(2)}, None)])
def test_drafters_are_told_from_models(tmp_path, name, values, tensors, there):
  (tmp_path / 'config.json').write_text(json.dumps(values))
  safetensors.write(tmp_path / f'{name}.safetensors', tensors)
  assert drafter_file.is_drafter(tmp_path) == (there is not None)
  assert drafter_file.is_own(tmp_path) == (there == 'own')
  if there is not None:
    assert drafter_file.whose(tmp_path) == there
    return
  with pytest.raises(FormatError, match=r"format.*medusa.*'fc\.weight'"):
    drafter_file.whose(tmp_path)


def test_pickles_and_damaged_files(tmp_path):
  assert not drafter_file.is_drafter(tmp_path)  # an empty folder
  config = tmp_path / 'config.json'
  config.write_text('{}')
  assert not drafter_file.is_drafter(tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  assert drafter_file.whose(tmp_path) == 'other'
  (tmp_path / 'model.safetensors').write_bytes(b'damaged')
  assert not drafter_file.is_drafter(tmp_path)
  config.write_text('{')
  assert not drafter_file.is_drafter(tmp_path)
  assert not drafter_file.is_own(tmp_path)
  with pytest.raises(FormatError, match='config.json: not valid JSON'):
    drafter_file.whose(tmp_path)


def test_a_full_disk_leaves_the_old_one(monkeypatch, tmp_path):
  folder = write(tmp_path / 'd', 'float32')
  before = (folder / 'drafter.safetensors').read_bytes()

  def full(*args, **kwargs):
    raise OSError(28, os.strerror(28))
  monkeypatch.setattr(safetensors, 'write', full)
  with pytest.raises(OutputError, match='No space left'):
    write(folder, 'int8')
  assert (folder / 'drafter.safetensors').read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ['d']
  assert json.loads((folder / 'config.json').read_text())['form'] == 'float32'
