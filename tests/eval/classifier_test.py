"""A trained classifier as a file and as an extractor."""

import json

import jax
import numpy as np
import pytest

from specjax.eval import classifier, features, statistics
from specjax.eval.classifier import TrainedClassifier, load, save
from specjax.io import safetensors
from specjax.io.errors import FormatError, OutputError
from specjax.models.classifier import Classifier

NET = Classifier.of(dict(num_classes=3, width=8, num_stages=1, num_blocks=1))
RNG = np.random.default_rng(0)


@pytest.fixture(scope='module', name='trained')
def _trained():
  return TrainedClassifier(
      NET, jax.jit(NET.init)(jax.random.key(0)), classes=('a', 'b', 'ü'),
      facts={'accuracy': 0.5})


def images(n=5):
  return RNG.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def test_it_is_an_extractor(trained):
  x = images(5)
  assert trained(x).shape == (5, trained.dim) == (5, 8)
  assert features.names(trained) == ('FD-self', 'KD-self', 'IS-self')
  parts = TrainedClassifier(NET, trained.params, batch=2)
  np.testing.assert_allclose(parts(x), trained(x), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
      parts.logits(x), trained.logits(x), rtol=1e-5, atol=1e-6)
  found = statistics.measure(x, trained)
  assert found.extractor == trained.name
  with pytest.raises(ValueError, match='uint8'):
    trained(x / 255)
  with pytest.raises(ValueError, match='batch=0'):
    TrainedClassifier(NET, trained.params, batch=0)


def test_the_name_tells_weights_and_options(trained):
  same = TrainedClassifier(NET, jax.tree.map(np.array, trained.params))
  assert same.name == trained.name
  other = jax.tree.map(lambda x: x + 1e-6, trained.params)
  half = Classifier.of({**NET.options, 'dtype': 'bfloat16'})
  names = {trained.name, TrainedClassifier(NET, other).name,
           TrainedClassifier(half, trained.params).name}
  assert len(names) == 3
  broken = jax.tree.map(lambda x: x * np.nan, trained.params)
  with pytest.raises(ValueError, match='not finite'):
    TrainedClassifier(NET, broken)


def test_save_and_load(tmp_path, trained):
  folder = save(tmp_path / 'judge', trained)
  assert save(folder, trained) == folder  # replaced
  found = load(folder, Classifier.of)
  assert found.network == NET and found.name == trained.name
  assert found.classes == ('a', 'b', 'ü') and found.facts == {'accuracy': 0.5}
  x = images()
  np.testing.assert_array_equal(found(x), trained(x))
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'letter.txt').write_text('mine')
  with pytest.raises(OutputError, match='holds something else'):
    save(tmp_path / 'other', trained)


def test_load_refuses(tmp_path, trained):
  folder = save(tmp_path / 'judge', trained)
  config, arrays = folder / 'config.json', folder / 'model.safetensors'
  good, values = config.read_text(), json.loads(config.read_text())

  def expect(text):
    with pytest.raises(FormatError, match=text):
      load(folder, Classifier.of)
  for change, text in (
      ({'format': 'other'}, "it has 'other'"), ({'options': None}, 'damaged'),
      ({'options': {**NET.options, 'width': 16}}, 'config asks for'),
      ({'options': {**NET.options, 'num_blocks': 2}}, 'is absent'),
      ({'options': {'depth': 1}}, "unknown option 'depth'"),
      ({'name': 'classifier-000000000000'}, 'was replaced')):
    config.write_text(json.dumps({**values, **change}))
    expect(text)
  config.write_text(good)
  tensors = {k: v.read() for k, v in safetensors.read(arrays).items()}
  safetensors.write(arrays, {**tensors, 'extra': np.zeros(3)})
  expect('extra')
  safetensors.write(arrays, {k: v + 1 for k, v in tensors.items()})
  expect('was replaced')
  safetensors.write(arrays, {k: v * np.nan for k, v in tensors.items()})
  expect('not finite')
  arrays.unlink()
  expect('model.safetensors')
  config.unlink()
  expect('no config.json')
  assert classifier.digest(NET, trained.params)[:12] in good
