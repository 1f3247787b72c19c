"""Draft vocabularies for models that were not trained with one (VocabTrim)."""

from __future__ import annotations

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

import numpy as np

from specjax.io import drafter_file
from specjax.models import draft_vocab
from specjax.models.trimmed import trim

__all__ = ('read', 'trim')


def read(
    what: str | int | Sequence[int], vocab_size: int, *,
    counts: str | Sequence[int] | None = None, always: Sequence[int] = (),
) -> np.ndarray:
  """Returns the ids of a draft vocabulary, int64[W], ascending.

  Args:
    what: ids in any order; a file of them (.npy, or a .json list); the
      folder of a trained drafter, whose ids are taken; or W, the number of
      tokens to keep, which needs `counts`.
    vocab_size: V, of the target.
    counts: int[V], or a .npy file of it: how often each token occurs in the
      target's own text (best) or in text like it.
    always: ids kept besides (end tokens).

  Raises:
    ValueError: no such file, ids or counts that are not for V tokens.
  """
  if isinstance(what, str) and what.isdecimal():  # of a command line
    what = int(what)
  if isinstance(what, int):
    if counts is None:
      raise ValueError(f'draft_vocab={what}: a number of tokens needs '
                       "'draft_vocab_counts', a .npy file of V counts")
    array = _file(counts) if isinstance(counts, str) else np.asarray(counts)
    if array.shape != (vocab_size,):
      raise ValueError(f'draft_vocab_counts: shape {array.shape}, but the '
                       f'target has {vocab_size} tokens')
    return draft_vocab.most_frequent(
        array, min(what, vocab_size), tuple(always))
  ids = _file(what) if isinstance(what, str) else np.asarray(what)
  if ids.ndim != 1 or not ids.size or ids.dtype.kind not in 'iu':
    raise ValueError(f'draft_vocab={_short(what)}: must hold a list of ids')
  ids = np.unique(np.concatenate([ids.astype(np.int64), [*always]]))
  ids = ids.astype(np.int64)
  if ids[0] < 0 or ids[-1] >= vocab_size:
    raise ValueError(f'draft_vocab={_short(what)}: ids {ids[0]} to '
                     f'{ids[-1]}, but the target has {vocab_size} tokens')
  return ids


def _file(name: str) -> Any:
  path = Path(name)
  try:
    if path.is_dir():
      return drafter_file.read(path)[1]
    if path.suffix == '.json':
      return np.asarray(json.loads(path.read_text()))
    return np.load(path, allow_pickle=False)
  except (OSError, ValueError) as error:
    raise ValueError(f'{name}: not a list of token ids: {error}') from error


def _short(what: Any) -> str:
  return repr(what) if isinstance(what, str) else f'{len(what)} ids'
