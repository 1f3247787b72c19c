"""The scripts about trained drafters, on a random model."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
from matplotlib import image
import numpy as np
import pytest

from benchmarks import (
  batch_curve,
  drafters,
  gap,
  huggingface,
  qwen,
  support,
  vocab_trim,
)
from specjax.host import drafter as drafter_lib
from specjax.host import tiny
from specjax.models.attention import Block

QUICK = ['--target', 'tiny', '--drafter', 'tiny', '--threads', '2']


def test_costs_are_a_line_through_the_widths():
  rule = batch_curve.fitted({2: 1.4, 4: 1.8})
  assert rule.draft_cost == pytest.approx(0.2)
  assert rule.verify_cost == pytest.approx(1.0)
  assert batch_curve.fitted({4: 1.8}).verify_cost == pytest.approx(1.8)


def test_batch_curve(tmp_path, monkeypatch):
  out = tmp_path / 'curve.json'
  arguments = [
      *QUICK, '--out', str(out), '--batches', '2', '--widths', '',
      '--groups', '1', '--repeats', '2', '--new_tokens', '16',
      '--max_prompt', '500']
  batch_curve.main(arguments)
  row = json.loads(out.read_text())['sections']['2']
  assert set(row['round_ms']) == {'plain', '0', '3'}
  assert set(row['runs']) == {'plain', 'drafter', 'tracking', 'shared'}
  for name, run in row['runs'].items():
    assert run['speedup_by_run']['n'] == 2
    assert (run['tau'] == 1) if name == 'plain' else (run['tau'] >= 1)
  assert row['runs']['plain']['speedup'] == 1
  pixels = image.imread(tmp_path / 'batch_curve.png')
  assert (pixels[..., :3].max(-1) - pixels[..., :3].min(-1)).max() > 0.3
  # A batch size that is there is not measured again.
  monkeypatch.setattr(batch_curve.Bench, 'first', pytest.fail)
  batch_curve.main(arguments)
  assert json.loads(out.read_text())['sections']['2'] == row


def test_another_vocabulary_keeps_the_scores_of_its_tokens(tmp_path):
  """Fewer tokens or more: those that it knew score as before."""
  model = tiny.model()
  loaded = support.drafter(model, 'tiny')
  net = jax.tree.map(
      lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
      loaded.params['net'])
  ids = np.asarray(loaded.params['ids'])
  folder = drafter_lib.save_drafter(
      tmp_path / 'drafter', loaded.source.model, net, ids, model,
      kind='dspark', num_draft=3, form='float32')
  loaded = support.drafter(model, str(folder))
  hidden = jax.random.normal(jax.random.key(0), (1, 2, 32))
  before = jnp.asarray([[40, 70]])

  def scores(one):
    net = one.source.model
    own = net.logits(one.params, hidden) + net.bias(
        one.params, hidden, net.previous(one.params, model.params, before))
    return np.asarray(net.spread(one.params, own))

  want = scores(loaded)
  for new in (ids[8:38], np.arange(257)):
    got = scores(vocab_trim.resized(model, str(folder), loaded, new))
    both = np.intersect1d(ids, new)
    known = before if 70 in new else before[:, :1]
    np.testing.assert_allclose(
        got[:, :known.shape[1], both], want[:, :known.shape[1], both],
        rtol=1e-5, atol=1e-5)
    assert (np.isfinite(got[0, 0]).nonzero()[0] == new).all()


def test_vocab_trim(tmp_path):
  out = tmp_path / 'trim.json'
  vocab_trim.main([
      *QUICK, '--out', str(out), '--sizes', 'full', '--num_questions', '2',
      '--new_tokens', '6', '--slots', '900'])
  found = json.loads(out.read_text())['sections']
  own, full = found['own'], found['full']
  assert own['draft_vocab_size'] == 64 and full['coverage'] == 1
  assert own['coverage'] <= 1 and own['passes'] == 1 and own['depth'] == 3
  # The head has 193 rows of 32 fewer, the Markov head 4 numbers a token.
  assert full['parameters_read'] - own['parameters_read'] == 193 * 36
  for row in found.values():
    assert row['memory_bound_speedup'] == pytest.approx(
        row['tau'] / (row['c'] + 1))
  assert own['memory_bound_speedup_over_full'] == pytest.approx(
      own['memory_bound_speedup'] / full['memory_bound_speedup'])


def test_drafters_take_turns(tmp_path):
  """Plain decoding is the first; each question is counted once."""
  configs = tmp_path / 'drafters.json'
  configs.write_text(json.dumps({
      'chain': {'method': 'ngram', 'num_speculative_tokens': 2}}))
  out = tmp_path / 'drafters.json.out'
  drafters.main([
      '--target', 'tiny', '--drafters', str(configs), '--out', str(out),
      '--num_questions', '2', '--new_tokens', '6', '--sizes', '900',
      '--threads', '2'])
  found = json.loads(out.read_text())
  rows = found['sections']['T=0']
  assert list(rows) == ['plain', 'chain']
  assert rows['plain']['tau'] == rows['plain']['speedup'] == 1
  asked = found['setting']['num_questions']
  assert asked == 2 and found['setting']['too_long'] == 0
  for row in rows.values():
    assert row['same_text_as_plain'] == asked
    assert sum(c['n'] for c in row['by_category'].values()) == asked


def test_drafters_that_cannot_draft_are_skipped(tmp_path, capsys):
  """By their configuration, or by the block that the target takes."""
  configs = tmp_path / 'drafters.json'
  configs.write_text(json.dumps({
      'none': {'method': 'ngram', 'num_speculative_tokens': 0},
      'wide': {'method': 'ngram', 'num_speculative_tokens': 64},
      'chain': {'method': 'ngram', 'num_speculative_tokens': 2}}))
  out = tmp_path / 'out.json'
  arguments = [
      '--target', 'tiny', '--drafters', str(configs), '--out', str(out),
      '--num_questions', '1', '--new_tokens', '4', '--sizes', '900',
      '--threads', '2']
  drafters.main(arguments)
  found = json.loads(out.read_text())
  assert list(found['sections']['T=0']) == ['plain', 'chain']
  skipped = found['skipped']['T=0']
  assert 'num_speculative_tokens=0: Lookup needs >= 1' in skipped['none']
  assert '65 tokens in one call or tree, but chunk=64' in skipped['wide']
  assert 'T=0 wide: skipped: 65 tokens' in capsys.readouterr().out
  with pytest.raises(ValueError, match='T=0: no drafter is left'):
    drafters.main([*arguments, '--only', 'none,wide'])


def test_questions_by_size():
  model = tiny.model()
  whole, none = support.questions(model, '', 4, [900], 0)
  assert len(whole) == 4 and not none
  length = sorted(len(q.tokens) for q in whole)
  some, dropped = support.questions(model, '', 4, [length[1], 900], 0)
  assert not dropped
  assert [q.size for q in some] == [
      length[1] if len(q.tokens) <= length[1] else 900 for q in whole]
  some, dropped = support.questions(model, '', 4, [length[1]], 1)
  assert dropped == 4 - len(some) >= 3


def test_gap(tmp_path):
  """Training and decoding see the same laws, at the same places."""
  out = tmp_path / 'gap.json'
  gap.main([
      '--target', 'tiny', '--drafter', 'tiny', '--num_questions', '1',
      '--new_tokens', '6', '--most_tokens', '900', '--temperatures', '1',
      '--out', str(out)])
  found = json.loads(out.read_text())
  setting = found['setting']
  assert setting['num_prompts'] == 1 and setting['kind'] == 'dspark'
  assert list(found['sections']) == ['T=1']
  found = found['sections']['T=1']
  assert found['tokens'] == 6 and found['decoded']['number'][0] > 0
  assert 0.1 < found['forced']['mean'][0] < 0.9
  assert found['largest'][0] < 1e-5


@pytest.mark.reference
def test_qwen_beside_transformers(tmp_path):
  pytest.importorskip('transformers')
  out = tmp_path / 'qwen.json'
  qwen.main([
      *QUICK, '--small', 'tiny', '--out', str(out), '--num_questions', '2',
      '--new_tokens', '6', '--slots', '900', '--only', '0.5B, chain of 3'])
  found = json.loads(out.read_text())['sections']
  assert set(found['specjax']) == {'plain', '0.5B, chain of 3'}
  # The drafter is the target: everything is accepted.
  assert found['specjax']['0.5B, chain of 3']['tau'] > 2
  theirs = found['transformers']
  assert theirs['plain']['questions'] == 2
  assert theirs['assisted']['same_text_as_plain'] == 2
  assert all(row['ms_a_token'] > 0 for row in theirs.values())


@pytest.mark.reference
@pytest.mark.parametrize('bias', [False, True])
def test_transformers_gets_the_same_network(bias):
  torch = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  model = tiny.model(qkv_bias=bias)
  tokens = np.random.default_rng(0).integers(0, 257, (1, 9))
  logits, _ = model.lm.forward(
      model.params, model.lm.empty(1, 16)['cache'], jnp.asarray(tokens),
      Block(base=jnp.zeros((1,), jnp.int32), position=jnp.arange(9)[None])
  )[:2]
  with torch.inference_mode():
    theirs = huggingface.to_torch(model)(
        torch.tensor(tokens).to(huggingface.device())).logits
  np.testing.assert_allclose(
      logits, theirs.float().cpu().numpy(), rtol=1e-4, atol=1e-5)
