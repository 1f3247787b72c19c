"""Trees in the decoder: grown by levels, exact to the bit, moved in place.

The reference is always the same text as a chain: a plain forward pass, or
the very bits of another block that scored the same text.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax.core import keys, loop, tree
from specjax.core.round import Engine
from specjax.core.types import (
  Context,
  Draft,
  Models,
  Options,
  SpecState,
  Verdict,
)
from specjax.drafters import base as drafting
from specjax.drafters.null import Null
from specjax.models.causal import CausalLM
from specjax.verify.greedy import Greedy

# A window shorter than the trees below are deep.
KINDS = {'global': tiny.CONFIGS['llama'],
         'window': dataclasses.replace(tiny.CONFIGS['gemma3'], window=3)}
each_kind = pytest.mark.parametrize('config', KINDS.values(), ids=KINDS)
# Logits are float32 of size 1 to 20; seen: below 1e-5.
CLOSE = {'atol': 3e-5, 'rtol': 1e-5}
PREFIX = np.array([9, 6])
WIDTHS = (1, 2, 3, 3)  # nodes of each level, root included: CHUNK in all
LEVEL = np.repeat(np.arange(len(WIDTHS)), WIDTHS)
RUN, ADMIT = loop.compiled()


def random_levels(seed: int) -> np.ndarray:
  """Returns ancestors bool[B,9,9] of trees with `WIDTHS` nodes a level."""
  rng = np.random.default_rng(seed)
  above = np.broadcast_to(np.eye(tiny.CHUNK, dtype=bool), (2, 9, 9)).copy()
  for row in above:
    for node in range(1, tiny.CHUNK):
      parent = rng.choice(np.flatnonzero(LEVEL == LEVEL[node] - 1))
      row[node] |= row[parent]
  return above


@functools.partial(jax.jit, static_argnums=(0, 8))
def grow(lm, params, state, tokens, base, position, above, entries, start):
  return lm.grow(params, state, tokens, base, position, above, entries, start)


def grown(lm, state, tokens, above, widths):
  """Feeds a tree `widths` nodes at a time: logits of all nodes, and state."""
  base = jnp.asarray(PREFIX, jnp.int32)
  position = base[:, None] + LEVEL
  out, start = [], 0
  for width in widths:
    end = start + width
    logits, state = grow(
        lm, tiny.params(lm.config), state, tokens[:, start:end], base,
        position[:, start:end], jnp.asarray(above[:, start:end, :end]),
        position[:, :end] if start else None, start)
    out.append(np.asarray(logits))
    start = end
  return np.concatenate(out, axis=1), state


def prefilled(config):
  """Returns (text [2,12], state of `PREFIX` entries a row)."""
  x = tiny.tokens(2, 12)
  fed = np.arange(12) < PREFIX[:, None]
  _, cache = tiny.feed(config, x, tiny.empty(config), [0, 0], fed)
  return x, {'cache': cache}


@each_kind
def test_growing_by_levels(config):
  """Levels, one call, and every path on its own: the same logits.

  The second tree is grown over what the first one left.
  """
  if config.window:  # at 3, an entry's index would pass for its position
    config = dataclasses.replace(config, window=2)
  lm = CausalLM(config, chunk=tiny.CHUNK)
  x, state = prefilled(config)
  for seed in (0, 1):
    above = random_levels(seed)
    tokens = tiny.tokens(2, tiny.CHUNK, seed=3 + seed)
    whole, _ = grown(lm, state, tokens, above, (tiny.CHUNK,))
    levels, state = grown(lm, state, tokens, above, WIDTHS)
    texts = np.zeros((2, tiny.CHUNK, 20), np.int32)
    last = np.zeros((2, tiny.CHUNK), int)
    for b, node in np.ndindex(2, tiny.CHUNK):
      text = [*x[b, :PREFIX[b]], *tokens[b, above[b, node]]]
      texts[b, node, :len(text)], last[b, node] = text, len(text) - 1
    want = tiny.full(config, texts.reshape(-1, 20))
    want = want[np.arange(18), last.reshape(-1)].reshape(2, 9, -1)
    np.testing.assert_allclose(levels, whole, **CLOSE)
    np.testing.assert_allclose(levels, want, **CLOSE)


def test_what_cannot_be_grown():
  lm = CausalLM(KINDS['window'], chunk=tiny.CHUNK)
  state = lm.empty(2, tiny.CAPACITY)
  args = (np.zeros((2, 3), np.int32), np.zeros(2, np.int32),
          np.full((2, 3), 4))
  params = tiny.params(lm.config)
  with pytest.raises(ValueError, match='entry_position is None'):
    lm.grow(params, state, *args, np.ones((3, 7), bool), None, 4)
  with pytest.raises(ValueError, match='10 tokens .* chunk=9'):
    lm.grow(params, state, *args, np.ones((3, 10), bool),
            np.zeros((2, 10), np.int32), 7)


# A tree of eight drafts whose shape is known when it is compiled, and one
# whose shape is data.
STATIC = tree.from_parents([0, 0, 1, 2, 3, 3, 5, 0])
DYNAMIC = tree.Topology(
    num_nodes=8, max_depth=8, max_children=8, is_chain=False, parents=None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_and_commit(lm, topology, params, state, drafts, parents, path):
  """One round with a foregone verdict: logits [B,N+1,V], and the state."""
  draft = Draft(
      topology=topology, tokens=drafts, parents=parents,
      valid=jnp.ones(drafts.shape, bool), mode=jnp.zeros(8, jnp.int32))
  logits, _, state = lm.raw(Models(target=params), state, draft, ())
  none = jnp.zeros(path.shape[:1], jnp.int32)
  state = lm.commit(state, draft, Verdict(
      path=path, num_accepted=none, next_token=none, excess=none,
      gave_up=none))
  return logits, state


def make_context(tokens, length) -> Context:
  batch = len(tokens)
  return Context(
      tokens=jnp.array(tokens), length=jnp.array(length, jnp.int32),
      prompt_length=jnp.array(length, jnp.int32), done=jnp.zeros(batch, bool),
      limit=jnp.full(batch, 44, jnp.int32),
      rounds=jnp.zeros(batch, jnp.int32), options=Options(),
      keys=jax.random.split(jax.random.key(0), batch))


def random_parents(rng, topology) -> np.ndarray:
  """Returns int32[2,8]: of the topology, or mostly long branches."""
  if topology.parents is not None:
    return np.tile(np.asarray(topology.parents, np.int32), (2, 1))
  return np.asarray([[rng.integers(max(0, i - 2), i + 1) for i in range(8)]
                     for _ in range(2)], np.int32)


def path_to(parents, row: int) -> list[int]:
  path = [row]
  while path[0]:
    path.insert(0, int(parents[path[0] - 1]))
  return path


def scored(lm, topology, num_rounds: int = 7):
  """Follows a text through rounds of random trees.

  In every round a random path of the tree says how the text goes on, other
  nodes are noise, and a random part of the path is committed: most tokens
  are scored several times, at other depths, nodes and roots.

  Returns:
    {(row, position): list of the logits' bytes}.
  """
  config, rng = lm.config, np.random.default_rng(7)
  text = tiny.tokens(2, 40)
  fed = np.arange(9) < np.array([[4], [2]])
  _, cache = tiny.feed(config, text[:, :9], tiny.empty(config), [0, 0], fed)
  root, found = np.array([4, 2]), collections.defaultdict(list)
  state = SpecState(context=make_context(text, root + 1), drafter={},
                    target={'cache': cache}, metrics=None)
  for _ in range(num_rounds):
    parents = random_parents(rng, topology)
    drafts = rng.integers(0, tiny.VOCAB, (2, 8)).astype(np.int32)
    paths = [path_to(parents[b], rng.integers(4, 9)) for b in range(2)]
    kept = np.full((2, topology.max_depth + 1), 9)  # padding
    count = np.zeros(2, int)
    for b, path in enumerate(paths):
      drafts[b, np.array(path[1:], int) - 1] = text[b, root[b] + 1:][
          :len(path) - 1]
      count[b] = rng.integers(1, len(path))
      kept[b, :count[b] + 1] = path[:count[b] + 1]
    logits, state = score_and_commit(
        lm, topology, tiny.params(config), state, drafts,
        None if topology.parents else parents, kept)
    for b, path in enumerate(paths):
      for depth, row in enumerate(path):
        found[b, root[b] + depth].append(np.asarray(logits)[b, row].tobytes())
    root = root + count
    state = state.replace(context=state.context.replace(
        length=jnp.asarray(root + 1, jnp.int32)))
  return found


def disagreeing(found) -> int:
  """Counts positions that two blocks have scored with other bits."""
  again = [bits for bits in found.values() if len(bits) > 1]
  assert len(again) >= 12 and max(map(len, again)) >= 3
  return sum(len(set(bits)) > 1 for bits in again)


@pytest.mark.parametrize('kind,dtype,topology', [
    ('global', 'float32', DYNAMIC), ('window', 'float32', DYNAMIC),
    ('window', 'float32', STATIC), ('window', 'bfloat16', DYNAMIC)],
    ids=['global', 'window', 'static', 'bfloat16'])
def test_exact_trees(kind, dtype, topology):
  """Bits are a function of the text, whatever the trees around it."""
  config = dataclasses.replace(KINDS[kind], dtype=dtype)
  lm = CausalLM(config, chunk=tiny.CHUNK, exact_trees=True)
  assert disagreeing(scored(lm, topology)) == 0


@each_kind
def test_other_trees_are_exact_up_to_rounding(config):
  """Without the option bits differ (the tests above can fail), a little."""
  lm = CausalLM(config, chunk=tiny.CHUNK)
  found = scored(lm, DYNAMIC)
  exact = scored(dataclasses.replace(lm, exact_trees=True), DYNAMIC)
  assert disagreeing(found) > 3
  assert found.keys() == exact.keys()
  for key, bits in found.items():
    for one in bits:
      np.testing.assert_allclose(
          np.frombuffer(one, np.float32),
          np.frombuffer(exact[key][0], np.float32), **CLOSE)


@dataclasses.dataclass(frozen=True)
class SpoiltScript(drafting.Drafter):
  """Drafts a script at every node, two in five tokens spoilt."""

  topology: tree.Topology = STATIC

  def propose(self, params, state):
    context = state.context
    depth = tree.node_depth(self.topology, None)
    script = tree.take_row(
        context.condition['script'], context.root[:, None] + depth)
    noise = keys.uniform(keys.row(context, keys.Purpose.DRAFT), 8)
    tokens = (script + (noise < 0.4)) % tiny.VOCAB
    return drafting.point_draft(
        self.topology, tokens, jnp.ones(tokens.shape, bool)), state


def greedy(lm, drafter, script):
  """Returns (engine, params, state) of greedy decoding."""
  context = make_context(tiny.tokens(2, 44), [9, 6]).replace(
      condition={'script': jnp.array(script)})
  engine = Engine(lm, drafter, Greedy())
  params = Models(target=tiny.params(lm.config))
  copy = jax.tree.map(jnp.array, context)  # donated
  return engine, params, ADMIT(
      engine, params, loop.empty(engine, context),
      jnp.ones(2, bool), copy, chunk=tiny.CHUNK)


@functools.cache
def plain(config) -> Context:
  """Returns the end of decoding token by token."""
  nothing = np.zeros((2, 44), np.int32)
  lm = CausalLM(config, chunk=tiny.CHUNK)
  return RUN(*greedy(lm, Null(0), nothing), np.int32(99)).context


@pytest.mark.parametrize('exact', [False, True])
def test_compiled_loop_of_a_tree(exact):
  """Plain decoding's text, rounds saved, and no cache copied on the way."""
  config = KINDS['window']  # of its two layers, the other is global
  lm = CausalLM(config, chunk=tiny.CHUNK, exact_trees=exact)
  want = plain(config)
  engine, params, state = greedy(lm, SpoiltScript(), want.tokens)
  compiled = RUN.lower(engine, params, state, np.int32(99)).compile()
  text = compiled.as_text()
  inside = text[:text.index('ENTRY')]
  for shape in {x.shape for x in jax.tree.leaves(state.target)}:
    if len(shape) == 4:
      name = ','.join(map(str, shape))
      assert f'f32[{name}]' in inside
      assert not re.findall(rf'f32\[{name}\]\S* copy\(', inside)
  aliases = re.search(
      r'input_output_alias=\{(.*?)\}, entry', text, re.DOTALL)
  assert aliases
  assert aliases.group(1).count('alias') >= len(jax.tree.leaves(state))
  state = compiled(params, state, np.int32(99))
  np.testing.assert_array_equal(state.context.tokens, want.tokens)
  assert (state.context.rounds < want.rounds - 5).all()
  depths = np.asarray(state.metrics.histogram).sum(axis=0)
  assert (depths[1:] > 0).sum() >= 2  # paths of several lengths were moved
