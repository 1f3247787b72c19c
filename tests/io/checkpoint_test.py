"""Models survive a round trip through orbax, onto any mesh."""

import jax
import numpy as np
import pytest

import specjax
from specjax.host import tiny
from specjax.io.errors import FormatError
from specjax.models.rope import RopeScaling
from specjax.parallel import make_mesh


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  model = tiny.model(
      rope_scaling=RopeScaling('llama3', 8.0), window=8,
      local_layers=(True, False), vocab_size=264)
  return model, specjax.save(model, tmp_path_factory.mktemp('c') / 'm')


def test_round_trip(saved):
  model, folder = saved
  again = specjax.load(str(folder))
  assert again.lm.config == model.lm.config and again.eos == model.eos
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  text = 'a <|user|> é'
  assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
  assert again.tokenizer.chat_template == model.tokenizer.chat_template


def test_loads_onto_a_mesh(saved):
  model, folder = saved
  again = specjax.load(str(folder), mesh=make_mesh((4, 2)))
  embedding = again.params['embedding']
  assert embedding.sharding.spec == jax.sharding.PartitionSpec('model', None)
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_refuses(saved, tmp_path):
  model, folder = saved
  with pytest.raises(FormatError, match='already'):
    specjax.save(model, folder)
  with pytest.raises(ValueError, match='holds float32'):
    specjax.load(str(folder), dtype='bfloat16')
