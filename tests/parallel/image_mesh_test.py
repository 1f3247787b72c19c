"""Codes of images on a mesh of eight virtual devices: the same images."""

from __future__ import annotations

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from configs import cifar10_lantern
import specjax
from specjax.host import cli, image_sampling
from specjax.host import rules as rules_lib


@pytest.mark.parametrize('verify, options', [
    ('speculative', {}),
    ('lantern', {'codebook': 'synthetic', 'num_neighbours': 3,
                 'delta': 0.05})])
def test_guided_images_with_drafts(verify, options):
  config = cifar10_lantern.get_config('tiny')
  config.images.update(dict(guidance=3.0, per_class=6, classes=('b', 'a')))
  found = []
  for shape in ((1, 1), (4, 2)):
    mesh = cli.mesh(shape)
    model, prompts, pictures = image_sampling.prepare(config, mesh, True)
    rule, tables = rules_lib.build(verify, options, model.vocab_size)
    found.append(specjax.generate(
        model, {'method': 'jacobi', 'num_speculative_tokens': 4}, prompts,
        specjax.Sampling(temperature=1.0, max_new_tokens=pictures.length),
        verify=rule, verifier_params=tables, batch_size=8))
  assert [r.tokens for r in found[0]] == [r.tokens for r in found[1]]
  assert [r.request.tokens for r in found[0]] == 6 * [(17,)] + 6 * [(16,)]
  assert ([r.step_lengths for r in found[0]]
          == [r.step_lengths for r in found[1]])
  # Weights are split as those of texts are.
  down = model.params['layer_0']['mlp']['down']
  assert down.sharding.is_equivalent_to(
      NamedSharding(mesh, P('model')), down.ndim)
  assert len(jax.devices()) == 8
