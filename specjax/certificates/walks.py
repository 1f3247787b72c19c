"""A toy of continuous tokens, and its law drawn apart from the library.

Each token follows a mixture of normal laws that the two tokens before shift;
a denoising chain with the closed-form denoiser draws it. `reference` draws
the same texts in numpy, step by step, from formulas of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax.core import chains, density, tree
from specjax.core.types import Context, Options, Scores
from specjax.models.diffusion import Diffusion
from specjax.models.mixture import MixtureHead

# How much of the last token, and of the one before, shifts the next.
PULL = (0.8, -0.4)
_STEPS = 8
MIXTURES: dict[str, dict[str, Any]] = {
    'target': {'weight': (0.35, 0.65), 'mean': (-0.9, 0.7),
               'std': (0.35, 0.3), 'range': -0.4},
    'drafter': {'weight': (0.55, 0.45), 'mean': (-0.75, 0.75),
                'std': (0.45, 0.35), 'range': 0.4}}


@dataclasses.dataclass(frozen=True)
class Walk:
  """Tokens f32[C] that two tokens before them shift; reads a token cache.

  Serves as a target and as the model of a `ChainDensity`.

  Attributes:
    process: of the denoising chain; None makes laws `Gaussian` (of the first
      part of the mixture) or, with `mixed`, `Mixture`.
    channels: C. mixed: see `process`.
    together: tokens made at a time, G: the t-th of a text is shifted by the
      two before its group, of which t - t % G is the first.
  """

  process: Any = None
  channels: int = 1
  mixed: bool = True
  together: int = 1

  vocab_size = 0

  def empty(self, batch: int, capacity: int) -> Any:
    """Returns a cache that no text has written."""
    return {'cache': jnp.full((batch, capacity, self.channels), 9.0)}

  def feed(self, params, state, tokens, base, fed):
    """Stores tokens."""
    del params
    slot = base[:, None] + jnp.arange(tokens.shape[1])
    return {'cache': _put(state['cache'], slot, tokens, fed)}

  def extend(self, params, state, tokens, base, fed):
    """Stores tokens; features [B,C] of what follows the last one."""
    state = self.feed(params, state, tokens, base, fed)
    slot = base + tokens.shape[1] - 1
    return _features(state['cache'], slot[:, None])[:, 0], state

  def law(self, params: Any, context: Context, features) -> Any:
    """Returns the law of what follows, [B,R]."""
    assert context.options.temperature is not None
    temperature = jnp.broadcast_to(
        context.options.temperature[:, None], features.shape[:2])
    if self.process is not None:
      return chains.Path(self.process, params, features, temperature)
    tau = jnp.log(temperature)[..., None]
    if not self.mixed:
      mean = params['mean'][0] + features
      return density.Gaussian(mean, jnp.broadcast_to(
          params['log_std'][0] + tau, mean.shape))
    mean = params['mean'] + features[..., None, :]
    log_std = params['log_std'][:, None] + tau[..., None]
    return density.Mixture(
        jnp.broadcast_to(params['logits'], mean.shape[:-1]), mean,
        jnp.broadcast_to(log_std, mean.shape))

  def init(self, params, state, position, fed, taps):
    """Stores a chunk of the prompt."""
    del params, taps
    tokens = tree.take_row(state.context.tokens, position)
    cache = _put(state.target['cache'], position, tokens, fed)
    return state.replace(target={'cache': cache}), {}

  def score(self, params, state, draft, taps):
    """Stores root and drafts; the laws of what follows each."""
    del taps
    context = state.context
    pending = tree.take_row(context.tokens, context.root)
    tokens = jnp.concatenate([pending[:, None], draft.tokens], axis=1)
    slot = context.root[:, None] + jnp.arange(tokens.shape[1])
    cache = _put(state.target['cache'], slot, tokens,
                 jnp.ones(slot.shape, bool))
    sets = None
    if self.together == 1:
      features = _features(cache, slot)
    else:  # not the cache: drafts in it may have been corrected since
      text = _put(context.tokens, slot[:, 1:], draft.tokens,
                  jnp.ones(draft.valid.shape, bool))
      group = (slot + 1) // self.together
      sets = group - group[:, :1]
      features = _features(text, group * self.together - 1)
    return Scores(
        target_law=self.law(params.target, context, features), sets=sets,
        finite=jnp.all(jnp.isfinite(features), axis=-1)), state.replace(
            target={'cache': cache})

  def commit(self, state, draft, verdict):
    """A chain's entries are in place."""
    del draft, verdict
    return state


def _put(cache, slot, tokens, fed):
  slot = jnp.where(fed & (slot >= 0), slot, cache.shape[1])
  return cache.at[jnp.arange(cache.shape[0])[:, None], slot].set(
      tokens, mode='drop')


def _features(cache, slot):
  """Returns f32[B,T,C], what shifts the token after each slot."""
  now = jnp.where(
      (slot >= 0)[..., None], tree.take_row(cache, jnp.maximum(slot, 0)), 0)
  before = jnp.where((slot > 0)[..., None], tree.take_row(cache, slot - 1), 0)
  return PULL[0] * now + PULL[1] * before


def diffusion(channels: int = 1, **kwargs: Any) -> Diffusion:
  """Returns the chain of the toy: few steps, of variances that differ."""
  return Diffusion(**{
      'head': MixtureHead(), 'channels': channels, 'num_levels': _STEPS,
      'num_base': _STEPS, **kwargs})


def params(who: str, channels: int = 1) -> dict[str, Any]:
  """Returns the parameters of 'target' or 'drafter'."""
  part = MIXTURES[who]
  return {'logits': jnp.log(jnp.asarray(part['weight'], jnp.float32)),
          'mean': jnp.asarray(np.outer(
              part['mean'], _tilt(channels)), jnp.float32),
          'log_std': jnp.log(jnp.asarray(part['std'], jnp.float32)),
          'range': jnp.float32(part['range'])}


def context(
    prompts: np.ndarray, lengths: np.ndarray, new: np.ndarray,
    temperature: np.ndarray, keys: Any, *, room: int, condition: Any = None,
) -> Context:
  """Returns rows of continuous text.

  Args:
    prompts: f32[B,P,C], of which `lengths int[B]` are given. new: int[B],
      tokens to make. temperature: f32[B] > 0. keys: key[B].
    room: tokens that fit behind the longest prompt.
    condition: see `Context`.
  """
  batch, most, channels = prompts.shape
  tokens = np.zeros((batch, most + room, channels), np.float32)
  tokens[:, :most] = prompts
  length = jnp.asarray(lengths, jnp.int32)
  return Context(
      tokens=jnp.asarray(tokens), length=length, prompt_length=length + 0,
      limit=length + jnp.asarray(new, jnp.int32),
      done=jnp.zeros((batch,), bool),
      rounds=jnp.zeros((batch,), jnp.int32), keys=keys,
      token_round=jnp.full(tokens.shape[:2], -1, jnp.int32),
      token_kept=jnp.zeros(tokens.shape[:2], bool),
      options=Options(temperature=jnp.asarray(temperature, jnp.float32)),
      condition=condition)


def reference(
    rng: np.random.Generator, prompt: np.ndarray, num: int, new: int,
    temperature: float, process: Diffusion | None, mixed: bool = True,
    together: int = 1,
) -> np.ndarray:
  """Draws `num` texts f64[num,new,C] of the target in numpy.

  Args:
    rng: source of noise. prompt: f[P,C]. new: tokens.
    temperature: of all deviations. process, mixed, together: as of `Walk`.
  """
  text = _begun(prompt[:0], num) + list(_begun(prompt, num)[-len(prompt):])
  for place in range(len(prompt), len(prompt) + new):
    first = 2 + place - place % together  # behind two that are nothing
    shift = PULL[0] * text[first - 1] + PULL[1] * text[first - 2]
    if process is None:
      mean, std = _part(rng, 'target', shift, mixed)
      text.append(mean + temperature * std * rng.normal(size=shift.shape))
    else:
      x = rng.normal(size=shift.shape)
      for j in reversed(range(process.num_levels)):
        mean, std = _moments('target', shift, x, j, process)
        x = mean + temperature * std * rng.normal(size=x.shape)
      text.append(x)
  return np.stack(text[-new:], axis=1)


def acceptance(
    rng: np.random.Generator, prompt: np.ndarray, num: int,
    temperature: float, process: Diffusion, last: int | None,
) -> np.ndarray:
  """Returns f64[num], the chance that the first draft is kept, path by path.

  Both models denoise with the same noise until `last` steps are left (None:
  from the start); then the drafter goes on and both score where it goes.
  """
  text = _begun(prompt, num)
  shift = PULL[0] * text[-1] + PULL[1] * text[-2]
  q = p = rng.normal(size=shift.shape)
  log_ratio = np.zeros(num)
  for j in reversed(range(process.num_levels)):
    noise = rng.normal(size=q.shape)
    of_q = _moments('drafter', shift, q, j, process)
    of_p = _moments('target', shift, p, j, process)
    q = of_q[0] + temperature * of_q[1] * noise
    if last is None or j < last:
      for sign, (mean, std) in ((-1, of_q), (1, of_p)):
        away = (q - mean) / (temperature * std)
        log_ratio += sign * np.sum(-0.5 * away**2 - np.log(std), axis=1)
      p = q  # the same states from now on
    else:
      p = of_p[0] + temperature * of_p[1] * noise
  return np.exp(np.minimum(log_ratio, 0.0))


def _begun(prompt: np.ndarray, num: int) -> list[np.ndarray]:
  """Returns the tokens of a prompt, two at least, for `num` texts."""
  text = [np.broadcast_to(x, (num, prompt.shape[1])) for x in prompt]
  return [np.zeros((num, prompt.shape[1]))] * (2 - len(text)) + text


def _part(rng, who, shift, mixed):
  """Returns mean and deviation of a part of the mixture, drawn."""
  it = MIXTURES[who]
  which = np.zeros(len(shift), int)
  if mixed:
    which = (rng.random(len(shift)) > it['weight'][0]).astype(int)
  mean = np.asarray(it['mean'])[which][:, None] * _tilt(shift.shape[1])
  return shift + mean, np.asarray(it['std'])[which][:, None]


def _tilt(channels: int) -> np.ndarray:
  """Channels differ, so that one in the place of another is noticed."""
  return 1 - 0.3 * np.arange(channels)


def _moments(who, shift, x, j, process):
  """Returns mean and deviation of a step, from the definition (DDPM)."""
  it, base = MIXTURES[who], process.num_base
  steps = np.arange(base + 1) / base
  curve = np.cos((steps + 0.008) / 1.008 * np.pi / 2)**2
  beta = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
  kept = np.linspace(0, base - 1, process.num_levels).round().astype(int)
  signal = np.cumprod(1 - beta)[kept]
  before = signal[j - 1] if j else 1.0
  alpha = signal[j] / before
  # E[token | x] of the mixture, part by part.
  log_w, guess = [], []
  for w, m, s in zip(it['weight'], it['mean'], it['std'], strict=True):
    mean = shift + m * _tilt(shift.shape[1])
    spread = signal[j] * s**2 + 1 - signal[j]
    away = x - np.sqrt(signal[j]) * mean
    log_w.append(np.log(w) - 0.5 * np.sum(
        away**2 / spread + np.log(spread), axis=1))
    guess.append(mean + np.sqrt(signal[j]) * s**2 / spread * away)
  weight = np.exp(np.stack(log_w) - np.max(log_w, axis=0))
  token = np.sum((weight / weight.sum(axis=0))[..., None] * guess, axis=0)
  mean = (np.sqrt(before) * (1 - alpha) * token
          + np.sqrt(alpha) * (1 - before) * x) / (1 - signal[j])
  level = max(j, 1)  # the last step has the posterior of the one before
  low = (1 - signal[level] / signal[level - 1]) * (
      1 - signal[level - 1]) / (1 - signal[level])
  share = {'lower': 0.0, 'upper': 1.0}.get(
      process.variance, (it['range'] + 1) / 2)
  return mean, np.sqrt((1 - alpha)**share * low**(1 - share))
