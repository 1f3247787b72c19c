"""What sweeps share: options, results that go on, times in turn.

A sweep measures points, ways of decoding, in two parts: the quality of many
samples, and the speed of a batch, which wants the device for itself. So
several programs may measure the quality of some points each, and one the
speed of all, each in a folder of its own:

  python -m sample.lantern_sweep ... --parts quality --guidance 2 --out out/a
  python -m sample.lantern_sweep ... --parts quality --guidance 1 --out out/b
  python -m sample.lantern_sweep ... --parts speed --out out/c
  python -m sample.lantern_plots --results out/a out/b out/c --out out/all

Programs that share a device and are given the same `--turns` FILE pause while
one of them takes times.
"""

from __future__ import annotations

import argparse
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
import contextlib
import fcntl
import json
import pathlib
import re
from typing import Any, TypeAlias

import numpy as np

from specjax.host import results as results_lib
from specjax.io import output

PARTS = ('quality', 'speed')
# A row has a part when it has this entry of it.
_MARKS = dict(zip(PARTS, ('samples', 'speed'), strict=True))
# Options that choose points or parts, or do not change the law of a sample:
# they may differ when a sweep goes on.
_CHOOSE = ('out', 'parts', 'only', 'guidance', 'turns', 'batch_size')


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
  """Returns what reads values by commas."""
  return lambda text: [kind(x) for x in text.split(',') if x]


def add_flags(
    parser: argparse.ArgumentParser, *, batch_size: int, repeats: int,
    batches: Sequence[int], guidance: Sequence[float],
) -> None:
  """Adds the options that all sweeps have, with these defaults."""
  parser.add_argument('--out', required=True)
  parser.add_argument('--samples', type=int, default=10_000)
  parser.add_argument('--batch_size', type=int, default=batch_size,
                      help='of the samples')
  parser.add_argument('--batches', type=numbers(int), default=[*batches],
                      help='that are timed')
  parser.add_argument('--repeats', type=int, default=repeats)
  parser.add_argument('--guidance', type=numbers(float), default=[*guidance])
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--parts', type=numbers(str), default=[*PARTS])
  parser.add_argument('--only', type=re.compile, default=re.compile(''),
                      help='points whose name has this regular expression')
  parser.add_argument('--turns', type=Turns, default=Turns(''), metavar='FILE',
                      help='a lock of the programs that share a device')


def check(args: argparse.Namespace) -> None:
  """Raises ValueError for options of `add_flags` that cannot be run."""
  for name in ('samples', 'batch_size', 'repeats'):
    if getattr(args, name) < 1:
      raise ValueError(f'--{name}={getattr(args, name)}: must be >= 1')
  for name in ('batches', 'guidance', 'parts'):
    if not getattr(args, name):
      raise ValueError(f'--{name}: give at least one')
  if min(args.batches) < 1:
    raise ValueError(f'--batches={args.batches}: must be >= 1')
  unknown = sorted(set(args.parts) - set(PARTS))
  if unknown:
    raise ValueError(f'--parts: {unknown[0]!r} is unknown; known are '
                     f'{", ".join(PARTS)}')


class Turns:
  """Who may use a device that several programs share.

  Any number may work; who takes times waits until the others pause.
  """

  def __init__(self, path: str):
    """Takes the path of a lock file; with '' the device is not shared."""
    self._path = path

  def work(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """Returns what a piece of work is done within.

    Gives a function to call every few seconds: it waits while another program
    takes times.
    """
    return self._held(fcntl.LOCK_SH)

  def alone(self) -> contextlib.AbstractContextManager[Any]:
    """Returns what times are taken within: no other program works."""
    return self._held(fcntl.LOCK_EX)

  @contextlib.contextmanager
  def _held(self, kind: int) -> Iterator[Callable[[], None]]:
    if not self._path:
      yield lambda: None
      return
    # Who waits to be alone holds the gate, or work would never end.
    with open(self._path, 'a') as lock, open(self._path + '.gate', 'a') as gate:
      def take() -> None:
        fcntl.flock(lock, fcntl.LOCK_UN)
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(lock, kind)
        fcntl.flock(gate, fcntl.LOCK_UN)

      take()
      yield take


class Record:
  """The rows of a sweep in a file, each written as soon as it is there.

  Attributes:
    data: 'setting', 'device', 'versions', 'points' and what is added.
  """

  def __init__(
      self, args: argparse.Namespace, choose: Collection[str],
      sources: Mapping[str, str] | None = None,
  ):
    """Goes on with the results in the folder `args.out`, if there are some.

    Args:
      choose: options that choose points, besides those of `add_flags`.
      sources: what names in the points stand for, by name.

    Raises:
      ValueError: those are of another setting or device, or a name stood for
        something else.
    """
    self.path = pathlib.Path(output.prepare(args.out)) / 'sweep.json'
    setting = {k: v for k, v in vars(args).items()
               if k not in {*_CHOOSE, *choose}}
    self.data: dict[str, Any] = {
        'setting': json.loads(json.dumps(setting)),
        'device': results_lib.device_name(),
        'versions': results_lib.versions(), 'sources': {}, 'points': {}}
    if self.path.exists():
      fresh, self.data = self.data, read(self.path)
      same(self.path, self.data, fresh, ('setting', 'device'))
    known = self.data.setdefault('sources', {})
    for name, source in (sources or {}).items():
      if known.setdefault(name, source) != source:
        raise ValueError(f'{self.path}: {name} was {known[name]}, now it is '
                         f'{source}; give another --out')

  def lacks(self, key: str, part: str) -> bool:
    """Whether a part of a point is still to be measured."""
    return _MARKS[part] not in self.data['points'].get(key, {})

  def put(self, key: str, row: Mapping[str, Any]) -> None:
    """Adds to the row of a point, and writes the file."""
    self.data['points'].setdefault(key, {}).update(row)
    output.write_json(self.path, self.data)


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """Returns the results of a sweep.

  Raises:
    ValueError: the file holds none. OSError: there is no such file.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / 'sweep.json'
  try:
    data = json.loads(path.read_text())
    data['setting'].items(), data['points'].items(), data['device']
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'{path}: no results of a sweep: {error!r}') from error
  return data


def merged(paths: Iterable[str | pathlib.Path]) -> dict[str, Any]:
  """Returns the results of several programs as those of one.

  Of a part that two have measured the later file's is taken.

  Raises:
    ValueError: see `read`; or they are of several targets or devices.
  """
  first, *others = [(path, read(path)) for path in paths]
  data = first[1]
  target = {'target': data['setting'].get('target')}
  for path, other in others:
    same(path, other, data, ('device',))
    same(path, other['setting'], target, ('target',))
    for key, row in other['points'].items():
      data['points'].setdefault(key, {}).update(row)
    for name, value in other.items():
      data.setdefault(name, value)
  return data


def has(row: Mapping[str, Any], *parts: str) -> bool:
  """Whether a row has all of these parts."""
  return all(_MARKS[part] in row for part in parts)


# Seconds of plain decoding and of a way, one behind the other, at a batch size
# and of the repeat of a number.
Times: TypeAlias = Callable[[int, int], tuple[float, float]]


def speeds(
    ways: Mapping[str, Times], batches: Iterable[int], repeats: int,
    turns: Turns,
) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
  """Yields names and how fast these ways of decoding are, by batch size.

  All compile before one of them is timed: the device is taken from others
  once. Repeat 0 compiles, its times are not read.

  Args:
    ways: by name. batches: sizes. repeats: that are read. turns: of the device.
  """
  if not ways:
    return
  with turns.work() as pause:
    for times in ways.values():
      for batch in batches:
        times(batch, 0)
        pause()
  with turns.alone():
    for name, times in ways.items():
      yield name, {
          str(batch): _ratios([
              times(batch, number) for number in range(1, repeats + 1)])
          for batch in batches}


def _ratios(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
  found = [a / b for a, b in pairs]
  return {'seconds': float(np.median([b for _, b in pairs])),
          'plain_seconds': float(np.median([a for a, _ in pairs])),
          'speedup': float(np.median(found)), 'least': min(found),
          'most': max(found), 'repeats': len(found)}


def said(speed: Mapping[str, Mapping[str, float]]) -> str:
  """Returns a line that tells how fast a way of decoding is."""
  return ', '.join(
      f'{s["speedup"]:.2f}x at {batch}' for batch, s in speed.items())


def same(
    path: str | pathlib.Path, found: Mapping[str, Any],
    wanted: Mapping[str, Any], names: Iterable[str],
) -> None:
  """Raises ValueError for results whose `names` are others than wanted."""
  for name in names:
    if found.get(name) != wanted[name]:
      raise ValueError(f'{path}: of another {name}, {found.get(name)}; give '
                       'another --out')
