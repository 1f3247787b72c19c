"""The target writes the text that its drafters learn from.

Plain decoding by the compiled loop, in a batch whose rows are refilled while
their neighbours go on. A text depends on the seed, on its prompt and on the
prompt's index in its list only: neither on its slot, nor on which other texts
were generated already (up to the last bits of the arithmetic where two lists
lead to other batch shapes).
"""

from __future__ import annotations

from collections.abc import (
  Callable,
  Container,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from specjax import verify
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.data.store import Record
from specjax.distill.rollout_rows import (
  Group,
  Progress,
  Rows,
  Settings,
  Tally,
)
from specjax.drafters import Null
from specjax.parallel import rules

Tokens = Sequence[int] | npt.NDArray[np.integer]

# Slots by kind of device: an accelerator reads the weights once for all rows.
_BATCH = {'cpu': 8}
_DEFAULT_BATCH = 1024
# Streams of keys: answers, and user turns; from 2 on answers to later turns.
_ANSWERS, _TURNS = 0, 1


def generate(
    target: Any, params: Any,
    prompts: Sequence[Tokens] | Mapping[int, Tokens], *,
    eos: Sequence[int], settings: Settings | None = None,
    skip: Container[int] = (), turn: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[Record]:
  """Generates an answer to each prompt; yields them as they are finished.

  Answers follow the target's law at their temperature (and `top_p`) exactly.

  Args:
    target: a `Target` (`models.causal.CausalLM`).
    params: its parameters, placed on `mesh` if there is one.
    prompts: token ids, at least one each; a mapping where their indices
      matter (the conversations whose next turn is to be answered).
    eos: end tokens. They are part of the answer.
    settings: None is `Settings()`.
    skip: indices of prompts that are not wanted (again). The other texts are
      the same with and without.
    turn: >= 0, of the conversations; each turn has noise of its own.
    mesh: `parallel.make_mesh`, or None for one device.
    on_progress: called after each chunk of rounds.

  Yields:
    Records in order of completion, `prompt_index` telling whose.

  Raises:
    ValueError: a prompt is empty, too long (with `settings.max_new`, for the
      context of the target) or out of the vocabulary, or `turn` is negative.
    FloatingPointError: NaN or infinite logits; the message names the prompt.
      Answers of its neighbours that were finished have been yielded.
  """
  settings = settings or Settings()
  if turn < 0:
    raise ValueError(f'turn={turn}: must be >= 0')
  arrays = {i: np.asarray(p, np.int32) for i, p in _items(prompts)}
  _check(arrays, target, settings, getattr(
      target, 'num_ids', target.vocab_size))
  yield from _generate(
      target, params, arrays, eos, settings, skip, mesh, on_progress,
      stream=_TURNS + turn if turn else _ANSWERS)


def _items(
    prompts: Sequence[Tokens] | Mapping[int, Tokens]
) -> Iterable[tuple[int, Tokens]]:
  """Returns the prompts with their indices."""
  return (prompts.items() if isinstance(prompts, Mapping)
          else enumerate(prompts))


def self_prompts(
    target: Any, params: Any, num: int, *, prefixes: Sequence[Tokens],
    suffix: Tokens, eos: Sequence[int], settings: Settings | None = None,
    skip: Container[int] = (), mesh: jax.sharding.Mesh | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
  """Lets the target say what a user would: prompts without any data.

  The chat template is cut where the user's words stand. The target continues
  what comes before them until it ends the turn; what comes after them is
  appended, and the result is a prompt for `generate`.

  Args:
    target, params, settings, mesh, on_progress: as for `generate`; choose
      `max_new` (of a user turn) and positive temperatures.
    num: user turns to sample; fewer come back.
    prefixes: token ids of the template before the user's words, at least one
      each; several (other system prompts) are used in turn.
    suffix: token ids after them, up to where the answer begins. Its first
      token ends a user turn, like those of `eos`.
    eos: end tokens.
    skip: indices in [0, num) that are not wanted.

  Yields:
    `(index, prompt)` of the turns that were ended by the target and are not
    empty, in order of completion. Equal turns are not removed.

  Raises:
    ValueError: no prefix, an empty suffix, or only greedy rows.

  Reference: Xu et al. 2024, arXiv:2406.08464 (Magpie).
  """
  settings = settings or Settings(max_new=256, temperatures=(1.0,))
  if not min(settings.temperatures) > 0:
    raise ValueError(f'temperatures={settings.temperatures}: greedy user '
                     'turns would all be equal')
  suffix = np.asarray(suffix, np.int32)
  if not len(prefixes) or not suffix.size:
    raise ValueError('self_prompts needs a prefix and a suffix')
  heads = [np.asarray(p, np.int32) for p in prefixes]
  _check(dict(enumerate([*heads, suffix])), target, settings,
         target.vocab_size)
  prompts = {i: heads[i % len(heads)] for i in range(num)}
  ends = list(dict.fromkeys([int(suffix[0]), *eos]))
  for record in _generate(
      target, params, prompts, ends, settings, skip, mesh, on_progress,
      stream=_TURNS):
    if record.finished and len(record.answer) > 1:
      yield record.prompt_index, np.concatenate([record.tokens[:-1], suffix])


def room(target: Any, settings: Settings) -> int | None:
  """Returns the tokens that the context has for a prompt; None: any number.

  What remains of the target's `max_length` is for `settings.max_new` tokens.
  """
  context = getattr(target, 'max_length', None)
  return None if context is None else context - settings.max_new


def _check(
    prompts: Mapping[int, np.ndarray], target: Any, settings: Settings,
    vocab_size: int,
) -> None:
  """Raises ValueError for prompts that cannot be fed."""
  most, free = settings.buckets[-1], room(target, settings)
  for index, tokens in prompts.items():
    if tokens.ndim != 1 or not 1 <= tokens.size <= most:
      raise ValueError(f'prompt {index}: shape {tokens.shape}; 1 to {most} '
                       'token ids can be fed (settings.buckets)')
    if free is not None and tokens.size > free:
      raise ValueError(
          f'prompt {index}: {tokens.size} tokens and max_new='
          f'{settings.max_new}; the context of this model is '
          f'{target.max_length}')
    if tokens.min() < 0 or tokens.max() >= vocab_size:
      raise ValueError(f'prompt {index}: token ids {tokens.min()} to '
                       f'{tokens.max()}: must be in [0, {vocab_size})')


def plan(
    lengths: Sequence[int], settings: Settings, num_shards: int = 1
) -> list[Group]:
  """Returns the batch shapes, a function of the whole list of prompts.

  A bucket with fewer prompts than slots joins the next longer one: a program
  is not worth compiling for a handful. Prompts are in order of length within
  windows of a few batches, so that those fed together are about as long.

  Args:
    lengths: tokens of each prompt.
    settings: of the run.
    num_shards: devices that the slots are spread over.
  """
  batch = settings.batch or _BATCH.get(
      jax.default_backend(), _DEFAULT_BATCH)
  found = np.searchsorted(settings.buckets, lengths)
  groups: list[Group] = []
  carried: list[int] = []
  for number, longest in enumerate(settings.buckets):
    indices = sorted([*carried, *np.flatnonzero(found == number).tolist()])
    is_last = not np.any(found > number)
    if len(indices) < batch and not is_last:
      carried = indices
      continue
    carried = []
    if not indices:
      continue
    size = longest + settings.max_new
    slots = min(batch, len(indices), max(settings.cache_tokens // size, 1))
    slots = -(-slots // num_shards) * num_shards
    refill = -(-max(int(slots * settings.refill), 1)
               // num_shards) * num_shards
    window = 8 * slots
    order = [i for at in range(0, len(indices), window)
             for i in sorted(indices[at:at + window],
                             key=lambda i: (lengths[i], i))]
    groups.append(Group(slots, refill, longest, size, order))
  return groups


def _generate(
    target, params, prompts, eos, settings, skip, mesh, on_progress, stream
) -> Iterator[Record]:
  """Decodes group after group; see `generate`."""
  rule = verify.get('greedy' if settings.is_greedy else 'match')
  engine = Engine(target, Null(0), rule)
  if mesh is not None:
    params = rules.on_mesh(params, mesh)
  models = Models(target=params)
  num_shards = 1 if mesh is None else mesh.shape['data']
  names = list(prompts)
  groups = [
      g._replace(indices=[names[i] for i in g.indices if names[i] not in skip])
      for g in plan([len(p) for p in prompts.values()], settings, num_shards)]
  tally = Tally(sum(len(g.indices) for g in groups), on_progress)
  for group in groups:
    if group.indices:
      rows = Rows(engine, models, prompts, group, tuple(eos), settings,
                   mesh, stream)
      yield from rows.run(tally)


__all__ = [
    'Progress', 'Record', 'Settings', 'generate', 'plan', 'room',
    'self_prompts']
