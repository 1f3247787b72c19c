"""Every config file: both variants, short, and locked against typing errors."""

import importlib
import pathlib

from ml_collections import config_dict
import pytest

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
NAMES = sorted(p.stem for p in CONFIGS.glob('*.py')
               if p.stem not in ('common', 'drafter_kinds', '__init__'))


@pytest.mark.parametrize('name', NAMES)
def test_config(name):
  get_config = importlib.import_module(f'configs.{name}').get_config
  full, tiny = get_config(), get_config('tiny')
  assert get_config('').to_dict() == full.to_dict() != tiny.to_dict()
  assert set(full) == set(tiny)
  for config in (full, tiny):
    assert isinstance(config, config_dict.ConfigDict)
    config.lock()
    with pytest.raises(AttributeError):
      config.no_such_key = 1
  with pytest.raises(ValueError, match="'huge'.*'tiny'"):
    get_config('huge')
  # Nothing is shared between two configs.
  assert get_config() is not full


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')),
                         ids=lambda p: p.name)
def test_length(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 120
  if path.stem in NAMES:
    assert text.startswith('"""') and ':tiny' in text
    assert '--config configs/' in text  # the command that runs it
