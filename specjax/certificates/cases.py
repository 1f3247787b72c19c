"""The grid: drafters x rules x topologies, and the faults to be found."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from specjax.certificates import faults, faulty_rules, toys
from specjax.certificates.drafter_faults import (
  Drafted,
  Fault,
  FaultyWindow,
  Sharper,
)
from specjax.certificates.equality import Layouts
from specjax.certificates.exact import describe
from specjax.certificates.jobs import (
  Exact,
  Faults,
  FaultyRule,
  Job,
  Sampled,
)
from specjax.certificates.pictures import Pictures
from specjax.certificates.setting import Setting
from specjax.core import control, topologies, tree
from specjax.core.types import (
  IID,
  POINT,
  TOP_PLUS_ONE,
  WITHOUT_REPLACEMENT,
)
from specjax.drafters import (
  Adaptive,
  ChainLM,
  GrownLM,
  InputGuided,
  Jacobi,
  Lookup,
  LookupTree,
  Null,
  TreeLM,
)
from specjax.drafters.jacobi import REDRAFTS
from specjax.verify import (
  Block,
  Greedy,
  GreedyMultiDraft,
  Grouped,
  Gumbel,
  Judge,
  KSeq,
  Lantern,
  Lenient,
  Match,
  OptimalTransport,
  Speculative,
  Traversal,
  Typical,
)

# With all filters, and without those that take most of the time.
SETTING, LIGHT = Setting(), Setting(filters=False)
GREEDY = Setting(all_greedy=True)
_V = SETTING.vocab_size
_LM = toys.ToyLM(_V)
_CHAIN = ChainLM(3, _LM)
_STOPS = dataclasses.replace(_CHAIN, confidence_threshold=0.5)
# Drafts, gives up, probes: with these prices rows go on and off.
_ON_AND_OFF = control.Tracking(draft_cost=0.15, decay=0.6, probe_every=2)
_TOGETHER = control.Shared(draft_cost=0.15, decay=0.6, probe_every=2)

# Lossy rules where they are exact, and where they are not.
_AS_EXACT = (Lenient(1.0), Typical(1.0, 1e9), Lantern(0, delta=0.5),
             Grouped(0), Judge(1.0))
_MEDUSA = Typical(0.3, 0.5, 'medusa')
_LOSSY = (Lenient(0.8), Typical(0.3, 0.5), Lantern(2, delta=0.4),
          Lantern(2, lam=1.5), Grouped(2, 0.5), Judge(0.7))

# Compiles for long; in the short form its twin stands for it.
_SLOW = OptimalTransport('without_replacement')
# Rules for each way in which the children of a node are chosen.
_BY_METHOD: dict[str, tuple[Any, ...]] = {
    'iid': (Speculative(), Traversal(), KSeq(), OptimalTransport('iid'),
            Match()),
    'without_replacement': (Speculative(), Traversal(), _SLOW, Match()),
    'top_k': (Speculative(), Traversal(), GreedyMultiDraft(), Match()),
    'top_plus_one': (Speculative(), GreedyMultiDraft(), Match()),
    'coupled': (Gumbel(1), Gumbel(2), Match(), Speculative())}
_KINDS = {IID: 'iid', WITHOUT_REPLACEMENT: 'without_replacement',
          POINT: 'top_k', TOP_PLUS_ONE: 'top_plus_one'}

TREES = (topologies.branching((2, 1)), topologies.branching((2, 2)),
         topologies.branching((3, 1)), topologies.sequences((3, 2)))


def arrays(vocab_size: int) -> dict[str, np.ndarray]:
  """Returns the arrays of rules that read some: neighbours, a judge's head."""
  rng = np.random.default_rng(3)
  near = (np.arange(vocab_size)[:, None] + np.arange(1, 3)) % vocab_size
  return {
      'neighbours': near.astype(np.int32),
      'codebook': rng.normal(size=(vocab_size, 2)).astype(np.float32),
      'weight': rng.normal(size=vocab_size).astype(np.float32),
      'bias': np.zeros((), np.float32),
      'mean': np.zeros(vocab_size, np.float32),
      'scale': np.ones(vocab_size, np.float32)}


def grid(full: bool = False) -> tuple[Job, ...]:
  """Returns all jobs; `full` adds every tree under every way of drafting."""
  jobs: tuple[Job, ...] = (
      *_exact(full), *_chains(full), *_trees(full), *_jacobi(),
      *_pictures(full), *_greedy(), *_layouts(full), *_faults())
  names = [name for job in jobs for name in job.names]
  assert len(names) == len(set(names)), 'row names are to be unique'
  return jobs


def _tree(
    method: str, topology: tree.Topology, setting: Setting, full: bool
) -> Sampled:
  """Returns the rules of one way of drafting on one tree."""
  rules = tuple(r for r in _BY_METHOD[method] if full or r != _SLOW)
  return Sampled(
      f'{describe(topology)} {method}', TreeLM(topology, _LM, method),
      rules, setting, closed_form=True)


def _trees(full: bool) -> list[Sampled]:
  """Returns each way of drafting on one tree, or on all of them."""
  narrow, wide, many, _ = TREES
  some: Sequence[tuple[str, tree.Topology, Setting]] = (
      ('iid', narrow, LIGHT), ('without_replacement', wide, SETTING),
      ('top_k', many, LIGHT), ('top_plus_one', narrow, SETTING),
      ('coupled', narrow, LIGHT))
  if full:
    some = [(method, t, SETTING) for method in _BY_METHOD for t in TREES]
  return [_tree(*one, full) for one in some] + [
      Sampled('grown tree', GrownLM(4, _LM, 3, 2),
              (Speculative(), Match(), Greedy()), LIGHT)]


def _chains(full: bool) -> list[Sampled]:
  """Returns chains: every drafter, every controller, lossy rules."""
  heuristic = Adaptive(_STOPS, control.Heuristic(1))
  confidence = Adaptive(_CHAIN, control.Confidence())
  on_and_off = Adaptive(_CHAIN.resyncing(), _ON_AND_OFF, exact_shape=False,
                        widths=(0, 1))
  together = dataclasses.replace(on_and_off, controller=_TOGETHER)
  rules, points = (Speculative(), Block()), (Speculative(), Match())
  light = SETTING if full else LIGHT
  coupled = TreeLM(tree.chain(3), _LM, 'coupled')
  tops = TreeLM(tree.chain(3), _LM, 'top_k')
  table = arrays(_V)
  return [
      Sampled('no drafts', Null(0), (Match(), Gumbel(2)), SETTING),
      Sampled('small model', _CHAIN,
              (Speculative(), Block(), Traversal(), GreedyMultiDraft(),
               Match(), Greedy()), SETTING, closed_form=True),
      Sampled('small model', _CHAIN, _AS_EXACT, light, table, as_exact=True),
      Sampled('small model', _CHAIN, _LOSSY, light, table),
      Sampled('top tokens', tops, (_MEDUSA, Speculative()), light,
              closed_form=True),
      Sampled('coupled chain', coupled, (Gumbel(1),), light,
              closed_form=True),
      Sampled('heuristic length', heuristic, rules, light),
      Sampled('confident length', confidence, rules, light),
      Sampled('on and off', on_and_off, rules, light),
      Sampled('one length', together, points, light),
      Sampled('lookup', Lookup(3, 2), points, light),
      Sampled('lookup tree', LookupTree((2, 1), 2),
              (*points, GreedyMultiDraft(), Traversal()), light),
      Sampled('input guided', InputGuided(2), points, light)]


def _jacobi() -> list[Job]:
  """Returns windows drawn again in both ways, and their faults."""
  fresh, coupled = (Jacobi(3, _V, redraft=how) for how in REDRAFTS)
  points = (Speculative(), Match())
  return [
      Sampled('jacobi fresh', fresh, (*points, Traversal()), LIGHT),
      Sampled('jacobi coupled', coupled, points, LIGHT),
      Sampled('jacobi coupled', coupled, (Grouped(2, 0.5, 1.5),), LIGHT,
              arrays(_V)),
      Sampled('jacobi raster', Jacobi(3, _V, 'raster', 2), points, LIGHT),
      Sampled('all greedy, jacobi', coupled,
              (Greedy(), Speculative(), Match()), GREEDY),
      Layouts('jacobi coupled', coupled, Speculative()),
      Drafted('jacobi window', FaultyWindow(Jacobi(3, 3, redraft='coupled')),
              Sharper(3, filters=False),
              (Fault.LAW_BEFORE_REDRAW, Fault.TOKENS_BEFORE_REDRAW))]


def _pictures(full: bool) -> list[Sampled]:
  """Returns codes of images under guidance, by a decoder with classes."""
  setting = Pictures(filters=full)
  chain = ChainLM(3, setting.small)
  jobs = [
      Sampled('guided images', chain, (Speculative(), Match()), setting,
              closed_form=True),
      Sampled('guided images, jacobi', Jacobi(3, _V, redraft='coupled'),
              (Speculative(),), setting)]
  if full:
    jobs += [
        Sampled('guided images', chain, (Block(), *_LOSSY[2:4]), setting,
                arrays(_V)),
        Sampled('guided images, tree (2,1)', TreeLM(
            TREES[0], setting.small, 'without_replacement'),
                (Speculative(), Traversal()), setting)]
  return jobs


def _greedy() -> list[Sampled]:
  """Returns rows that are all greedy, which is compiled without sampling."""
  return [
      Sampled('all greedy, small model', _CHAIN,
              (Greedy(), Speculative(), Match(), Block()), GREEDY),
      Sampled('all greedy, tree (2,2)',
              TreeLM(TREES[1], _LM, 'without_replacement'),
              (Greedy(), Speculative(), Traversal()), GREEDY)]


def _layouts(full: bool) -> list[Layouts]:
  """Returns rows beside others that are refilled; alone in the full form."""
  slots = (1, 3) if full else (3,)
  drafter = TreeLM(TREES[1], _LM, 'without_replacement')
  chain = [Layouts('small model', _CHAIN, Block(), slots)] if full else []
  return [*chain, Layouts(
      'tree (2,2) without_replacement', drafter, Traversal(), slots)]


def _exact(full: bool) -> list[Exact]:
  """Returns what is enumerated: every rule, every kind of draft it takes."""
  chains: list[tuple[Any, int]] = [
      (Speculative(), IID), (Block(), IID), (Traversal(), IID),
      (GreedyMultiDraft(), IID), (Match(), POINT), (Speculative(), POINT),
      *((rule, IID) for rule in _LOSSY), (_MEDUSA, POINT)]
  table = arrays(3)
  jobs = [Exact(rule, tree.chain(2), kind, params=table)
          for rule, kind in chains]
  some = (*TREES, topologies.branching((3,))) if full else TREES[:1]
  for topology in some:
    for kind, method in _KINDS.items():
      jobs += [Exact(rule, topology, kind) for rule in _BY_METHOD[method]
               if full or rule != _SLOW]
  if full:
    jobs += [Exact(rule, tree.chain(3), kind, params=table)
             for rule, kind in chains]
    jobs += [Exact(rule, tree.chain(2), IID, params=table)
             for rule in _AS_EXACT]
  return jobs


def _faults() -> list[Job]:
  """Returns the faults that must be found."""
  planted = faults.Planted
  return [
      *(FaultyRule(fault) for fault in faulty_rules.FAULTS),
      Faults('chain', _CHAIN,
             (planted.STALE_SLOT, planted.LAW_OF_NEIGHBOUR), faults.RULES,
             LIGHT),
      Faults('tree (2,2)', TreeLM(TREES[1], _LM, 'without_replacement'),
             (planted.SHIFTED_PATH, planted.STALE_SLOT,
              planted.LAW_OF_OTHER_NODE), setting=LIGHT)]
