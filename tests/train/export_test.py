"""`python -m train.export`: our drafters out, those of others in."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers

from specjax.distill import kinds
from specjax.host import drafter as drafter_lib
from specjax.host import interchange, tiny
from specjax.io import drafter_file, safetensors
from specjax.io.tokenizer import Tokenizer
from train import export

TARGET = tiny.model()
IDS = np.setdiff1d(np.arange(257), [5])


@pytest.fixture
def trained(tmp_path):
  """Returns the folder of a drafter as `train.drafter` saves it."""
  model = {'num_layers': 1, 'num_slots': 3, 'markov_rank': 4, 'taps': (1, 2)}
  task = kinds.build('dspark', TARGET.lm.config, len(IDS), model=model)
  net = task.init(jax.random.key(0), TARGET.params)
  return drafter_lib.save_drafter(
      tmp_path / 'own', task.model, net, IDS, TARGET, kind='dspark',
      num_draft=3, form='float32')


def run(*arguments):
  return export.main([str(a) for a in arguments])


def test_out_and_in_again(trained, tmp_path, capsys):
  there, back = tmp_path / 'there', tmp_path / 'back'
  assert run('--drafter', trained, '--target', 'random', '--format',
             'speculators', '--out', there, '--dtype', 'float32',
             '--name', 'owner/name', '--mask_token', 256) == 0
  assert 'dspark for owner/name, 256 of 257 tokens' in capsys.readouterr().out
  values = json.loads((there / 'config.json').read_text())
  assert values['speculators_config']['verifier']['name_or_path'] == (
      'owner/name')
  assert values['mask_token_id'] == 256
  assert run('--drafter', there, '--target', 'random', '--format', 'specjax',
             '--out', back, '--dtype', 'float32') == 0
  ours = drafter_lib.load_drafter(trained, TARGET)
  again = drafter_lib.load_drafter(back, TARGET)
  assert again.source.model.config == ours.source.model.config
  assert (again.num_draft, again.facts['kind']) == (3, 'dspark')
  jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)


def test_temperatures_stay_in_our_own_format(trained, tmp_path):
  arrays, ids, facts = drafter_file.read(trained)
  facts['model']['config']['temperatures'] = [0.5, 1.0, 2.0]
  mine = drafter_file.write(tmp_path / 'mine', arrays, ids, facts)
  assert run('--drafter', mine, '--target', 'random', '--format', 'specjax',
             '--out', tmp_path / 'own2') == 0
  again = drafter_lib.load_drafter(tmp_path / 'own2', TARGET)
  assert again.source.model.config.temperatures == (0.5, 1.0, 2.0)
  with pytest.warns(UserWarning, match='temperatures of a confidence head'):
    assert run('--drafter', mine, '--target', 'random', '--format',
               'speculators', '--out', tmp_path / 'x', '--mask_token',
               256) == 0


def test_positions_are_those_of_the_target(
    trained, tmp_path, monkeypatch, capsys):
  def export_to(name, *flags):
    code = run('--drafter', trained, '--target', 'random', '--format',
               'speculators', '--out', tmp_path / name, '--mask_token', 256,
               *flags)
    if code:
      return capsys.readouterr().err
    values = json.loads((tmp_path / name / 'config.json').read_text())
    return values['transformer_layer_config']['max_position_embeddings']
  assert export_to('to-unknown') == 32768  # nobody says
  assert export_to('to-more', '--max_length', 50000) == 50000
  short = tiny.model(max_length=512)
  monkeypatch.setattr(export.tiny, 'model', lambda: short)
  assert export_to('to-own') == 512
  assert export_to('to-less', '--max_length', 64) == 64
  assert export_to('to-beyond', '--max_length', 513) == (
      'error: max_length=513: the context of random is 512 tokens\n')
  assert 'max_length=0: must be >= 1' in export_to('none', '--max_length', 0)
  assert not (tmp_path / 'to-beyond').exists()


def test_bfloat16_is_the_default(trained, tmp_path):
  assert run('--drafter', trained, '--target', 'random', '--format',
             'speculators', '--out', tmp_path / 'x', '--mask_token', 256) == 0
  found = safetensors.read(tmp_path / 'x')
  assert found['fc.weight'].dtype == 'BF16'


def an_alphabet(special: tuple[str, ...], **kwargs) -> Tokenizer:
  """Returns a tokenizer of letters, and special tokens after them."""
  vocab = {letter: i for i, letter in enumerate(('a', 'b', *special))}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  backend.add_special_tokens(list(special))
  return Tokenizer(backend, **kwargs)


def test_which_token_no_text_uses():
  special = ('<bos>', '<end>', '<user>', '<file>', '<none>')  # 2 to 6
  text = an_alphabet(special, bos_id=2, eos_ids=(3,),
                     chat_template='<user>{{ messages }}')
  def token(vocab_size, ids, tokenizer=text):
    model = dataclasses.replace(
        tiny.model(vocab_size=vocab_size), tokenizer=tokenizer, eos=(3,))
    return interchange.unused_token(model, np.asarray(ids))
  assert token(9, range(9)) == 7  # ids 7 and 8 have no token
  assert token(7, range(7)) == 6
  assert token(7, [0, 1, 3, 6]) == 5  # 6 is drafted: text uses it
  assert token(7, [0, 1, 5, 6]) is None
  assert token(7, range(7), None) is None
  padded = an_alphabet(('<end>', '[PAD3]', '[PAD4]'), eos_ids=(2,))
  assert token(5, range(5), padded) == 3


def test_a_mask_token_is_chosen(tmp_path, trained, monkeypatch, capsys):
  text = tiny.tokenizer()
  target = dataclasses.replace(TARGET, tokenizer=an_alphabet(
      tuple(f'<{i}>' for i in range(255)), eos_ids=text.eos_ids))
  monkeypatch.setattr(export.tiny, 'model', lambda: target)
  ours = drafter_lib.load_drafter(trained, target)
  assert ours.source.model.config.mask_token is None
  for flag, token in (((), 5), (('--mask_token', 7), 7)):
    out = tmp_path / str(token)
    assert run('--drafter', trained, '--target', 'random', '--format',
               'speculators', '--out', out, '--dtype', 'float32', *flag) == 0
    said = capsys.readouterr().out
    assert ('mask_token: 5, which no text uses' in said) == (token == 5)
    assert json.loads((out / 'config.json').read_text())[
        'mask_token_id'] == token
    again = drafter_lib.load_drafter(out, target)
    assert again.source.model.config == ours.source.model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)


@pytest.mark.parametrize(('arguments', 'message'), [
    (('--format', 'zlab', '--target', 'random'), 'no reduced vocabulary'),
    (('--format', 'eagle', '--target', 'random'), 'known are zlab'),
    (('--format', 'speculators', '--target', 'random', '--dtype', 'int8'),
     "dtype='int8'"),
    (('--format', 'speculators', '--target', 'random'), 'mask_token=None')])
def test_what_cannot_be_is_said_in_a_line(
    trained, tmp_path, capsys, arguments, message):
  out = tmp_path / 'x'
  assert run('--drafter', trained, '--out', out, *arguments) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and message in error
  assert not out.exists()


def test_a_folder_of_others_needs_a_target(tmp_path, capsys):
  assert run('--drafter', tmp_path, '--format', 'specjax', '--out',
             tmp_path / 'x') == 1
  assert '--target' in capsys.readouterr().err


def test_names_of_kinds():
  build = lambda kind: kinds.build(kind, TARGET.lm.config, 257)  # noqa: E731
  for kind in ('dspark', 'dflash', 'eagle1', 'eagle3', 'medusa', 'hydra'):
    assert interchange.kind_of(build(kind).model.config) == kind
