"""Numbers that are not finite: who, which token, which denoising step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax.drafters.chain_density import ChainDensity
from specjax.host import latent_sampling, mar

SIZE = 16
TINY = mar.tiny()


@dataclasses.dataclass(frozen=True)
class Breaking:
  """A head that says NaN at one level of noise, of some images."""

  inner: Any
  number: int

  def __call__(self, params, x, time, condition):
    noise, between = self.inner(params, x, time, condition)
    broken = (time.number == self.number)[..., None]
    return jnp.where(broken, jnp.nan, noise), between


def breaking(model, step):
  """Returns the model with a head that breaks at a step of its chain."""
  process = model.lm.process
  number = int(np.asarray(process.time(process.level(step)).number))
  lm = dataclasses.replace(model.lm, process=dataclasses.replace(
      process, head=Breaking(process.head, number)))
  return dataclasses.replace(model, lm=lm)


def decode(target, drafter, **kwargs):
  orders = latent_sampling.orders_of('random', 2, SIZE, 3)
  return specjax.generate(
      target, drafter, latent_sampling.begin(TINY.lm, np.arange(2), orders),
      specjax.Sampling(temperature=1.0, max_new_tokens=SIZE),
      batch_size=2, **kwargs)


@pytest.mark.parametrize('step', [0, 3])
def test_a_target(step):
  with pytest.raises(FloatingPointError, match=(
      r'request 0 \(row 0\): NaN or infinite numbers in round 0, from token 0 '
      f"on: the target's law of it, denoising step {step + 1} of 7")):
    decode(breaking(TINY, step), None)


def test_a_drafter():
  broken = breaking(TINY, 2)
  with pytest.raises(FloatingPointError, match=(
      r'\(row 1\).* round 0, from token 0 on: the drafter.s draft 1, '
      'denoising step 3 of 7')):
    decode(TINY, ChainDensity(3, broken.lm), drafter_params=broken.params)




def test_weights_without_steps():
  """A decoder whose condition is broken, its head being fine."""
  params = jax.tree.map(lambda x: x, TINY.params)
  params['mar'] = jax.tree.map(lambda x: x * jnp.nan, params['mar'])
  with pytest.raises(FloatingPointError, match='from token 0 on: the target'):
    decode(dataclasses.replace(TINY, params=params), None)
