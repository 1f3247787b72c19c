"""Results of a run, and its summary."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import importlib.metadata
import os
from typing import Any

import jax
import numpy as np

from specjax.core import metrics
from specjax.host.requests import Result, by_round


@dataclasses.dataclass(frozen=True)
class Results:
  """What `generate` returns.

  Attributes:
    results: one per prompt, sample and turn, in the order of the prompts.
    wall_s: seconds of decoding, compilation excluded.
    compile_s: seconds of tracing and compiling (or cache loading).
    slot_rounds, row_rounds: rounds times slots, and those of unfinished
      rows among them.
    description: drafter, rule and shapes, for the summary.
  """

  results: tuple[Result, ...]
  wall_s: float
  compile_s: float
  slot_rounds: int
  row_rounds: int
  description: dict[str, Any]

  @property
  def texts(self) -> list[str]:
    """Texts of all results."""
    return [r.text for r in self.results]

  def __iter__(self):
    return iter(self.results)

  def __len__(self) -> int:
    return len(self.results)

  def __getitem__(self, index):
    return self.results[index]

  def rank_acceptance(self) -> np.ndarray:
    """Returns how often the k-th child is the one accepted, f64[D,C].

    Entry [d,k]: of the rounds that accepted d drafts or more, the share in
    which the next was accepted and was the k-th sibling in draw order. What
    `core.topologies.sequoia` builds the best tree of (measure with a tree in
    which every node has children).
    """
    ranks = np.sum([r.ranks for r in self.results], axis=0, dtype=float)
    reached = np.concatenate([
        [sum(r.rounds for r in self.results)], ranks.sum(axis=1)[:-1]])
    return ranks / np.maximum(reached, 1)[:, None]

  def summary(self) -> dict[str, Any]:
    """Returns the figures of `summary.json`; see `core.metrics`."""
    out = summarise(self.results)
    return {
        'num_requests': len(self.results), **out, 'wall_s': self.wall_s,
        'compile_s': self.compile_s,
        'tokens_per_s': out['new_tokens'] / max(self.wall_s, 1e-9),
        'useful_row_share': self.row_rounds / max(self.slot_rounds, 1),
        **self.description, 'device': device_name(), 'versions': versions()}


def summarise(results: Sequence[Result]) -> dict[str, Any]:
  """Returns acceptance and latency figures of some results."""
  if not results:
    return metrics.summarise(
        np.zeros(1, int), np.zeros(0, int), np.zeros(0, int), 0, 0)
  new = sum(len(r.tokens) for r in results)
  rounds = sum(r.rounds for r in results)
  out = metrics.summarise(
      np.sum([r.histogram for r in results], axis=0),
      np.sum([r.drafted for r in results], axis=0),
      np.sum([r.accepted for r in results], axis=0), new, rounds)
  by_depth = [by_round(r.step_lengths, r.kept, len(r.accepted))
              for r in results]
  if any((x[:, 1:] & ~x[:, :-1]).any() for x in by_depth):
    # Drafts behind a rejected one were kept (`Scores.sets`): the shares by
    # position are of each alone, and nothing is given those before it.
    out['conditional_acceptance'] = None
  excess = sum(r.excess for r in results)
  # One-step TV of a lossy rule, averaged over tokens; 0 for exact ones.
  out['one_step_tv'] = excess / max(new, 1)
  # Capped residuals, a share of rounds: bounds what the caps change.
  out['gave_up'] = sum(r.gave_up for r in results) / max(rounds, 1)
  later = [(r.wall_s - r.ttft_s) / (len(r.tokens) - 1)
           for r in results if len(r.tokens) > 1]
  out['ttft_s'] = float(np.mean([r.ttft_s for r in results]))
  out['tpot_s'] = float(np.mean(later)) if later else None
  return out


def accepted(results: Sequence[Result]) -> np.ndarray:
  """Returns bool[N,T]: whether the k-th token made was an accepted draft."""
  return np.stack([r.kept for r in results])


def device_name() -> str:
  """Returns the kind and number of devices."""
  devices = jax.devices()
  return f'{len(devices)} x {devices[0].device_kind}'


def versions() -> dict[str, str]:
  """Returns the versions that a number depends on."""
  names = ('specjax', 'jax', 'jaxlib', 'flax')
  out = {}
  for name in names:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      out[name] = 'source'
  if flags := os.environ.get('XLA_FLAGS'):
    out['xla_flags'] = flags  # they choose kernels
  return out
