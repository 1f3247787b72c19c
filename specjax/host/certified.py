"""Certificates of drafters that are networks, over a target that is one.

Tiny random weights: what is certified is the code that decodes with them. The
law of a text comes from plain forward passes, the laws that drafts are drawn
from out of the training code: that texts take as many rounds as these laws
say is the proof that training and decoding see the same drafter.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates.drafter_faults import (
  Drafted,
  Fault,
  FaultySource,
  Misstating,
)
from specjax.certificates.equality import Layouts
from specjax.certificates.jobs import Job
from specjax.certificates.setting import NUM_KINDS, Setting
from specjax.core import topologies
from specjax.core.types import Models
from specjax.distill import kinds, teacher
from specjax.drafters import (
  BlockSource,
  ChainLM,
  GrownLattice,
  GrownLM,
  Lattice,
  TreeLM,
)
from specjax.drafters.copying import Copying
from specjax.models import weights
from specjax.models.causal import CausalLM
from specjax.models.transformer_config import TransformerConfig
from specjax.verify import Speculative

_VOCAB = 4
# What is left out is likely: its place is taken by other tokens often.
_TRIMMED = 1
IDS = np.delete(np.arange(_VOCAB), _TRIMMED)
_SHAPE = TransformerConfig(
    vocab_size=_VOCAB, num_layers=2, embed_dim=8, mlp_dim=12, num_heads=2,
    num_kv_heads=1, head_dim=4, tied=False)
_LM = CausalLM(_SHAPE, chunk=16)
_NUM = 3
# Spread of weights, and what the target's head is multiplied by.
_SCALE, _FLAT = 1.0, 0.4
_BLOCK: dict[str, Any] = {'num_slots': _NUM, 'num_layers': 1, 'taps': (1, 2)}


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkSetting(Setting):
  """A tiny decoder, and a drafter of it, both random.

  Attributes:
    kind: of drafter (`distill.kinds`). model: its arguments.
    seed: of the weights. With these, faults show in short texts.
    normalised: the drafter states log-probabilities as its logits, as
      lattices do (a repetition penalty depends on it).
  """

  vocab_size: int = _VOCAB
  filters: bool = False
  kind: str = 'dspark'
  seed: int = 0
  model: tuple[tuple[str, Any], ...] = ()
  normalised: bool = False

  @property
  def target(self) -> CausalLM:
    return _LM

  @property
  def by_slot(self) -> bool:
    """Whether each depth is drafted by a slot or head of its own."""
    return not self.kind.startswith('eagle')

  @functools.cached_property
  def task(self) -> Any:
    """Trains such a drafter; drafts _NUM tokens."""
    task: Any = kinds.build(self.kind, _SHAPE, len(IDS),
                            model=dict(self.model))
    if not hasattr(task, 'steps'):
      return task
    # More steps than a recipe trains are the same arithmetic.
    return dataclasses.replace(task, steps=_NUM, recipe='ttt')

  @functools.cached_property
  def _params(self) -> Models:
    target = _random(weights.abstract(_SHAPE), 1000 + self.seed)
    # Both laws flat enough that each token is said and accepted at times.
    target['head'] = _FLAT * target['head']
    net = jax.eval_shape(
        lambda: self.task.init(jax.random.key(0), target))
    return Models(target=target, drafter=self.task.attach(
        _random(net, 2000 + self.seed), target, IDS))

  def models(self, drafter: Any = None, verifier: Any = None) -> Models:
    """Returns all parameters; the drafter's unless `drafter` is given."""
    own = self._params.drafter if drafter is None else drafter
    return self._params.replace(drafter=own, verifier=verifier)

  def logits(
      self, who: str, kind: int, made: tuple[int, ...], begun: int
  ) -> np.ndarray:
    """See `Setting.logits`; NaN where a drafter has no state to read yet."""
    say_p, say_q = self._tables
    length = self._length
    row = kind * self.vocab_size**length + int(np.ravel_multi_index(
        made + (0,) * (length - len(made)), (self.vocab_size,) * length))
    start = len(self.kinds[kind].prompt) - 1
    if who == 'target':
      return say_p[row, start + len(made)]
    if start + begun == 0 and self.kind not in ('dspark', 'dflash'):
      return np.full(self.vocab_size, np.nan)
    return say_q[row, begun, len(made) - begun]

  @property
  def _length(self) -> int:
    """Tokens that a draft may stand behind: trees outgrow the text."""
    return self.length - 1 + _NUM - 1

  @functools.cached_property
  def _tables(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits of all texts: f64[rows,S,V] of the target, of the
    drafter f64[rows,L,K,V] after a pending token at every place.
    """
    length = self._length
    every = np.asarray(list(itertools.product(
        range(self.vocab_size), repeat=length)), np.int32)
    prompts = [it.prompt for it in self.kinds]
    size = max(map(len, prompts)) + length
    places = np.arange(self.length)
    tokens = np.zeros((NUM_KINDS, len(every), size), np.int32)
    anchors = np.zeros((NUM_KINDS, len(every), len(places)), np.int32)
    for kind, prompt in enumerate(prompts):
      tokens[kind, :, :len(prompt)] = prompt
      tokens[kind, :, len(prompt):len(prompt) + length] = every
      anchors[kind] = len(prompt) - 1 + places
    p, q = _said(self.task, self._params, tokens.reshape(-1, size),
                 anchors.reshape(-1, len(places)))
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if self.normalised:
      most = q.max(axis=-1, keepdims=True)
      q = q - most - np.log(np.exp(q - most).sum(axis=-1, keepdims=True))
    return p, q


@functools.partial(jax.jit, static_argnums=0)
def _said(task: Any, params: Models, tokens, anchors):
  """Returns what target and drafter say of whole texts, teacher-forced."""
  batch = teacher.Batch(
      tokens=tokens, document=jnp.ones_like(tokens),
      position=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
      supervised=jnp.ones(tokens.shape, bool))
  seen = teacher.observe(_LM, params.target, batch, task.taps)
  q = task.logits(params.drafter, params.target, batch, seen, anchors)
  spread = task.model.spread(params.drafter, q)
  return _LM.head(params.target, seen.final), spread


def _random(like: Any, seed: int) -> Any:
  """Returns random weights; norms around 1."""
  leaves, tree = jax.tree.flatten(like)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(tree, [jnp.asarray(
      _SCALE * rng.normal(size=x.shape) + (x.ndim == 1), x.dtype)
      for x in leaves])


def grid(full: bool = False) -> tuple[Job, ...]:
  """Returns the rows of all drafters that read the target's states.

  `full` adds what differs little: more drafters in refilled slots.
  """
  jobs = (*_blocks(), *_lattices(full), *_eagles(), *_heads(full))
  names = [name for job in jobs for name in job.names]
  assert len(names) == len(set(names)), 'row names are to be unique'
  return jobs


def _setting(
    kind: str, seed: int = 0, normalised: bool = False, **model
) -> NetworkSetting:
  return NetworkSetting(kind=kind, seed=seed, normalised=normalised,
                        model=tuple(model.items()))


def _chain(setting: NetworkSetting) -> ChainLM:
  """Returns a chain whose source listens for faults."""
  source = setting.task.source()
  return ChainLM(_NUM, FaultySource(source, setting.by_slot))


def _blocks() -> Iterator[Job]:
  """DSpark and DFlash, one token after another."""
  dspark = _setting('dspark', **_BLOCK, markov_rank=1)
  source = dspark.task.source()
  bare = BlockSource(dataclasses.replace(
      source.model, config=dataclasses.replace(
          source.model.config, markov='none', confidence=False)))
  chain = _chain(dspark)
  yield Drafted(
      'dspark', Misstating(chain, ChainLM(_NUM, bare)), dspark,
      (Fault.PART_LEFT_OUT, Fault.TRIMMED_TOKEN_COUNTED,
       Fault.SYNC_SKIPPED, Fault.SLOT_TOO_FAR), chain)
  dflash = _setting('dflash', **_BLOCK, layout='mask', mask_token=3)
  chain = _chain(dflash)
  yield Drafted('dflash', chain, dflash, (
      Fault.SYNC_SKIPPED, Fault.SLOT_TOO_FAR), chain)


def _lattices(full: bool) -> Iterator[Job]:
  """Walks through a table of candidates: all that there are, or fewer."""
  setting = _setting('dspark', normalised=True, **_BLOCK, markov_rank=1)
  source = setting.task.source()
  yield Drafted(
      'lattice chain', Misstating(Lattice(source, 2)), setting,
      (Fault.BEFORE_THE_PIPELINE, Fault.TRIMMED_TOKEN_COUNTED))
  shape = topologies.branching((2, 2, 1))
  shapes: list[tuple[str, Any]] = [
      ('lattice tree', Lattice(source, len(IDS), shape)),
      ('grown lattice', GrownLattice(source, len(IDS), 5, _NUM, 2))]
  copying = Copying((0.3, 0.6))
  chain = Lattice(source, 2)
  yield Drafted(
      'copying chain', Misstating(
          dataclasses.replace(chain, copying=copying), chain), setting,
      (Fault.PART_LEFT_OUT,))
  for title, drafter in shapes[:2]:
    yield Drafted(f'copying {title}', dataclasses.replace(
        drafter, copying=copying), setting)
  if full:
    shapes.append(('whole lattice chain', Lattice(source, len(IDS))))
  for title, drafter in shapes:
    yield Drafted(title, drafter, setting, known=drafter)
  if full:
    yield Layouts('lattice chain', Lattice(source, 2), Speculative(), (3,),
                  setting)


def _eagles() -> Iterator[Job]:
  """EAGLE-1 and EAGLE-3, as a chain and grown."""
  first, third = _setting('eagle1', 1), _setting(
      'eagle3', 1, taps=(0, 1, 2))
  chain = _chain(third)
  yield Drafted(
      'eagle3', Misstating(chain), third,
      (Fault.TRIMMED_TOKEN_COUNTED, Fault.SYNC_SKIPPED),
      chain)
  grown = GrownLM(5, third.task.source(), _NUM, 2)
  yield Drafted('eagle3 grown', grown, third, known=grown)
  yield Layouts('eagle3 grown', grown, Speculative(), (3,), third)
  chain = _chain(first)
  yield Drafted('eagle1', chain, first, (Fault.SYNC_SKIPPED,), chain)


def _heads(full: bool) -> Iterator[Job]:
  """Medusa's tree of likeliest tokens, Hydra's chain."""
  medusa = _setting('medusa', 1, num_heads=_NUM, head='target')
  tree = TreeLM(topologies.branching((2, 2, 1)),
                FaultySource(medusa.task.source(), True), 'top_k')
  yield Drafted('medusa tree', tree, medusa,
                (Fault.SYNC_SKIPPED, Fault.SLOT_TOO_FAR), tree)
  hydra = _setting('hydra', 1, num_heads=_NUM, head='target')
  chain = _chain(hydra)
  yield Drafted(
      'hydra', Misstating(chain), hydra,
      (Fault.TRIMMED_TOKEN_COUNTED, Fault.SYNC_SKIPPED, Fault.SLOT_TOO_FAR),
      chain)
  if full:
    yield Layouts('hydra', ChainLM(_NUM, hydra.task.source()), Speculative(),
                  (3,), hydra)
