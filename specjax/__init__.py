"""Speculative decoding of anything autoregressive, in JAX.

Public names only; everything else is an implementation detail that may move.
Acceptance rules are in `specjax.verify`, drafters in `specjax.drafters`, tree
shapes in `specjax.core.topologies`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from specjax.version import __version__

if TYPE_CHECKING:
  from specjax import drafters, verify
  from specjax.certificates.own import certify
  from specjax.host.generate import generate
  from specjax.host.load import Model, load, random_model, save
  from specjax.host.results import Results
  from specjax.io.options import Sampling
  from specjax.io.prompts import Prompt
  from specjax.models.transformer_config import TransformerConfig

# Loaded on first use: who decodes on a bare machine does without tokenizers
# and file formats.
_HOME = {
    'Model': 'host.load', 'Prompt': 'io.prompts', 'Results': 'host.results',
    'Sampling': 'io.options', 'TransformerConfig': 'models.transformer',
    'certify': 'certificates.own', 'generate': 'host.generate',
    'load': 'host.load', 'random_model': 'host.load', 'save': 'host.load'}

__all__ = [
    'Model', 'Prompt', 'Results', 'Sampling', 'TransformerConfig',
    '__version__', 'certify', 'drafters', 'generate', 'load', 'random_model',
    'save', 'verify']


def __getattr__(name: str) -> Any:
  if name in ('drafters', 'verify'):
    return importlib.import_module(f'specjax.{name}')
  if name not in _HOME:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  home = importlib.import_module(f'specjax.{_HOME[name]}')
  return getattr(home, name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
