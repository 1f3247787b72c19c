"""Reads prompt files in the formats that users already have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any
import warnings

from specjax.io.errors import PromptError

_KINDS = "turns, messages, conversations or prompt"
# ShareGPT's names for the roles of chat templates.
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant",
    "chatgpt": "assistant", "assistant": "assistant", "system": "system",
    "tool": "tool",
}


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One request; exactly one of `turns`, `messages`, `text` is set.

  Attributes:
    id: from the row, else its line or item number, counted from 1.
    category: from the row, else "other".
    turns: what the user says, turn by turn; the answers between them are
      generated.
    messages: a conversation that ends before the answer to generate.
    text: plain text to continue, without a chat template.
    reference: known good answers, if the row has any.
    source: the part of the text that input-guided drafting copies from; the
      whole prompt if None.
  """

  id: str
  category: str = "other"
  turns: tuple[str, ...] | None = None
  messages: tuple[Mapping[str, Any], ...] | None = None
  text: str | None = None
  reference: tuple[str, ...] | None = None
  source: str | None = None


def read(
    path: str | Path,
    *,
    keep_going: bool = False,
    on_error: Callable[[str], None] | None = None,
) -> list[Prompt]:
  """Reads every prompt of a file.

  Formats: `.txt` is one prompt per line, blank lines skipped. Anything else
  is JSON: one object per line, or one list of objects. A row is
  `{"question_id", "category", "turns"}` (Spec-Bench), `{"prompt"}`,
  `{"messages"}` or `{"conversations"}` (ShareGPT). Answers at the end of a
  conversation become its `reference`: they are what is to be generated.

  Args:
    path: the file.
    keep_going: skip bad rows and report them instead of raising.
    on_error: gets the message of each row skipped; warnings by default.

  Returns:
    The prompts, at least one, in file order.

  Raises:
    PromptError: naming file and line, on the first bad row; also if the file
      cannot be read or holds no good row.
  """
  path = Path(path)
  try:
    data = path.read_bytes()
  except OSError as error:
    raise PromptError(f"cannot read {path}: {error.strerror}") from error
  data = data.removeprefix(b"\xef\xbb\xbf")  # byte order mark
  rows: Iterator[tuple[int, str, Callable[[], Any]]]
  if data.lstrip()[:1] == b"[" and path.suffix != ".txt":
    rows = _items(path, data)
  else:
    rows = _lines(path, data, is_text=path.suffix == ".txt")
  prompts, skipped = [], 0
  for number, where, load in rows:
    try:
      prompts.append(_to_prompt(load(), number))
    except PromptError as error:
      message = f"{where}: {error}"
      if not keep_going:
        raise PromptError(message) from error
      skipped += 1
      if on_error is None:
        warnings.warn(f"skipped {message}", stacklevel=2)
      else:
        on_error(message)
  if not prompts:
    why = f"all {skipped} rows are bad" if skipped else "the file is empty"
    raise PromptError(f"{path}: no prompts: {why}")
  return prompts


def _lines(
    path: Path, data: bytes, *, is_text: bool
) -> Iterator[tuple[int, str, Callable[[], Any]]]:
  """Yields (number, place, loader) of each line that is not blank."""
  for number, line in enumerate(data.split(b"\n"), 1):
    if line.strip():
      yield number, f"{path}:{number}", _line_loader(line, is_text)


def _line_loader(line: bytes, is_text: bool) -> Callable[[], Any]:
  def load() -> Any:
    text = _utf8(line).strip("\r\n")
    return {"prompt": text} if is_text else _parse(text)

  return load


def _items(
    path: Path, data: bytes
) -> Iterator[tuple[int, str, Callable[[], Any]]]:
  """Yields (number, place, loader) of each item of a JSON list."""
  try:
    items = _parse(_utf8(data))
  except PromptError as error:
    raise PromptError(f"{path}: {error}") from error
  for number, item in enumerate(items, 1):
    yield number, f"{path}: item {number}", functools.partial(_same, item)


def _same(item: Any) -> Any:
  return item


def _utf8(data: bytes) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start)
    place = f"line {line + 1}, " if line else ""
    column = error.start - data.rfind(b"\n", 0, error.start)
    raise PromptError(
        f"not valid UTF-8: byte 0x{data[error.start]:02x} at {place}column "
        f"{column}") from error


def _parse(text: str) -> Any:
  try:
    value = json.loads(text)
    if "\\ud" in text.lower():
      json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value
  except UnicodeEncodeError as error:
    raise PromptError(
        "not valid Unicode: an escape \\uD8xx to \\uDFxx without its pair, "
        "which no tokenizer can encode") from error
  except json.JSONDecodeError as error:
    place = f"line {error.lineno}, " if error.lineno > 1 else ""
    raise PromptError(
        f"not valid JSON: {error.msg} at {place}column {error.colno}"
    ) from error
  except RecursionError as error:
    raise PromptError("not usable JSON: nested too deeply") from error


def _to_prompt(row: Any, number: int) -> Prompt:
  """Converts one row; raises PromptError without a place."""
  if not isinstance(row, dict):
    raise PromptError(f"a JSON object was expected, found {_short(row)}")
  common: dict[str, Any] = {
      "id": str(row.get("question_id", row.get("id", number))),
      "category": str(row.get("category", "other")),
      "reference": _reference(row.get("reference")),
  }
  if "turns" in row:
    return Prompt(turns=_strings(row["turns"], "turns"), **common)
  for key in ("messages", "conversations"):
    if key in row:
      messages, answer = _conversation(row[key], key)
      if answer and common["reference"] is None:
        common["reference"] = (answer,)
      return Prompt(messages=messages, **common)
  if "prompt" in row:
    if not isinstance(row["prompt"], str) or not row["prompt"]:
      raise PromptError(
          f"prompt must be a non-empty string, found {_short(row['prompt'])}")
    return Prompt(text=row["prompt"], **common)
  raise PromptError(
      f"a row needs {_KINDS}; found keys {', '.join(row) or 'none'}")


def _reference(value: Any) -> tuple[str, ...] | None:
  # Never a reason to refuse a row: published sets hold empty strings here.
  items = value if isinstance(value, list) else [value]
  return tuple(str(i) for i in items if i not in (None, "")) or None


def _strings(value: Any, key: str) -> tuple[str, ...]:
  items = [value] if isinstance(value, str) else value
  if not isinstance(items, list) or not items or not all(
      isinstance(s, str) and s for s in items):
    raise PromptError(
        f"{key} must be a list of non-empty strings, found {_short(value)}")
  return tuple(items)


def _conversation(
    value: Any, key: str) -> tuple[tuple[Mapping[str, Any], ...], str]:
  """Returns the messages up to the last question, and the answer to it."""
  if not isinstance(value, list) or not all(
      isinstance(m, dict) for m in value):
    raise PromptError(
        f"{key} must be a list of objects, found {_short(value)}")
  messages = [_message(m, f"{key}[{i}]") for i, m in enumerate(value)]
  answer = ""
  while messages and messages[-1]["role"] == "assistant":
    content = messages.pop()["content"]
    answer = content if isinstance(content, str) else ""
  if not any(m["role"] == "user" for m in messages):
    raise PromptError(f"{key} has no message of a user")
  return tuple(messages), answer


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
  role = message.get("role", message.get("from"))
  content = message.get("content", message.get("value"))
  if role not in _ROLES:
    raise PromptError(
        f"{place} has role {role!r}; known are {', '.join(sorted(_ROLES))}")
  # Assistant messages that only call tools have no content.
  if not isinstance(content, str | list) and "tool_calls" not in message:
    raise PromptError(f"{place} has no content")
  rest = {
      k: v for k, v in message.items()
      if k not in ("role", "from", "content", "value")}
  return {"role": _ROLES[role], "content": content, **rest}


def _short(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False, default=repr)
  return text if len(text) <= 60 else text[:57] + "..."
