"""Prompt files: every accepted format, every complaint."""

import json

import pytest

from specjax.io import prompts
from specjax.io.errors import PromptError

_SHAREGPT = [
    {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"},
    {"from": "human", "value": "and?"}, {"from": "gpt", "value": "bye"}]
_MESSAGES = (
    {"role": "user", "content": "hi"}, {"role": "assistant", "content":
                                        "hello"},
    {"role": "user", "content": "and?"})


def _file(tmp_path, *rows, name="p.jsonl"):
  path = tmp_path / name
  lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
  path.write_bytes(b"\n".join(lines) + b"\n")
  return path


@pytest.mark.parametrize("row, expected", [
    ({"question_id": 81, "category": "qa", "turns": ["a", "b"],
      "reference": ["r"]},
     prompts.Prompt("81", "qa", turns=("a", "b"), reference=("r",))),
    ({"prompt": "once \U0001f600"},
     prompts.Prompt("1", text="once \U0001f600")),
    ({"id": "x", "prompt": "p", "reference": ["r", "", 3]},
     prompts.Prompt("x", text="p", reference=("r", "3"))),
    ({"turns": "t", "reference": ""}, prompts.Prompt("1", turns=("t",))),
    ({"messages": list(_MESSAGES)},
     prompts.Prompt("1", messages=_MESSAGES)),
    ({"conversations": _SHAREGPT},
     prompts.Prompt("1", messages=_MESSAGES, reference=("bye",))),
])
@pytest.mark.parametrize("form", ["lines", "list", "list without suffix"])
def test_rows(tmp_path, row, expected, form):
  if form == "lines":
    path = _file(tmp_path, row)
  else:
    path = _file(
        tmp_path, [row], name="p.json" if form == "list" else "prompts")
  assert prompts.read(path) == [expected]


def test_plain_text(tmp_path):
  path = _file(
      tmp_path, b"\xef\xbb\xbf[one]\r", b"", b"  ", " zwei ü".encode(),
      name="p.txt")
  assert prompts.read(path) == [
      prompts.Prompt("1", text="[one]"), prompts.Prompt("4", text=" zwei ü")]


def test_message_details_are_kept(tmp_path):
  call = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
  parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
  tool = {"role": "tool", "content": "4", "name": "sum"}
  (prompt,) = prompts.read(
      _file(tmp_path, {"messages": [parts, call, tool]}))
  assert prompt.messages == (parts, call, tool)


_BAD = [
    (b'{"prompt": "a\xff"}', "not valid UTF-8: byte 0xff at column 14"),
    (b'{"prompt": ', "not valid JSON: .* column 12"),
    (b"[" * 100_000, "JSON"),
    (b'{"prompt": "\\ud83d"}', "not valid Unicode"),
    (b"3", "object was expected, found 3"),
    (b"{}", "a row needs turns, messages, conversations or prompt"),
    (b'{"text": "a"}', "found keys text"),
    (b'{"prompt": ""}', "non-empty string"),
    (b'{"turns": [1]}', "turns must be"),
    (b'{"turns": []}', "turns must be"),
    (b'{"turns": [""]}', "turns must be"),
    (b'{"messages": "a"}', "messages must be"),
    (b'{"messages": []}', "no message of a user"),
    (b'{"messages": [{"role": "god", "content": "a"}]}', "role 'god'"),
    (b'{"messages": [{"role": "user"}]}', r"messages\[0\] has no content"),
]


@pytest.mark.parametrize("line, text", _BAD)
def test_bad_line_names_file_and_line(tmp_path, line, text):
  path = _file(tmp_path, {"prompt": "good"}, b"", line, {"prompt": "last"})
  with pytest.raises(PromptError, match=text) as caught:
    prompts.read(path)
  assert str(caught.value).startswith(f"{path}:3: ")


def test_keep_going_runs_the_other_lines(tmp_path):
  path = _file(
      tmp_path, {"prompt": "good"}, *(line for line, _ in _BAD),
      {"prompt": "last"})
  seen = []
  found = prompts.read(path, keep_going=True, on_error=seen.append)
  assert [p.text for p in found] == ["good", "last"]
  assert [m.split(": ")[0] for m in seen] == [
      f"{path}:{i}" for i in range(2, 2 + len(_BAD))]
  with pytest.warns(UserWarning) as record:
    assert prompts.read(path, keep_going=True) == found
  assert [str(w.message) for w in record] == [f"skipped {m}" for m in seen]


def test_keep_going_in_lists_and_text(tmp_path):
  seen = []
  path = _file(tmp_path, [3, {"prompt": "a"}], name="p.json")
  found = prompts.read(path, keep_going=True, on_error=seen.append)
  assert [p.id for p in found] == ["2"] and "item 1" in seen[0]
  path = _file(tmp_path, b"a", b"\xff", name="p.txt")
  found = prompts.read(path, keep_going=True, on_error=seen.append)
  assert [p.text for p in found] == ["a"] and f"{path}:2" in seen[1]


def test_damaged_list_names_the_line(tmp_path):
  path = _file(tmp_path, b"[", b'{"prompt": "\xfe"}]', name="p.json")
  with pytest.raises(PromptError, match="0xfe at line 2, column 13"):
    prompts.read(path, keep_going=True)
  path = _file(tmp_path, b"[", b'{"prompt": }]', name="p.json")
  with pytest.raises(PromptError, match="line 2, column 12"):
    prompts.read(path, keep_going=True)


@pytest.mark.parametrize("data, text", [
    (b"", "the file is empty"), (b"\n \n", "the file is empty"),
    (b"[]", "the file is empty"), (b"3\n4", "all 2 rows are bad")])
def test_no_prompts(tmp_path, data, text):
  path = tmp_path / "p.jsonl"
  path.write_bytes(data)
  with pytest.raises(PromptError, match=text):
    prompts.read(path, keep_going=True, on_error=lambda _: None)


def test_missing_file(tmp_path):
  with pytest.raises(PromptError, match="No such file"):
    prompts.read(tmp_path / "p.jsonl")
