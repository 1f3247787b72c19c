"""Renders chat templates as Hugging Face models expect.

Templates come with the weights, so they run in jinja2's immutable sandbox:
they see the messages and a few functions, and can change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import datetime
import functools
import json
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, parser
import jinja2.ext
import jinja2.sandbox

from specjax.io.errors import TokenizerError


class _Generation(jinja2.ext.Extension):
  """Accepts `{% generation %}` blocks, which mark text for training masks."""

  tags = {"generation"}

  def parse(self, parser: parser.Parser) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.Scope(body).set_lineno(line)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
  """Renders messages to the text that the model was trained on.

  Args:
    template: jinja2 source.
    messages: `{"role": ..., "content": ...}` each, oldest first.
    add_generation_prompt: end with the opening of the model's answer.
    **variables: more names for the template: special tokens, `tools`, ...

  Returns:
    Text with special tokens spelled out; encode it with special tokens
    parsed. It may begin with the BOS token.

  Raises:
    TokenizerError: if the template is not valid or rejects the messages.
  """
  # Templates test `tools is not none`, so an absent list must be None rather
  # than undefined.
  names = {"tools": None, "documents": None, **variables}
  try:
    return _compile(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt,
        **names)
  except (jinja2.TemplateError, TypeError, KeyError) as error:
    raise TokenizerError(f"chat template: {error}") from error


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True,
      extensions=["jinja2.ext.loopcontrols", _Generation])
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _fail
  environment.globals["strftime_now"] = _now
  return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
  # jinja2's own filter escapes for HTML, which models have not seen.
  return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
      sort_keys=sort_keys)


def _fail(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
  return datetime.datetime.now().strftime(pattern)
