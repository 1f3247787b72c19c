"""Judge heads: a planted rule is found, thresholds keep their promise."""

import json

import numpy as np
import pytest
import safetensors.numpy as reference
from scipy import optimize

from specjax.distill import judge, thresholds
from specjax.io import safetensors

M, D = 1500, 12  # one shape: `fit` is compiled once
_RNG = np.random.default_rng(0)
RULE = _RNG.normal(size=D)
RULE /= np.linalg.norm(RULE)
# Features with offsets and spreads of their own, as hidden states have.
SPREAD = np.exp(_RNG.normal(size=D))
OFFSET = 5 * _RNG.normal(size=D)


def planted(seed: int, noise: float = 0.0, cut: float = -1.0):
  """Returns features and labels: correct above a hyperplane, less noise."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(M, D))
  label = x @ RULE + noise * rng.normal(size=M) > cut
  hidden = (x * SPREAD + OFFSET).astype(np.float32)
  return hidden, label.astype(np.int8)


@pytest.fixture(scope='module')
def noisy():
  """Returns a head of imbalanced, noisy data, its report, held-out data."""
  held_out = planted(2, noise=0.3)
  head, report = judge.fit(*planted(1, noise=0.3), held_out=held_out)
  return head, report, held_out


def errors_caught(head, hidden, label) -> float:
  return float(np.mean(judge.score(head, hidden)[label == 0] <= 0.5))


def test_planted_rule_is_recovered():
  head, report = judge.fit(*planted(1), l2=1e-5)
  hidden, label = planted(2)
  right = (np.asarray(judge.score(head, hidden)) > 0.5) == label
  assert right.mean() > 0.98
  weight = np.asarray(head['weight'] / head['scale']) * SPREAD
  assert weight @ RULE / np.linalg.norm(weight) > 0.995
  assert report.gradient_norm < 1e-3 and report.auc > 0.999
  assert {n: (x.shape, x.dtype) for n, x in head.items()} == {
      'weight': ((D,), np.float32), 'bias': ((), np.float32),
      'mean': ((D,), np.float32), 'scale': ((D,), np.float32)}


@pytest.mark.parametrize('weight', ['balanced', 3.0])
def test_optimum_is_that_of_another_solver(weight):
  hidden, label = planted(1, noise=0.3)
  head, report = judge.fit(hidden, label, negative_weight=weight, l2=0.02)
  x = hidden.astype(np.float64)
  x = (x - x.mean(0)) / x.std(0)
  if weight == 'balanced':
    weight = label.sum() / (1 - label).sum()
  w = np.where(label, 1.0, weight)

  def loss(v):
    logit = x @ v[:-1] + v[-1]
    terms = np.logaddexp(0, np.where(label, -logit, logit))
    return w @ terms / w.sum() + 0.01 * v[:-1] @ v[:-1]

  best = optimize.minimize(loss, np.zeros(D + 1), tol=1e-7)
  found = np.append(head['weight'], head['bias'])
  np.testing.assert_allclose(found, best.x, atol=1e-3)
  assert abs(report.loss - best.fun) < 1e-6
  assert report.gradient_norm < 1e-4  # where float32 loss stops falling


def test_weight_of_errors_trades_recall(noisy):
  head, _, held_out = noisy
  train = planted(1, noise=0.3)
  caught = [errors_caught(judge.fit(*train, negative_weight=w)[0], *held_out)
            for w in (0.2, 1.0, 20.0)]
  assert caught[0] < caught[1] - 0.02 < caught[2] - 0.04
  assert errors_caught(head, *held_out) > caught[1] + 0.02


def test_report_is_on_held_out_data(noisy):
  head, report, (hidden, label) = noisy
  scores = judge.score(head, hidden)
  assert report.auc == thresholds.auc(scores, label)
  assert report.operating_point == thresholds.choose_threshold(
      scores, label, acceptance=0.9)
  assert report.auc != judge.fit(*planted(1, noise=0.3))[1].auc


def test_fit_is_deterministic(noisy):
  again, _ = judge.fit(*planted(1, noise=0.3))
  assert all(np.array_equal(again[n], noisy[0][n]) for n in again)


def test_noise_and_constants_do_not_matter(noisy):
  hidden, label = planted(1, noise=0.3)
  hidden[:, 0] = 7.0
  hidden[:, 1] = 1e8 * (1 + 1e-7 * (_RNG.random(M) > 0.5))
  head, _ = judge.fit(hidden, label)
  assert head['weight'][0] == 0 and head['scale'][0] > 0
  # Rounding of a large constant must not be blown up to unit spread.
  x = (hidden[:, 1] - head['mean'][1]) / head['scale'][1]
  assert abs(x).max() < 0.2


@pytest.mark.parametrize('l2', [0.0, 1e-3])
def test_extremes_stay_finite(l2):
  hidden, label = planted(1)  # separable: without a penalty no optimum
  hidden[0, 0], hidden[1, 1], hidden[2, 1] = 1e30, 1e38, -1e38
  hidden[:, 2] *= 1e-38
  hidden[:, 3] = 0.0
  head, report = judge.fit(hidden, label, l2=l2)
  assert all(np.isfinite(x).all() for x in head.values())
  assert np.isfinite([report.loss, report.gradient_norm]).all()
  assert report.loss < np.log(2)
  assert np.isfinite(judge.score(head, hidden)).all()


def test_a_failed_line_search_is_not_kept():
  """So steep a penalty throws L-BFGS off; zero weights cost log 2 nats."""
  head, report = judge.fit(*planted(1), l2=1e35, negative_weight=1e3)
  assert report.loss <= np.log(2) + 1e-6
  assert np.isfinite(head['weight']).all()


def test_auc_counts_pairs():
  rng = np.random.default_rng(3)
  scores = rng.integers(0, 6, 60) / 8  # many ties
  label = rng.integers(0, 2, 60)
  right, wrong = scores[label == 1][:, None], scores[label == 0]
  pairs = (right > wrong) + 0.5 * (right == wrong)
  assert thresholds.auc(scores, label) == pytest.approx(pairs.mean(), abs=1e-12)


@pytest.mark.parametrize('levels', [7, 10**6])
def test_threshold_keeps_its_promise(levels):
  """With and without ties: promised, and no better cut keeps the promise."""
  rng = np.random.default_rng(4)
  scores = (rng.integers(1, levels, 300) / levels).astype(np.float32)
  label = (rng.random(300) < 0.8).astype(int)
  wrong, right = scores[label == 0], scores[label == 1]
  cuts = np.unique(np.append(scores, 0))
  before = -1.0
  for share in (0.01, 0.07, 0.5, 0.9, 0.99, 1.0):
    got = thresholds.choose_threshold(scores, label, error_recall=share)
    assert got.error_recall >= share
    assert got.error_recall == np.mean(wrong <= got.threshold)
    assert got.acceptance == np.mean(right > got.threshold) == max(
        np.mean(right > c) for c in cuts if np.mean(wrong <= c) >= share)
    assert got.threshold >= before
    before = got.threshold
  for share in (0.01, 0.07, 0.5, 0.9, 0.99, 1.0):
    got = thresholds.choose_threshold(scores, label, acceptance=share)
    assert got.acceptance >= share
    assert got.error_recall == np.mean(wrong <= got.threshold) == max(
        np.mean(wrong <= c) for c in cuts if np.mean(right > c) >= share)
    assert 0 <= got.threshold <= before
    before = got.threshold
  choose = thresholds.choose_threshold
  assert choose(scores, label) == choose(scores, label, error_recall=0.9)


def test_threshold_says_when_it_falls_short():
  got = thresholds.choose_threshold([0, 0, 0.5], [1, 0, 1], acceptance=1)
  assert got == thresholds.Threshold(0, 1, 0.5)


def test_least_share_is_not_rounded_up():
  scores, label = np.arange(200) / 200, np.arange(200) % 2
  got = thresholds.choose_threshold(scores, label, error_recall=0.07)
  assert got.error_recall == 0.07  # 0.07 * 100 > 7 in floating point


def test_save_and_load(tmp_path, noisy):
  head, report, _ = noisy
  path, cut = tmp_path / 'head.safetensors', report.operating_point.threshold
  judge.save(path, head, 1.0)
  judge.save(path, head, cut)
  back, threshold = judge.load(path)
  assert threshold == cut and [p.name for p in tmp_path.iterdir()] == [
      'head.safetensors']
  for found in (back, reference.load_file(path),
                {n: x.read() for n, x in safetensors.read(path).items()}):
    assert set(found) == set(head)
    for name, value in head.items():
      assert found[name].dtype == np.float32
      assert np.array_equal(found[name], value)
  with reference.safe_open(path, 'np') as file:
    assert float(file.metadata()['threshold']) == cut


def _header(change):
  """Returns a corruption: the header altered, the values kept."""
  def corrupt(data: bytes) -> bytes:
    start = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:start])
    change(header)
    blob = json.dumps(header).encode()
    return len(blob).to_bytes(8, 'little') + blob + data[start:]
  return corrupt


@pytest.mark.parametrize('corrupt, text', [
    (lambda data: b'', 'not a judge head'),
    (lambda data: b'x' * 100, 'not a judge head'),
    (lambda data: data[:-4], 'not a judge head'),
    (_header(lambda h: h.pop('mean')), 'not a judge head'),
    (_header(lambda h: h.pop('__metadata__')), 'not a judge head'),
    (_header(lambda h: h['scale'].update(shape=[2])), 'not a judge head'),
    (_header(lambda h: h['mean'].update(h['bias'])), 'expected'),
    (_header(lambda h: h['__metadata__'].update(tap='resid_2')), 'resid_2'),
])
def test_load_refuses(tmp_path, noisy, corrupt, text):
  path = tmp_path / 'head'
  judge.save(path, noisy[0], 0.5)
  path.write_bytes(corrupt(path.read_bytes()))
  with pytest.raises(ValueError, match=text):
    judge.load(path)


def test_save_refuses_a_threshold_out_of_range(tmp_path, noisy):
  with pytest.raises(ValueError, match='threshold=1.5'):
    judge.save(tmp_path / 'head', noisy[0], 1.5)
  assert not list(tmp_path.iterdir())


_X, _Y = np.ones((4, 2)), np.array([0, 1, 1, 1])
_FAR = np.array([[3e38], [-3e38], [-3e38], [-3e38]])


@pytest.mark.parametrize('args, options, text', [
    ((_X[0], _Y), {}, 'training features .* must be'),
    ((_X, _Y[:3]), {}, 'must be'),
    ((_X[:0], _Y[:0]), {}, 'must be'),
    ((_X * np.nan, _Y), {}, 'training features are not all finite'),
    ((_X, 2 * _Y), {}, 'training labels must be 0 or 1'),
    ((_X, 0 * _Y), {}, 'all training labels are 0'),
    ((_X, 0 * _Y + 1), {}, 'all training labels are 1'),
    ((_FAR, _Y), {}, 'too far apart'),
    ((_X, _Y), dict(negative_weight='rare'), "negative_weight='rare'"),
    ((_X, _Y), dict(negative_weight=0), 'negative_weight=0'),
    ((_X, _Y), dict(negative_weight=np.inf), 'negative_weight=inf'),
    ((_X, _Y), dict(l2=-1), 'l2=-1'),
    ((_X, _Y), dict(l2=np.nan), 'l2=nan'),
    ((_X, _Y), dict(num_steps=0), 'num_steps=0'),
    ((_X, _Y), dict(acceptance=0), 'acceptance=0'),
    ((_X, _Y), dict(held_out=(_X, 0 * _Y)), 'all held-out labels are 0'),
    ((_X, _Y), dict(held_out=(_X[:, :1], _Y)), 'held-out D=1, training D=2'),
])
def test_fit_refuses(args, options, text):
  with pytest.raises(ValueError, match=text):
    judge.fit(*args, **options)


@pytest.mark.parametrize('scores, label, options, text', [
    ([0.5], [[1]], {}, 'must be'),
    ([], [], {}, 'must be'),
    ([0.5, 1.5], [0, 1], {}, r'scores must be in \[0, 1\]'),
    ([0.5, np.nan], [0, 1], {}, r'scores must be in \[0, 1\]'),
    ([0.5, 0.5], [1, 1], {}, 'all labels are 1'),
    ([0.5, 0.5], [0, 3], {}, 'labels must be 0 or 1'),
    ([0.5, 0.5], [0, 1], dict(error_recall=0), 'error_recall=0'),
    ([0.5, 0.5], [0, 1], dict(acceptance=1.1), 'acceptance=1.1'),
    ([0.5, 0.5], [0, 1], dict(error_recall=0.5, acceptance=0.5), 'not both'),
])
def test_choose_threshold_refuses(scores, label, options, text):
  with pytest.raises(ValueError, match=text):
    thresholds.choose_threshold(scores, label, **options)
