"""Speculative decoding of anything autoregressive, in JAX.

Public names only; everything else is an implementation detail that may move.
Acceptance rules are in `specjax.verify`, drafters in `specjax.drafters`, tree
shapes in `specjax.core.topologies`.
"""

from specjax import drafters, verify
from specjax.certificates.own import certify
from specjax.host.generate import generate
from specjax.host.load import Model, load, random_model, save
from specjax.host.results import Results
from specjax.io.options import Sampling
from specjax.io.prompts import Prompt
from specjax.models.transformer import TransformerConfig
from specjax.version import __version__

__all__ = [
    'Model', 'Prompt', 'Results', 'Sampling', 'TransformerConfig',
    '__version__', 'certify', 'drafters', 'generate', 'load', 'random_model',
    'save', 'verify']
