"""Ways of training a drafter by name, from the values of a config.

    task = build('dspark', target_config, 16384,
                 model={'num_layers': 3}, task={'num_anchors': 192},
                 loss={'first': {'kl': 1.0}})
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, NamedTuple

from specjax.distill import eagle as eagle_task
from specjax.distill.blocks import BlockTask
from specjax.distill.eagle import EagleTask
from specjax.distill.medusa import HeadsTask
from specjax.distill.objective import Mixture
from specjax.distill.small_lm import SmallLMTask
from specjax.distill.task import Objective, Task
from specjax.models import medusa
from specjax.models.block_drafter import BlockConfig, default_taps
from specjax.models.block_model import BlockModel
from specjax.models.eagle import EagleConfig
from specjax.models.eagle_model import EagleModel
from specjax.models.medusa import HeadsModel
from specjax.models.small_lm import SmallLMConfig, SmallLMModel
from specjax.models.transformer_config import TransformerConfig

Values = Mapping[str, Any]

# Of the drafter's layers; everything else about them is the target's.
_LAYERS = ('num_layers', 'mlp_dim', 'num_heads', 'num_kv_heads', 'head_dim',
           'qk_norm')


class _Request(NamedTuple):
  """What is asked of the maker of a kind.

  `model`, `task` hold set values only; `objective` is None for the kind's
  own.
  """

  target: TransformerConfig
  width: int
  model: dict[str, Any]
  task: dict[str, Any]
  objective: Objective | None


def _block(asked: _Request, **preset: Any) -> Task:
  """DFlash and DSpark."""
  model = {**preset, **asked.model}
  decoder = _decoder(asked.target, model, num_layers=3, qk_norm=True)
  taps = _taps(asked.target, model, 4)
  return BlockTask(
      BlockModel(_make(BlockConfig, model, 'model', decoder=decoder,
                       taps=taps, draft_vocab_size=asked.width)),
      **_of(BlockTask, asked))


def _eagle(asked: _Request, recipe: str, version: str) -> Task:
  """EAGLE-1, EAGLE-3, HASS, with the losses of their papers."""
  model = dict(asked.model)
  decoder = _decoder(asked.target, model, num_layers=1, qk_norm=False)
  if version == '3':
    model['taps'] = _taps(asked.target, model, 3)
  return eagle_task.published(
      recipe, EagleModel(_make(
          EagleConfig, model, 'model', decoder=decoder,
          draft_vocab_size=asked.width, version=version)),
      **_of(EagleTask, asked))


def _heads(asked: _Request, kind: str) -> Task:
  """Medusa and Hydra."""
  _known(medusa.HeadsConfig, asked.model, 'model')
  config = medusa.for_target(
      asked.target, asked.width, **{**asked.model, 'kind': kind})
  return HeadsTask(HeadsModel(config), **_of(HeadsTask, asked))


def _small_lm(asked: _Request) -> Task:
  """A small causal model: the target's shape, scaled to `embed_dim`."""
  target, model = asked.target, dict(asked.model)
  width = model.pop('embed_dim', target.embed_dim)
  if width < 1:
    raise ValueError(f'model.embed_dim={width}: must be >= 1')
  share = width / target.embed_dim
  heads = max(1, round(share * target.num_heads))
  groups = max(n for n in range(1, target.num_kv_heads + 1)
               if heads % n == 0)
  tied = model.pop('tied', True)
  decoder = dataclasses.replace(_decoder(
      target, model, **{
          'num_layers': 4, 'num_heads': heads, 'num_kv_heads': groups,
          'mlp_dim': 8 * math.ceil(share * target.mlp_dim / 8)}),
      embed_dim=width, tied=tied, embed_scale=(
          None if target.embed_scale is None else math.sqrt(width)))
  shared = 'target' if width == target.embed_dim else 'own'
  return SmallLMTask(
      SmallLMModel(_make(
          SmallLMConfig, {'embedding': shared, **model}, 'model',
          decoder=decoder, draft_vocab_size=asked.width)),
      **_of(SmallLMTask, asked))


# Kind -> its maker.
KINDS: dict[str, Any] = {
    'dspark': _block,
    'dflash': lambda asked: _block(asked, markov='none', confidence=False),
    'eagle1': lambda asked: _eagle(asked, 'plain', '1'),
    'hass': lambda asked: _eagle(asked, 'hass', '1'),
    'eagle3': lambda asked: _eagle(asked, 'ttt', '3'),
    'medusa': lambda asked: _heads(asked, 'medusa'),
    'hydra': lambda asked: _heads(asked, 'hydra'),
    'small_lm': _small_lm,
}


def build(
    kind: str, target: TransformerConfig, draft_vocab_size: int, *,
    model: Values | None = None, task: Values | None = None,
    loss: Values | None = None,
) -> Task:
  """Returns the task of a kind.

  Args:
    kind: one of KINDS.
    target: the target's shape; the drafter takes widths, norms, rotary base
      and dtype from it.
    draft_vocab_size: W.
    model: attributes of the model's config (`BlockConfig`, `EagleConfig`,
      `HeadsConfig`, `SmallLMConfig`; of the last also `embed_dim`, which
      scales the other widths, and `tied`), of its layers (`num_layers`,
      `mlp_dim`, `num_heads`, `num_kv_heads`, `head_dim`, `qk_norm`), and
      `num_taps`, if `taps` are not given. None values are the kind's
      defaults, here and below.
    task: attributes of the task (`BlockTask`, `EagleTask`, `HeadsTask`,
      `SmallLMTask`).
    loss: `first` and `last`, weights by name of the loss (a stage without
      any is as if not given), `hold` and `chunk` (`objective.Mixture`,
      `task.Objective`).

  Raises:
    ValueError: an unknown kind or key, or a value out of range.
  """
  if kind not in KINDS:
    raise ValueError(f'kind={kind!r}: known are {", ".join(KINDS)}')
  return KINDS[kind](_Request(
      target, draft_vocab_size, _set(model), _set(task),
      _objective(loss)))


def _set(values: Values | None) -> dict[str, Any]:
  return {k: v for k, v in (values or {}).items() if v is not None}


def _objective(values: Values | None) -> Objective | None:
  loss = _set(values)
  for stage in ('first', 'last'):
    weights = _set(loss.pop(stage, None))
    if weights:
      loss[stage] = weights
  if not loss:
    return None
  unknown = sorted(set(loss) - {'first', 'last', 'hold', 'chunk'})
  if unknown:
    raise ValueError(f'loss.{unknown[0]}: unknown; known are first, last, '
                     'hold, chunk')
  if 'first' not in loss:
    raise ValueError('loss.first: must be given')
  last = loss.get('last')
  mixture = Mixture(
      tuple(sorted(loss['first'].items())),
      None if last is None else tuple(sorted(last.items())),
      **{k: loss[k] for k in ('hold',) if k in loss})
  return Objective(mixture, **{k: loss[k] for k in ('chunk',) if k in loss})


def _decoder(
    target: TransformerConfig, model: dict[str, Any], **preset: Any
) -> TransformerConfig:
  """Returns the drafter's layers; takes their values out of `model`."""
  given = {name: model.pop(name) for name in _LAYERS if name in model}
  names = ('vocab_size', 'embed_dim', 'mlp_dim', 'num_heads', 'num_kv_heads',
           'head_dim', 'norm_eps', 'rope_base', 'rope_scaling', 'embed_scale',
           'activation', 'final_softcap', 'dtype')
  own = {name: getattr(target, name) for name in names}
  return TransformerConfig(**{**own, **preset, **given})


def _taps(
    target: TransformerConfig, model: dict[str, Any], count: int
) -> tuple[int, ...]:
  """Returns the layers that are read; takes both keys out of `model`."""
  count = model.pop('num_taps', count)
  taps = model.pop('taps', None)
  if taps is None:
    # Small targets have fewer layers than the usual places.
    taps = {min(max(t, 0), target.num_layers)
            for t in default_taps(target.num_layers, count)}
    return tuple(sorted(taps))
  if any(not 0 <= t <= target.num_layers for t in taps):
    raise ValueError(f'taps={tuple(taps)}: the target has the streams 0 to '
                     f'{target.num_layers}')
  return tuple(taps)


def _make(config: Any, values: Values, section: str, **fixed: Any) -> Any:
  _known(config, values, section)
  return config(**{**values, **fixed})


def _of(task: Any, asked: _Request) -> dict[str, Any]:
  """Returns the arguments of a task beside its model."""
  _known(task, asked.task, 'task')
  if asked.objective is None:
    return asked.task
  return {**asked.task, 'objective': asked.objective}


def _known(config: Any, values: Values, section: str) -> None:
  """Raises ValueError for keys that a dataclass lacks."""
  known = [f.name for f in dataclasses.fields(config)
           if f.name not in ('decoder', 'model', 'objective')]
  unknown = sorted(set(values) - set(known))
  if unknown:
    raise ValueError(f'{section}.{unknown[0]}: unknown for '
                     f'{config.__name__}; known are {", ".join(known)}')
