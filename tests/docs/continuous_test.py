"""What the page on continuous tokens says runs."""

from __future__ import annotations

import pathlib
import re

import numpy as np

from specjax import verify
from specjax.certificates import continuous

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'continuous.md'


def test_the_example_runs_as_printed(capsys):
  [code] = re.findall(r'^```python\n(.*?)^```$', PAGE.read_text(), re.M | re.S)
  names: dict = {'__name__': '__main__'}
  exec(compile(code, 'example', 'exec', dont_inherit=True), names)
  out = capsys.readouterr().out
  assert len(out.splitlines()) == 2
  assert np.all(np.asarray(names['state'].context.done))
  assert 1 < float(out.split()[-1]) < 5  # of 8


def test_rules_and_rows_are_those_that_exist():
  text = PAGE.read_text()
  for rule in verify.RULES:
    assert (f'`{rule.name}`' in text) >= rule.continuous, rule.name
  only = re.search(r"certify --only '(head.*?)'", text)
  assert only
  rows = [n for job in continuous.grid(False) for n in job.names]
  assert all(re.search(only[1], name) for name in rows)
