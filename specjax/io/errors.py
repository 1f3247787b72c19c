"""Errors that a user can act on.

Every message names the file or key at fault, what was found, what is allowed,
and what to do next. Command-line modules print them without a traceback.
"""


class SpecjaxError(ValueError):
  """Base of all errors caused by input rather than by a fault of specjax."""


class HubError(SpecjaxError):
  """A weight source cannot be found, downloaded or verified."""


class FormatError(SpecjaxError):
  """A weight or configuration file is damaged or not understood."""


class TokenizerError(SpecjaxError):
  """A tokenizer or chat template cannot be built or applied."""


class PromptError(SpecjaxError):
  """A prompt file, or one line of it, cannot be read."""


class OutputError(SpecjaxError):
  """A result cannot be written."""
