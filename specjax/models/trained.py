"""Models of trained drafters as JSON values, and back."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax

from specjax.models import block_drafter, eagle, medusa, small_lm
from specjax.models.block_drafter import BlockConfig
from specjax.models.block_model import BlockModel
from specjax.models.eagle import EagleConfig
from specjax.models.eagle_model import EagleModel
from specjax.models.medusa import HeadsConfig, HeadsModel
from specjax.models.small_lm import SmallLMConfig, SmallLMModel
from specjax.models.transformer_config import TransformerConfig

# Name -> config, model, initialiser.
_FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    'block': (BlockConfig, BlockModel, block_drafter.init),
    'eagle': (EagleConfig, EagleModel, eagle.init),
    'heads': (HeadsConfig, HeadsModel, medusa.init),
    'small_lm': (SmallLMConfig, SmallLMModel, small_lm.init),
}


def family(model: Any) -> str:
  """Returns a model's family: 'block', 'eagle', 'heads' or 'small_lm'."""
  for name, (_, kind, _) in _FAMILIES.items():
    if isinstance(model, kind):
      return name
  raise ValueError(f'{type(model).__name__}: not a model of a drafter')


def to_values(model: Any) -> dict[str, Any]:
  """Returns `{'family', 'config'}` of JSON values."""
  return {'family': family(model),
          'config': dataclasses.asdict(model.config)}


def from_values(values: Mapping[str, Any]) -> Any:
  """Inverts `to_values`, also after JSON made lists of tuples.

  Raises:
    ValueError: an unknown family or key, or a value out of range.
  """
  name = values.get('family')
  if name not in _FAMILIES:
    raise ValueError(f'family={name!r}: known are {", ".join(_FAMILIES)}')
  config, model, _ = _FAMILIES[str(name)]
  given = _tuples(values.get('config', {}))
  if 'decoder' in given:
    given['decoder'] = TransformerConfig.of(given['decoder'])
  return model(_made(config, given))


def abstract(model: Any) -> Any:
  """Returns the tree of `ShapeDtypeStruct` of a model's trained weights."""
  init = _FAMILIES[family(model)][2]
  return nn.unbox(jax.eval_shape(
      lambda: init(model.config, jax.random.key(0))))


def sizes(model: Any) -> tuple[int | None, int, int]:
  """Returns `(D, V, W)`: widths of states, of both vocabularies.

  D is None for a drafter of targets of any width.
  """
  config = model.config
  inner = getattr(config, 'decoder', config)
  width = getattr(config, 'target_dim', inner.embed_dim)
  return width, inner.vocab_size, config.draft_vocab_size


def _made(kind: Any, values: dict[str, Any]) -> Any:
  try:
    return kind(**values)
  except TypeError as error:
    raise ValueError(f'{kind.__name__}: {error}') from error


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
  return {k: tuple(v) if isinstance(v, list) else v
          for k, v in values.items()}
