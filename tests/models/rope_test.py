"""Rotary frequencies against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.models import rope
from specjax.models.rope import RopeScaling


def test_plain():
  # base ** (-2i / H): 100 ** 0, 100 ** -0.5.
  inv, scale = rope.frequencies(4, 100.0, None)
  np.testing.assert_allclose(inv, [1.0, 0.1], rtol=1e-12)
  assert scale == 1.0


def test_linear():
  inv, scale = rope.frequencies(4, 100.0, RopeScaling('linear', 4.0))
  np.testing.assert_allclose(inv, [0.25, 0.025], rtol=1e-12)
  assert scale == 1.0


def test_llama3():
  # H = 6, base 1000: 1, 0.1, 0.01. Over 126 tokens they turn 126 / 2 pi =
  # 20.0535, 2.00535 and 0.200535 times. Above 4 turns: kept. Below 1: divided
  # by 8. Between: s = (2.00535228 - 1) / (4 - 1) = 0.33511743, and
  # 0.1 * ((1 - s) / 8 + s) = 0.1 * (0.08311032 + 0.33511743).
  scaling = RopeScaling('llama3', 8.0, 126, low_freq_factor=1.0,
                        high_freq_factor=4.0)
  inv, scale = rope.frequencies(6, 1000.0, scaling)
  np.testing.assert_allclose(inv, [1.0, 0.041822775, 0.00125], rtol=1e-7)
  assert scale == 1.0


def test_yarn():
  # H = 8, base 10 ** 4: 1, 0.1, 0.01, 0.001. The dimension that turns r times
  # in 4096 tokens is log10(4096 / (2 pi r)): 1.309 for r = 32, 2.814 for
  # r = 1, rounded outwards to 1 and 3. So dimensions 0 and 1 are kept, 3 is
  # divided by 4, and 2 is halfway: (0.01 + 0.0025) / 2.
  # cos and sin are scaled by 0.1 ln 4 + 1.
  inv, scale = rope.frequencies(8, 1e4, RopeScaling('yarn', 4.0, 4096))
  np.testing.assert_allclose(inv, [1.0, 0.1, 0.00625, 0.00025], rtol=1e-12)
  assert scale == pytest.approx(1.1386294361)


def test_yarn_options():
  # As above without rounding: dimension 2 lies (2 - 1.30903021) / log10(32) =
  # 0.45907039 into the band: 0.01 * (1 - 0.75 * 0.45907039).
  scaling = RopeScaling('yarn', 4.0, 4096, truncate=False,
                        attention_factor=1.5)
  inv, scale = rope.frequencies(8, 1e4, scaling)
  np.testing.assert_allclose(inv[[0, 1, 3]], [1.0, 0.1, 0.00025], rtol=1e-12)
  assert inv[2] == pytest.approx(0.0065569721, rel=1e-6)
  assert scale == 1.5
  # A band of 8 and 2 turns: log10(4096 / 16 pi) = 1.911, log10(4096 / 4 pi)
  # = 2.513, so again dimensions 1 and 3.
  narrow = RopeScaling('yarn', 4.0, 4096, beta_fast=8.0, beta_slow=2.0)
  np.testing.assert_allclose(
      rope.frequencies(8, 1e4, narrow)[0], [1.0, 0.1, 0.00625, 0.00025])


def test_yarn_band_of_no_width():
  # 32 and 1 turns of 8 tokens lie below dimension 0: all are divided.
  inv, _ = rope.frequencies(8, 1e4, RopeScaling('yarn', 4.0, 1))
  assert np.isfinite(inv).all()


def test_rotate_by_hand():
  # Position 2, frequencies 1 and 0.1: pairs (x0, x2) and (x1, x3) turn by 2
  # and 0.2 radians.
  table = rope.tables(jnp.array([[2]]), 4, 100.0)
  got = rope.rotate(jnp.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4), table)
  want = [np.cos(2), np.cos(0.2), np.sin(2), np.sin(0.2)]
  np.testing.assert_allclose(got[0, 0, 0], want, atol=1e-6)


def test_scores_depend_on_distance():
  rng = np.random.default_rng(0)
  q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 16)), jnp.float32)

  def score(at_q, at_k):
    turned = [rope.rotate(x, rope.tables(jnp.array([[at]]), 16, 1e4))
              for x, at in ((q, at_q), (k, at_k))]
    return float((turned[0] * turned[1]).sum())

  # float32 angles of size 100 are off by 4e-6.
  assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-3)
  assert abs(score(3, 1) - score(3, 2)) > 1e-2


def test_rotate_keeps_dtype_and_batch():
  position = jnp.array([[0, 1], [5, 2]])
  table = rope.tables(position, 8, 1e4)
  x = jnp.ones((2, 2, 3, 2, 8), jnp.bfloat16)  # [B,T,G,Q,H]
  got = rope.rotate(x, table)
  assert got.dtype == x.dtype
  np.testing.assert_array_equal(got[0, 0], x[0, 0])  # position 0
  assert not np.array_equal(got[1, 0], got[1, 1])


def test_unknown_kind():
  with pytest.raises(ValueError, match='longrope.*known are linear'):
    RopeScaling('longrope', 2.0)
