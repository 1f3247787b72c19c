"""Continuous drafts: what is kept, how fast, and whose law comes out.

  python -m sample.latents_sweep --target out/mar/model \
      --tokenizer out/vae/autoencoder --data cifar10_jpeg.npz \
      --drafters small=out/mar_small/model,taught=out/mar_taught/model \
      --samples 10000 --out out/latents_sweep
  python -m sample.latents_sweep --target random --features none \
      --samples 16 --batches 1,4 --num_draft 2,3 --out out/try

For every drafter, number of drafts, rule, share of tokens that the target
makes first, and scale of guidance, `sweep.json` gets

* tokens a round, the share of drafts that were kept, and of those that were
  reached (`conditional`, by position);
* seconds of a batch of images at each of `--batches`, over plain decoding of
  the same classes in turn with it (compilation and pixels left out);
* the largest Kolmogorov-Smirnov distance of a channel to plain decoding with
  other noise; beside it what two plain samples are apart;
* the Frechet distance of `--samples` images to the test images, plus or minus
  two deviations of resampled samples, beside that of what the autoencoder
  makes of the test images, and of two halves of the real images. It is taken
  of plain decoding and, at the largest K and the first share, of the rules
  that are `--judged`; other points decode `--few` images.

Masked decoders also decode plainly in `--iterations`, the honest comparison at
equal time. `table.md` is the same as a table. The same command goes on after
an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import dataclasses
import itertools
import pathlib
import sys
from typing import Any

import numpy as np
from scipy import stats

from sample import judging, lantern_plots
from sample.judging import Judge, judge_of
import specjax
from specjax.drafters import Null
from specjax.host import cli, latent_sampling, latents, mar
from specjax.host import results as results_lib
from specjax.host.load import Model
from specjax.host.results import Results
from specjax.io import output
from specjax.models.masked_images import MaskedImages
from specjax.verify import CSpD, PathExact

RULES: dict[str, Any] = {
    'path_exact': PathExact(), 'path_exact, last 10': PathExact(10),
    'path_exact, last step': PathExact(1), 'cspd': CSpD(),
    'cspd, not aligned': CSpD(align=False),
    'cspd, 42': CSpD(inner_temperature=42.0)}
_SEED = 1000  # of samples; those of timings are below


@dataclasses.dataclass(frozen=True)
class Point:
  """A way of decoding.

  Attributes:
    drafter: its name; '' for plain decoding.
    rule: a key of `RULES`. num_draft: K. prefill: share of the tokens.
    guidance: scale. iterations: of plain decoding, 0 for one a token.
  """

  drafter: str = ''
  rule: str = 'path_exact'
  num_draft: int = 0
  prefill: float = 0.0
  guidance: float = 1.0
  iterations: int = 0

  @property
  def key(self) -> str:
    """A name that is unique in a sweep."""
    if not self.drafter:
      more = f', {self.iterations} iterations' if self.iterations else ''
      return f'plain{more}; guidance={self.guidance:g}'
    return (f'{self.drafter}; {self.rule}; K={self.num_draft}; '
            f'prefill={self.prefill:g}; guidance={self.guidance:g}')


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

  def decode(self, point: Point, num: int, batch: int, seed: int) -> Results:
    """Decodes `num` images, classes in turn, `batch` at a time."""
    target = self.target
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
        verify=RULES[point.rule], batch_size=batch, seed=seed)

  def labels(self, num: int) -> np.ndarray:
    """Returns int[num], classes in turn."""
    return np.arange(num) % self.num_classes

  def orders(self, num: int, seed: int) -> np.ndarray:
    """Returns int[num,T], see `latent_sampling.orders_of`."""
    return latent_sampling.orders_of('random', num, self.length, seed)

  def pixels(self, results: Results, seed: int) -> np.ndarray:
    """Returns uint8[N,H,W,3]."""
    return latent_sampling.Pictures(
        self.autoencoder, self.grid, self.orders(len(results), seed), (),  # type: ignore[arg-type]
        1).pixels(results.results)


def points(args: argparse.Namespace, scene: Scene) -> Iterator[Point]:
  """Yields the points, plain decoding first at every scale."""
  for guidance in args.guidance:
    yield Point(guidance=guidance)
    if isinstance(scene.target.lm, MaskedImages):
      for number in args.iterations:
        if number > scene.length:
          continue
        yield Point(guidance=guidance, iterations=number)
    for name, num, rule in itertools.product(
        scene.drafters, args.num_draft, args.rules):
      for prefill in args.prefill:
        yield Point(name, rule, num, prefill, guidance)


def tokens(results: Results) -> np.ndarray:
  """Returns f32[n,C], all tokens."""
  return np.concatenate([np.asarray(r.tokens, np.float32) for r in results])


def distance(one: np.ndarray, other: np.ndarray) -> float:
  """Returns the largest Kolmogorov-Smirnov distance of a channel."""
  return max(float(stats.ks_2samp(a, b).statistic)
             for a, b in zip(one.T, other.T, strict=True))


def is_judged(point: Point, args: argparse.Namespace) -> bool:
  """Whether the distance of a point's images is taken."""
  return not point.drafter or (
      point.rule in args.judged and point.num_draft == max(args.num_draft)
      and point.prefill == args.prefill[0])


def measured(
    scene: Scene, point: Point, plain: np.ndarray | None,
    judge: Judge | None, args: argparse.Namespace,
) -> tuple[dict[str, Any], np.ndarray]:
  """Returns the row of a point, without times, and its tokens."""
  # Plain decoding is what others are compared with: other noise.
  seed = _SEED + bool(point.drafter) + 2 * bool(point.iterations)
  judged = is_judged(point, args)
  num = args.samples if judged else min(args.few, args.samples)
  found = scene.decode(point, num, args.batch_size, seed)
  summary, made = found.summary(), tokens(found)
  row: dict[str, Any] = {
      **dataclasses.asdict(point), 'samples': num,
      'tokens_per_round': summary['mean_acceptance_length'],
      'kept': summary['draft_acceptance_rate'],
      'conditional': summary['conditional_acceptance'],
      'one_step_tv': summary['one_step_tv'],
      'gave_up': summary['gave_up'], 'lossy': summary['lossy'],
      'scoring': summary['scoring']}
  if plain is None:
    other = scene.decode(point, args.samples, args.batch_size, _SEED + 9)
    row['ks'] = distance(tokens(other), made)
  else:
    row['ks'] = distance(plain, made)
  if judge is not None and judged:
    row |= judge.score(scene.pixels(found, seed), scene.labels(num))
  return row, made


def speed(
    scene: Scene, point: Point, plain: Point, batch: int, repeats: int
) -> dict[str, float]:
  """Returns seconds of a batch of images, in turn with plain decoding."""
  pairs = [[scene.decode(one, batch, batch, number).wall_s
            for one in (plain, point)] for number in range(repeats + 1)][1:]
  ratios = [a / b for a, b in pairs]
  return {'seconds': float(np.median([b for _, b in pairs])),
          'plain_seconds': float(np.median([a for a, _ in pairs])),
          'speedup': float(np.median(ratios)), 'least': min(ratios),
          'most': max(ratios), 'repeats': repeats}


def work(scene: Scene, judge: Judge | None, args, data, save) -> None:
  """Measures what is not there yet; writes after each point."""
  plain: tuple[Point, np.ndarray] | None = None
  for point in points(args, scene):
    is_plain = not (point.drafter or point.iterations)
    if point.key in data['points'] and not is_plain:
      continue
    row, made = measured(
        scene, point, None if is_plain or plain is None else plain[1], judge,
        args)
    if is_plain:
      plain = point, made
    assert plain is not None
    row['speed'] = {str(batch): speed(
        scene, point, plain[0], batch, args.repeats)
                    for batch in ([] if is_plain else args.batches)}
    data['points'][point.key] = row
    save()
    said = [f'{row["tokens_per_round"]:.2f} tokens a round',
            *(f'{s["speedup"]:.2f}x at {b}' for b, s in row['speed'].items()),
            f'KS {row["ks"]:.4f}']
    if 'distance' in row:
      said.append(f'{row["distance"]:.2f} +- {row["half_width"]:.2f}')
    print(f'{point.key}: ' + ', '.join(said), flush=True)


def table(data: dict[str, Any], batches: list[int]) -> str:
  """Returns all points as a table in Markdown."""
  lines = ['| | tokens a round | drafts kept | '
           + ' | '.join(f'speed-up at {b}' for b in batches)
           + f' | KS | {" | ".join(judging.HEADS)} |',
           '| --- ' * (4 + len(batches) + len(judging.HEADS)) + '|']
  for key, row in data['points'].items():
    times = [row['speed'].get(str(b)) for b in batches]
    kept = '' if row['kept'] is None else f'{row["kept"]:.3f}'
    cells = [key + (' (lossy)' if row['lossy'] else ''),
             f'{row["tokens_per_round"]:.2f}', kept,
             *('' if t is None else f'{t["speedup"]:.2f}' for t in times),
             f'{row["ks"]:.4f}', *judging.cells(row)]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def numbers(kind):
  """Returns a parser of lists with commas."""
  return lambda text: [kind(x) for x in text.split(',') if x]


def parse(arguments=None) -> argparse.Namespace:
  """Returns the options; exits where they are none."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--target', required=True)
  parser.add_argument('--tokenizer', default='')
  parser.add_argument('--drafters', default='', help='name=folder, by commas')
  judging.add_flags(parser)
  parser.add_argument('--samples', type=int, default=10_000)
  parser.add_argument('--few', type=int, default=3200)
  parser.add_argument('--batch_size', type=int, default=512)
  parser.add_argument('--batches', type=numbers(int), default=[1, 8, 128])
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--num_draft', type=numbers(int), default=[4, 8, 16])
  parser.add_argument('--prefill', type=numbers(float), default=[0.05])
  parser.add_argument('--guidance', type=numbers(float), default=[1.0])
  parser.add_argument('--iterations', type=numbers(int), default=[32, 16])
  rules: Any = dict(type=lambda x: x.split(';'), help='by semicolons')
  parser.add_argument('--rules', **rules, default=[
      'path_exact', 'path_exact, last step', 'cspd', 'cspd, not aligned'])
  parser.add_argument('--judged', **rules, default=['path_exact', 'cspd'])
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', required=True)
  args = parser.parse_args(arguments)
  given = args.drafters or ('self=random' if args.target == 'random' else '')
  args.drafters = dict(x.split('=', 1) for x in given.split(',') if x)
  for name in ('rules', 'judged'):
    unknown = sorted(set(getattr(args, name)) - set(RULES))
    if unknown:
      raise ValueError(f'--{name}: {unknown[0]!r} is unknown; known are '
                       f'{"; ".join(RULES)}')
  return args


def main(arguments=None) -> int:
  """Runs the program; returns the exit code."""
  args = parse(arguments)
  out = pathlib.Path(output.prepare(args.out))
  cli.start(False)
  scene = Scene(args)
  found = judge_of(args)
  judge = found[0] if found else None
  more = ('out', 'drafters', 'num_draft', 'prefill', 'guidance', 'iterations',
          'rules')  # these add points
  data: dict[str, Any] = {
      'setting': {k: v for k, v in vars(args).items() if k not in more},
      'device': results_lib.device_name(),
      'versions': results_lib.versions(), 'points': {}}
  path = out / 'sweep.json'
  if path.exists():
    data = lantern_plots.read(path, data)
  if found and 'reference' not in data:
    judge, real = found
    data['reference'] = judge.context(scene.autoencoder.decode(
        scene.autoencoder.encode(real, seed=0)))
  work(scene, judge, args, data, lambda: output.write_json(path, data))
  (out / 'table.md').write_text(table(data, args.batches))
  return 0


if __name__ == '__main__':
  try:
    sys.exit(main())
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
