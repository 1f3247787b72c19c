"""Autoencoder, decoder and taught drafter by their commands; then images."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import mar_cifar10, sample_latents
from specjax.host import latent_sampling, latents, mar
from specjax.models import vae
from specjax.models.vae import VAEConfig
from train import image_data
from train import mar as train_mar

ROOT = pathlib.Path(__file__).parents[2]


def program(name, config, out, *flags, package='train'):
  """Runs a script; returns what it wrote to stderr."""
  done = subprocess.run(
      [sys.executable, '-m', f'{package}.{name}', '--config', config, '--out',
       str(out), *flags],
      cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)), timeout=600,
      capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stderr


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The folders that the commands of docs/continuous.md leave."""
  out = tmp_path_factory.mktemp('latents')
  program('vae', 'configs/vae_cifar10.py:tiny', out / 'vae')
  shared = f'--config.tokenizer={out / "vae" / "autoencoder"}'
  said = program('mar', 'configs/mar_cifar10.py:tiny', out / 'mar', shared,
                 '--config.model.kind=masked')
  assert '64 images of 16 tokens' in said and 'held-out loss' in said
  program('mar', 'configs/mar_cifar10.py:tiny', out / 'causal', shared)
  said = program(
      'mar', 'configs/mar_cifar10.py:tiny', out / 'taught', shared,
      f'--config.teacher={out / "causal" / "model"}',
      '--config.model.num_layers=1')
  assert 'nats a token' in said and 'tokens a round' in said
  return out


def test_what_the_commands_leave(trained):
  for folder, kind in (('mar', 'masked'), ('causal', 'causal'),
                       ('taught', 'causal')):
    model, facts = mar.load(trained / folder / 'model')
    assert facts['model']['kind'] == kind and facts['grid'] == [4, 4]
    assert model.lm.num_tokens == 16
    rows = [json.loads(line) for line in (
        trained / folder / 'metrics.jsonl').read_text().splitlines()]
    evals = [r for r in rows if r['kind'] == 'eval']
    assert evals[-1]['noise'] < evals[0]['noise']  # something was learnt
    assert ('tokens_per_round' in evals[-1]) == (folder == 'taught')
    assert (trained / folder / 'samples.png').stat().st_size > 1000


@pytest.mark.parametrize('rule', ['path_exact', 'cspd'])
def test_images_by_command(trained, rule, tmp_path):
  program(
      'sample', 'configs/sample_latents.py', tmp_path,
      f'--config.target={trained / "causal" / "model"}',
      f'--config.speculative.model={trained / "taught" / "model"}',
      f'--config.images.tokenizer={trained / "vae" / "autoencoder"}',
      '--config.images.per_class=2', '--config.images.guidance=1.5',
      '--config.images.guidance_schedule=linear',
      '--config.images.process.ahead=2', f'--config.verify={rule}',
      package='specjax')
  rows = [json.loads(line) for line in (
      tmp_path / 'samples.jsonl').read_text().splitlines()]
  assert {np.shape(r['tokens']) for r in rows} == {(16, 4)}
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['lossy'] == (rule == 'cspd')
  assert 1 <= summary['mean_acceptance_length'] <= 9
  assert summary['plain']['mean_acceptance_length'] == 1
  for name in ('samples', 'acceptance', 'acceptance_by_step'):
    assert (tmp_path / f'{name}.png').stat().st_size > 1000


@pytest.mark.parametrize(('flags', 'message'), [
    (['--config.target={mar}', '--config.images.classes=("x",)'],
     "'x' is unknown"),
    (['--config.target={mar}', '--config.sampling.temperature=0.0'],
     'temperature=0'),
    (['--config.target={mar}', '--config.images.process.ahead=-2'],
     'ahead=-2: must be >= 0'),
    (['--config.target={vae}'], 'specjax-mar'),
    (['--config.target={mar}', '--config.speculative.model={vae}'],
     'specjax-mar')])
def test_what_is_refused(trained, flags, message, tmp_path):
  folders = {'mar': trained / 'mar' / 'model',
             'vae': trained / 'vae' / 'autoencoder'}
  done = subprocess.run(
      [sys.executable, '-m', 'specjax.sample', '--config',
       'configs/sample_latents.py', '--out', str(tmp_path),
       f'--config.images.tokenizer={folders["vae"]}',
       '--config.speculative.method=draft_model',
       f'--config.speculative.model={folders["mar"]}',
       *(f.format(**folders) for f in flags)],
      cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)), timeout=600,
      capture_output=True, text=True)
  assert done.returncode == 1 and message in done.stderr
  assert 'Traceback' not in done.stderr


def test_a_decoder_goes_on_from_another(trained, tmp_path):
  """A drafter begins with the weights of one that was not taught."""
  config = mar_cifar10.get_config('tiny')
  config.tokenizer = str(trained / 'vae' / 'autoencoder')
  data = image_data.read(config.data, config.seed, labels=True)

  def run():
    return train_mar.Run(
        config, data, latents.load_autoencoder(config.tokenizer), None,
        tmp_path)

  config.init_from = str(trained / 'causal' / 'model')
  state = run().fresh()
  kept = mar.load(config.init_from)[0].params
  for found in (state.net, state.average):
    jax.tree.map(np.testing.assert_array_equal, found, kept)
  config.model.width = 8
  with pytest.raises(ValueError, match='config.init_from: .*tensor '):
    run().fresh()
  config.init_from = config.tokenizer
  with pytest.raises(ValueError, match='config.init_from: .*specjax-mar'):
    run().fresh()


def test_an_autoencoder_of_other_channels_is_refused(trained, tmp_path):
  shape = VAEConfig(channels=8, multipliers=(1, 2), num_res_blocks=1,
                    latent_channels=2, attention=False)
  other = latents.save_autoencoder(
      tmp_path / 'two', shape, vae.init(shape, jax.random.key(0)), {})
  config = sample_latents.get_config()
  config.target = str(trained / 'mar' / 'model')
  config.images.tokenizer = str(other)
  with pytest.raises(ValueError, match='two has 2 channels, .*model 4'):
    latent_sampling.prepare(config)


def test_an_unknown_kind_of_decoder_is_refused():
  config = mar_cifar10.get_config('tiny')
  config.model.kind = 'both'
  with pytest.raises(ValueError, match="kind='both': known are masked"):
    train_mar.decoder(config, 16, 4, 3)
