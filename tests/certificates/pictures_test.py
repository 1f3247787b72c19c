"""Certificates of guided images, and a scale of guidance that is not kept."""

import numpy as np

from specjax.certificates import sampled
from specjax.certificates.pictures import Pictures
from specjax.certificates.sampled import Program
from specjax.certificates.setting import Laws
from specjax.drafters import ChainLM
from specjax.verify import Speculative

SETTING = Pictures(filters=False)


def test_laws_are_of_two_views():
  """Without guidance it is the law of the class; the scale moves it."""
  laws = [Laws(Pictures(filters=False, stated=s)).of('target', 0, (1,))
          for s in (0.0, 1.0, 2.0)]
  # log p is linear in the scale, up to a constant.
  steps = np.diff(np.log(laws), axis=0)
  np.testing.assert_allclose(
      *(s - s.mean() for s in steps), atol=1e-5)
  assert np.abs(laws[2] - laws[1]).max() > 0.02
  assert abs(Laws(SETTING).texts(0).sum() - 1) < 1e-6


def test_a_wrong_scale_is_found():
  """The same texts pass for the scale that they were decoded with, only."""
  passed = {}
  for stated in (None, 1.6):
    setting = Pictures(filters=False, stated=stated)
    program = Program(setting, setting.target, ChainLM(3, setting.small),
                      (Speculative(),), setting.models())
    row = sampled.certify(program, 0, 'guided', seed=0, batches=1)
    passed[stated] = row.passed
  assert passed == {None: True, 1.6: False}
