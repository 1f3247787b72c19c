"""Chains drawn with states guessed ahead: the same law in fewer calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from specjax.certificates import walks
from specjax.certificates.continuous_faults import Unseen
from specjax.core.chains import Path
from specjax.models.ahead import Ahead

ROWS = 8192
SHIFT = 0.2


def chain(ahead=3, kind=Ahead, **kwargs):
  """Returns the toy's steps; with `ahead` states guessed."""
  return walks.diffusion(**{
      'variance': 'lower', 'ahead': kind(ahead) if ahead else None, **kwargs})


def law(process, *lead):
  """Returns the same law for each of `lead` rows."""
  return Path(process, walks.params('target'), jnp.full((*lead, 1), SHIFT),
              jnp.full(lead, 0.9))


@pytest.mark.parametrize(('variance', 'ahead'), [
    ('lower', 3), ('upper', 1), ('learned', 3), ('learned', 20)])
def test_tokens_have_the_law(variance, ahead, rows=ROWS):
  """Of fixed deviations and learned ones; chains may be shorter than K."""
  path = law(chain(ahead, variance=variance), rows)
  keys = jax.random.split(jax.random.key(1), rows)
  event = jax.jit(lambda keys: path.sample(keys))(keys)
  assert event.shape == (rows, path.process.num_steps + 1, 1)
  own = walks.reference(
      np.random.default_rng(2), np.asarray([[SHIFT / walks.PULL[0]]]),
      4 * rows, 1, 0.9, path.process)[:, 0, 0]
  found = stats.ks_2samp(np.asarray(path.token(event))[:, 0], own)
  assert found.pvalue > 1e-3
  # Not the tokens alone: every step's noise is standard normal.
  noise = np.asarray(path.noise(event, path.process.num_steps))
  for step in noise[..., 0].T:
    assert stats.kstest(step, 'norm').pvalue > 1e-4


def test_what_is_not_verified_is_noticed():
  """The test above has the power that it needs."""
  path = law(chain(kind=Unseen), ROWS)
  event = path.sample(jax.random.split(jax.random.key(1), ROWS))
  noise = np.asarray(path.noise(event, path.process.num_steps))
  assert min(stats.kstest(x, 'norm').pvalue for x in noise[..., 0].T) < 1e-9


def test_an_end_of_a_chain():
  """Any axes in front, from any step on."""
  path, lead, first = law(chain(), 64, 16), (64, 16), 5
  state = jax.random.normal(jax.random.key(3), (*lead, 1))
  keys = jax.random.split(jax.random.key(4), lead)
  tail = path.tail(state, first)
  found = tail.sample(keys)
  assert found.shape == (*lead, path.process.num_steps - first, 1)
  mean, log_std = tail.moments(found)
  noise = np.asarray((found - mean) * jnp.exp(-log_std)).reshape(-1)
  assert stats.kstest(noise, 'norm').pvalue > 1e-3


def test_rows_do_not_see_each_other():
  path, keys = law(chain(), 32), jax.random.split(jax.random.key(5), 32)
  alone = law(chain(), 1).sample(keys[7:8])
  np.testing.assert_allclose(path.sample(keys)[7:8], alone, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Counted:
  """A head that tells how often it is asked."""

  head: object
  calls: list = dataclasses.field(default_factory=list, hash=False,
                                  compare=False)

  def __call__(self, params, x, time, condition):
    jax.debug.callback(lambda: self.calls.append(1))
    return self.head(params, x, time, condition)


def test_fewer_calls():
  counts = []
  for ahead in (0, 8):
    head = Counted(walks.diffusion().head)
    path = law(chain(ahead, num_levels=64, num_base=64, head=head), 4)
    jax.block_until_ready(
        path.sample(jax.random.split(jax.random.key(6), 4)))
    jax.effects_barrier()
    counts.append(len(head.calls))
  assert counts[0] == 64 and counts[1] <= 32


def test_what_cannot_be_guessed():
  with pytest.raises(ValueError, match='num=0: must be >= 1'):
    Ahead(0)
  with pytest.raises(ValueError, match='set last_noise=True'):
    chain(last_noise=False)
