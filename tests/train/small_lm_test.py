"""The program's own part in training small LMs: on-policy batches."""

from __future__ import annotations

import sys

import numpy as np

from specjax.distill import kinds
from specjax.distill.trainer import Trainer
from specjax.host import tiny
from train import loop
from train import run as run_lib
from train import text as text_lib


def test_a_share_of_each_batch_is_the_drafters_own(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['drafter'])
  from configs import drafter_smollm2
  config = drafter_smollm2.get_config('tiny-small_lm')
  config.task.on_policy, config.loss.first = 0.5, {'reverse_kl': 1.0}
  target = tiny.model()
  text = text_lib.read(config, target, 0)
  ids, _ = text_lib.vocabulary(text, target, 128)
  task = kinds.build('small_lm', target.lm.config, len(ids), **{
      name: config[name].to_dict() for name in ('model', 'task', 'loss')})
  trainer = Trainer(task, target.lm, loop.optimiser(config.optimizer))
  test = run_lib.Run(trainer, target, ids, text, config, None)
  state = test.fresh()
  test.schedule(4)
  for step in range(4):
    state, report, _ = test.step(state, step)
    assert np.isfinite(report['loss'])
  batch, plain = test._next[1].result()[0], test._rows(4)
  own = round(0.5 * config.batch_size)
  np.testing.assert_array_equal(batch.tokens[own:], plain['tokens'][own:])
  assert not np.array_equal(batch.tokens[:own], plain['tokens'][:own])
  said = np.asarray(batch.tokens[:own])[np.asarray(batch.supervised[:own])]
  assert len(said) and set(said.tolist()) <= set(ids.tolist())
