"""Quality against speed of image decoding: exact, relaxed, without training.

  python -m sample.lantern_sweep --target out/image_ar/model \
      --tokenizer out/vq/tokenizer --drafter out/image_ar_small/model \
      --data cifar10_jpeg.npz --samples 10000 --out out/sweep
  python -m sample.lantern_sweep --target random --features none \
      --samples 64 --out out/try

Decodes images with every rule over neighbours k, limits delta and lambda,
temperatures and scales of guidance (`sample.lantern_points`), and writes for
each, to `sweep.json`:

* tokens a round; the one-step total variation, as it estimates itself;
* the time of a batch of images at each of `--batches`, over plain decoding of
  the same classes in turn with it (prompt included, pixels left out);
* the Frechet distance of `--samples` images to the test images, plus or minus
  two standard errors of sampling (the real images stay);
  beside them what the tokenizer makes of the test images, and the distance of
  two halves of the real images: of smaller sets, so that it is larger than
  what a perfect sampler would score.

The test images are those of a dataset with a test split: of others a part is
cut off by `--seed`, which has to be the models' own.

Greedy decoding draws one image a class, so no distance is taken of it. The
same command goes on after an interruption, and several may share the work
(`sample.sweeps`). `sample.lantern_plots` draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import itertools
import sys
import time
from typing import Any

import jax
import numpy as np

from sample import judging, lantern_plots, sweeps
from sample.judging import Judge
from sample.lantern_points import (
  DRAFTER,
  Point,
  check,
  describe,
  parse,
  points,
)
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.distill import measure
from specjax.host import cli, image_sampling, images, methods
from specjax.host import rules as rules_lib
from specjax.host.load import Model
from specjax.io import drafter_file


@dataclasses.dataclass(frozen=True)
class Scene:
  """What all points share: models, codes, classes.

  Attributes:
    target: not guided. drafter: a smaller decoder, the folder of a drafter
      that `train.drafter` made, or None.
    tokenizer, grid, num_classes: of the codes.
    codebook: where rules find the vectors of the codes.
  """

  target: Model
  drafter: Model | str | None
  tokenizer: images.Tokenizer
  grid: tuple[int, int]
  num_classes: int
  codebook: str = 'synthetic'

  @property
  def length(self) -> int:
    """Codes of an image."""
    return self.grid[0] * self.grid[1]

  def labels(self, num: int) -> np.ndarray:
    """Returns int64[num]: classes in turn."""
    return np.arange(num) % self.num_classes

  def pixels(self, texts) -> np.ndarray:
    """Returns uint8[N,H,W,3] of decoded texts, prompts included."""
    codes = np.stack([t[-self.length:] for t in texts])
    return self.tokenizer.decode(codes.reshape(-1, *self.grid))


class Way:
  """A point made ready to decode."""

  def __init__(self, scene: Scene, point: Point):
    """Prepares; compiled at the first call of a batch size."""
    self.scene, self.point = scene, point
    target = image_sampling.guided(scene.target, point.guidance)
    drafting = dict(point.drafting or {'method': 'null'})
    if drafting.get('model') == DRAFTER:
      assert scene.drafter is not None
      drafting['model'] = (
          scene.drafter if isinstance(scene.drafter, str)
          else image_sampling.guided(scene.drafter, point.guidance))
    drafter, params = methods.build(drafting, target)
    options = dict(point.options)
    if point.reads_codebook:
      options['codebook'] = scene.codebook
    verify = 'speculative' if point.verify == 'auto' else point.verify
    rule, tables = rules_lib.build(verify, options, target.vocab_size)
    self.engine = Engine(target.lm, drafter, rule)
    self.params = Models(target=target.params, drafter=params,
                         verifier=tables)

  def __call__(self, labels, seed: int) -> measure.Measured:
    """Decodes an image of each class in `labels`."""
    first = self.scene.target.vocab_size
    start = measure.context(
        [[first + int(label)] for label in labels], self.scene.length,
        temperature=self.point.temperature, seed=seed)
    # A class is one token.
    return measure.acceptance(self.engine, self.params, start, chunk=1)


def quality(
    scene: Scene, way: Way, judge: Judge | None, args: argparse.Namespace
) -> dict[str, Any]:
  """Decodes many images; returns acceptance, distortion, distance."""
  num = args.samples if way.point.temperature else scene.num_classes
  size = min(args.batch_size, num)
  labels = scene.labels(-(-num // size) * size).reshape(-1, size)
  found = []
  for number, row in enumerate(labels):
    with args.turns.work():
      found.append(way(row, args.seed + 1 + number))
  tokens, rounds = (sum(getattr(f, n) for f in found)
                    for n in ('tokens', 'rounds'))
  out: dict[str, Any] = {
      'samples': num, 'tau': tokens / rounds,
      'conditional': np.mean([f.conditional for f in found], 0).tolist(),
      'one_step_tv': float(np.mean([f.one_step_tv for f in found]))}
  if judge is not None and way.point.temperature:
    texts = [t for f in found for t in f.texts][:num]
    with args.turns.work():
      out |= judge.score(scene.pixels(texts), labels.reshape(-1)[:num])
  return out


def times_of(
    scene: Scene, way: Way, plain: Way, seed: int
) -> sweeps.Times:
  """Returns what times batches of images, in turn with plain decoding."""
  def times(batch: int, number: int) -> tuple[float, float]:
    labels = scene.labels(batch * (number + 1))[-batch:]
    ends = [time.perf_counter()]
    for one in (plain, way):
      one(labels, seed + number)  # waits for the result
      ends.append(time.perf_counter())
    return ends[1] - ends[0], ends[2] - ends[1]

  return times


def scene_of(args: argparse.Namespace) -> Scene:
  """Loads the models.

  Raises:
    ValueError: models of different codes, or a drafter of other classes.
  """
  small: Model | str | None = args.drafter or None
  if args.target == 'random':
    model, facts, tokenizer = image_sampling.random_models()
  else:
    if not args.tokenizer:
      raise ValueError('--tokenizer: give the folder that train.vq wrote')
    model, facts = images.load_lm(args.target, dtype=args.dtype)
    tokenizer = images.load_tokenizer(args.tokenizer)
  if tokenizer.config.num_codes != model.vocab_size:
    raise ValueError(
        f'--tokenizer: {tokenizer.config.num_codes} codes, but {args.target} '
        f'has {model.vocab_size}')
  if isinstance(small, str) and not drafter_file.is_drafter(small):
    small = model if small == 'random' else images.load_lm(
        small, dtype=args.dtype)[0]
    if small.num_ids != model.num_ids or small.vocab_size != model.vocab_size:
      raise ValueError(f'--drafter={args.drafter}: of other codes or classes '
                       f'than {args.target}')
  return Scene(model, small, tokenizer, tuple(facts['grid']),
               len(facts['data']['classes']), args.tokenizer or 'synthetic')


def work(
    scene: Scene, judge: Judge | None, args: argparse.Namespace,
    record: sweeps.Record,
) -> None:
  """Measures what is not there yet; writes after each part of a point."""
  todo = points(args, scene.target.vocab_size)
  for point in todo:
    Way(scene, point)  # what cannot be built is told before hours of work
  for _, some in itertools.groupby(
      todo, lambda point: (point.guidance, point.temperature)):
    jax.clear_caches()  # each setting has programs of its own
    _work(scene, [*some], judge, args, record)


def _work(
    scene: Scene, todo: Sequence[Point], judge: Judge | None,
    args: argparse.Namespace, record: sweeps.Record,
) -> None:
  """Measures the points of a setting, of which the first is plain."""
  plain = Way(scene, todo[0])
  ways: dict[str, sweeps.Times] = {}
  for point in todo:
    if not args.only.search(point.key):
      continue
    parts = [part for part in args.parts if record.lacks(point.key, part)]
    if not parts:
      continue
    way = Way(scene, point) if point is not todo[0] else plain
    row = describe(point)
    if 'quality' in parts:
      row |= quality(scene, way, judge, args)
      print(f'{point.key}: {_said(row, judge)}', flush=True)
    if 'speed' in parts:
      ways[point.key] = times_of(scene, way, plain, args.seed)
    record.put(point.key, row)
  for key, speed in sweeps.speeds(
      ways, args.batches, args.repeats, args.turns):
    record.put(key, {'speed': speed})
    print(f'{key}: {sweeps.said(speed)}', flush=True)


def _said(row: dict[str, Any], judge: Judge | None) -> str:
  said = []
  if 'tau' in row:
    said.append(f'tau {row["tau"]:.2f}, one-step TV {row["one_step_tv"]:.3f}')
  if judge and 'distance' in row:
    said.append(f'{judge.name} {row["distance"]:.3f} +- '
                f'{row["half_width"]:.3f}')
  return ', '.join(said)


def main(arguments=None) -> int:
  """Runs the program; returns the exit code."""
  args = parse(arguments)
  check(args)
  cli.start(False)
  record = sweeps.Record(args, (
      'neighbours', 'delta', 'lam', 'group', 'temperatures'))
  scene = scene_of(args)
  judge = judging.judge_of(args, record, lambda real: scene.tokenizer.decode(
      scene.tokenizer.encode(real)))
  work(scene, judge, args, record)
  lantern_plots.draw(record.data, record.path.parent)
  return 0


if __name__ == '__main__':
  sys.exit(cli.reported(main))
