"""Continuous drafts: what is kept, how fast, and whose law comes out.

  python -m sample.latents_sweep --target out/mar/model \
      --tokenizer out/vae/autoencoder --data cifar10_jpeg.npz \
      --drafters small=out/mar_small/model,taught=out/mar_taught/model \
      --samples 10000 --out out/latents_sweep
  python -m sample.latents_sweep --target random --features none \
      --samples 16 --batches 1,4 --num_draft 2,3 --out out/try

For every drafter, number of drafts, rule, share of tokens that the target
makes first, number of denoising steps guessed ahead, and scale of guidance,
`sweep.json` gets

* tokens a round, the share of drafts that were kept, and of those that were
  reached (`conditional`, by position);
* seconds of a batch of images at each of `--batches`, over plain decoding of
  the same classes in turn with it (compilation and pixels left out);
* the largest Kolmogorov-Smirnov distance of a channel to plain decoding with
  other noise; beside it what two plain samples are apart;
* the Frechet distance of `--samples` images to the test images, plus or minus
  two standard errors of sampling, beside that of what the autoencoder
  makes of the test images, and of two halves of the real images. It is taken
  of plain decoding and, at the largest K and the first share, of the rules
  that are `--judged`; other points decode `--few` images.

Masked decoders also decode plainly in `--iterations`, the honest comparison at
equal time; `--steps` decodes plainly with other denoising steps (a last one
without noise, another start, other variances), which is another law.
`table.md` is the same as a table. The same command goes on after an
interruption, and several may share the work (`sample.sweeps`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import dataclasses
import sys
from typing import Any

import numpy as np
from scipy import stats

from sample import judging, latents_table, sweeps
from sample.judging import Judge
from sample.latents_points import RULES, Point, is_judged, parse, points
import specjax
from specjax.drafters import Null
from specjax.host import cli, latent_sampling, latents, mar
from specjax.host.load import Model
from specjax.host.results import Results
from specjax.io import output
from specjax.models.masked_images import MaskedImages

_SEED = 1000  # of samples; those of timings are below


class Scene:
  """Models and classes that all points share."""

  def __init__(self, args: argparse.Namespace):
    """Loads them; ValueError where they do not fit."""
    if args.target == 'random':
      self.target, facts, self.autoencoder = latent_sampling.random_models()
    else:
      self.target, facts = mar.load(args.target)
      self.autoencoder = latents.load_autoencoder(args.tokenizer)
    side = round(self.target.lm.num_tokens**0.5)
    self.grid = tuple(facts.get('grid', (side, side)))
    channels = self.autoencoder.config.latent_channels
    if channels != self.target.lm.process.channels:
      raise ValueError(
          f'--tokenizer has {channels} channels, {args.target} '
          f'{self.target.lm.process.channels}')
    self.num_classes = len(facts['data']['classes'])
    self.drafters: dict[str, Model] = {}
    for name, source in args.drafters.items():
      self.drafters[name] = (
          self.target if source == 'random' else mar.load(source)[0])
      mar.draft_lm(self.target, self.drafters[name])  # or why not

  @property
  def length(self) -> int:
    """Tokens of an image."""
    return self.target.lm.num_tokens

  def decode(
      self, point: Point, num: int, batch: int, seed: int,
      pause: Callable[[], None] | None = None,
  ) -> Results:
    """Decodes `num` images, classes in turn, `batch` at a time.

    `pause` is called every few rounds.
    """
    target = dataclasses.replace(
        self.target, lm=mar.changed(self.target.lm, **point.changes))
    scales = latent_sampling.scales(self.length, point.guidance, 'constant')
    if scales is not None:
      target = dataclasses.replace(target, lm=mar.guided(target.lm))
    labels, orders = self.labels(num), self.orders(num, seed)
    drafter: Any = None
    if point.iterations:
      lm = dataclasses.replace(
          target.lm, num_iterations=point.iterations, num_passes=1)
      target = dataclasses.replace(target, lm=lm)
      drafter = Null(lm.largest - 1)
    elif point.drafter:
      drafter = {
          'method': 'draft_model', 'model': self.drafters[point.drafter],
          'num_speculative_tokens': point.num_draft,
          'prefill': round(point.prefill * self.length)}
    return specjax.generate(
        target, drafter,
        latent_sampling.begin(target.lm, labels, orders, scales),
        specjax.Sampling(temperature=1.0, max_new_tokens=self.length),
        verify=RULES[point.rule], batch_size=batch, seed=seed,
        on_progress=pause and (lambda _: pause()))

  def plain(self, guidance: float, args: argparse.Namespace) -> np.ndarray:
    """Returns f32[n,C], tokens of plain decoding, as a point's row has them."""
    with args.turns.work() as pause:
      return tokens(self.decode(
          Point(guidance=guidance), args.samples, args.batch_size, _SEED,
          pause))

  def labels(self, num: int) -> np.ndarray:
    """Returns int[num], classes in turn."""
    return np.arange(num) % self.num_classes

  def orders(self, num: int, seed: int) -> np.ndarray:
    """Returns int[num,T], see `latent_sampling.orders_of`."""
    return latent_sampling.orders_of('random', num, self.length, seed)

  def pixels(self, results: Results, seed: int) -> np.ndarray:
    """Returns uint8[N,H,W,3]."""
    return latent_sampling.Pictures(
        self.autoencoder, self.grid, self.orders(len(results), seed), (),
        1).pixels(results.results)


def tokens(results: Results) -> np.ndarray:
  """Returns f32[n,C], all tokens."""
  return np.concatenate([np.asarray(r.tokens, np.float32) for r in results])


def distance(one: np.ndarray, other: np.ndarray) -> float:
  """Returns the largest Kolmogorov-Smirnov distance of a channel."""
  return max(float(stats.ks_2samp(a, b).statistic)
             for a, b in zip(one.T, other.T, strict=True))


def measured(
    scene: Scene, point: Point, plain: np.ndarray | None,
    judge: Judge | None, args: argparse.Namespace,
) -> tuple[dict[str, Any], np.ndarray]:
  """Returns the row of a point, without times, and its tokens."""
  # Plain decoding is what others are compared with: other noise.
  seed = _SEED + (not point.is_plain)
  judged = is_judged(point, args)
  num = args.samples if judged else min(args.few, args.samples)
  with args.turns.work() as pause:
    found = scene.decode(point, num, args.batch_size, seed, pause)
  summary, made = found.summary(), tokens(found)
  row: dict[str, Any] = {
      'samples': num,
      'tokens_per_round': summary['mean_acceptance_length'],
      'kept': summary['draft_acceptance_rate'],
      'conditional': summary['conditional_acceptance'],
      'one_step_tv': summary['one_step_tv'],
      'gave_up': summary['gave_up'], 'lossy': summary['lossy'],
      'scoring': summary['scoring']}
  if plain is None:  # the point itself: what two samples are apart
    with args.turns.work() as pause:
      other = scene.decode(
          point, args.samples, args.batch_size, _SEED + 9, pause)
    row['ks'] = distance(tokens(other), made)
  else:
    row['ks'] = distance(plain, made)
  if judge is not None and judged:
    with args.turns.work():
      row |= judge.score(scene.pixels(found, seed), scene.labels(num))
  return row, made


def times_of(scene: Scene, point: Point) -> sweeps.Times:
  """Returns what times batches of images, in turn with plain decoding."""
  plain = Point(guidance=point.guidance)

  def times(batch: int, number: int) -> tuple[float, float]:
    before, after = (scene.decode(one, batch, batch, number).wall_s
                     for one in (plain, point))
    return before, after

  return times


def work(
    scene: Scene, judge: Judge | None, args: argparse.Namespace,
    record: sweeps.Record,
) -> None:
  """Measures what is not there yet; writes after each part of a point."""
  plain: np.ndarray | None = None
  ways: dict[str, sweeps.Times] = {}
  for point in points(
      args, scene.drafters, scene.length,
      isinstance(scene.target.lm, MaskedImages)):
    if point.is_plain:
      plain = None
    parts = [part for part in args.parts if record.lacks(point.key, part)]
    if not parts or not args.only.search(point.key):
      continue
    row: dict[str, Any] = dataclasses.asdict(point)
    if 'quality' in parts:
      if plain is None and not point.is_plain:  # measured before
        plain = scene.plain(point.guidance, args)
      more, made = measured(scene, point, plain, judge, args)
      plain = made if point.is_plain else plain
      row |= more
      print(f'{point.key}: {_said(row)}', flush=True)
    if 'speed' in parts:
      if point.is_plain:
        row['speed'] = {}  # 1 by definition
      else:
        ways[point.key] = times_of(scene, point)
    record.put(point.key, row)
  for key, speed in sweeps.speeds(
      ways, args.batches, args.repeats, args.turns):
    record.put(key, {'speed': speed})
    print(f'{key}: {sweeps.said(speed)}', flush=True)


def _said(row: dict[str, Any]) -> str:
  said = [f'{row["tokens_per_round"]:.2f} tokens a round',
          f'KS {row["ks"]:.4f}']
  if 'distance' in row:
    said.append(f'{row["distance"]:.2f} +- {row["half_width"]:.2f}')
  return ', '.join(said)


def main(arguments=None) -> int:
  """Runs the program; returns the exit code."""
  args = parse(arguments)
  cli.start(False)
  record = sweeps.Record(args, (
      'drafters', 'num_draft', 'prefill', 'iterations', 'rules', 'ahead',
      'steps'), args.drafters)
  scene = Scene(args)
  judge = judging.judge_of(args, record, lambda real: (
      scene.autoencoder.decode(scene.autoencoder.encode(real, seed=0))))
  work(scene, judge, args, record)
  output.write_text(
      record.path.parent / 'table.md', latents_table.table(record.data))
  return 0


if __name__ == '__main__':
  sys.exit(cli.reported(main))
