"""Rules from configs: options by name, tables and heads from files."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

from specjax import verify as rules
from specjax.host import images
from specjax.models import vq

# Channels of the synthetic codebook: random vectors, for dry runs.
_SYNTHETIC_CHANNELS = 8


def build(
    verify: Any, options: Mapping[str, Any] | None, vocab_size: int
) -> tuple[Any, Any]:
  """Returns `(rule or 'auto', its arrays or None)` of a config.

  Args:
    verify: a rule's name, 'auto', `{'name': ..., **options}`, or a rule.
    options: fields of the rule; also `codebook` (a tokenizer's folder or .pt
      file, an .npy file of VQ vectors [entries, channels], or 'synthetic':
      random ones for the whole vocabulary) for 'lantern' and for 'grouped'
      with a `distance`, and `head` (a .safetensors file) for 'judge'.
    vocab_size: V of the target.

  Raises:
    ValueError: an unknown name or option, a value or file that will not do.
  """
  options = {k: v for k, v in dict(options or {}).items() if v is not None}
  if isinstance(verify, Mapping):
    verify = dict(verify)
    options = {**options, **verify}
    verify = options.pop('name', 'auto')
  if not isinstance(verify, str):
    return verify, None
  codebook, head = options.pop('codebook', None), options.pop('head', None)
  if verify == 'auto':
    if options or codebook or head:
      raise ValueError(f"verify='auto' takes no options, got "
                       f'{sorted(options) or "files"}: name the rule')
    return verify, None
  rule = rules.get(verify, **options)
  reads = isinstance(rule, rules.Lantern) or (
      isinstance(rule, rules.Grouped) and rule.distance is not None)
  if codebook is not None and not reads:
    raise ValueError(f'verify={verify!r} reads no codebook'
                     + (' without a distance'
                        if isinstance(rule, rules.Grouped) else ''))
  if head is not None and not isinstance(rule, rules.Judge):
    raise ValueError(f'verify={verify!r} reads no head')
  if codebook is not None:
    vectors = _codebook(codebook, vocab_size)
    if isinstance(rule, rules.Grouped):
      return rule, {'codebook': np.asarray(vectors, np.float32)}
    return rule, {
        'neighbours': rules.neighbours(vectors, rule.num_neighbours)}
  if head is not None:
    from specjax.distill import judge
    trained, threshold = judge.load(head)
    if 'threshold' not in options:  # the one chosen when it was trained
      rule = dataclasses.replace(rule, threshold=threshold)
    return rule, trained
  return rule, None


def _codebook(source: str, vocab_size: int) -> np.ndarray:
  """Returns VQ vectors float[entries, channels]."""
  if source == 'synthetic':
    rng = np.random.default_rng(0)
    return rng.normal(size=(vocab_size, _SYNTHETIC_CHANNELS))
  path = pathlib.Path(source)
  if path.is_dir() or path.suffix in ('.pt', '.pth'):
    # What the tokenizer looks up: rows of length 1.
    return np.asarray(vq.unit(images.load_tokenizer(path).params['codebook']))
  if not path.is_file():
    raise ValueError(f'codebook={source!r}: no such file')
  try:
    return np.load(path, allow_pickle=False)
  except ValueError as error:
    raise ValueError(f'codebook={source!r}: {error}') from error
