"""Tiny drafters of every kind that other projects have a format for."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.host import interchange
from specjax.io import safetensors
from specjax.models import trained
from specjax.models.block_drafter import BlockConfig
from specjax.models.eagle import EagleConfig
from specjax.models.interchange import Drafter, Target
from specjax.models.medusa import HeadsConfig
from specjax.models.transformer_config import TransformerConfig
from tests import tiny

CONFIG = tiny.CONFIGS['llama']
VOCAB = CONFIG.vocab_size
ALL = np.arange(VOCAB)
SOME = np.setdiff1d(ALL, [3, 11])

_QWEN = TransformerConfig(
    vocab_size=VOCAB, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=4,
    num_kv_heads=2, head_dim=8, qk_norm=True, rope_base=5000.0)
_LLAMA = dataclasses.replace(_QWEN, num_layers=1, qk_norm=False)
_DFLASH = BlockConfig(
    decoder=_QWEN, taps=(1, 2), draft_vocab_size=VOCAB, num_slots=4,
    layout='mask', mask_token=3, markov='none', confidence=False)
_DSPARK = dataclasses.replace(
    _DFLASH, layout='anchor', markov='vanilla', markov_rank=6,
    confidence=True)


class Case(NamedTuple):
  """A drafter and how it is written."""

  config: Any
  ids: np.ndarray
  format: str
  options: dict[str, Any] = {}

  @property
  def drafter(self) -> Drafter:
    return Drafter(self.config, net(self.config), self.ids)


CASES = {
    'zlab': Case(_DFLASH, ALL, 'zlab'),
    'deepspec-dflash': Case(
        dataclasses.replace(_DFLASH, layout='anchor'), ALL, 'deepspec'),
    'deepspec-dspark': Case(
        dataclasses.replace(_DSPARK, markov='gated', mask_token=None), ALL,
        'deepspec', {'mask_token': 3}),
    'speculators-dflash': Case(_DFLASH, ALL, 'speculators'),
    'speculators-dspark': Case(
        dataclasses.replace(_DSPARK, draft_vocab_size=len(SOME)), SOME,
        'speculators'),
    'speculators-eagle3': Case(
        EagleConfig(
            dataclasses.replace(_LLAMA, qk_norm=True), len(SOME),
            taps=(0, 1, 2), own_head=True), SOME, 'speculators'),
    'eagle1': Case(
        EagleConfig(dataclasses.replace(_LLAMA, num_layers=2), VOCAB,
                    version='1', fuse_bias=True), ALL, 'eagle'),
    'eagle3': Case(
        EagleConfig(_LLAMA, len(SOME), taps=(0, 1, 2), own_head=True), SOME,
        'eagle'),
    'medusa': Case(HeadsConfig(16, VOCAB, VOCAB, num_heads=2), ALL, 'medusa'),
    'vllm_medusa': Case(
        HeadsConfig(16, VOCAB, len(SOME), num_heads=2, num_layers=2), SOME,
        'vllm_medusa'),
}


@functools.cache
def target() -> Target:
  return Target('owner/target', CONFIG, tiny.params(CONFIG), 'abc')


@functools.cache
def net(config: Any) -> Any:
  """Returns weights large enough that each moves the logits."""
  model = Drafter(config, None, None).model
  like, tree = jax.tree.flatten(trained.abstract(model))
  leaves = []
  for seed, x in enumerate(like):
    value = 0.3 * tiny.noise(x.shape, seed) + (1.0 if x.ndim == 1 else 0.0)
    leaves.append(jnp.asarray(value, x.dtype))
  out = jax.tree.unflatten(tree, leaves)
  if 'markov_in' in out and config.draft_vocab_size == VOCAB:
    # The row of tokens that are not kept: there are none.
    out['markov_in'] = out['markov_in'].at[-1].set(0)
  return out


def write(folder: Path, name: str, to: Target | None = None, **kwargs: Any
          ) -> Path:
  """Writes a case to a folder in `folder`."""
  case = CASES[name]
  c, net, ids = case.drafter
  return interchange.write(
      folder / name, c, net, ids, format=case.format,
      target=to or target(), **{**case.options, **kwargs})


def values(folder: Path) -> dict[str, Any]:
  """Returns `config.json`."""
  return json.loads((folder / 'config.json').read_text())


def edit(folder: Path, **changes: Any) -> None:
  """Changes values of `config.json`; None takes one away."""
  found = {**values(folder), **changes}
  (folder / 'config.json').write_text(json.dumps(
      {k: v for k, v in found.items() if v is not None}))


def edit_tensors(folder: Path, change: Callable[[dict], Any]) -> None:
  """Changes the tensors in place."""
  path = folder / 'model.safetensors'
  tensors = {name: np.array(x.load()).reshape(x.shape)
             for name, x in safetensors.read(folder).items()}
  change(tensors)
  safetensors.write(path, tensors)
