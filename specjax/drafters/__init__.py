"""Drafters: everything that proposes tokens."""

from specjax.drafters.compose import Adaptive
from specjax.drafters.lookup import InputGuided, Lookup
from specjax.drafters.null import Null
from specjax.drafters.scripted import Scripted
from specjax.drafters.small_lm import SmallLM

__all__ = ['Adaptive', 'InputGuided', 'Lookup', 'Null', 'Scripted', 'SmallLM']
