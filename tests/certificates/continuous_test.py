"""Certificates of continuous tokens: they pass, and they can fail."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from specjax.certificates import continuous, walks
from specjax.verify import CSpD, PathExact

GRID = continuous.grid(False)


def test_names_are_unique_and_the_full_form_has_more():
  names = [n for job in continuous.grid(True) for n in job.names]
  assert len(names) == len({*names}) > len(GRID)
  assert sum(n.startswith('fault: ') for n in names) == 7


@pytest.mark.parametrize('name', [
    'mixture head / path_exact', 'normal head / reflection',
    'denoised / path_exact(last_steps=1)', 'fault: no first rejection',
    'fault: noise of the draft in the residual',
    'denoised, two at a time / path_exact',
    'fault: rejections inside a set end nothing',
    'fault: states ahead are kept unseen'])
def test_rows(name):
  [job] = [job for job in GRID if job.names == (name,)]
  [row] = job.run(job.names, 0, 1)
  assert row.passed, row.note
  assert row.count == 8192
  if row.expected is not None:
    assert 0.3 < row.expected < 0.9


def test_wrong_law_fails_and_unreported_bias_fails(monkeypatch):
  """Without a fault planted, the same row would not pass."""
  [job] = [j for j in GRID if j.names[0] == 'fault: no first rejection']
  [row] = dataclasses.replace(job, is_fault=False).run(('x',), 0, 1)
  assert not row.passed and row.attempts == 2
  monkeypatch.setattr(CSpD, 'lossy', False)
  rule = CSpD(inner_temperature=42.0)
  [row] = continuous.Walked('denoised', rule, walks.diffusion()).run(
      ('x',), 0, 1)
  assert not row.passed


def test_wrong_acceptance_fails(monkeypatch):
  real = walks.acceptance
  monkeypatch.setattr(
      walks, 'acceptance', lambda *args: 0.9 * real(*args))
  job = continuous.Walked('denoised', PathExact(1), walks.diffusion())
  [row] = job.run(job.names, 0, 1)
  assert not row.passed and 'acceptance off' in row.note


def test_energy_sees_what_projections_do_not():
  """Equal marginals, another dependence."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1000, 2, 1))
  same = rng.normal(size=(1000, 2, 1))
  tied = np.concatenate([x[:, :1], -x[:, :1]], axis=1)
  assert continuous.energy(rng, x, same) > 0.01
  assert continuous.energy(rng, x, tied) < 0.001
  assert continuous.energy(rng, x, x + 0.3) < 0.001
