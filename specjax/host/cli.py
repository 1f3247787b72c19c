"""What the command-line programs share: flags, errors, live output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import logging
import sys
import time
from typing import Any, NamedTuple

from absl import app, flags
import jax
from ml_collections import config_dict, config_flags

from specjax.host import mar, tiny
from specjax.host.decoder import Progress
from specjax.host.load import Model, load
from specjax.io import hub
from specjax.io.options import Sampling
from specjax.parallel import make_mesh


class Flags(NamedTuple):
  """The flags that every program has."""

  config: Any
  out: Any
  quiet: Any
  distributed: Any
  keep_going: Any


def define_flags(default_out: str) -> Flags:
  """Defines the common flags, with this program's default for `--out`."""
  defined = _define()
  flags.set_default(defined.out, default_out)
  return defined


@functools.cache  # two programs can be imported into one process
def _define() -> Flags:
  config = config_flags.DEFINE_config_file(
      'config', None, 'Path of a config file, with :arg for a variant.',
      lock_config=True)
  flags.mark_flag_as_required('config')
  out = flags.DEFINE_string('out', 'out', 'Folder for results.')
  quiet = flags.DEFINE_bool('quiet', False, 'No progress and no text.')
  distributed = flags.DEFINE_bool(
      'distributed', False, 'Call jax.distributed.initialize() first.')
  keep_going = flags.DEFINE_bool(
      'keep_going', False, 'Skip malformed rows of a prompts file.')
  return Flags(config, out, quiet, distributed, keep_going)


def run(main: Callable[[], int | None]) -> None:
  """Runs a program of `Flags` under absl, as `reported` does.

  With -v=1 errors keep their traceback.
  """
  def wrapped(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments: {argv[1:]}')
    # JAX tells of every absent backend.
    logging.getLogger('jax._src.xla_bridge').setLevel(logging.WARNING)
    sys.exit(reported(main, (flags.FLAGS['verbosity'].value or 0) >= 1))

  def parse(argv):
    try:
      rest = flags.FLAGS(argv)
      verbosity = flags.FLAGS['verbosity']
      if verbosity.using_default_value:
        # absl would go on to INFO: tfds and orbax tell of every file.
        verbosity.value, verbosity.using_default_value = -1, False
      if 'config' in flags.FLAGS:
        _ = flags.FLAGS.config.items  # raises if its file is missing
      return rest
    except (AttributeError, KeyError, ValueError, TypeError, OSError,
            flags.Error) as error:
      print(f'error: {flag_error(error, argv)}', file=sys.stderr)
      sys.exit(1)

  app.run(wrapped, flags_parser=parse)


def reported(
    main: Callable[[], int | None], traceback: bool = False) -> int:
  """Runs `main`; returns its exit code.

  User errors become one line on stderr and 1, unless `traceback`. Ctrl-C is
  130: programs keep what is finished.
  """
  try:
    return main() or 0
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return 130
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if 'RESOURCE_EXHAUSTED' not in text:
      raise
    print(f'error: the device is out of memory: {text.splitlines()[0]}; '
          'lower the batch size or max_new_tokens', file=sys.stderr)
  except (ValueError, MemoryError, FloatingPointError, OSError,
          ImportError) as error:
    if traceback:
      raise
    print(f'error: {error}', file=sys.stderr)
  return 1


def flag_error(error: BaseException, argv: Sequence[str]) -> str:
  """Returns what is wrong with the flags, in one line."""
  # An AttributeError may hold the KeyError, whose text is quoted.
  text: Any = error
  while isinstance(text, BaseException) and text.args:
    text = text.args[-1 if isinstance(text, OSError) else 0]
  lines = [line.strip() for line in str(text).splitlines() if line.strip()]
  if isinstance(error, (AttributeError, KeyError)):
    missing, _, hint = ' '.join(lines).partition(' Did you mean')
    missing = missing.strip('\'"')
    # Of a flag any part may be unknown; the error has the part alone.
    named = [flag for flag in (a.partition('=')[0] for a in argv)
             if flag.startswith('--config.')
             and missing in flag.split('.')[1:]]
    if named:
      hint = f'; did you mean{hint}' if hint else ''
      return f'{" or ".join(named)}: the config has no {missing!r}{hint}'
  if len(lines) > 1:  # a file that is missing, or raises
    return f'--config: {lines[-1].removeprefix("ValueError: ")}'
  text = lines[0] if lines else repr(error)
  return text if isinstance(error, flags.Error) else f'--config: {text}'


def start(distributed: bool) -> None:
  """Initialises processes and the persistent compilation cache."""
  if distributed:
    jax.distributed.initialize()
  if getattr(jax.config, 'jax_compilation_cache_dir', None) is None:
    jax.config.update('jax_compilation_cache_dir', str(hub.cache_dir('xla')))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def sampling(config: config_dict.ConfigDict) -> Sampling:
  """Returns the `Sampling` of a config's `sampling` section."""
  values: dict[str, Any] = {
      k: v for k, v in config.to_dict().items() if v is not None}
  known = {f.name for f in dataclasses.fields(Sampling)}
  unknown = sorted(set(values) - known)
  if unknown:
    raise ValueError(f'config.sampling.{unknown[0]}: unknown; known are '
                     f'{", ".join(sorted(known))}')
  given: dict[str, Any] = {
      k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
  return Sampling(**given)


def labels(
    section: config_dict.ConfigDict, known: Sequence[str]
) -> tuple[tuple[str, ...], list[int]]:
  """Returns the classes of a config's `images` section, and each image's.

  All that are `known` where it names none; labels are numbers of those.

  Raises:
    ValueError: a class that is not known.
  """
  wanted = tuple(section.classes or known)
  for name in wanted:
    if name not in known:
      raise ValueError(f'config.images.classes: {name!r} is unknown; known '
                       f'are {", ".join(known)}')
  number = list(known).index
  return wanted, [number(n) for n in wanted for _ in range(section.per_class)]


def speculative(
    config: config_dict.ConfigDict, override: str | None
) -> dict[str, Any] | None:
  """Returns the speculative configuration: the flag's JSON, or the config's.

  Raises:
    ValueError: the flag is not a JSON object.
  """
  if override:
    try:
      value = json.loads(override)
    except json.JSONDecodeError as error:
      raise ValueError(
          f'--speculative_config={override}: not JSON ({error})') from error
    if not isinstance(value, dict):
      raise ValueError('--speculative_config: must be a JSON object')
    return value
  values = {k: v for k, v in config.to_dict().items() if v is not None}
  return values or None


def load_target(config, mesh: Any, quiet: bool) -> Model:
  """Loads `config.target`; 'random' is the tiny model that needs no data."""
  if config.target == 'random':
    return tiny.model(mesh=mesh)
  begin = time.perf_counter()
  model = load(config.target, dtype=config.dtype, mesh=mesh, quiet=quiet)
  note(f'{config.target}: {model.lm.config.num_params / 1e6:.0f} M '
       f'parameters, {model.lm.config.dtype}, loaded in '
       f'{time.perf_counter() - begin:.1f} s', quiet)
  return model


def load_drafter(target: Model, quiet: bool) -> Callable[[str], Model]:
  """Returns what loads a draft model in the target's dtype.

  'random' is the tiny model, whatever the target.
  """
  def source_of(source: str) -> Model:
    if source == 'random':
      return tiny.model() if target.vocab_size else mar.tiny()
    return load(source, dtype=target.dtype, quiet=quiet)

  return source_of


def mesh(shape: tuple[int, int] | None):
  """Returns the mesh of a config, or None for a single device."""
  if shape is None or tuple(shape) == (1, 1):
    return None
  data, model = shape
  return make_mesh((data, model))


class StatusLine:
  """One line on stderr that says how far things are."""

  def __init__(self, quiet: bool, every_s: float = 0.2):
    self._quiet, self._every = quiet, every_s
    self._is_tty = sys.stderr.isatty()
    self._last = 0.0
    self._shown = False

  def __call__(self, progress: Progress) -> None:
    """Shows progress, at most every `every_s` seconds; a `Decoder` hook."""
    now = time.monotonic()
    if self._quiet or not self._is_tty or now - self._last < self._every:
      return
    self._last = now
    sys.stderr.write('\r\x1b[2K' + self.text(progress))
    sys.stderr.flush()
    self._shown = True

  @staticmethod
  def text(progress: Progress) -> str:
    """Returns the line: rows, tokens/s, acceptance, time left."""
    speed = progress.new_tokens / max(progress.elapsed_s, 1e-9)
    length = progress.new_tokens / max(progress.row_rounds, 1)
    line = (f'{progress.num_done}/{progress.num_requests} done, '
            f'{progress.new_tokens} tokens, {speed:.1f} tokens/s, '
            f'{length:.2f} tokens/round')
    if 0 < progress.num_done < progress.num_requests:
      left = progress.num_requests - progress.num_done
      line += f', {progress.elapsed_s / progress.num_done * left:.0f} s left'
    return line

  def clear(self) -> None:
    """Removes the line, so that text can be printed in its place."""
    if self._shown:
      sys.stderr.write('\r\x1b[2K')
      sys.stderr.flush()
      self._shown = False


def note(message: str, quiet: bool = False) -> None:
  """Prints a line on stderr."""
  if not quiet:
    print(message, file=sys.stderr, flush=True)
