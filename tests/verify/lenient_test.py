"""The lenient rule: lossless at 1, near-argmax tokens on greedy rows."""

import jax
import numpy as np
import one_step
import pytest

from specjax.core.types import POINT
from specjax.verify import Lenient

VOCAB, NUM = 6, 200


@pytest.mark.parametrize('shape', one_step.SHAPES)
def test_lenience_one_is_speculative(shape):
  """Same verdicts on the same noise, greedy rows with exact ties too."""
  one_step.assert_speculative(Lenient(1.0), shape)


def test_greedy_rows():
  """Accept x when p(x) >= l max p, at temperature 1; bans stay bans."""
  rng = np.random.default_rng(2)
  node = one_step.random_node(3, NUM, VOCAB, 0)
  bias = np.where(rng.random((NUM, VOCAB)) < 0.3, -np.inf, 0)
  bias[:, 0] = 0
  rows, _ = one_step.build(node, [POINT], bias=bias, temperature=0.0)
  half = np.full(rows.draft.tokens.shape, 0.5, np.float32)
  verdict, _ = one_step.decide(Lenient(0.5), None, rows, half)
  verdict = jax.tree.map(lambda x: np.asarray(x).reshape(NUM, VOCAB, -1),
                         verdict)
  accepted = verdict.num_accepted[..., 0] == 1
  p = one_step.softmax(node.target + bias)
  best = p.max(axis=1, keepdims=True)
  sure = np.abs(p - 0.5 * best) > 1e-6
  np.testing.assert_array_equal(accepted[sure], (p >= 0.5 * best)[sure])
  assert not accepted[np.isinf(bias)].any()
  relaxed = accepted & (p < best)
  assert relaxed.sum() > 50
  # A one-hot law is left altogether: distance 1.
  np.testing.assert_array_equal(verdict.excess[..., 0], relaxed)
  want = np.broadcast_to(p.argmax(axis=1)[:, None], p.shape)
  np.testing.assert_array_equal(
      verdict.next_token[..., 0][~accepted], want[~accepted])
