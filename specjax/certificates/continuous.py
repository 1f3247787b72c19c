"""Certificates of continuous tokens: texts of the compiled loop against numpy.

Texts of toy walks (`walks`) are compared with texts that numpy draws of the
target alone, by two-sample tests: Kolmogorov-Smirnov of tokens, sums and
products, and the energy distance of whole texts. The share of first drafts
that are kept is compared with its expectation over paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import math
import time
from typing import Any, ClassVar

import jax
import numpy as np

from specjax.certificates import jobs, sampled, walks
from specjax.certificates.continuous_faults import (
  NoFirstRejection,
  NoiseAgain,
  OneSet,
  Quiet,
  Unseen,
  VarianceForDeviation,
)
from specjax.certificates.report import SIZE, Row
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.drafters.chain_density import ChainDensity
from specjax.models.ahead import Ahead
from specjax.verify import CSpD, PathExact, Reflection

# Kinds of rows, in turn: prompt, tokens to make, temperature.
_KINDS: tuple[tuple[tuple[float, ...], int, float], ...] = (
    ((0.3, -0.5), 3, 1.0), ((-0.4,), 2, 0.8))
# Texts in the test of energy, and their relabelings.
_FEW, _RELABELED = 1500, 1999
_ERRORS = 4.0  # standard errors that acceptance may be off


@dataclasses.dataclass(frozen=True)
class Walked:
  """Texts of one rule, its drafter a walk of another mixture.

  Attributes:
    title: of the row. rule: verifies. process: of the denoising chains, or
      None for laws in closed form. mixed: see `walks.Walk`.
    channels: C. num_draft: K.
    together: of the target, see `walks.Walk`.
    drafted: wraps the drafter. alike: both models have one deviation.
    is_fault: the row passes when the law is found to be off.
  """

  title: str
  rule: Any
  process: Any = None
  mixed: bool = True
  channels: int = 1
  num_draft: int = 2
  together: int = 1
  drafted: Any = None
  alike: bool = False
  is_fault: bool = False

  needs_quiet: ClassVar[bool] = False

  @property
  def names(self) -> tuple[str, ...]:
    """One."""
    if self.is_fault:
      return (f'fault: {self.title}',)
    return (f'{self.title} / {jobs.label(self.rule)}',)

  def run(
      self, names: Sequence[str], seed: int, batches: int
  ) -> Iterator[Row]:
    """Samples; a row that fails is repeated with more texts."""
    begin = time.perf_counter()
    for attempt, size in enumerate((SIZE, SIZE / 10)):
      row = self._row(
          names[0], sampled.row_seed(names[0], seed, attempt),
          batches * sampled.MORE**attempt, size)
      if row.passed or self.is_fault:
        break
    row.attempts = attempt + 1
    row.seconds = time.perf_counter() - begin
    yield row

  def _row(self, name: str, seed: int, batches: int, size: float) -> Row:
    texts, kept, excess, rounds = self._texts(seed, batches)
    row = Row(name=name, method='fault' if self.is_fault else 'sampled',
              passed=True, count=sum(map(len, texts)))
    rng = np.random.default_rng(seed)
    p_values, distance, energies = [], 0.0, []
    for (prompt, new, tau), made in zip(_KINDS, texts, strict=True):
      own = walks.reference(
          rng, self._prompt(prompt), 2 * len(made), new, tau, self.process,
          self.mixed, self.together)
      for one, other in zip(views(made), views(own), strict=True):
        d, p = two_sample(one, other)
        p_values.append(p)
        distance = max(distance, d)
      energies.append(energy(rng, made[:_FEW], own[:_FEW]))
    row.p_value = min(1.0, len(p_values) * min(p_values))
    row.tv = distance
    row.tokens_per_round = sum(
        len(made) * new for (_, new, _), made in zip(
            _KINDS, texts, strict=True)) / rounds
    fine = row.p_value > size and min(energies) > 1 / (_RELABELED + 1)
    row.note = '' if fine else (
        f'KS {distance:.4f}, energy p {min(energies):.4f}')
    if self.rule.lossy and not self.is_fault:
      # Held against what it reports for a whole text, and chance.
      row.lossy, row.excess = True, excess
      chance = math.sqrt(-math.log(size / 2) / len(texts[0]))
      fine = distance <= excess * max(n for _, n, _ in _KINDS) + chance
    row.passed = fine != self.is_fault
    if not self.is_fault:
      self._judge_acceptance(row, rng, kept)
    return row

  def _judge_acceptance(self, row: Row, rng, kept) -> None:
    """Compares how often the first draft is kept with its expectation."""
    row.accepted = float(np.mean([k.mean() for k in kept]))
    if self.process is None or self.together > 1 or not isinstance(
        self.rule, PathExact):
      return
    means = []
    for (prompt, _, tau), found in zip(_KINDS, kept, strict=True):
      chance = walks.acceptance(
          rng, self._prompt(prompt), 4 * len(found), tau, self.process,
          self.rule.last_steps)
      slack = _ERRORS * math.sqrt(
          found.var() / len(found) + chance.var() / len(chance))
      means.append(chance.mean())
      if abs(found.mean() - chance.mean()) > slack:
        row.passed = False
        row.note = (row.note + f'; {sampled.ACCEPTANCE_OFF}').lstrip('; ')
    row.expected = float(np.mean(means))

  def _prompt(self, values: Sequence[float]) -> np.ndarray:
    """Returns f[P,C]."""
    return np.outer(values, 1 + 0.5 * np.arange(self.channels))

  def _texts(self, seed: int, batches: int):
    """Decodes: `(texts by kind, first drafts kept by kind, excess, rounds)`.

    `excess` is of a token.
    """
    lm: Any = walks.Walk(self.process, self.channels, self.mixed)
    drafter: Any = ChainDensity(self.num_draft, lm)
    lm = dataclasses.replace(lm, together=self.together)
    if self.drafted is not None:
      drafter = self.drafted(drafter)
    engine = Engine(lm, drafter, self.rule)
    params = {who: walks.params(who, self.channels)
              for who in ('target', 'drafter')}
    if self.alike:
      params['drafter']['log_std'] = params['target']['log_std']
    models = Models(target=params['target'], drafter=params['drafter'])
    rows = sampled.BATCH
    most = max(len(prompt) for prompt, _, _ in _KINDS)
    prompts = np.zeros((rows, most, self.channels), np.float32)
    for i, (prompt, _, _) in enumerate(_KINDS):
      prompts[i::len(_KINDS), :len(prompt)] = self._prompt(prompt)
    out: list[list[np.ndarray]] = [[] for _ in _KINDS]
    kept: list[list[np.ndarray]] = [[] for _ in _KINDS]
    excess, rounds, tokens = 0.0, 0, 0
    for i in range(batches):
      key = jax.random.fold_in(jax.random.key(seed), i)
      state = sampled.decode(engine, models, walks.context(
          prompts, np.resize([len(p) for p, _, _ in _KINDS], rows),
          np.resize([n for _, n, _ in _KINDS], rows),
          np.resize([t for _, _, t in _KINDS], rows),
          jax.random.split(key, rows), room=4 + self.num_draft))
      made = np.asarray(state.context.tokens, float)
      by = np.asarray(state.context.token_round)
      for k, (prompt, new, _) in enumerate(_KINDS):
        rows_of = slice(k, None, len(_KINDS))
        out[k].append(made[rows_of, len(prompt):len(prompt) + new])
        kept[k].append((by[rows_of] == 0).sum(axis=1) > 1)
        tokens += out[k][-1].shape[0] * new
      excess += float(np.asarray(state.metrics.excess).sum())
      rounds += int(np.asarray(state.context.rounds).sum())
    return ([np.concatenate(x) for x in out],
            [np.concatenate(x).astype(float) for x in kept],
            excess / tokens, rounds)


def views(texts: np.ndarray) -> list[np.ndarray]:
  """Returns numbers f[num] that depend on texts f[num,L,C] in all ways."""
  flat = texts.reshape(len(texts), -1)
  found = [*flat.T]
  for a, b in itertools.combinations(flat.T, 2):
    found += [a + b, a * b, a - 2 * b]
  return found


def two_sample(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
  """Returns the Kolmogorov-Smirnov distance and its p-value."""
  from scipy import stats
  found = stats.ks_2samp(one, other, method='asymp')
  return float(found.statistic), float(found.pvalue)


def energy(
    rng: np.random.Generator, one: np.ndarray, other: np.ndarray
) -> float:
  """Returns the p-value of equal laws by the energy distance, relabeled.

  Szekely and Rizzo 2013. Texts f[num,L,C]; p is at least 1 / 2000.
  """
  both = np.concatenate([one, other]).reshape(len(one) + len(other), -1)
  square = np.sum(both**2, axis=1)
  gap = np.sqrt(np.maximum(
      square[:, None] + square - 2 * both @ both.T, 0.0)).astype(np.float32)
  label = np.zeros((len(both), _RELABELED + 1), np.float32)
  label[:len(one)] = 1
  for column in label.T[1:]:
    rng.shuffle(column)
  # The total is the same for all labels: what is between decides.
  within = np.einsum('nr,nr->r', label, gap @ label)
  rest = 1 - label
  outside = np.einsum('nr,nr->r', rest, gap @ rest)
  size, left = len(one), len(other)
  between = (gap.sum() - within - outside) / 2
  found = 2 * between / (size * left) - within / size**2 - outside / left**2
  return float(np.mean(found >= found[0] * (1 - 1e-6)))


@functools.cache
def grid(full: bool) -> tuple[Walked, ...]:
  """Returns the rows of continuous tokens, and the faults to be found."""
  chain = walks.diffusion()
  wide = walks.diffusion(2)
  ahead = {variance: walks.diffusion(variance=variance, ahead=Ahead(3))
           for variance in ('learned', 'lower')}
  rows = [
      Walked('mixture head', PathExact()),
      Walked('normal head', PathExact(), mixed=False),
      Walked('normal head', Reflection(), mixed=False, alike=True),
      Walked('denoised', PathExact(), chain),
      Walked('denoised', PathExact(3), chain),
      Walked('denoised', PathExact(1), chain),
      Walked('denoised', CSpD(), chain),
      Walked('denoised ahead', PathExact(1), ahead['lower'], num_draft=1),
      Walked('denoised, two at a time', PathExact(), chain, num_draft=3,
             together=2)]
  if full:
    rows += [
        Walked('denoised, 2 channels', PathExact(), wide, channels=2),
        Walked('denoised, 2 channels', PathExact(2), wide, channels=2),
        Walked('normal head, other deviation', Reflection(), mixed=False),
        Walked('mixture head, 2 channels', PathExact(), channels=2),
        Walked('denoised, one draft', PathExact(), chain, num_draft=1),
        Walked('denoised ahead, learned deviations', PathExact(1),
               ahead['learned']),
        Walked('denoised, three at a time', PathExact(3), chain, together=3),
        Walked('mixture head, two at a time', PathExact(), together=2),
        Walked('denoised', CSpD(align=False), chain),
        Walked('denoised', CSpD(inner_temperature=42, inverted=True), chain)]
  return (
      *rows,
      Walked('ratio of two paths', CSpD(), chain, is_fault=True),
      Walked('variance for deviation', VarianceForDeviation(), chain,
             is_fault=True),
      Walked('no first rejection', NoFirstRejection(), chain, is_fault=True),
      Walked('last step without noise, scored with it', PathExact(), chain,
             drafted=Quiet, is_fault=True),
      Walked('rejections inside a set end nothing', OneSet(), chain,
             num_draft=3, together=2, is_fault=True),
      Walked('noise of the draft in the residual', NoiseAgain(), chain,
             is_fault=True),
      Walked('states ahead are kept unseen', PathExact(1),
             walks.diffusion(ahead=Unseen(3)), num_draft=1, is_fault=True))
