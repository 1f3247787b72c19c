"""Decoders of continuous tokens: folders, published files, drawing, errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax.drafters import Null
from specjax.drafters.chain_density import ChainDensity
from specjax.host import latent_sampling, mar
from specjax.host.load import Model
from specjax.io.errors import FormatError
from specjax.models.causal_images import CausalImages
from specjax.models.diffusion import Diffusion
from specjax.models.diffusion_head import DenoisingMLP, GuidedHead
from specjax.models.transformer_config import TransformerConfig
from specjax.parallel import make_mesh
from specjax.verify import PathExact

SIZE = 16
TINY = mar.tiny()
SAMPLING = specjax.Sampling(temperature=1.0, max_new_tokens=SIZE)


def causal():
  lm = CausalImages(
      TransformerConfig(
          vocab_size=1, num_layers=1, embed_dim=8, mlp_dim=16, num_heads=2,
          num_kv_heads=2, head_dim=4, num_conditions=3),
      SIZE, 2, 2, Diffusion(DenoisingMLP(2, 8, 8, 1), 2, num_levels=8,
                            first=6))
  return Model('causal', lm, lm.random(jax.random.key(1)))


def starts(labels, **kwargs):
  orders = latent_sampling.orders_of('random', len(labels), SIZE, 3)
  return latent_sampling.begin(TINY.lm, labels, orders, **kwargs)


def tokens(results):
  return np.stack([np.asarray(r.tokens) for r in results])


@pytest.mark.parametrize('model', [TINY, causal()], ids=lambda m: m.name)
def test_folders_keep_a_decoder(model, tmp_path):
  folder = mar.save(tmp_path / 'model', model.lm, model.params, {
      'data': {'classes': ['a', 'b']}}, 'float32')
  again, facts = mar.load(folder)
  assert again.lm == model.lm and facts['data']['classes'] == ['a', 'b']
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  other, _ = mar.load(folder, num_levels=12, first=9, last_noise=False)
  assert (other.lm.process.num_steps, other.lm.process.last_noise) == (
      10, False)
  values = json.loads((folder / 'config.json').read_text())
  values['model']['kind'] = 'recurrent'
  (folder / 'config.json').write_text(json.dumps(values))
  with pytest.raises(FormatError, match="'recurrent': known are masked, caus"):
    mar.load(folder)


@pytest.mark.parametrize('model', [TINY, causal()], ids=lambda m: m.name)
def test_drafters_are_models_or_folders(model, tmp_path):
  folder = mar.save(tmp_path / 'model', model.lm, model.params, {}, 'float32')
  loaded = specjax.load(str(folder))
  assert loaded.lm == model.lm and not loaded.vocab_size
  ways = [loaded, {'model': loaded}, {'model': str(folder)}, (
      ChainDensity(model=mar.draft_lm(TINY, model)), model.params)]
  texts = []
  for way in ways:
    way, params = way if isinstance(way, tuple) else (way, None)
    found = specjax.generate(
        TINY, way, starts([0, 1]), SAMPLING, drafter_params=params)
    assert found.summary()['num_draft_tokens'] > 0
    texts.append(tokens(found))
  for text in texts:
    np.testing.assert_array_equal(text, texts[0])


def test_other_steps_are_told():
  process = dataclasses.replace(TINY.lm.process, first=5)
  other = dataclasses.replace(
      TINY, lm=dataclasses.replace(TINY.lm, process=process))
  with pytest.warns(UserWarning, match='first of the denoising steps: 6 of'):
    made = mar.draft_lm(TINY, other)
  assert made.process.num_steps == TINY.lm.process.num_steps


def test_a_folder_of_another_size_names_the_tensor(tmp_path):
  folder = mar.save(tmp_path / 'model', TINY.lm, TINY.params, {})
  values = json.loads((folder / 'config.json').read_text())
  values['model']['decoder']['channels'] = 3
  values['model']['head']['channels'] = 3
  values['model']['diffusion']['channels'] = 3
  (folder / 'config.json').write_text(json.dumps(values))
  with pytest.raises(FormatError, match=r'head\.final_layer\.linear\.bias'):
    mar.load(folder)


def test_published_names_and_back():
  tensors = mar.to_published(TINY.lm, TINY.params)
  assert tensors['diffloss.net.input_proj.weight'].shape == (8, 2)
  lm, params = mar.published(tensors)
  # What a checkpoint does not tell: the steps, and heads of small models.
  assert dataclasses.replace(lm.mar, num_heads=2) == TINY.lm.mar
  assert (lm.process.head, lm.process.num_levels) == (
      TINY.lm.process.head, 100)
  jax.tree.map(np.testing.assert_array_equal, params, TINY.params)
  missing = {k: v for k, v in tensors.items() if k != 'mask_token'}
  with pytest.raises(ValueError, match='mask_token: missing'):
    mar.published(missing)
  with pytest.raises(FormatError, match='not a MAR checkpoint'):
    mar.published({'output.weight': np.zeros((2, 2))})


@pytest.mark.parametrize('drafter', [TINY, causal()], ids=lambda m: m.name)
def test_images_through_generate(drafter):
  """Drafts of either kind; counts that agree; every place made once."""
  params = jax.tree.map(lambda x: x + 0.05, drafter.params)
  results = specjax.generate(
      TINY, {'method': 'draft_model', 'num_speculative_tokens': 3,
             'model': dataclasses.replace(drafter, params=params)},
      starts([0, 1, 2, 0, 1]), SAMPLING, batch_size=2)
  found = tokens(results)
  assert found.shape == (5, SIZE, 2) and np.isfinite(found).all()
  assert len(np.unique(found.reshape(-1, 2), axis=0)) == 5 * SIZE
  summary = results.summary()
  assert summary['verify'] == 'path_exact' and not summary['lossy']
  for r in results:
    assert sum(r.step_lengths) == SIZE and r.histogram.sum() == r.rounds
    assert r.kept.sum() == r.accepted.sum() == (
        r.histogram @ np.arange(4))
  assert 0 < summary['num_accepted_draft_tokens'] < 5 * SIZE
  assert summary['acceptance_histogram'] == list(
      np.sum([r.histogram for r in results], axis=0))


def test_an_image_does_not_depend_on_its_neighbours():
  drafter = ChainDensity(3, TINY.lm)
  params = jax.tree.map(lambda x: x + 0.02, TINY.params)
  sampling = [dataclasses.replace(SAMPLING, seed=i) for i in range(3)]
  asked = starts([0, 1, 2])
  together = specjax.generate(
      TINY, drafter, asked, sampling, drafter_params=params, batch_size=3)
  alone = specjax.generate(
      TINY, drafter, asked[1:2], sampling[1:2], drafter_params=params,
      batch_size=3)
  np.testing.assert_array_equal(tokens(together)[1], tokens(alone)[0])


def test_images_on_a_mesh():
  """Rows over two devices: the same images, up to rounding."""
  asked = starts([0, 1, 2, 0])
  drafting = {
      'method': 'draft_model', 'num_speculative_tokens': 3, 'model':
      dataclasses.replace(TINY, params=jax.tree.map(
          lambda x: x + 0.05, TINY.params))}
  one, two = (specjax.generate(
      dataclasses.replace(TINY, mesh=mesh), drafting, asked, SAMPLING,
      batch_size=4) for mesh in (None, make_mesh((2, 1))))
  np.testing.assert_allclose(tokens(one), tokens(two), atol=1e-4)
  assert [r.step_lengths for r in one] == [r.step_lengths for r in two]


def test_iterations_are_rounds_of_plain_decoding():
  lm = dataclasses.replace(TINY.lm, num_iterations=4)
  results = specjax.generate(
      dataclasses.replace(TINY, lm=lm), Null(lm.largest - 1), starts([0, 1]),
      SAMPLING)
  sizes = np.bincount(lm.iterations)
  assert all(r.step_lengths == tuple(sizes[sizes > 0]) for r in results)
  assert not any(r.kept.any() for r in results)


def test_drafts_inside_iterations_are_counted():
  lm = dataclasses.replace(TINY.lm, num_iterations=4, num_passes=1)
  model = dataclasses.replace(TINY, lm=lm)
  results = specjax.generate(
      model, ChainDensity(lm.largest, TINY.lm), starts([0, 1, 2, 0]),
      SAMPLING, drafter_params=jax.tree.map(lambda x: x + .05, TINY.params))
  for r in results:
    assert r.rounds == 4 and r.kept.sum() == r.accepted.sum()
  assert 0 < sum(r.kept.sum() for r in results) < 4 * SIZE
  # Drafts behind a rejected one stand, so nothing is given those before it.
  assert results.summary()['conditional_acceptance'] is None


def test_the_target_makes_the_first_tokens_alone():
  results = specjax.generate(
      TINY, {'method': 'draft_model', 'model': TINY, 'prefill': 5,
             'num_speculative_tokens': 3}, starts([0, 1]), SAMPLING)
  for r in results:
    assert r.step_lengths == (1, 1, 1, 1, 1, 4, 4, 3)
    np.testing.assert_array_equal(r.kept[:5], False)


def test_what_is_compared_with():
  pictures = latent_sampling.Pictures(
      None, (4, 4), None, ('a',), 1, iterations=(8, 1))  # type: ignore[arg-type]
  found = pictures.rivals(TINY)
  assert {k: (m.lm.num_iterations, d.num_speculative_tokens + 1)
          for k, (m, d) in found.items()} == {
              'plain, 8 iterations': (8, 3), 'plain, 1 iterations': (1, 16)}
  with pytest.raises(ValueError, match='causal decoder has no iterations'):
    pictures.rivals(causal())


def test_results_say_what_was_verified_against():
  few = dataclasses.replace(TINY, lm=dataclasses.replace(
      TINY.lm, num_iterations=4, num_passes=1))
  for model, said in ((TINY, 'a pass for each draft'),
                      (few, '1 at most (masked, 4 iterations, cosine)'),
                      (causal(), 'one pass over all drafts (causal)')):
    found = specjax.generate(model, None, starts([0]), SAMPLING).summary()
    assert said in found['scoring']


def test_orders_and_scales():
  orders = latent_sampling.orders_of('random', 5, 9, 0)
  np.testing.assert_array_equal(np.sort(orders, axis=1), [np.arange(9)] * 5)
  assert len({tuple(o) for o in orders}) == 5
  np.testing.assert_array_equal(
      latent_sampling.orders_of('raster', 2, 4, 0), [np.arange(4)] * 2)
  assert latent_sampling.scales(8, 1.0, 'linear') is None
  np.testing.assert_allclose(
      latent_sampling.scales(4, 3.0, 'linear'), [1.5, 2, 2.5, 3])
  np.testing.assert_allclose(
      latent_sampling.scales(2, 3.0, 'constant'), [3, 3])


def test_guidance_of_target_and_drafter_is_one():
  """A drafter is guided when its target is, and by the same numbers."""
  guided = dataclasses.replace(TINY, lm=mar.guided(TINY.lm))
  other = mar.draft_lm(guided, causal())
  assert isinstance(other.process.head, GuidedHead)
  assert not isinstance(
      mar.draft_lm(TINY, causal()).process.head, GuidedHead)
  results = specjax.generate(
      guided, {'method': 'draft_model', 'model': TINY,
               'num_speculative_tokens': 2},
      starts([0, 1], guidance=np.full(SIZE, 1.0, np.float32)), SAMPLING)
  # The drafter is the target, and at scale 1 guidance changes nothing.
  assert all(r.step_lengths == (3, 3, 3, 3, 3, 1) for r in results)


def image(**changes):
  start = starts([0])[0]
  return dataclasses.replace(start, **changes)


WRONG = [
    ({'temperature': 0.0}, {}, 'temperature=0'),
    ({'top_k': 5}, {}, 'top_k=5: is for ids'),
    ({}, {'tokens': [3]}, 'tokens are real numbers'),
    ({}, {'tokens': np.full((1, 2), np.nan)}, 'not finite'),
    ({}, {'tokens': np.zeros((1, 2, 2))}, 'must be ids'),
]


@pytest.mark.parametrize(('options', 'changes', 'message'), WRONG)
def test_what_cannot_be_decoded(options, changes, message):
  with pytest.raises(ValueError, match=message):
    specjax.generate(TINY, None, [image(**changes)],
                     dataclasses.replace(SAMPLING, **options))


def test_prompts_of_several_shapes_are_refused():
  wrong = image(condition={'label': np.int32(0)})
  with pytest.raises(ValueError, match='prompt 1: condition'):
    specjax.generate(TINY, None, [image(), wrong], SAMPLING)


def test_not_a_number_in_the_weights_is_told():
  params = {**TINY.params, 'mar': {
      **TINY.params['mar'],
      'z_proj.weight': jnp.full_like(TINY.params['mar']['z_proj.weight'],
                                     jnp.nan)}}
  with pytest.raises(FloatingPointError, match='request 0.*round'):
    specjax.generate(dataclasses.replace(TINY, params=params), None,
                     [image()], SAMPLING)


@pytest.mark.parametrize(('config', 'message'), [
    ({'lattice': True}, 'unknown for method'),
    ({'draft_confidence_threshold': 0.5}, 'are for ids'),
    ({'num_speculative_tokens': 0}, 'num_speculative_tokens=0')])
def test_drafting_options(config, message):
  with pytest.raises(ValueError, match=message):
    specjax.generate(TINY, {'method': 'draft_model', 'model': TINY, **config},
                     [image()], SAMPLING)


def test_more_drafts_than_tokens_are_refused():
  with pytest.raises(ValueError, match='tokens=17: an image has 16 tokens'):
    specjax.generate(TINY, {'method': 'draft_model', 'model': TINY,
                            'num_speculative_tokens': 17}, [image()], SAMPLING)


def test_capped_residuals_are_in_the_summary():
  """What a cap changes is bounded by the share of rounds that it ended."""
  shares = []
  for rule in (PathExact(), PathExact(max_tries=1)):
    found = specjax.generate(
        TINY, ChainDensity(3, TINY.lm), starts([0, 1, 2, 0]), SAMPLING,
        drafter_params=jax.tree.map(lambda x: x + 0.05, TINY.params),
        verify=rule)
    shares.append(found.summary()['gave_up'])
    assert shares[-1] == sum(r.gave_up for r in found) / sum(
        r.rounds for r in found)
  assert shares[0] == 0 < shares[1] <= 1


def test_nothing_is_drafted_behind_the_end():
  """A drafter that is the target has all its drafts accepted."""
  found = specjax.generate(
      TINY, {'method': 'draft_model', 'model': TINY,
             'num_speculative_tokens': 6}, starts([0, 1]), SAMPLING).summary()
  assert found['draft_acceptance_rate'] == 1.0


def test_guidance_without_a_guided_head_is_told():
  scales = np.full(SIZE, 2.0, np.float32)
  with pytest.raises(ValueError, match='a head that is not a GuidedHead'):
    specjax.generate(TINY, None, starts([0], guidance=scales), SAMPLING)


def test_drafters_of_other_tokens_are_refused():
  few = dataclasses.replace(causal().lm, num_tokens=9)
  with pytest.raises(ValueError, match='num_tokens: 16 of random, 9 of few'):
    mar.draft_lm(TINY, Model('few', few, None))
  fixed = dataclasses.replace(TINY.lm, process=dataclasses.replace(
      TINY.lm.process, variance='lower'))
  with pytest.raises(ValueError, match='variance.*learned of random, lower'):
    mar.draft_lm(TINY, Model('fixed', fixed, None))


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: starts([3]), r'labels \[3\]: must be in \[0, 2\]'),
    (lambda: latent_sampling.orders_of('spiral', 1, 4, 0), "'spiral'"),
    (lambda: latent_sampling.scales(4, 2.0, 'cosine'), "'cosine'"),
    (lambda: latent_sampling.scales(4, float('nan'), 'linear'), 'nan')])
def test_arguments_out_of_range(call, message):
  with pytest.raises(ValueError, match=message):
    call()
