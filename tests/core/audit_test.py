"""The loop around a real decoder: caches, bits, and the compiled program.

A law cannot show a drafter's stale cache (a wrong q is still the q that was
drawn from); comparing caches with a feed from scratch does.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.certificates import toys
from specjax.core import control, loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters import Adaptive, ChainLM, Lookup, Null
from specjax.models import weights
from specjax.models.attention import Block as Slots
from specjax.models.causal import CausalLM
from specjax.models.transformer_config import TransformerConfig
from specjax.verify import Block, Match, Speculative

CONFIG = TransformerConfig(
    vocab_size=13, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=4,
    num_kv_heads=2, head_dim=8)
TINY = CausalLM(CONFIG, chunk=32)
BATCH, SIZE, NUM = 4, 28, 3
SMALL = ChainLM(num_speculative_tokens=NUM, model=TINY)
PROMPTS = [[1], [2, 0, 5], [3, 3, 7, 7, 7, 1], [4, 12]]
RUN, ADMIT = loop.compiled()


def make_params(seed: int):
  """Weights large enough that layers, positions and tokens matter."""
  made = weights.random_params(CONFIG, jax.random.key(seed))
  return jax.tree.map(lambda x: x if x.ndim == 1 else x * 15, made)


TARGET = make_params(0)
# Between the target and another model: drafts are kept and lost.
DRAFTER = jax.tree.map(lambda a, b: 0.93 * a + 0.07 * b, TARGET,
                       make_params(1))
PARAMS = Models(target=TARGET, drafter=DRAFTER)


def make_context(log_probs: bool = False, prompts=None, size: int = SIZE):
  prompts = prompts or PROMPTS
  zeros = lambda: jnp.zeros((len(prompts), size))  # noqa: E731
  return toys.context(
      prompts, size=size, new=20,
      options=toys.sampled(len(prompts), temperature=0.9),
      log_probs={'raw': zeros(), 'processed': zeros()} if log_probs else None)


def begin(engine, context):
  copy = lambda: jax.tree.map(jnp.array, context)  # noqa: E731  (donated)
  rows = ~context.done
  return ADMIT(engine, PARAMS, loop.empty(engine, copy()), rows, copy(),
               chunk=4)


@jax.jit
def from_scratch(params, tokens):
  """Feeds whole rows at once: the cache, as `[layer][k or v]`."""
  cache = TINY.empty(BATCH, SIZE)['cache']
  base = jnp.zeros(BATCH, jnp.int32)
  position = jnp.broadcast_to(jnp.arange(SIZE), tokens.shape)
  return TINY.forward(params, cache, tokens, Slots(
      base=base, position=position), with_head=False)[2]


def difference(cache, params, context, until) -> float:
  """Largest error of the entries below `until int[B]`."""
  want, worst = from_scratch(params, context.tokens), 0.0
  live = np.arange(SIZE) < np.asarray(until)[:, None]
  for have, fresh in zip(cache, want, strict=True):
    for name in 'kv':
      gap = np.abs(np.asarray(have[name])[:, :, :SIZE] - fresh[name])
      worst = max(worst, float((gap * live[:, None, :, None]).max()))
  return worst


def audit(engine, num_rounds: int = 30):
  """Runs round by round: the worst error of either cache, and the state."""
  state = begin(engine, make_context())
  worst = [0.0, 0.0]
  for _ in range(num_rounds):
    root = np.asarray(state.context.root)
    context = jax.tree.map(jnp.array, state.context)  # donated below
    worst[0] = max(worst[0], difference(
        state.target['cache'], TARGET, context, root))
    inner = state.drafter.get('inner', state.drafter)
    # What the next round relies on without feeding it again.
    until = root - (SMALL.catch_up - 1)
    if engine.drafter is not SMALL:
      until = np.minimum(until, np.asarray(inner['held']))
    worst[1] = max(worst[1], difference(
        inner['model']['cache'], DRAFTER, context, until))
    if np.asarray(state.context.done).all():
      break
    state = RUN(engine, PARAMS, state, np.int32(1))
  return worst, state


# Float32 sums in another order; entries are of size 1 to 10.
CLOSE, WRONG = 1e-4, 0.1


def test_caches_after_every_round():
  """Target and drafter hold what a feed from scratch would, all outcomes."""
  worst, state = audit(Engine(TINY, SMALL, Block()))
  assert max(worst) < CLOSE
  assert (np.asarray(state.metrics.histogram).sum(axis=0) > 0).all()


def test_caches_around_an_off_switch():
  """Rounds without the drafter, at other widths; it catches up again.

  A drafter that was not told to resync is made to by the combinator.
  """
  rule = control.Tracking(draft_cost=0.25, decay=0.5, probe_every=3)
  drafter = Adaptive(SMALL, rule, exact_shape=False, widths=(0, 1))
  worst, state = audit(Engine(TINY, drafter, Block()))
  assert max(worst) < CLOSE
  drafted = np.asarray(state.metrics.drafted)[:, 0]
  rounds = np.asarray(state.context.rounds)
  assert (drafted > 1).any() and (drafted < rounds - 2).any()
  # The last draft of each row came from a cache without holes.
  inner = state.drafter['inner']
  held = np.asarray(inner['held'])
  assert (held <= np.asarray(state.context.length)).all()


@dataclasses.dataclass(frozen=True)
class ForgetsLast(ChainLM):
  """Feeds the pending token only: short by one after full acceptance."""

  def propose(self, params, state):
    position = state.context.root - 1
    draft, new = super().propose(params, state)
    put = jax.vmap(lambda x, old, i: x.at[:, i].set(old[:, i]))
    cache = tuple(
        {k: put(layer[k], old[k], position) for k in layer}
        for layer, old in zip(new.drafter['model']['cache'],
                              state.drafter['model']['cache']))
    held = new.drafter['held']
    return draft, new.replace(
        drafter={'model': {'cache': cache}, 'held': held})


@dataclasses.dataclass(frozen=True)
class OneSlotOff(CausalLM):
  """Feeds one slot later than it should once a draft was rejected."""

  def raw(self, params, state, draft, taps):
    off = (state.context.rounds == 2).astype(jnp.int32)
    moved = state.replace(context=state.context.replace(
        length=state.context.length + off))
    logits, found, moved = super().raw(params, moved, draft, taps)
    return logits, found, moved.replace(context=state.context)


def test_the_audit_sees_planted_faults():
  """A drafter that misses a token, and a target that is one slot off."""
  forgets = ForgetsLast(num_speculative_tokens=NUM, model=TINY)
  off = OneSlotOff(CONFIG, chunk=32)
  worst, _ = audit(Engine(off, forgets, Block()))
  assert min(worst) > WRONG


def matched(drafter):
  """Returns (tokens, log-probabilities) of sample-and-match."""
  engine = Engine(TINY, drafter, Match())
  state = RUN(engine, PARAMS, begin(engine, make_context(True)),
              np.int32(99))
  context = state.context
  live = np.arange(SIZE) < np.asarray(context.length)[:, None]
  return [np.where(live, np.asarray(x), 0) for x in (
      context.tokens, context.log_probs['raw'],
      context.log_probs['processed'])]


def test_scores_are_the_same_bits_for_any_drafter():
  """Separate compilations, one block shape: tokens and log-probabilities."""
  for got, want in zip(matched(SMALL), matched(Null(NUM))):
    np.testing.assert_array_equal(got, want)


def compiled_text(drafter, batch: int):
  """Returns the compiled loop as text, and its state."""
  engine = Engine(TINY, drafter, Speculative())
  context = make_context(prompts=PROMPTS[:batch], size=64)
  state = loop.empty(engine, jax.tree.map(jnp.array, context))
  lowered = RUN.lower(engine, PARAMS, state, np.int32(3))
  return lowered.compile().as_text(), state


def copies(text: str, state) -> int:
  """Counts copies of a cache array, those of the entry (once) apart."""
  shape = ','.join(str(n) for n in state.target['cache'][0]['k'].shape)
  return len(re.findall(
      rf'f32\[{shape}\]\S* copy\(', text[:text.index('ENTRY')]))


@pytest.mark.parametrize('drafter,batch', [(SMALL, 4), (Lookup(NUM), 2)])
def test_compiled_loop_donates_and_copies_no_cache(drafter, batch):
  """Each cache array is updated where it lies, in every round."""
  text, state = compiled_text(drafter, batch)
  assert copies(text, state) == 0
  aliased = re.search(r'input_output_alias=\{(.*?)\}, entry', text, re.S)
  num_leaves = len(jax.tree.leaves(state))
  assert aliased and aliased.group(1).count('alias') >= num_leaves


def test_one_row_and_one_token_copies_no_cache():
  """Plain decoding of one row, and each draft of a small LM."""
  assert copies(*compiled_text(Null(0), 1)) == 0


@pytest.mark.xfail(strict=True, reason='XLA copies what a conditional in a '
                   'loop passes through')
def test_block_widths_copy_no_cache():
  """A switch over block widths (`exact_shape=False`)."""
  rule = control.Tracking()
  drafter = Adaptive(Lookup(NUM), rule, exact_shape=False)
  assert copies(*compiled_text(drafter, 2)) == 0
