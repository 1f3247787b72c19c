"""Tokenizer and image decoder: trained, stopped, resumed, loaded, sampled."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import image_ar_cifar10, sample_image, vq_cifar10
from specjax.data import store
from specjax.data.images import Images
from specjax.eval import pictures
from specjax.host import image_sampling, images
from specjax.io.errors import FormatError
from specjax.models import image_lm, vq_weights, weights
from specjax.models import vq as vq_lib
from specjax.models.vq import VQConfig
from tests import tiny
from train import image_ar, image_data, vq
from train.checkpoints import Checkpoints

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
  """A tokenizer and a decoder, by the commands of their configs."""
  out = tmp_path_factory.mktemp('image')
  said = program('vq', 'configs/vq_cifar10.py:tiny', out / 'vq')
  assert 'dB' in said and 'codes used' in said
  said = program(
      'image_ar', 'configs/image_ar_cifar10.py:tiny', out / 'lm',
      f'--config.tokenizer={out / "vq" / "tokenizer"}')
  assert '64 images of 64 codes' in said and 'held-out loss' in said
  return out


def test_what_the_commands_leave(trained):
  for folder, last in (('vq', 'psnr'), ('lm', 'held_out_loss')):
    rows = [json.loads(line) for line in (
        trained / folder / 'metrics.jsonl').read_text().splitlines()]
    tests = [r for r in rows if r['kind'] == 'eval']
    assert [r['step'] for r in tests] == [0, 6, 12]
    assert np.isfinite(tests[-1][last])
  assert (trained / 'vq' / 'images.png').stat().st_size > 1000
  assert (trained / 'lm' / 'samples.png').stat().st_size > 1000
  tokenizer = images.load_tokenizer(trained / 'vq' / 'tokenizer')
  model, facts = images.load_lm(trained / 'lm' / 'model')
  assert facts['grid'] == [8, 8] and facts['data']['classes'] == ['a', 'b', 'c']
  assert model.vocab_size == tokenizer.config.num_codes == 16
  assert model.lm.config.num_conditions == 4
  data = image_data.read(vq_cifar10.get_config('tiny').data, 0)
  ids = tokenizer.encode(data.test.images, batch_size=24)  # 64: one is short
  assert ids.shape == (64, 8, 8)
  np.testing.assert_array_equal(
      ids[50:], tokenizer.encode(data.test.images[50:]))
  again = tokenizer.decode(ids)
  assert again.dtype == np.uint8 and again.shape == data.test.images.shape


@pytest.mark.parametrize('rule', ['auto', 'lantern'])
def test_images_are_sampled(trained, tmp_path, rule):
  flags = [] if rule == 'auto' else [
      '--config.verify=lantern', '--config.verify_options.delta=0.3',
      '--config.verify_options.num_neighbours=5',
      f'--config.verify_options.codebook={trained / "vq" / "tokenizer"}']
  program(
      'sample', 'configs/sample_image.py', tmp_path,
      f'--config.target={trained / "lm" / "model"}',
      f'--config.images.tokenizer={trained / "vq" / "tokenizer"}',
      '--config.images.per_class=2', "--config.images.classes=('b', 'c')",
      *flags, package='specjax')
  rows = [json.loads(line) for line in (
      tmp_path / 'samples.jsonl').read_text().splitlines()]
  assert len(rows) == 4
  assert all(len(r['tokens']) == 64 and max(r['tokens']) < 16 for r in rows)
  summary = json.loads((tmp_path / 'summary.json').read_text())
  # A decoder that knows little: its law hardly changes, so Jacobi's drafts fit.
  assert summary['mean_acceptance_length'] > 3
  assert (summary['one_step_tv'] > 0) == (rule == 'lantern')
  for name in ('samples.png', 'acceptance.png'):
    assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize('which', ['vq', 'image_ar'])
def test_a_run_goes_on_exactly(which, trained, tmp_path):
  data = image_data.read(vq_cifar10.get_config('tiny').data, 0)

  def run():
    if which == 'vq':
      config = vq_cifar10.get_config('tiny')
      made = vq.Run(config, data, None, tmp_path)
    else:
      config = image_ar_cifar10.get_config('tiny')
      made = image_ar.Run(
          config, data, images.load_tokenizer(trained / 'vq' / 'tokenizer'),
          None, tmp_path)
    made.schedule(6)
    return made
  whole = run()
  state = whole.fresh()
  for step in range(6):
    state, report, _ = whole.step(state, step)
  assert np.isfinite(report['loss']) and report['bad'] == 0
  first = run()
  half = first.fresh()
  for step in range(3):
    half, _, _ = first.step(half, step)
  place = Checkpoints(tmp_path / 'states', first.config.to_dict(), 'x')
  place.save(half, 3, {'num_steps': 6})
  second = run()
  found = place.restore(second.abstract(), None)
  assert found is not None and found[1]['num_steps'] == 6
  again = found[0]
  for step in range(3, 6):
    again, _, _ = second.step(again, step)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state),
               jax.device_get(again))


def test_bad_input(trained, tmp_path):
  tokenizer = images.load_tokenizer(trained / 'vq' / 'tokenizer')
  with pytest.raises(ValueError, match='multiples of 2'):
    tokenizer.encode(np.zeros((1, 5, 4, 3), np.uint8))
  with pytest.raises(ValueError, match='uint8'):
    tokenizer.encode(np.zeros((1, 4, 4), np.uint8))
  with pytest.raises(ValueError, match=r'\[0, 16\)'):
    tokenizer.decode(np.full((1, 4, 4), 16))
  with pytest.raises(FormatError, match='specjax-image-lm'):
    images.load_lm(trained / 'vq' / 'tokenizer')
  asked = sample_image.get_config()
  for name, value, said in (
      (None, None, 'give the folders'), ('classes', ('x',), "'x' is unknown"),
      ('per_class', 0, 'must be >= 1')):
    if name is None:
      with pytest.raises(ValueError, match=said):
        image_sampling.prepare(asked, None, True)
      asked.target = str(trained / 'lm' / 'model')
      asked.images.tokenizer = str(trained / 'vq' / 'tokenizer')
      continue
    wrong = asked.copy_and_resolve_references()
    wrong.images[name] = value
    with pytest.raises(ValueError, match=said):
      image_sampling.prepare(wrong, None, True)
  with pytest.raises(FormatError, match='specjax-vq'):
    images.load_tokenizer(tmp_path)
  config = VQConfig(num_codes=9, code_dim=4, channels=8, multipliers=(1, 2),
                    num_res_blocks=1, latent_dim=8, attention=False)
  folder = images.save_tokenizer(
      tmp_path / 'other', config, tokenizer.params, {})
  with pytest.raises(FormatError, match="'codebook' is \\(16, 4\\)"):
    images.load_tokenizer(folder)
  options = vq_cifar10.get_config('tiny')
  for path, said in ((None, 'give a dataset'), ('nowhere.npz', 'not there')):
    with options.ignore_type():
      options.data.path = path
    with pytest.raises(ValueError, match=said):
      image_data.read(options.data, 0)
  odd = image_data.Data(*(Images(
      np.zeros((2, 15, 15, 3), np.uint8), np.zeros(2, np.int32), None,
      ('a',)),) * 2)
  with pytest.raises(ValueError, match='do not divide by 2'):
    vq.Run(vq_cifar10.get_config('tiny'), odd, None, tmp_path)


def test_a_grid_of_pictures(tmp_path):
  some = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
  pictures.grid(some, tmp_path / 'x.png', columns=3, rows=('one', 'two'))
  assert (tmp_path / 'x.png').stat().st_size > 1000
  with pytest.raises(ValueError, match='1 names for 2 rows'):
    pictures.grid(some, tmp_path / 'x.png', columns=3, rows=('one',))
  with pytest.raises(ValueError, match='columns=0'):
    pictures.grid(some, tmp_path / 'x.png', columns=0)
  with pytest.raises(ValueError, match='uint8'):
    pictures.grid(some / 255, tmp_path / 'x.png', columns=3)


@pytest.mark.reference
def test_published_files(tmp_path, monkeypatch):
  """Files as LlamaGen saves them: weights of a name, others beside them."""
  torch = pytest.importorskip('torch')
  shape = image_lm.shape(1, 1, 64, grid_width=16, vocab_size=7, num_classes=3)
  params = tiny.params(shape)
  state = {k: torch.tensor(np.array(v)) for k, v in weights.export(
      shape, params, 'llamagen').items()}
  state['freqs_cis'] = torch.zeros(3)
  torch.save({'model': state, 'steps': 1}, tmp_path / 'lm.pt')
  model, facts = images.load_lm(tmp_path / 'lm.pt', dtype='float32')
  assert model.lm.config == shape and facts['grid'] == [16, 16]
  jax.tree.map(np.testing.assert_array_equal, model.params, params)
  small = VQConfig(num_codes=9, code_dim=4, channels=8, multipliers=(1, 2),
                   num_res_blocks=1, latent_dim=8)
  monkeypatch.setattr(vq_lib, 'VQ8', small)
  book = vq_lib.init(small, jax.random.key(0))
  torch.save({'model': {
      k: torch.tensor(np.array(v))
      for k, v in vq_weights.to_llamagen(book).items()}}, tmp_path / 'vq.pt')
  found = images.load_tokenizer(tmp_path / 'vq.pt')
  assert found.config == small
  jax.tree.map(np.testing.assert_array_equal, found.params, book)
  with pytest.raises(FormatError, match='missing tensors'):
    images.load_tokenizer(tmp_path / 'lm.pt')
  with pytest.raises(FormatError, match='not a LlamaGen decoder'):
    images.load_lm(tmp_path / 'vq.pt')


def test_on_a_terminal_codes_are_counted(trained, tmp_path):
  """A status line is written there alone."""
  screen, end = os.openpty()
  done = subprocess.run(
      [sys.executable, '-m', 'train.image_rollout', '--config',
       'configs/rollout_image.py:tiny', '--out', str(tmp_path / 'codes'),
       f'--config.target={trained / "lm" / "model"}'],
      cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)), timeout=600,
      stdout=subprocess.DEVNULL, stderr=end)
  os.close(end)
  said = os.read(screen, 2**16).decode()
  os.close(screen)
  assert done.returncode == 0, said
  assert 'images: 40/40' in said


def test_a_drafter_for_images(trained, tmp_path):
  """Codes that the decoder wrote, a drafter of them, images drafted by it."""
  lm = trained / 'lm' / 'model'
  said = program('image_rollout', 'configs/rollout_image.py:tiny',
                 tmp_path / 'codes', f'--config.target={lm}')
  assert '32 images to learn from, 8 held out' in said
  rows, facts = store.load_npz(tmp_path / 'codes' / 'rollouts.npz')
  assert {int(r.tokens[0]) for r in rows} == {16, 17, 18}  # all classes
  assert all(len(r.answer) == 64 and r.answer.max() < 16 for r in rows)
  assert facts['guidance'] == 2 and facts['classes'] == ['a', 'b', 'c']
  said = program(
      'drafter', 'configs/drafter_image.py:tiny', tmp_path / 'drafter',
      f'--config.target={lm}', '--config.data.length=65',
      f'--config.data.rollouts={tmp_path / "codes"}')
  assert 'tau' in said
  folder = tmp_path / 'drafter' / 'drafter'
  assert 'temperature 1, held-out' in (folder / 'MODEL_CARD.md').read_text()
  said = program(
      'sample', 'configs/sample_image.py:tiny', tmp_path / 'out',
      f'--config.target={lm}', '--config.compare_plain=false',
      f'--config.images.tokenizer={trained / "vq" / "tokenizer"}',
      '--speculative_config', json.dumps({
          'method': 'eagle3', 'model': str(folder),
          'num_speculative_tokens': 3}), package='specjax')
  summary = json.loads((tmp_path / 'out' / 'summary.json').read_text())
  assert summary['mean_acceptance_length'] > 1
  assert (tmp_path / 'out' / 'samples.png').exists()
