"""Moments in chunks, files of statistics, and what is refused."""

import numpy as np
import pytest

from specjax.eval.statistics import Moments, Statistics, measure
from specjax.io.errors import FormatError

RNG = np.random.default_rng(0)


class Means:
  """An extractor: the mean of each channel, and its square."""

  name, dim, fid_name = 'means', 6, 'FD-means'

  def __call__(self, images):
    x = images.astype(np.float32).mean((1, 2)) / 255
    return np.concatenate([x, x ** 2], 1)


def pictures(n, low=0):
  return RNG.integers(low, 256, (n, 4, 4, 3), dtype=np.uint8)


def test_chunks_give_what_numpy_gives():
  # A mean so large that sums of squares would lose most digits.
  x = RNG.normal(size=(500, 7)) @ RNG.normal(size=(7, 7)) + 1e6
  total = Moments()
  for part in np.split(x, [1, 2, 130, 131, 400]):
    total.add(part)
  for found in (total.finish(extractor='e'), Statistics.of(x, extractor='e')):
    assert found.n == 500 and found.dim == 7
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(
        found.covariance, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-8)


def test_measure_of_arrays_and_of_parts():
  x = pictures(50)
  whole = measure(x, Means(), dataset='noise', chunk=7)
  parts = measure(iter([x[:20], x[20:]]), Means(), dataset='noise')
  wanted = np.cov(Means()(x), rowvar=False)
  for found in (whole, parts):
    np.testing.assert_allclose(found.covariance, wanted, rtol=1e-5, atol=1e-9)
    assert (found.n, found.extractor, found.metric, found.dataset) == (
        50, 'means', 'FD-means', 'noise')
  liar = Means()
  liar.dim = 5
  with pytest.raises(ValueError, match=r'\(50, 6\).*dim=5'):
    measure(x, liar)
  for bad, text in ((x[:1], 'at least 2'), (x / 255, 'must be uint8'),
                    (x[:, 0], 'expected .N,H,W,3'), ([x[:1]], 'at least 2')):
    with pytest.raises(ValueError, match=text):
      measure(bad, Means())


def test_save_and_load(tmp_path):
  path = tmp_path / 'statistics'  # no suffix is added
  one = measure(pictures(9), Means(), dataset='nöise')
  one.save(path)
  two = Statistics.load(path)
  np.testing.assert_array_equal(one.mean, two.mean)
  np.testing.assert_array_equal(one.covariance, two.covariance)
  assert (two.n, two.extractor, two.metric, two.dataset) == (
      9, 'means', 'FD-means', 'nöise')
  assert [p.name for p in tmp_path.iterdir()] == ['statistics']


def test_load_refuses(tmp_path):
  path = tmp_path / 'x.npz'
  good = dict(format='specjax-statistics', mean=np.zeros(2),
              covariance=np.eye(2), n=9, extractor='e', metric='FD',
              dataset='')
  np.savez(path, **good)
  assert Statistics.load(path).n == 9
  for change, text in (
      ({'format': 'other'}, 'format other'),
      ({'covariance': np.eye(3)}, 'expected'),
      ({'covariance': np.array([[1.0, 0.5], [0, 1]])}, 'not symmetric'),
      ({'mean': np.array([0, np.nan])}, 'not finite'),
      ({'n': 1}, 'at least 2'), ({'extractor': ''}, 'must be named'),
      ({'mean': np.array([{}], object)}, 'not a file of statistics')):
    np.savez(path, **{**good, **change})
    with pytest.raises(FormatError, match=text):
      Statistics.load(path)
  del good['n']
  np.savez(path, **good)
  with pytest.raises(FormatError, match='not a file of statistics'):
    Statistics.load(path)
  np.save(tmp_path / 'x.npy', np.zeros(3))
  path.write_bytes(path.read_bytes()[:60])
  for name in ('x.npz', 'x.npy', 'absent'):
    with pytest.raises(FormatError, match='not a file of statistics'):
      Statistics.load(tmp_path / name)


@pytest.mark.parametrize('x, text', [
    (np.zeros(5), 'expected features'), (np.zeros((5, 0)), 'expected'),
    (np.zeros((1, 3)), 'at least 2'), (np.full((4, 3), np.nan), 'not finite'),
    (np.full((4, 3), np.inf), 'not finite'),
    (np.full((4, 3), 'a'), 'expected features'),
    (np.ones((4, 3), bool), 'expected features')])
def test_features_that_are_none(x, text):
  with pytest.raises(ValueError, match=text):
    Statistics.of(x, extractor='e')


def test_a_refused_chunk_changes_nothing():
  total = Moments()
  with pytest.raises(ValueError, match='0 samples'):
    total.finish(extractor='e')
  x = RNG.normal(size=(6, 3))
  total.add(x)
  for bad in (np.zeros((2, 4)), np.full((2, 3), np.inf)):
    with pytest.raises(ValueError, match='features'):
      total.add(bad)
  found = total.finish(extractor='e')
  np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False))


def test_the_name_of_the_metric_is_checked():
  boast = Means()
  boast.fid_name = 'FID'
  with pytest.raises(ValueError, match="fid_name='FID' with 6"):
    measure(pictures(4), boast)
