"""Drafters in the formats of other projects: names and shapes, both ways."""

from specjax.models.interchange.formats import (
  FORMATS,
  Drafter,
  detect,
  export,
  load,
)
from specjax.models.interchange.shared import File, Target

__all__ = ['FORMATS', 'Drafter', 'File', 'Target', 'detect', 'export', 'load']
