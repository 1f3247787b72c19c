"""Laws: draws, log-probabilities and residuals agree with each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from specjax.core import law as law_lib
from specjax.core import tree, types

NUM, VOCAB = 64, 5
KEYS = jax.random.split(jax.random.key(0), NUM)
YES, NO = jnp.ones(NUM, bool), jnp.zeros(NUM, bool)


def random_law(seed: int, shape=(NUM,)) -> law_lib.Categorical:
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 2, shape + (VOCAB,)).astype(np.float32)
  logits[rng.random(logits.shape) < 0.2] = -np.inf
  logits[..., 0] = np.where(np.isinf(logits).all(-1), 0, logits[..., 0])
  return law_lib.Categorical(jnp.asarray(logits))


@pytest.fixture
def seen(monkeypatch):
  """Collects the probabilities of every law that is drawn from."""
  found = []

  def sample(self, keys):
    found.append(np.asarray(self.probs, np.float64))
    return self.mode()

  monkeypatch.setattr(law_lib.Categorical, 'sample', sample)
  return found


@pytest.mark.parametrize('scale', [None, 0.7])
def test_residual_is_what_the_equation_says(seen, scale):
  """norm(relu(scale p - q)), and p itself where `use` is unset."""
  p, q = random_law(1), random_law(2)
  use = jnp.arange(NUM) % 3 > 0
  s = None if scale is None else jnp.full(NUM, scale)
  _, gave_up = p.residual(q, KEYS, use, s)
  left = np.maximum((scale or 1) * np.asarray(p.probs) - q.probs, 0)
  mass = left.sum(-1, keepdims=True)
  usable = np.asarray(use)[:, None] & (mass > 0)
  want = np.where(usable, left / np.where(usable, mass, 1), p.probs)
  np.testing.assert_allclose(seen[0], want, atol=2e-6)
  assert not gave_up.any()


def test_residual_without_mass_falls_back_to_the_target(seen):
  """p = q leaves nothing; the draw is p, never uniform, never NaN."""
  p = random_law(3)
  p.residual(p, KEYS, YES)
  np.testing.assert_allclose(seen[0], p.probs, atol=1e-6)
  p.residual(p, KEYS, YES, jnp.zeros(NUM))
  np.testing.assert_allclose(seen[1], p.probs, atol=1e-6)


def test_residual_of_a_point_draft_excludes_its_token(seen):
  """One-hot q: p with the token removed; all other zeros stay zeros."""
  p = random_law(4)
  token = p.mode()
  p.residual(law_lib.Point(token, VOCAB), KEYS, YES)
  probs = np.array(p.probs, np.float64)
  lone = probs.max(-1) > 1 - 1e-6  # nothing else to draw: p itself
  probs[~lone, np.asarray(token)[~lone]] = 0
  np.testing.assert_allclose(
      seen[0], probs / probs.sum(-1, keepdims=True), atol=2e-6)


def test_point_target_stays_a_point():
  """What is left of a point mass is that point mass."""
  value = jnp.arange(NUM) % VOCAB
  point = law_lib.Point(value, VOCAB)
  for use in (YES, NO):
    token, _ = point.residual(random_law(5), KEYS, use)
    np.testing.assert_array_equal(token, value)
  np.testing.assert_array_equal(point.sample(KEYS), value)
  np.testing.assert_array_equal(point.soften().probs, point.probs)
  assert (point.log_prob(value) == 0).all()
  assert (point.log_prob((value + 1) % VOCAB) == -jnp.inf).all()


def test_samples_follow_the_law():
  """Draws by Gumbel noise: chi-square over 40000 keys, seeds 0 to 3."""
  p = law_lib.Categorical(jnp.asarray([1.0, -0.5, -jnp.inf, 0.3, -3.0]))
  num = 40000
  worst = []
  for seed in range(4):
    keys = jax.random.split(jax.random.key(seed), num)
    law = law_lib.Categorical(jnp.tile(p.logits, (num, 1)))
    drawn = np.bincount(np.asarray(law.sample(keys)), minlength=VOCAB)
    assert drawn[2] == 0
    kept = np.asarray(p.probs, np.float64) > 0
    want = np.asarray(p.probs, np.float64)[kept]
    worst.append(stats.chisquare(drawn[kept], want / want.sum() * num).pvalue)
  assert min(worst) > 1e-4


def test_log_prob_agrees_with_probs():
  """Also where a token is excluded: -inf, not NaN."""
  law = random_law(6, (8, 4))
  for token in range(VOCAB):
    got = law.log_prob(jnp.full((8, 4), token))
    np.testing.assert_allclose(np.exp(got), law.probs[..., token], atol=1e-6)


def test_rows_and_concatenation():
  """`at` clips (padding of paths); mixed kinds stack as a categorical."""
  law = random_law(7, (8, 4))
  index = jnp.asarray([0, 3, 4, 5, 9, 1, 2, 0])
  got = law.at(index).logits
  for b in range(8):
    np.testing.assert_array_equal(got[b], law.logits[b, min(index[b], 3)])
  point = law_lib.Point(jnp.zeros((8, 2), jnp.int32), VOCAB)
  both = point.concat(law)
  assert both.logits.shape == (8, 6, VOCAB)
  np.testing.assert_array_equal(both.probs[:, :2], point.probs)
  np.testing.assert_array_equal(law.concat(point).logits[:, :4], law.logits)
  assert point.concat(point).value.shape == (8, 4)


def make_draft(mode, law, law_row=None) -> types.Draft:
  return types.Draft(
      topology=tree.chain(3), tokens=jnp.asarray([[1, 2, 3], [4, 0, 1]]),
      valid=jnp.ones((2, 3), bool), mode=jnp.asarray(mode), draft_law=law,
      law_row=None if law_row is None else jnp.asarray(law_row))


@pytest.mark.parametrize('mode', [
    [types.IID, types.POINT, types.MATCH],
    [[types.IID, types.POINT, types.IID], [types.MATCH, types.IID, types.IID]],
])
def test_law_of_a_slot(mode):
  """A fixed slot is the point mass on its token, whatever a law row says."""
  law = random_law(8, (2, 2))
  draft = make_draft(mode, law, [0, 1, 0])
  modes = np.broadcast_to(np.asarray(mode), (2, 3))
  for slot in range(3):
    got = law_lib.at_slot(draft, jnp.full(2, slot), VOCAB).probs
    for b in range(2):
      fixed = modes[b, slot] != types.IID
      want = (np.eye(VOCAB)[draft.tokens[b, slot]] if fixed
              else law.probs[b, [0, 1, 0][slot]])
      np.testing.assert_allclose(got[b], want, atol=1e-6)


def test_law_of_a_slot_without_or_with_point_laws():
  """Greedy drafters hand over points, or no law at all."""
  fixed = [types.POINT] * 3
  point = law_lib.Point(jnp.zeros((2, 3), jnp.int32), VOCAB)
  for law in (None, point):
    draft = make_draft(fixed, law)
    got = law_lib.at_slot(draft, jnp.asarray([2, 0]), VOCAB).probs
    np.testing.assert_array_equal(got, np.eye(VOCAB)[[3, 4]])
