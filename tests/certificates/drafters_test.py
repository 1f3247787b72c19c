"""Certificates of drafters: closed forms of rounds, faults told apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from specjax.certificates import rounds, sampled, toys
from specjax.certificates.drafter_faults import Drafted, Fault, Misstating
from specjax.certificates.setting import Laws, Setting
from specjax.core import topologies
from specjax.core.types import IID
from specjax.drafters import ChainLM, GrownLM, Null, TreeLM
from specjax.host import certified
from specjax.verify import Block, Match, Speculative

LIGHT = Setting(filters=False)
MODEL = toys.ToyLM(LIGHT.vocab_size)


def taken(drafter, rule) -> tuple[np.ndarray, np.ndarray]:
  """Returns rounds a text by simulation, and their standard errors."""
  program = sampled.Program(
      LIGHT, LIGHT.target, drafter, (rule,), LIGHT.models())
  tally = program.sample(0, 0, 1)
  count = tally.count / len(LIGHT.kinds)
  mean = tally.taken[:, 0] / count
  return mean, np.sqrt(
      np.maximum(tally.taken[:, 1] / count - mean**2, 0) / count)


@pytest.mark.parametrize('drafter, rule', [
    (ChainLM(2, MODEL), Speculative()), (ChainLM(3, MODEL), Match()),
    (TreeLM(topologies.branching((2, 1)), MODEL, 'top_k'), Speculative()),
    (GrownLM(4, MODEL, 3, 2), Match())])
def test_rounds_are_those_of_the_loop(drafter, rule):
  laws = Laws(LIGHT)
  want = rounds.expected(laws, drafter, rule)
  mean, error = taken(drafter, rule)
  assert (np.abs(mean - want) <= 4.5 * error + 1e-9).all()
  plain = [sum(p * np.sum(np.asarray(np.unravel_index(
      i, (LIGHT.vocab_size + 1,) * LIGHT.length)) < LIGHT.vocab_size)
      for i, p in enumerate(laws.texts(kind)) if p) for kind in range(4)]
  # Of the greedy kind nothing may ever be accepted.
  assert (want[:3] < np.asarray(plain[:3]) - 0.05).all()
  assert want[3] <= plain[3]


def test_a_drafter_that_is_the_target_needs_few_rounds():
  """A text of four tokens by drafts of three: one round, or less."""
  class Same(Setting):
    def logits(self, who, kind, made, begun):
      return super().logits('target', kind, made, begun)

  laws = Laws(Same(filters=False))
  want = rounds.expected(laws, ChainLM(3, MODEL), Speculative())
  np.testing.assert_allclose(want, 1)
  want = rounds.expected(laws, ChainLM(1, MODEL), Speculative())
  assert want[0] == pytest.approx(2) and want[1] == pytest.approx(2)


def test_what_is_not_known_is_not_judged():
  laws = Laws(LIGHT)
  assert rounds.expected(laws, ChainLM(2, MODEL), Block()) is None
  assert rounds.expected(laws, Null(0), Speculative()) is None
  tree = TreeLM(topologies.branching((2, 1)), MODEL, 'iid')
  assert tree.modes == (IID,)
  assert rounds.expected(laws, tree, Speculative()) is None


def test_a_wrong_number_of_rounds_is_found():
  program = sampled.Program(
      LIGHT, LIGHT.target, ChainLM(1, MODEL), (Speculative(),),
      LIGHT.models())
  want = rounds.expected(Laws(LIGHT), program.drafter, Speculative())
  right = sampled.certify(program, 0, 'a', seed=0, batches=1, rounds=want)
  assert right.passed
  wrong = sampled.certify(
      program, 0, 'a', seed=0, batches=1, rounds=want + [0, .1, 0, 0])
  assert not wrong.passed and wrong.note == sampled.ROUNDS_OFF
  unknown = want + [0, np.nan, 0, 0]
  assert sampled.certify(
      program, 0, 'a', seed=0, batches=1, rounds=unknown).passed


@pytest.fixture(scope='module')
def hydra():
  """The rows of one network drafter, by name."""
  [job] = [job for job in certified.grid() if job.names[0].startswith('hydra')]
  return {row.name: row for row in job.run(job.names, 0, 4)}


def test_a_network_drafter_has_its_certificate(hydra):
  assert all(row.passed for row in hydra.values()), hydra
  control = hydra.pop('hydra / speculative')
  assert control.method == 'sampled' and control.p_value > 1e-3
  assert len(hydra) == 3
  assert {row.method for row in hydra.values()} == {'fault'}


def test_wrong_drafts_are_no_fault_of_the_law(hydra):
  """The wrong head, a stale state: the texts' law holds, rounds do not."""
  for word in ('slot too far', 'sync skipped'):
    row = hydra[f'fault: {word} (hydra)']
    assert row.p_value > sampled.SIZE_AGAIN and row.note == 'rounds off'
  row = hydra['fault: trimmed token counted (hydra)']
  assert row.p_value < sampled.SIZE_AGAIN and 'law' in row.note


def test_a_fault_that_does_nothing_is_missed():
  """A chain of a language model has neither Markov terms nor slots."""
  chain = ChainLM(2, MODEL)
  job = Drafted('toy', Misstating(chain), LIGHT,
                (Fault.PART_LEFT_OUT, Fault.SLOT_TOO_FAR), chain)
  control, *faults = job.run(job.names, 0, 1)
  assert control.passed
  assert [row.verdict for row in faults] == ['MISSED', 'MISSED']


def test_rows_of_the_grid_cover_every_kind():
  names = ' '.join(name for job in certified.grid(True) for name in job.names)
  for word in ('dspark', 'dflash', 'lattice chain', 'lattice tree',
               'grown lattice', 'eagle3', 'eagle3 grown', 'eagle1',
               'medusa tree', 'hydra'):
    assert f'{word} / speculative' in names
  assert names.count('refilled slots') == 3


def test_laws_of_a_setting_are_those_of_its_networks():
  """The target's by its own decoding; trimmed tokens are never drafted."""
  job = next(job for job in certified.grid() if isinstance(job, Drafted))
  setting = job.setting
  laws = Laws(setting)
  for kind, it in enumerate(setting.kinds):
    law = laws.texts(kind)
    assert law.sum() == pytest.approx(1)
    for begun in range(2):
      q = laws.of('drafter', kind, (0, 2), begun)
      assert q[1] == 0 and q.sum() == pytest.approx(1)
    p = laws.of('target', kind, (0,))
    assert (p > 0).all() or it.options['temperature'] == 0
  assert dataclasses.replace(setting, seed=3).models() is not None
