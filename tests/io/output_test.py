"""Files and folders that are whole or not there."""

import json
import os

import pytest

from specjax.io import output
from specjax.io.errors import OutputError


def names(folder) -> list[str]:
  return sorted(p.name for p in folder.iterdir())


def test_prepare_makes_folders_and_leaves_nothing_in_them(tmp_path):
  out = output.prepare(tmp_path / 'a' / 'b')
  assert out.is_dir() and not names(out)
  (out / 'file').write_text('')
  with pytest.raises(OutputError, match='--out=.*cannot write there'):
    output.prepare(out / 'file')


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
  path = tmp_path / 'a.json'
  output.write_json(path, {'a': 'ü'})
  assert json.loads(path.read_text()) == {'a': 'ü'}
  with pytest.raises(TypeError):
    output.write_json(path, {'a': object()})
  (tmp_path / 'folder').mkdir()
  with pytest.raises(OutputError, match='folder'):
    output.write_text(tmp_path / 'folder', 'x')
  assert names(tmp_path) == ['a.json', 'folder']
  assert json.loads(path.read_text()) == {'a': 'ü'}


def filled(path, content, **kwargs):
  """Writes a folder with one file."""
  with output.folder(path, **kwargs) as new:
    assert not names(new)
    (new / 'file').write_text(content)
  return path


def test_a_folder_appears_when_it_is_filled(tmp_path):
  path = tmp_path / 'a' / 'b'
  with output.folder(path) as new:
    (new / 'file').write_text('')
    assert not path.exists()
  assert names(path) == ['file'] and names(path.parent) == ['b']
  other = tmp_path / 'plain'
  other.mkdir()
  assert path.stat().st_mode == other.stat().st_mode
  assert names(filled(other, '')) == ['file']  # it was empty


@pytest.mark.parametrize('error, raised', [
    (OSError(28, 'No space left'), OutputError), (KeyError('x'), KeyError),
    (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_folder_that_is_not_finished(tmp_path, error, raised):
  path = filled(tmp_path / 'old', '1')
  for name in ('old', 'new'):
    with pytest.raises(raised, match='space|x|'), output.folder(
        tmp_path / name, replaces=lambda p: True) as new:
      (new / 'file').write_text('2')
      raise error
  assert names(tmp_path) == ['old']
  assert (path / 'file').read_text() == '1'


def test_only_what_may_be_replaced_is(tmp_path):
  path = filled(tmp_path / 'x', '1')
  for kwargs in ({}, {'replaces': lambda p: (p / 'mark').exists()}):
    with pytest.raises(OutputError, match='x exists.*give a new folder'):
      filled(path, '2', **kwargs)
  (path / 'mark').write_text('')
  filled(path, '2', replaces=lambda p: (p / 'mark').exists())
  assert names(path) == ['file'] and (path / 'file').read_text() == '2'
  assert names(tmp_path) == ['x']
  with pytest.raises(OutputError, match='file exists'):
    filled(path / 'file', '3', replaces=lambda p: True)


def test_the_old_folder_comes_back_if_the_new_one_cannot_be_named(
    tmp_path, monkeypatch):
  path, move = filled(tmp_path / 'x', '1'), os.replace

  def refuse(source, target):
    if source.name == 'new':
      raise OSError(13, 'Permission denied')
    move(source, target)
  monkeypatch.setattr(output.os, 'replace', refuse)
  with pytest.raises(OutputError, match='x: Permission denied'):
    filled(path, '2', replaces=lambda p: True)
  assert names(tmp_path) == ['x'] and (path / 'file').read_text() == '1'


def test_rows_appear_when_all_are_there(tmp_path):
  path, old = tmp_path / 'rows.jsonl', tmp_path / 'summary.json'
  old.write_text('')
  with output.JsonLines(path, outdated=[old]) as file:
    file.write({'a': 1})
    assert names(tmp_path) == ['rows.jsonl.partial', 'summary.json']
    # On the disk at once: a run that is killed leaves them behind.
    assert path.with_name('rows.jsonl.partial').read_text() == '{"a": 1}\n'
  assert names(tmp_path) == ['rows.jsonl']
  with output.JsonLines(path):
    pass
  assert path.read_text() == ''  # a run without rows, but one that ended


def test_an_interrupted_run_keeps_its_rows_and_a_failed_one_the_old(tmp_path):
  path, summary = tmp_path / 'rows.jsonl', tmp_path / 'summary.json'
  with pytest.raises(KeyboardInterrupt), output.JsonLines(path) as file:
    file.write({'a': 1})
    raise KeyboardInterrupt
  summary.write_text('')
  with pytest.raises(ValueError), output.JsonLines(path, [summary]):
    raise ValueError('before the first row')
  assert names(tmp_path) == ['rows.jsonl', 'summary.json']
  assert path.read_text() == '{"a": 1}\n'


def test_nowhere(tmp_path):
  with output.JsonLines(None, [tmp_path]) as file:
    file.write({'a': 1})
  with pytest.raises(ValueError), output.JsonLines(None):
    raise ValueError
  assert not names(tmp_path)
