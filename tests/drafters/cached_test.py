"""Trees around the loop: what the caches hold, and what the counters say.

A law cannot show a drafter's stale cache (a wrong q is still the q that was
drawn from): here each round's caches and drafts are compared with the text.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax.certificates import toys
from specjax.core import loop, topologies, tree
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters import GrownLM, TreeLM
from specjax.models.attention import Block as Slots
from specjax.models.causal import CausalLM
from specjax.verify import Greedy, Gumbel, Match, Speculative

VOCAB, SIZE, NEW = 6, 26, 16
LM = toys.ToyLM(VOCAB)
TARGET = toys.table(0, VOCAB)
# Between the target and another model: drafts are kept and lost.
OTHER = 0.75 * TARGET + 0.25 * toys.table(1, VOCAB)
PROMPTS = [[1], [2, 0, 5], [3, 3], [4, 1, 0, 2, 5]]
# Uneven, breadth first; and with slots in depth-first order.
WIDE = topologies.from_paths(
    '[(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), '
    '(1, 0, 0)]')
DEEP = tree.from_parents((0, 1, 2, 1, 0, 5, 5, 0))
# Little is computed here, and optimising it takes longer.
QUICK = {'xla_backend_optimization_level': 0}


class Spy:
  """A drafter that leaves behind what it proposed, within one trace."""

  def __init__(self, inner):
    self.inner = inner

  def __getattr__(self, name):
    return getattr(self.inner, name)

  def propose(self, params, state):
    draft, state = self.inner.propose(params, state)
    self.caught = (draft, state.drafter['model'])
    return draft, state


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def begin(engine, params, context):
  state = loop.empty(engine, context)
  rows = jnp.ones(context.length.shape, bool)
  return loop.start(engine, params, state, rows, chunk=4)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def step(engine, params, state):
  """Returns `(draft, the drafter's cache after it, state after a round)`."""
  spy = Spy(engine.drafter)
  state = loop.step(engine._replace(drafter=spy), params, state)
  return *spy.caught, state


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def run(engine, params, state):
  return loop.run(engine, params, state, jnp.int32(100))


def rounds(engine, params, context):
  """Yields `(state, draft, drafter's cache, next state)` in numpy."""
  state = begin(engine, params, context)
  for _ in range(60):
    if np.asarray(state.context.done).all():
      return
    draft, cache, new = step(engine, params, state)
    old, after = (s.replace(context=s.context.replace(keys=None))
                  for s in (state, new))  # keys are no numbers
    yield jax.device_get((old, draft, cache, after))
    state = new


class Counts:
  """Counters kept by walking drafts and texts in Python."""

  def __init__(self, batch: int, topology):
    self.topology, depth = topology, topology.max_depth
    self.histogram = np.zeros((batch, depth + 1), int)
    self.drafted = np.zeros((batch, depth), int)
    self.ranks = np.zeros((batch, depth, topology.max_children), int)

  def add(self, b: int, draft, emitted) -> tuple[int, ...]:
    """Adds a round of row b; returns the ranks of what was accepted."""
    parents = self.topology.parents
    parents = draft.parents[b] if parents is None else parents
    depth = np.array(tree.from_parents(parents).depth)
    for d in np.unique(depth[draft.valid[b]]):
      self.drafted[b, d - 1] += 1
    row, path = 0, []
    for token in emitted:
      kids = [i for i, up in enumerate(parents) if up == row]
      hit = [r for r, i in enumerate(kids)
             if draft.tokens[b, i] == token and draft.valid[b, i]]
      if not hit:
        break
      path.append(hit[0])
      row = kids[hit[0]] + 1
    self.histogram[b, len(path)] += 1
    for d, rank in enumerate(path):
      self.ranks[b, d, rank] += 1
    return tuple(path)

  def check(self, metrics) -> None:
    np.testing.assert_array_equal(metrics.histogram, self.histogram)
    np.testing.assert_array_equal(metrics.drafted, self.drafted)
    np.testing.assert_array_equal(metrics.ranks, self.ranks)
    np.testing.assert_array_equal(metrics.accepted, self.ranks.sum(axis=-1))


def stale(cache, tokens, until) -> int:
  """Counts entries below `until int[B]` that are not the row's tokens."""
  live = np.arange(SIZE) < until[:, None]
  return int(((cache['cache'][:, :SIZE] != tokens) & live).sum())


def make_context():
  return toys.context(PROMPTS * 3, size=SIZE, new=NEW,
                      options=toys.sampled(12, temperature=0.9))


TOYS = Models(target={'table': jnp.asarray(TARGET)},
              drafter={'table': jnp.asarray(OTHER)})


def audit(engine):
  """Returns stale entries (target, drafter), counts, paths, last state."""
  counts = Counts(12, engine.drafter.topology)
  wrong, paths = [0, 0], []
  for old, draft, cache, new in rounds(engine, TOYS, make_context()):
    context = old.context
    wrong[0] += stale(old.target, context.tokens, context.root)
    # What is drafted from: the pending token has been fed, too.
    wrong[1] += stale(cache, context.tokens, context.length)
    active = np.flatnonzero(~context.done)
    paths.append([counts.add(b, draft, new.context.tokens[
        b, context.length[b]:new.context.length[b]]) for b in active])
    for b in active:  # the likeliest child at the root is the table's
      text = [0, *context.tokens[b, :context.length[b]]]
      if not isinstance(engine.drafter, GrownLM) and draft.draft_law is None:
        assert draft.tokens[b, 0] == OTHER[text[-2], text[-1]].argmax()
  return wrong, counts, paths, new


@pytest.mark.parametrize('drafter', [
    TreeLM(WIDE, LM, 'top_k'), TreeLM(DEEP, LM), GrownLM(10, LM, 3, 3)],
    ids=['top_k', 'without_replacement', 'grown'])
def test_caches_and_counters_after_every_round(drafter):
  """Both caches hold the text; rows accept different paths, of all ranks."""
  engine = Engine(LM, drafter, Match())
  wrong, counts, paths, state = audit(engine)
  assert wrong == [0, 0]
  counts.check(state.metrics)
  assert any(len(set(row)) > 4 for row in paths)
  total = counts.ranks.sum(axis=0)
  assert (total[0] > 0).all() and (total[:, 0] > 0).all()
  assert (counts.histogram.sum(axis=0) > 0).all()
  if not isinstance(drafter, GrownLM):
    return
  # All rounds in one program, as they are usually compiled.
  whole = run(engine, TOYS, begin(engine, TOYS, make_context()))
  np.testing.assert_array_equal(whole.context.tokens, state.context.tokens)
  counts.check(whole.metrics)


@dataclasses.dataclass(frozen=True)
class FeedsTwo(TreeLM):
  """Catches up as a chain drafter does: short after two accepted drafts."""

  @property
  def catch_up(self) -> int:
    return 2


@dataclasses.dataclass(frozen=True)
class NeverCompacts(toys.ToyLM):
  """Leaves accepted entries where the tree had them."""

  def commit(self, state, draft, verdict):
    return state


def test_the_audit_sees_planted_faults():
  """A drafter that misses a token, and a target that moves nothing."""
  wrong, *_ = audit(Engine(
      NeverCompacts(VOCAB), FeedsTwo(WIDE, LM, 'top_k'), Match()))
  assert min(wrong) > 0


@pytest.mark.parametrize('method,rule', [
    ('top_k', Greedy()), ('without_replacement', Speculative()),
    ('coupled', Gumbel(2))])
def test_an_oracle_is_always_accepted(method, rule):
  """The target as its own drafter: depth + 1 tokens in every round.

  The likeliest child is greedy's; a first child that is drawn from the
  target's law is kept; of two coupled ones, one is the target's choice. With
  another drafter this is not so; coupled, the text is the same nonetheless.
  """
  context = make_context().replace(limit=make_context().root + 13)
  if method == 'top_k':
    context = context.replace(options=toys.context([[1]]).options)
  engine = Engine(LM, TreeLM(topologies.k_ary(2, 2), LM, method), rule)
  own_params = TOYS.replace(drafter=TOYS.target)
  own = run(engine, own_params, begin(engine, own_params, context))
  np.testing.assert_array_equal(own.context.rounds, 4)
  np.testing.assert_array_equal(own.metrics.histogram, [[0, 0, 4]] * 12)
  params = TOYS.replace(drafter=toys.toy_params(1, VOCAB))
  other = run(engine, params, begin(engine, params, context))
  assert 0 < other.metrics.accepted.sum() < own.metrics.accepted.sum() - 12
  if method != 'without_replacement':
    live = np.arange(SIZE) < np.asarray(own.context.length)[:, None]
    np.testing.assert_array_equal(
        (other.context.tokens * live), own.context.tokens * live)


# A real decoder, without and with sliding windows.

LONG, ROOM = 40, 34
# Sums run in another order when shapes differ; logits are of size 8 to 160.
CLOSE = 2e-3


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def from_scratch(config, params, tokens):
  """Returns log-probabilities f32[R,T,V] of whole texts."""
  lm = CausalLM(config, chunk=LONG)
  base = jnp.zeros(tokens.shape[0], jnp.int32)
  position = jnp.broadcast_to(jnp.arange(LONG), tokens.shape)
  logits, _, _ = lm.forward(
      params, lm.empty(tokens.shape[0], LONG)['cache'], tokens,
      Slots(base=base, position=position))
  return jax.nn.log_softmax(logits, axis=-1)


def node_laws(config, params, context, draft, topology) -> np.ndarray:
  """Returns f32[B,N+1,V]: log-probabilities after each node's own text."""
  batch, num = draft.tokens.shape
  text = np.zeros((batch, num + 1, LONG), np.int32)
  size = np.zeros((batch, num + 1), int)
  for b in range(batch):
    parents = topology.parents
    parents = draft.parents[b] if parents is None else parents
    text[b, :] = 0
    size[b, 0] = context.length[b]
    text[b, 0, :size[b, 0]] = context.tokens[b, :size[b, 0]]
    for i, up in enumerate(parents):
      text[b, i + 1] = text[b, up]
      text[b, i + 1, size[b, up]] = draft.tokens[b, i]
      size[b, i + 1] = size[b, up] + 1
  laws = np.asarray(from_scratch(config, params, text.reshape(-1, LONG)))
  laws = laws.reshape(batch, num + 1, LONG, -1)
  return np.take_along_axis(
      laws, size[..., None, None] - 1, axis=2)[:, :, 0]


def check_drafts(config, params, context, draft, topology) -> None:
  """Children are the likeliest of their parent's law, in order."""
  laws = node_laws(config, params, context, draft, topology)
  for b, num in enumerate(draft.tokens):
    parents = topology.parents
    parents = draft.parents[b] if parents is None else parents
    total = np.zeros(len(num) + 1)
    rank = np.zeros(len(num) + 1, int)
    for i, up in enumerate(parents):
      law, token = laws[b, up], draft.tokens[b, i]
      best = np.sort(law)[::-1][rank[up]]
      assert law[token] > best - CLOSE
      rank[up] += 1
      total[i + 1] = total[up] + law[token]
    if 'log_prob' in (draft.aux or {}):
      np.testing.assert_allclose(
          draft.aux['log_prob'][b], total[1:], atol=3 * CLOSE)


# As few tokens in one call as they can do with: the rings are short. Paths
# are longer than the window, so that parts of them go out of sight.
FOUR = tree.from_parents(WIDE.parents + (7, 9))
DECODERS = {
    'tree': lambda config: TreeLM(FOUR, CausalLM(config, chunk=6), 'top_k'),
    'grown': lambda config: GrownLM(10, CausalLM(config, chunk=6), 4, 2)}


# The second has layers of both kinds.
@pytest.mark.parametrize('kind,family', [
    ('grown', 'llama'), ('grown', 'gemma3'), ('tree', 'gemma3')])
def test_a_decoder_drafts_for_itself_and_for_another(kind, family):
  """Greedy text, full depth every round; nodes' laws as from scratch.

  Then for another, which samples: its cache is right after any path.
  """
  config = tiny.CONFIGS[family]
  if config.window:
    config = dataclasses.replace(config, window=2)
  drafter = DECODERS[kind](config)
  rules = toys.ByRow((Greedy(), Match()))
  engine = Engine(CausalLM(config, chunk=12), drafter, rules)
  target = dict(tiny.params(config))
  # Sure of itself: the likeliest path is in a grown tree.
  target['final_norm'] = jax.tree.map(lambda x: 8 * x, target['final_norm'])
  context = toys.context(
      [[7, 1, 2], [2, 9, 9, 1, 3, 4, 1, 30]], size=ROOM, new=25,
      options=toys.sampled(2, temperature=0.0),
      condition={'rule': jnp.zeros(2, jnp.int32)})
  own = Models(target=target, drafter=target)
  made = list(rounds(engine, own, context))
  state = made[-1][3]
  np.testing.assert_array_equal(state.metrics.histogram, [[0, 0, 0, 0, 5]] * 2)
  texts = np.pad(state.context.tokens, ((0, 0), (0, LONG - ROOM)))
  laws = np.asarray(from_scratch(config, target, texts))
  for b, start in enumerate((3, 8)):
    for t in range(start, start + 25):  # as plain greedy decoding says
      law = laws[b, t - 1]
      assert law[texts[b, t]] > law.max() - CLOSE
  wrong = jax.tree.map(
      lambda x: x + 0.05 * tiny.noise(x.shape, x.size).astype(x.dtype),
      target)
  context = context.replace(
      options=toys.sampled(2, temperature=4.0),
      condition={'rule': jnp.ones(2, jnp.int32)})
  other = list(rounds(
      engine, Models(target=target, drafter=wrong), context))
  for params, past in ((target, made), (wrong, other)):
    for old, draft, _, _ in past:
      check_drafts(config, params, old.context, draft, drafter.topology)
  spread = other[-1][3].metrics.histogram.sum(axis=0)
  assert (spread[:4] > 0).all()
