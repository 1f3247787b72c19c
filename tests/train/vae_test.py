"""An autoencoder: trained by its command, stopped, resumed, loaded."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import vae_cifar10
from specjax.data.images import Images
from specjax.host import latents
from train import image_data, vae
from train.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
DATA = image_data.read(vae_cifar10.get_config('tiny').data, 0)


def made(out, **changes):
  config = vae_cifar10.get_config('tiny')
  config.update(changes)
  run = vae.Run(config, DATA, None, out)
  run.schedule(6)
  return run


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """`(folder, what was said)` of the command of the config."""
  out = tmp_path_factory.mktemp('vae')
  done = subprocess.run(
      [sys.executable, '-m', 'train.vae', '--config',
       'configs/vae_cifar10.py:tiny', '--out', str(out)],
      cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)), timeout=600,
      capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return out, done.stderr


def test_what_the_command_leaves(trained):
  out, said = trained
  rows = [json.loads(line) for line in (
      out / 'metrics.jsonl').read_text().splitlines()]
  tests = [r for r in rows if r['kind'] == 'eval']
  assert [r['step'] for r in tests] == [0, 6, 12]
  assert tests[-1]['psnr'] > tests[0]['psnr']
  assert all(np.isfinite([r['kl'], r['std'], r['psnr']]).all()
             for r in rows if r['kind'] == 'train')
  assert (out / 'images.png').stat().st_size > 1000
  found = latents.load_autoencoder(out / 'autoencoder')
  assert found.facts['metrics']['psnr'] == tests[-1]['psnr']
  assert found.facts['data']['classes'] == ['a', 'b', 'c']
  assert found.config.latent_channels == 4 and found.config.factor == 4
  # What was said is what the folder does.
  run = made(out)
  scores = run.scores(found)
  assert f'{scores["psnr"]:.2f} dB, tokens of deviation' in said
  assert f'deviation {scores["std"]:.3f} with scale' in said
  assert f'scale {found.config.scale:.4g} as saved (int8)' in said
  # Eight bits and a scale change little.
  assert abs(scores['psnr'] - tests[-1]['psnr']) < 0.05


def test_tokens_have_deviation_1(trained):
  found = latents.load_autoencoder(trained[0] / 'autoencoder')
  assert abs(found.config.scale - 1) > 0.03  # there was something to do
  x = DATA.train.images
  # Seed 0 was measured, in float32. Of others, the deviation of 4,096 numbers
  # is known to 0.011.
  for seed, within in ((0, 0.01), (1, 0.04)):
    tokens = found.encode(x, seed=seed)
    assert tokens.shape == (64, 4, 4, 4)
    assert np.std(tokens) == pytest.approx(1, abs=within)
  again = found.decode(tokens)
  assert again.dtype == np.uint8 and again.shape == x.shape


def test_scale_is_measured_on_draws(tmp_path):
  """Where means are all alike, what is drawn deviates nonetheless."""
  run = made(tmp_path)
  state = run.fresh()
  flat = jax.tree.map(jnp.zeros_like, state.average)
  flat['quant_conv']['bias'] = jnp.asarray(  # means 7, deviations 0.1
      [7.0] * 4 + [2 * np.log(0.1)] * 4, jnp.float32)
  scaled = run.scaled(state.replace(average=flat))
  assert scaled.config.scale == pytest.approx(10, rel=0.04)
  tokens = scaled.encode(DATA.train.images, seed=0)
  assert np.std(tokens) == pytest.approx(1, abs=1e-3)
  assert np.mean(tokens) == pytest.approx(
      7 * scaled.config.scale, rel=0.01)
  # The weights are the average's, not those of the last step.
  jax.tree.map(np.testing.assert_array_equal, scaled.params, flat)


def test_scores_by_hand(tmp_path):
  run = made(tmp_path)
  model = latents.Autoencoder(run.objective.config, run.fresh().average)
  scores = run.scores(model)
  x = DATA.test.images[:16]
  tokens = model.encode(x, seed=0)
  gap = np.mean(np.square(x / 255 - model.decode(tokens) / 255), (1, 2, 3))
  assert scores['psnr'] == pytest.approx(-10 * np.mean(np.log10(gap)))
  assert scores['std'] == pytest.approx(np.std(tokens), rel=1e-4)
  assert scores['images'] == 16
  assert run.objective.config.scale == 1


def test_a_run_goes_on_exactly(tmp_path):
  first = made(tmp_path)
  state = first.fresh()
  for step in range(6):
    state, report, _ = first.step(state, step)
  assert np.isfinite(report['loss']) and report['bad'] == 0
  half = first.fresh()
  for step in range(3):
    half, _, _ = first.step(half, step)
  place = Checkpoints(tmp_path / 'states', first.config.to_dict(), 'x')
  place.save(half, 3, {'num_steps': 6})
  second = made(tmp_path)
  found = place.restore(second.abstract(), None)
  assert found is not None and found[1]['num_steps'] == 6
  again = found[0]
  for step in range(3, 6):
    again, _, _ = second.step(again, step)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state),
               jax.device_get(again))
  assert all(np.any(a != b) for a, b in zip(  # every weight still moves
      jax.tree.leaves(half.net), jax.tree.leaves(again.net), strict=True))


def test_bad_input(tmp_path):
  odd = image_data.Data(*(Images(np.zeros((2, 14, 16, 3), np.uint8)),) * 2)
  with pytest.raises(ValueError, match='14 pixels do not divide by 4'):
    vae.Run(vae_cifar10.get_config('tiny'), odd, None, tmp_path)
  config = vae_cifar10.get_config('tiny')
  config.loss.kl = -1.0
  with pytest.raises(ValueError, match='weights must be >= 0'):
    vae.Run(config, DATA, None, tmp_path)
