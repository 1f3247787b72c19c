"""What the pages on drafters say runs: examples, commands, options, links."""

from __future__ import annotations

import json
import pathlib
import re
import shlex

import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax.drafters import GrownLM
from specjax.drafters.source import Source
from specjax.host import methods, tiny

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'train' / 'README.md', *(
    ROOT / 'docs' / f'{name}.md'
    for name in ('drafters', 'training', 'own_drafter', 'index'))]
PROMPTS = ['A rose is a rose', 'Once upon a time']


def blocks(page: str, language: str) -> list[str]:
  """Returns the code blocks of a page in a language."""
  text = (ROOT / 'docs' / page).read_text()
  return re.findall(rf'^```{language}\n(.*?)^```$', text, re.M | re.S)


def run(code: str, names: dict) -> None:
  """Executes a block as a program of its own."""
  exec(compile(code, 'example', 'exec', dont_inherit=True), names)


def sharp(**kwargs) -> specjax.Model:
  """Returns the tiny model with laws that are worth learning."""
  model = MODEL(**kwargs)
  head = 30 * jnp.asarray(model.params['head'])
  return specjax.Model(
      model.name, model.lm, {**model.params, 'head': head}, model.tokenizer,
      model.eos)


MODEL = tiny.model


def test_the_untrained_drafter_runs_as_printed(monkeypatch, capsys):
  monkeypatch.setattr(specjax, 'load', lambda name: tiny.model())
  code = blocks('own_drafter.md', 'python')[0]
  names: dict = {'__name__': '__main__'}
  run(code, names)
  greedy, drawn = capsys.readouterr().out.splitlines()
  assert greedy.startswith('greedy [') and drawn.startswith('block [')
  padded = {'method': 'null', 'num_speculative_tokens': 4}
  sampling = specjax.Sampling(max_new_tokens=24)
  model = names['model']
  texts = [specjax.generate(model, drafter, PROMPTS, sampling).texts
           for drafter in (names['drafter'], padded)]
  assert texts[0] == texts[1]


def test_the_trained_drafter_learns_and_keeps_the_text(monkeypatch, capsys):
  monkeypatch.setattr(tiny, 'model', sharp)
  names: dict = {'__name__': '__main__'}
  for code in blocks('own_drafter.md', 'python')[1:]:
    run(code, names)
  loss, tau = map(float, capsys.readouterr().out.split())
  model, task, ids = names['model'], names['task'], names['ids']
  assert isinstance(task.source(), Source)
  fresh = task.attach(
      names['trainer'].init(names['jax'].random.key(0), model.params).net,
      model.params, ids)
  trained = task.attach(names['state'].net, model.params, ids)
  first, _ = task.loss(fresh, model.params, *seen(names), None, 0.0)
  last, sums = task.loss(trained, model.params, *seen(names), None, 1.0)
  assert max(float(last), loss) < 0.7 * float(first)
  assert 0 < sums['acceptance'][0] <= sums['weight'][0]
  assert tau > 1
  prompts = ['A rose is', 'Once']
  plain = specjax.generate(model, None, prompts)
  assert names['results'].texts == plain.texts
  tree = specjax.generate(
      model, GrownLM(6, task.source()), prompts, drafter_params=trained)
  assert tree.texts == plain.texts


def seen(names):
  """Returns a batch of the example, and what the target shows of it."""
  model, teacher = names['model'], names['teacher']
  batch = teacher.batch_of(names['text'].batch(0, 8))
  return batch, teacher.observe(model.lm, model.params, batch, ())


def test_speculative_configurations_are_known():
  text = ''.join(p.read_text() for p in PAGES)
  found = [json.loads(x) for x in re.findall(
      r"--speculative_config\s+'(\{.*?\})'", text)]
  assert len(found) >= 3
  for config in found:
    method = methods._METHODS.get(config['method'], config['method'])
    assert set(config) <= methods._SHARED | methods._KEYS[method]
  # Every method is in the table of options.
  drafters = (ROOT / 'docs' / 'drafters.md').read_text()
  table = drafters[drafters.index('## Options'):]
  for method in set(methods._KEYS) - {'null'}:
    assert f'`{method}`' in table, method
  for key in set().union(*methods._KEYS.values()):
    assert key in drafters, key


def test_kinds_and_formats_are_listed():
  from specjax.distill.kinds import KINDS
  from specjax.distill.losses import NAMES
  from specjax.models.interchange import FORMATS
  drafters = (ROOT / 'docs' / 'drafters.md').read_text()
  for kind in KINDS:
    assert f'\n| `{kind}` |' in drafters, kind
  for form in FORMATS:
    assert f'`{form}`' in drafters, form
  training = (ROOT / 'docs' / 'training.md').read_text()
  for name in NAMES:
    assert f'`{name}`' in training, name


@pytest.mark.parametrize('path', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_links_lead_somewhere(path):
  text = path.read_text()
  for link in re.findall(r'\]\((?!http)([^)#]+)', text):
    assert (path.parent / link).exists(), link
  for name in re.findall(
      r'`((?:checkpoints|notebooks|docs|configs|benchmarks|specjax)/[^`* ]+)`',
      text):
    assert (ROOT / name.partition(':')[0]).exists(), name
  for script in re.findall(r'^```sh\n(.*?)^```$', text, re.M | re.S):
    for line in script.replace('\\\n', ' ').splitlines():
      words = shlex.split(line.partition('&&')[2] or line)
      if words[:2] != ['python', '-m']:
        continue
      module = ROOT / (words[2].replace('.', '/') + '.py')
      assert module.exists() or module.with_suffix('').is_dir(), words[2]
      if '--config' in words:
        config = words[words.index('--config') + 1]
        assert (ROOT / config.partition(':')[0]).exists(), config


def test_figures_are_those_of_the_record():
  """The table of results, row by row, against its JSON."""
  page = (ROOT / 'docs' / 'drafters.md').read_text()
  table = page[page.index('<!-- results -->'):page.index('<!-- /results -->')]
  record = json.loads(
      (ROOT / 'docs' / 'results' / 'h100_drafters.json').read_text())
  names = {'none': 'plain', 'prompt lookup, 7': 'lookup',
           'chain of 8, all tokens scored': 'chain 8 exact'}
  checked = 0
  for line in table.splitlines():
    cells = [c.strip() for c in line.strip('|').split('|')]
    if len(cells) != 5 or not cells[1][:1].isdigit():
      continue
    name = names.get(cells[0]) or cells[0].replace(
        'chain of', 'chain').replace('tree of', 'grown').replace(',', '')
    row = record['sections']['T=0'][name]
    for cell, key in zip(cells[1:], (
        'tau', 'tau_before_repetition', 'round_over_plain_step', 'speedup'),
        strict=True):
      np.testing.assert_allclose(
          float(cell.rstrip('x')), row[key], atol=0.0051)
    checked += 1
  assert checked >= 8
