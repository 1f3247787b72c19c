"""Folders of drafters in the formats of other projects.

    drafter = read('Qwen3-4B-DFlash-b16', target.lm.config)
    write('out', drafter.config, drafter.net, drafter.ids,
          format='speculators', target=describe(target))

Formats (`models.interchange.FORMATS`), each a `config.json` beside tensors:
'zlab' (DFlash), 'deepspec' (DFlash, DSpark), 'speculators' (dflash, dspark,
eagle3), 'eagle' (EAGLE-1, EAGLE-3), 'medusa' and 'vllm_medusa'. vLLM and
SGLang load the drafters of speculators.
"""

from __future__ import annotations

from collections.abc import Mapping
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from specjax.drafters.block import BlockSource
from specjax.drafters.eagle import EagleSource
from specjax.drafters.medusa import HeadsSource
from specjax.host.drafter import Loaded
from specjax.host.load import Model
from specjax.io import output, safetensors
from specjax.io.errors import FormatError
from specjax.models import interchange
from specjax.models.block_drafter import BlockConfig
from specjax.models.eagle import EagleConfig
from specjax.models.interchange import Drafter, File, Target
from specjax.models.medusa import HeadsConfig
from specjax.models.transformer_config import TransformerConfig
from specjax.parallel import rules

_SOURCES: dict[Any, Any] = {
    BlockConfig: BlockSource, EagleConfig: EagleSource,
    HeadsConfig: HeadsSource}
# Tokens a round, where neither config nor file says.
_NUM_DRAFT = 5
# Positions of a target whose files do not say how many it has.
_MAX_LENGTH = 32768
_PICKLES = ('pytorch_model.bin', 'medusa_lm_head.pt')


def read(
    folder: str | Path, target: TransformerConfig | Target | Model
) -> Drafter:
  """Reads a drafter; the format is seen from `config.json` and names.

  Tensors are read from safetensors, else from `pytorch_model.bin` or
  `medusa_lm_head.pt` (which needs torch; nothing but tensors is unpickled).

  Args:
    folder: as downloaded.
    target: what it is for: the shape of a model, or a model. With a model,
      its embedding and head are compared with the file's copies, and shared
      where they agree. Files of Medusa need one.

  Returns:
    `(config, net, ids)`: `BlockConfig`, `EagleConfig` or `HeadsConfig`,
    trained weights, draft vocabulary int64[W].

  Raises:
    FormatError: no such folder or format, an option that is not supported,
      a tensor that is missing, unknown or of a wrong shape, another width or
      vocabulary than the target's, layers that it does not have.

  Warns:
    UserWarning: a Markov head over part of the vocabulary loses the rows of
      tokens that cannot be drafted.
  """
  folder = Path(folder)
  if isinstance(target, Model):
    target = describe(target)
  elif isinstance(target, TransformerConfig):
    target = Target('the target', target)
  if not (folder / 'config.json').is_file():
    raise FormatError(f'{folder}: no config.json; is this a drafter?')
  values = safetensors.read_json(folder / 'config.json')
  tensors = _open(folder)
  file = File(
      values, {name: x.shape for name, x in tensors.items()},
      lambda name: np.asarray(tensors[name].read()))
  try:
    return interchange.load(file, target)
  except FormatError as error:
    raise FormatError(f'{folder}: {error}') from error


def load(folder: str | Path, target: Model) -> Loaded:
  """Reads a drafter and makes it ready to decode with a target.

  Returns:
    As `host.drafter.load_drafter`; `facts` has `kind` and `num_draft`: of a
    block drafter its slots, of Medusa its heads, else what the file proposes
    or 5.

  Raises:
    FormatError: see `read`.
  """
  drafter = read(folder, target)
  config, model = drafter.config, drafter.model
  params = model.attach(drafter.net, target.params, drafter.ids)
  if target.mesh is not None:
    params = rules.on_mesh(params, target.mesh)
  values = safetensors.read_json(Path(folder) / 'config.json')
  methods = (values.get('speculators_config') or {}).get('proposal_methods')
  told = methods[0].get('speculative_tokens') if methods else None
  source: Any = _SOURCES[type(config)](model)
  return Loaded(source, params, {
      'kind': kind_of(config),
      'num_draft': num_draft_of(config) or told or _NUM_DRAFT})


def write(
    folder: str | Path, config: Any, net: Any, ids: Any, *, format: str,
    target: Target, dtype: str | None = None, mask_token: int | None = None,
    num_draft: int | None = None,
) -> Path:
  """Writes a drafter; the folder appears whole or not at all.

  Args:
    folder: must not exist, or be empty.
    config: `BlockConfig`, `EagleConfig` or `HeadsConfig`.
    net: trained weights. ids: int[W], the draft vocabulary.
    format: see the module docstring. 'medusa' is written as safetensors and,
      where torch is installed, as the authors' `medusa_lm_head.pt` too.
    target: the model that it is for (`describe`). Its parameters are needed
      where the format stores its embedding or rows of its head.
    dtype: of the tensors: 'float32', 'bfloat16', 'float16'; None is the
      drafter's.
    mask_token: an unused token (`unused_token`), for a drafter with a
      trained mask vector: its row of the stored embedding becomes that
      vector.
    num_draft: tokens a round that engines will draft by default; None is the
      number of slots of a block drafter, else 3.

  Returns:
    The folder.

  Raises:
    ValueError: the format cannot hold this drafter; weights that do not fit
      the config or are not finite; a target of another shape.
    OutputError: the folder is not empty, or cannot be written (disk full).
  """
  folder = Path(folder).expanduser()
  with output.folder(folder) as new:
    values, tensors = interchange.export(
        Drafter(config, rules.fetch(net), ids), format, target, dtype=dtype,
        mask_token=mask_token, num_draft=num_draft)
    is_medusa = format == 'medusa'
    name = 'medusa_lm_head' if is_medusa else 'model'
    safetensors.write(new / f'{name}.safetensors', tensors, {'format': 'pt'})
    if is_medusa and importlib.util.find_spec('torch'):
      _write_pickle(new / 'medusa_lm_head.pt', tensors)
    output.write_json(new / 'config.json', values)
  return folder


def describe(
    target: Model, *, name: str | None = None, revision: str = '',
    max_length: int | None = None,
) -> Target:
  """Returns what `read` and `write` need of a loaded model.

  Args:
    target: the model.
    name: as engines find it ('Qwen/Qwen3-4B'); None is where it came from.
    revision: of its weights.
    max_length: positions that engines will give it; None is its context,
      or 32768 where nobody says.

  Raises:
    ValueError: a length that is not in [1, its context].
  """
  most = target.max_length
  if max_length is None:
    max_length = most or _MAX_LENGTH
  if max_length < 1:
    raise ValueError(f'max_length={max_length}: must be >= 1')
  if most is not None and max_length > most:
    raise ValueError(f'max_length={max_length}: the context of {target.name} '
                     f'is {most} tokens')
  matrices = {k: target.params[k] for k in ('embedding', 'head')
              if k in target.params}
  return Target(name or target.name, target.lm.config,
                rules.fetch(matrices), revision, max_length)


def unused_token(target: Model, ids: Any) -> int | None:
  """Returns a token that no text uses: the first id that has no token.

  Where every id has one, it is the last of the special tokens that neither
  begin, end or pad a text nor stand in the chat template, and that are not
  drafted, if only some tokens are. None: there is no such token, or no
  tokenizer.

  Args:
    target: the model. ids: int[W], the draft vocabulary.
  """
  text = target.tokenizer
  if text is None:
    return None
  strings = text.token_strings()
  for i in range(target.vocab_size):
    if i >= len(strings) or strings[i] in (None, f'[PAD{i}]'):
      return i
  used = {text.bos_id, text.pad_id, *text.eos_ids, *target.eos}
  if len(ids) < target.vocab_size:
    used |= set(np.asarray(ids).tolist())
  template = text.chat_template or ''
  return max((i for i in text.special_ids - used if i < target.vocab_size
              and str(strings[i]) not in template), default=None)


def kind_of(config: Any) -> str:
  """Returns how such a drafter is called: 'dspark', 'eagle3', ..."""
  if isinstance(config, BlockConfig):
    plain = config.markov == 'none' and not config.confidence
    return 'dflash' if plain else 'dspark'
  if isinstance(config, EagleConfig):
    return f'eagle{config.version}'
  return config.kind


def num_draft_of(config: Any) -> int | None:
  """Returns the most tokens drafted in a round; None: as many as wanted."""
  return getattr(config, 'num_slots', getattr(config, 'num_heads', None))


def _open(folder: Path) -> Mapping[str, Any]:
  """Maps the tensors of a folder."""
  if any(folder.glob('*.safetensors')):
    return safetensors.read(folder)
  for name in _PICKLES:
    if (folder / name).is_file():
      return _read_pickle(folder / name)
  raise FormatError(f'{folder}: neither a .safetensors file nor '
                    f'{" nor ".join(_PICKLES)}')


class _Held:
  """A tensor that is in memory, read like `io.lazy.LazyTensor`."""

  def __init__(self, tensor: Any):
    self._tensor = tensor
    self.shape = tuple(tensor.shape)

  def read(self) -> np.ndarray:
    return self._tensor.float().numpy()


def _read_pickle(path: Path) -> dict[str, _Held]:
  try:
    import torch  # here alone: a large package that all else does without
  except ImportError as error:
    raise FormatError(
        f'{path}: reading it needs torch; install it, or convert the file '
        'to safetensors') from error
  try:
    found = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # pickle, zip and torch have errors of their own
    raise FormatError(f'{path}: cannot be read: {error}') from error
  if not isinstance(found, Mapping):
    raise FormatError(f'{path}: holds no tensors by name')
  return {name: _Held(x) for name, x in found.items()
          if isinstance(x, torch.Tensor)}


def _write_pickle(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  import torch  # see `_read_pickle`
  dtypes = {'bfloat16': torch.bfloat16, 'float16': torch.float16}
  torch.save({
      name: torch.from_numpy(x.astype(np.float32)).to(
          dtypes.get(x.dtype.name, torch.float32))
      for name, x in tensors.items()}, path)
