"""Converts a trained drafter: `python -m train.export --drafter DIR ...`.

    python -m train.export --drafter out/drafter/drafter --out out/export \\
        --format speculators --name HuggingFaceTB/SmolLM2-135M-Instruct
    python -m train.export --drafter Qwen3-4B-DFlash-b16 --target Qwen3-4B \\
        --format specjax --out drafters/dflash

Reads a drafter of our own or of another project (z-lab, DeepSpec,
speculators, EAGLE, Medusa; the format is detected) and writes it in the
format asked for; 'specjax' is our own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from specjax.host import cli, interchange, tiny
from specjax.host import drafter as drafter_lib
from specjax.host.load import Model, load
from specjax.io import drafter_file
from specjax.models.interchange import FORMATS, Drafter

_OWN = 'specjax'


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the program; returns the exit code."""
  args = parse(arguments)
  return cli.reported(lambda: convert(args))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  """Returns the values of the flags."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  add = parser.add_argument
  add('--drafter', required=True, help='folder of the drafter')
  add('--out', required=True, help='folder to write')
  add('--format', required=True, choices=(*FORMATS, _OWN))
  add('--target', help='the target model; default: that of our own drafter')
  add('--name', help='the target as engines find it; default: --target')
  add('--revision', default='', help="of the target's weights")
  add('--max_length', type=int,
      help='positions that engines will give the target; default: its\n'
      'context, 32768 where its files do not say')
  add('--dtype', default='bfloat16',
      help='of the tensors: float32, bfloat16, float16, or int8 (specjax)')
  add('--mask_token', type=int,
      help='a token that no text uses: its embedding becomes a trained mask\n'
      'vector; "mask_token_id" of config.json. Default: the first id that\n'
      'has no token, else the last special token that neither begins, ends\n'
      'or pads a text nor stands in the chat template, and is not drafted\n'
      '(16, <empty_output>, for the drafter of SmolLM2)')
  add('--num_draft', type=int, help='tokens to draft a round')
  return parser.parse_args(arguments)


def convert(args: argparse.Namespace) -> None:
  """Reads, converts and writes.

  Raises:
    ValueError: a drafter that the format cannot hold, or a bad folder.
  """
  source = args.target
  own = drafter_file.is_own(args.drafter)
  if source is None:
    if not own:
      raise ValueError('--target: a drafter of another project does not say '
                       'which files its target is in')
    source = drafter_file.read(args.drafter)[2]['target']['name']
  target = tiny.model() if source == 'random' else load(
      source, dtype='float32')
  about = interchange.describe(
      target, name=args.name, revision=args.revision,
      max_length=args.max_length)
  loaded = drafter_lib.load_drafter(args.drafter, target)
  drafter = Drafter(loaded.source.model.config, loaded.params['net'],
                    loaded.params['ids'])
  write(args, drafter, target, about, args.num_draft or loaded.num_draft)
  print(f'{args.out}: {interchange.kind_of(drafter.config)} for {about.name}, '
        f'{len(drafter.ids)} of {target.vocab_size} tokens, as {args.format}')


def write(args: argparse.Namespace, drafter: Drafter, target: Model,
          about: interchange.Target, num_draft: int) -> None:
  """Writes the drafter in the format asked for."""
  if args.format != _OWN:
    token = args.mask_token
    if token is None and 'mask' in drafter.net:
      token = interchange.unused_token(target, drafter.ids)
      if token is not None:
        print(f'mask_token: {token}, which no text uses')
    interchange.write(
        args.out, *drafter, format=args.format, target=about,
        dtype=args.dtype, mask_token=token, num_draft=num_draft)
    return
  drafter_lib.save_drafter(
      args.out, drafter.model, drafter.net, drafter.ids, target,
      kind=interchange.kind_of(drafter.config), num_draft=num_draft,
      form=args.dtype, facts={'origin': str(Path(args.drafter).name)})


if __name__ == '__main__':
  sys.exit(main())
