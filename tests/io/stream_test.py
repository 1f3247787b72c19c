"""Streaming text: pieces add up, characters stay whole, stops are found."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from specjax.io import tokenizer
from specjax.io.errors import TokenizerError


def _byte_level():
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = Tokenizer(models.BPE(
      {s: i for i, s in enumerate([*alphabet, "Ġhi"])}, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece(strip):
  pieces = [*(f"<0x{i:02X}>" for i in range(256)), "▁", "▁a", "b", "é", "▁▁"]
  backend = Tokenizer(models.BPE(
      {s: i for i, s in enumerate(pieces)}, [], byte_fallback=True))
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(),
           decoders.Fuse()]
  backend.decoder = decoders.Sequence(
      steps + [decoders.Strip(" ", 1, 0)] * strip)
  return backend


@pytest.fixture(
    params=[_byte_level, lambda: _sentencepiece(0), lambda: _sentencepiece(1)],
    ids=["bytes", "pieces", "pieces, leading space"])
def toy(request):
  backend = request.param()
  backend.add_special_tokens([AddedToken("<end>", special=True)])
  return tokenizer.Tokenizer(backend)


def _sequences(toy, count):
  """Random ids, half of them from valid text, so that both kinds occur."""
  rng = random.Random(0)
  for _ in range(count):
    ids = []
    for _ in range(rng.randrange(12)):
      if rng.random() < 0.5:
        ids.append(rng.randrange(toy.vocab_size))
      else:
        ids += _bytes(toy, rng.choice("é日😀 ab"))
    yield ids, rng


def _bytes(toy, text):
  if toy.byte_ids:
    return list(text.encode())
  return toy.encode(text)


@pytest.mark.parametrize("skip_special", [True, False])
def test_pieces_add_up(toy, skip_special):
  for ids, rng in _sequences(toy, 300):
    whole = toy.decode(ids, skip_special=skip_special)
    stream = tokenizer.StreamDecoder(toy, skip_special=skip_special)
    pieces, rest = [], list(ids)
    while rest:
      size = rng.randrange(1, 5)
      pieces.append(stream.push(rest[:size]))
      rest = rest[size:]
      assert not pieces[-1].endswith("\ufffd")
      assert whole.startswith("".join(pieces))
    assert "".join([*pieces, stream.flush()]) == whole


def test_a_character_waits_for_its_last_byte(toy):
  ids = _bytes(toy, "é😀")
  stream = tokenizer.StreamDecoder(toy)
  pieces = [stream.push([i]) for i in ids]
  if toy.byte_ids:  # a run of byte tokens is not final before its end
    assert pieces == [""] * 6 and stream.flush() == "é😀"
  else:
    assert pieces == ["", "é", "", "", "", "😀"] and not stream.flush()


def test_flush_gives_the_rest_and_starts_again(toy):
  stream = tokenizer.StreamDecoder(toy)
  half = _bytes(toy, "日")[:2]
  assert stream.push(half) == ""
  rest = stream.flush()
  assert rest == toy.decode(half) and "\ufffd" in rest
  assert stream.flush() == ""
  whole = _bytes(toy, "日")
  assert stream.push(whole) + stream.flush() == "日"


@pytest.mark.parametrize("text, stops, expected, hit", [
    ("one END two", ["END"], "one ", "END"),
    ("one EN", ["END"], "one EN", None),
    ("ENEND", ["END"], "EN", "END"),
    ("aaab", ["aab"], "a", "aab"),
    ("abcde", ["bcde", "cd"], "ab", "cd"),  # complete first
    ("abcd", ["cd", "bcd"], "a", "bcd"),  # together: the longest
    ("x\n\ny", ["\n\n", "\n\nHuman:"], "x", "\n\n"),
    ("日本", ["本"], "日", "本"),
    ("text", [], "text", None),
    ("END", ["END"], "", "END"),
    ("a.b", ".", "a", "."),
])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings(text, stops, expected, hit, size):
  search = tokenizer.StopStrings(stops)
  pieces = [
      search.push(text[i:i + size]) for i in range(0, len(text), size)]
  assert "".join(pieces) + search.flush() == expected
  assert search.hit == hit
  if hit:
    assert search.push("more") == "" and search.flush() == ""


def test_only_possible_beginnings_are_held_back():
  search = tokenizer.StopStrings(["\nUser:", "END"])
  assert search.push("some text") == "some text"
  assert search.push(" E") == " "
  assert search.push("N") == ""
  assert search.push("x\nUs") == "ENx"
  assert search.push("e of") == "\nUse of"


def test_empty_stop_string_is_refused():
  with pytest.raises(TokenizerError, match="empty"):
    tokenizer.StopStrings(["a", ""])
