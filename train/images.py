"""Builds a dataset of images: `python -m train.images --source ...`.

    python -m train.images --source cifar10 --path cifar10.npz \\
        --out out/cifar10
    python -m train.images --source folder --path photos --size 64 \\
        --out out/photos
    python -m train.images --source emoji --size 32 --out out/emoji \\
        --path iconify-json-2.2.535.tgz

'cifar10' is an .npz of JPEG files; 'folder' has a subfolder a class, or
train and test with one each; 'emoji' is the npm package @iconify/json
(`npm pack @iconify/json@2.2.535`), drawn by resvg-py. Writes a tfds dataset
with array_record shards, and the counts in images.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import functools
from pathlib import Path
import sys

from tqdm import tqdm

from specjax.data import emoji, image_store, images
from specjax.data.images import Images, Watch
from specjax.host import cli

_SIZE = 32


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the program; returns the exit code."""
  return cli.reported(lambda: prepare(parse(arguments)))


def prepare(args: argparse.Namespace) -> None:
  """Writes the dataset and tells what it holds; ValueError for bad values."""
  check(args)
  found = read(args)
  image_store.write(found, args.out, {
      'source': args.source, 'file': Path(args.path).name})
  for split, one in found.items():
    print(report(split, one))
  print(f'{args.out}: {", ".join(found)}')


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  """Returns the values of the flags."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  add = parser.add_argument
  add('--source', required=True, choices=('cifar10', 'folder', 'emoji'))
  add('--path', required=True, help='the file or folder to read')
  add('--out', required=True, help='folder to write')
  add('--size', type=int, default=_SIZE,
      help=f'height and width; cifar10 is {_SIZE} (default: {_SIZE})')
  add('--sets', default=','.join(emoji.SETS),
      help='icon sets of emoji, with commas (default: %(default)s)')
  add('--quiet', action='store_true', help='no progress')
  return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
  """Says what cannot work before any image is read.

  Raises:
    ValueError: a size that the source does not have, or a folder in use.
  """
  if args.source == 'cifar10' and args.size != _SIZE:
    raise ValueError(f'--size={args.size}: cifar10 is {_SIZE}')
  if args.size < 1:
    raise ValueError(f'--size={args.size}: must be >= 1')
  out = Path(args.out).expanduser()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ValueError(f'--out={args.out} exists: give a new folder')


def read(args: argparse.Namespace) -> dict[str, Images]:
  """Returns the splits that the source has."""
  splits: tuple[str, ...] = images.SPLITS
  if args.source == 'folder':
    splits = images.splits_of(args.path)
  found = {}
  for split in splits:
    watch: Watch = functools.partial(
        tqdm, desc=split, unit=' images', disable=args.quiet or None)
    if args.source == 'cifar10':
      one = images.read_cifar10(args.path, split, watch=watch)
    elif args.source == 'folder':
      one = images.read_folder(args.path, args.size, split, watch=watch)
    else:
      one = emoji.read_emoji(args.path, args.size, split,
                             sets=tuple(args.sets.split(',')), watch=watch)
    found[split] = one
  return found


def report(split: str, one: Images) -> str:
  """Returns counts, and what was dropped, as lines of text."""
  height, width = one.size
  lines = [f'{split}: {len(one)} images, {height}x{width}']
  lines += [f'  {count:8d} {name}' for name, count in one.counts().items()]
  if one.captions is not None:
    lines.append(f'  {len(set(one.captions))} different captions')
  if one.dropped:
    lines.append(f'  dropped: {images.describe(one.dropped)}')
  return '\n'.join(lines)


if __name__ == '__main__':
  sys.exit(main())
