"""What judges learn from: labels, hidden states at the right index, swaps."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax.distill import judge_data
from specjax.models import transformer
from specjax.models.causal import CausalLM

T = 20
each_kind = pytest.mark.parametrize('kind', ['llama', 'gemma3'])


def features(kind, x, lengths) -> np.ndarray:
  """Returns features of `x [B,T]`; 20 tokens are three chunks of 8."""
  config = tiny.CONFIGS[kind]
  return np.asarray(judge_data.features(
      CausalLM(config, chunk=8), tiny.params(config), x, lengths))


@pytest.mark.parametrize('args, label, keep', [
    ((3,), [1, 1, 1], [1, 1, 1]),
    ((4, 2), [1, 1, 0, 0], [1, 1, 1, 0]),
    ((4, 0), [0, 0, 0, 0], [1, 0, 0, 0]),
    ((4, 3), [1, 1, 1, 0], [1, 1, 1, 1]),
    ((5, 1, 2), [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]),
])
def test_labels(args, label, keep):
  got, kept = judge_data.labels(*args)
  assert got.dtype == np.int8 and got.tolist() == label
  assert kept.dtype == bool and kept.tolist() == keep


@pytest.mark.parametrize('args, text', [
    ((0,), 'length=0'),
    ((4, -1), 'spans tokens -1 to -1'),
    ((4, 4), 'spans tokens 4 to 4'),
    ((4, 3, 2), 'spans tokens 3 to 4'),
    ((4, 1, 0), 'error_length=0'),
])
def test_labels_refuses(args, text):
  with pytest.raises(ValueError, match=text):
    judge_data.labels(*args)


@each_kind
def test_feature_is_at_the_token_itself(kind):
  """It sees the token at its index, and nothing after."""
  x, changed = tiny.tokens(2, T), 11
  y = x.copy()
  y[0, changed] = (y[0, changed] + 1) % tiny.VOCAB
  before, after = (features(kind, z, [T, T]) for z in (x, y))
  assert before.dtype == np.float32 and before.shape == (2, T, 16)
  assert np.array_equal(before[0, :changed], after[0, :changed])
  assert np.array_equal(before[1], after[1])
  assert (abs(before - after)[0, changed].max()) > 0.1
  assert (before[0, changed + 1] != after[0, changed + 1]).any()


@each_kind
def test_feature_is_that_of_decoding(kind):
  """Blocks of a pending token and four drafts: row i consumed draft i.

  Also: the decoder's head turns features into the row's logits, chunks of
  another size do not matter, and neither does what lies past a row's length.
  """
  config, x, size = tiny.CONFIGS[kind], tiny.tokens(2, T), 5
  params, cache = tiny.params(config), tiny.empty(config)
  lengths = np.array([T, 14])
  hidden = features(kind, x, lengths)
  padded = np.where(np.arange(T) < lengths[:, None], x, -1)
  assert np.array_equal(hidden, features(kind, padded, lengths))
  assert (hidden[1, 14:] == 0).all()
  for root in range(0, T, size):
    rows = slice(root, root + size)
    logits, taps, cache = tiny.run(
        config, params, x[:, rows], cache, tiny.chain([root] * 2, size),
        taps=(judge_data.TAP,))
    got, keep = hidden[:, rows], np.arange(root, root + size) < [[T], [14]]
    np.testing.assert_allclose(
        got[keep], taps[judge_data.TAP][keep], atol=2e-4, rtol=0)
    read = transformer.Transformer(config).apply(
        {'params': params}, jnp.asarray(got), method='head')
    np.testing.assert_allclose(read[keep], logits[keep], atol=5e-4, rtol=0)


@pytest.mark.parametrize('x, lengths, text', [
    (np.zeros(3, int), [1], r'must be \[B,T\]'),
    (np.zeros((2, 3), int), [1], r'must be \[B,T\]'),
    (np.zeros((2, 0), int), [0, 0], 'B, T >= 1'),
    (np.zeros((1, 3), int), [4], r'lengths must be in \[0, T\]'),
    (np.zeros((1, 3), int), [-1], r'lengths must be in \[0, T\]'),
    (np.full((1, 3), tiny.VOCAB), [3], r'in \[0, 31\); found 31 to 31'),
    (np.full((1, 3), -1), [3], 'found -1 to -1'),
])
def test_features_refuses(x, lengths, text):
  with pytest.raises(ValueError, match=text):
    features('llama', x, lengths)


# A target that writes ten tokens: 1 for a letter, after which it adds up all
# digits above 4 that it has said. Its drafter says `favourite` everywhere.
def _counter(size: int):
  def continue_from(tokens):
    text = tokens + [1] * (size - len(tokens))
    return text, sum(t for t in text[1:] if t > 4)
  return continue_from


def test_swaps_of_harmless_tokens_are_kept():
  """Swaps below 5 leave the answer; texts build on those before."""
  swaps = judge_data.swap_labels([9], _counter(5), lambda text: [2] * 5)
  assert [s.label for s in swaps] == [1, 1, 1, 1]
  assert [s.tokens for s in swaps] == [
      [9, 2], [9, 2, 2], [9, 2, 2, 2], [9, 2, 2, 2, 2]]


def test_swaps_that_change_the_answer_are_undone():
  said = [0, 7, 3, 1, 6]  # entry 3 agrees with the target
  swaps = judge_data.swap_labels([9], _counter(5), lambda text: said)
  assert [s.label for s in swaps] == [0, 1, 0]
  assert [s.tokens for s in swaps] == [[9, 7], [9, 1, 3], [9, 1, 3, 1, 6]]


def test_the_drafter_reads_the_new_text():
  """It follows harmless swaps and is not asked again without one."""
  asked = []

  def draft(text):
    asked.append(text)
    return [0, 2] + [1 if t == 1 else 8 for t in text[1:-1]]

  swaps = judge_data.swap_labels([9], _counter(4), draft)
  assert asked == [[9, 1, 1, 1], [9, 2, 1, 1]]
  assert [(s.tokens, s.label) for s in swaps] == [
      ([9, 2], 1), ([9, 2, 8], 0)]


def test_a_swap_may_end_the_text():
  def continue_from(tokens):
    return (tokens if 0 in tokens else [9, 1, 1]), 'same'

  swaps = judge_data.swap_labels(
      [9], continue_from, lambda text: [5, 0, 5][:len(text)])
  assert swaps == [judge_data.Swap([9, 0], 1)]


@pytest.mark.parametrize('prompt, continue_from, draft, text', [
    ([], _counter(3), lambda t: t, 'prompt is empty'),
    ([9], lambda t: ([1, 1], 0), lambda t: t, 'the whole text'),
    ([9], _counter(3), lambda t: t[1:], '2 tokens for a text of 3'),
])
def test_swap_labels_refuses(prompt, continue_from, draft, text):
  with pytest.raises(ValueError, match=text):
    judge_data.swap_labels(prompt, continue_from, draft)
