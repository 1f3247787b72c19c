"""Exported drafters in the modules of the speculators package itself.

The package pins other versions of what this project runs with, so it is not
among the test requirements; where it is importable, its own classes load our
folders and must score what we score.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.host import interchange
from specjax.io import safetensors
from specjax.models import weights
from specjax.models.interchange import Target
from tests import published, tiny

torch = pytest.importorskip('torch')
pytest.importorskip(
    'speculators', reason='not a requirement: its pins exclude ours')

pytestmark = pytest.mark.reference

TOLERANCE = 1e-4
LENGTH, ANCHORS = 16, (2, 7)


def exported(folder, name):
  """Writes target and drafter; returns the case, ours and their model."""
  from speculators.config import SpeculatorModelConfig
  from speculators.model import SpeculatorModel
  case, params = published.CASES[name], published.target().params
  c = published.CONFIG
  base = folder / 'target'
  base.mkdir()
  safetensors.write(
      base / 'model.safetensors', weights.export(c, params))
  (base / 'config.json').write_text(json.dumps({
      'architectures': ['LlamaForCausalLM'], 'model_type': 'llama',
      'vocab_size': c.vocab_size, 'hidden_size': c.embed_dim,
      'intermediate_size': c.mlp_dim, 'num_hidden_layers': c.num_layers,
      'num_attention_heads': c.num_heads, 'head_dim': c.head_dim,
      'num_key_value_heads': c.num_kv_heads, 'rms_norm_eps': c.norm_eps}))
  target = Target(str(base), c, params)
  drafter = interchange.write(
      folder / 'drafter', *case.drafter, format='speculators', target=target)
  config = SpeculatorModelConfig.from_pretrained(str(drafter))
  config.transformer_layer_config._attn_implementation = 'eager'
  theirs = SpeculatorModel.from_pretrained(str(drafter), config=config)
  theirs.load_verifier_weights()
  theirs.eval()
  ours = case.drafter.model
  attached = ours.attach(case.drafter.net, params, case.ids)
  # What the package saves is what we read.
  theirs.save_pretrained(str(folder / 'again'))
  again = interchange.read(folder / 'again', target)
  assert again.config == case.config
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again.net,
      case.drafter.net)
  return case, ours, attached, params, theirs.float()


@pytest.mark.parametrize('name', ['speculators-dflash', 'speculators-dspark'])
def test_blocks(tmp_path, name):
  case, ours, params, target, theirs = exported(tmp_path, name)
  features = tiny.noise((1, LENGTH, 32), 5).astype(np.float32)
  tokens = tiny.tokens(1, LENGTH)
  supervised = torch.zeros((1, LENGTH))
  supervised[0, list(ANCHORS)] = 1
  with torch.no_grad():
    hidden, logits, _, _, where = theirs._backbone_forward(
        torch.from_numpy(features), torch.from_numpy(tokens).long(),
        supervised, torch.zeros((1, LENGTH, 16)),
        torch.zeros((1, LENGTH), dtype=torch.long),
        max_anchors=len(ANCHORS))
    width = case.config.width
    logits = logits.reshape(len(ANCHORS), width, -1)
    hidden = hidden.reshape(len(ANCHORS), width, -1)
    block = torch.from_numpy(tokens)[0, where].reshape(len(ANCHORS), width)
    sure = None
    if name == 'speculators-dspark':
      before = theirs.markov_head.prev_embeddings(block)
      logits = logits + theirs.markov_head.block_bias(
          prev_token_ids=block, hidden_states=hidden)
      sure = theirs.confidence_head(torch.cat([hidden, before], -1))
  assert where.reshape(len(ANCHORS), -1)[:, 0].tolist() == list(ANCHORS)

  at = jnp.asarray([ANCHORS])
  seen = jnp.arange(LENGTH) < at[..., None]
  states = ours.blocks(
      params, jnp.asarray(features), jnp.arange(LENGTH)[None],
      ours.embed(target, jnp.asarray(tokens)[0, at]), at, seen,
      ours.mask(target))[0]
  first = case.config.first
  np.testing.assert_allclose(hidden[:, first:], states, atol=TOLERANCE)
  scores = ours.logits(params, states)
  if sure is not None:
    before = ours.previous(params, target, jnp.asarray(block.numpy()))
    scores += ours.bias(params, states, before)
    np.testing.assert_allclose(
        sure, ours.confidence_logit(params, states, before), atol=TOLERANCE)
  np.testing.assert_allclose(logits[:, first:], scores, atol=TOLERANCE)


def test_eagle_3(tmp_path):
  case, ours, params, target, theirs = exported(
      tmp_path, 'speculators-eagle3')
  features = tiny.noise((1, LENGTH, 48), 6).astype(np.float32)
  tokens = tiny.tokens(1, LENGTH)
  found: list = []
  theirs.lm_head.register_forward_hook(
      lambda module, args, out: found.append(out))
  with torch.no_grad():
    # Its rows hold a state and the token that follows it.
    theirs(torch.from_numpy(features[:, :-1]),
           torch.from_numpy(tokens[:, 1:]).long(),
           torch.zeros((1, LENGTH - 1), dtype=torch.long), ttt_steps=3)
  seen = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
  outputs = ours.unroll(
      params, target, jnp.asarray(features), jnp.asarray(tokens),
      jnp.arange(LENGTH)[None], seen, 3)
  logits = ours.logits(params, outputs)[0]
  for step in range(3):
    last = LENGTH - 1 - step  # rows whose tokens are in the text
    np.testing.assert_allclose(
        found[step][0, :last], logits[step, :last], atol=TOLERANCE)
  np.testing.assert_array_equal(
      np.arange(len(case.ids)) + theirs.d2t.numpy(), case.ids)
