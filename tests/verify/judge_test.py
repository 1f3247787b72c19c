"""The judge: which hidden state it reads, and what it may add."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import one_step
import pytest

from specjax.certificates import toys
from specjax.core import law as law_lib
from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters.scripted import Scripted
from specjax.verify import Judge

VOCAB, CHANNELS = 6, 4


def head(channels: int, seed: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  return {'weight': rng.normal(size=channels).astype(np.float32),
          'bias': np.float32(0.3),
          'mean': rng.normal(size=channels).astype(np.float32),
          'scale': rng.uniform(0.5, 2, channels).astype(np.float32)}


@pytest.mark.parametrize('shape', one_step.SHAPES)
def test_threshold_one_is_speculative(shape):
  """No score exceeds 1, however sure the head is: same verdicts."""
  sure = {**head(VOCAB), 'bias': np.float32(1e4)}
  one_step.assert_speculative(Judge(1.0), shape, sure)


def test_scores_are_the_standardised_linear_head():
  """sigmoid(w (e - mean) / scale + b), in float64; half floats are fine."""
  rng = np.random.default_rng(1)
  state = rng.normal(size=(50, 3, CHANNELS)).astype(np.float16)
  made = head(CHANNELS)
  scores = one_step.random_rows(0, (0, 1), batch=50).scores.replace(
      taps={'final': jnp.asarray(state)})
  got = Judge().scores(Models(target=None, verifier=made), scores)
  z = (state.astype(np.float64) - made['mean']) / made['scale']
  want = 1 / (1 + np.exp(-(z @ made['weight'] + made['bias'])))
  assert got.dtype == jnp.float32 and got.shape == (50, 3)
  np.testing.assert_allclose(got, want, atol=1e-5)


def hopeless(parents, bad) -> one_step.Rows:
  """Returns drafts that only the judge can save, a batch of len(bad) rows.

  The target's law excludes every draft. In row b of the batch the states of
  the rows of Scores in `bad[b]` look bad, all others good.
  """
  rows = one_step.random_rows(0, parents, batch=len(bad), vocab=VOCAB)
  slots = len(parents)
  only = np.full((len(bad), slots + 1, VOCAB), -np.inf, np.float32)
  only[..., 0] = 0
  final = np.ones((len(bad), slots + 1, 1), np.float32)
  for b, those in enumerate(bad):
    final[b, those] = -1
  draft = rows.draft.replace(
      tokens=np.tile(1 + np.arange(slots, dtype=np.int32) % 5, (len(bad), 1)),
      valid=np.ones((len(bad), slots), bool))
  scores = rows.scores.replace(
      target_law=law_lib.Categorical(only), taps={'final': final})
  return rows._replace(draft=draft, scores=scores)


PLAIN_HEAD = {'weight': np.array([9.0], np.float32), 'bias': np.float32(0),
              'mean': np.zeros(1, np.float32), 'scale': np.ones(1, np.float32)}


def test_chain_stops_at_the_bad_draft():
  """The state after slot i judges slot i: row i + 1 of Scores."""
  size = 5
  bad = [[row] for row in range(size + 1)] + [[]]
  rows = hopeless(range(size), bad)
  verdict = one_step.verify(Judge(), PLAIN_HEAD, rows)
  # Row 0 is the pending token: nobody asks about it.
  np.testing.assert_array_equal(
      verdict.num_accepted, [size] + list(range(size)) + [size])
  assert (np.asarray(verdict.next_token) == 0).all()
  np.testing.assert_array_equal(verdict.excess, verdict.num_accepted)


TREE = (0, 0, 1, 1, 2, 3, 3)


def walk(bad) -> list[int]:
  """Returns the path that takes the first good child, until none is good."""
  path = [0]
  while True:
    good = [slot + 1 for slot, parent in enumerate(TREE)
            if parent == path[-1] and slot + 1 not in bad]
    if not good:
      return path
    path.append(good[0])


def test_tree_avoids_the_bad_nodes():
  """Every single bad node, and random sets of them."""
  rng = np.random.default_rng(0)
  nodes = np.arange(len(TREE) + 1)
  bad = [[], *([n] for n in nodes)]
  bad += [list(nodes[rng.random(len(nodes)) < 0.4]) for _ in range(60)]
  verdict = one_step.verify(Judge(), PLAIN_HEAD, hopeless(TREE, bad))
  want = [walk(those) for those in bad]
  assert {len(path) for path in want} == {1, 2, 3, 4}
  for b, path in enumerate(want):
    assert verdict.num_accepted[b] == len(path) - 1
    assert list(verdict.path[b, :len(path)]) == path


def test_threshold_splits_the_scores():
  """Accepted exactly above it; NaN states leave it to the exact test."""
  rows = hopeless((0,), [[]] * 101)
  z = np.linspace(-3, 3, 101).astype(np.float32)
  z[50] = np.nan
  final = np.stack([z * 0, z], axis=1)[..., None] / 9
  rows = rows._replace(scores=rows.scores.replace(taps={'final': final}))
  verdict = one_step.verify(Judge(0.8), PLAIN_HEAD, rows)
  with np.errstate(invalid='ignore'):
    want = 1 / (1 + np.exp(-z.astype(np.float64))) > 0.8
  np.testing.assert_array_equal(np.asarray(verdict.num_accepted) == 1, want)


SEEN: set[tuple[str, ...]] = set()


@dataclasses.dataclass(frozen=True)
class Recorder(toys.ToyLM):
  """Notes which hidden states it is asked for."""

  def score(self, params, state, draft, taps):
    SEEN.add(taps)
    return super().score(params, state, draft, taps)


def test_tap_is_requested_and_aligned_in_the_loop():
  """Greedy text through the loop: the judge reads the draft's own state."""
  SEEN.clear()
  batch, size, num = 6, 24, 3
  rng = np.random.default_rng(3)
  table = toys.table(4, VOCAB)
  script = rng.integers(0, VOCAB, (batch, size)).astype(np.int32)
  prompts = [[1, 2], [0], [5, 5, 1], [3], [2, 2], [4]]
  context = toys.context(
      prompts, size=size, new=12, options=toys.sampled(batch, temperature=0.0),
      condition={'script': jnp.asarray(script)})
  # `final` is the row of logits after the token: the head reads entry 0.
  made = {'weight': np.eye(VOCAB)[0] * 50.0, 'bias': 0.0,
          'mean': np.zeros(VOCAB), 'scale': np.ones(VOCAB)}
  params = Models(
      target={'table': jnp.asarray(table)},
      verifier={k: jnp.asarray(v, jnp.float32) for k, v in made.items()})
  engine = Engine(Recorder(VOCAB), Scripted(num), Judge())
  run, admit = loop.compiled((('xla_backend_optimization_level', 0),))
  copy = lambda: jax.tree.map(jnp.array, context)  # noqa: E731  (donated)
  state = admit(engine, params, loop.empty(engine, copy()), ~copy().done,
                copy(), chunk=4)
  state = run(engine, params, state, np.int32(99))
  assert SEEN == {('final',)}
  kept = wrong = 0
  for b, prompt in enumerate(prompts):
    text, end = list(prompt), min(len(prompt) + 12, size)
    while len(text) < end:
      for _ in range(num):
        before = text[-2] if len(text) > 1 else 0
        x, best = script[b, len(text)], table[before, text[-1]].argmax()
        if x != best and table[text[-1], x, 0] <= 0:
          break
        kept, wrong = kept + 1, wrong + (x != best)
        text.append(int(x))
      before = text[-2] if len(text) > 1 else 0
      text.append(int(table[before, text[-1]].argmax()))
    assert list(state.context.tokens[b, :end]) == text[:end]
  assert 5 < wrong < kept
