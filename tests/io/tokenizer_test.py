"""Tokenizers: round trips, special tokens, templates, comparison."""

import json

import pytest
from tokenizers import pre_tokenizers

from specjax.io import gguf, hub, tokenizer
from specjax.io.errors import TokenizerError

_TEXTS = [
    "", "Hello  world", " lead", "trail  ", "a\tb\t\tc", "12345 3.14",
    "\n\n\n  x   y\r\n", "naïve 日本語 नमस्ते", "😀👩‍👩‍👧",
    "def f(x):\n    return x", "a\x00b"]
_TEMPLATE = (
    "{% for m in messages %}\n"
    "<|im_start|>{{ m.role }}\n"
    "{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def _byte_level(pre="smollm", **changes):
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = ["h e", "he l", "l o", "Ġ w", "Ġ Ġ"]
  tokens = [
      "<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet,
      *(m.replace(" ", "") for m in merges), "<tool>"]
  types = [3] * 3 + [1] * (len(tokens) - 4) + [4]
  return {
      "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
      "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
      "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2,
      "tokenizer.chat_template": _TEMPLATE, **changes}


def _sentencepiece(**changes):
  pieces = [
      "<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>", "  ", "   ",
      *(f"<0x{i:02X}>" for i in range(256)), *"▁helowrd", "he", "ll", "hell",
      "hello", "▁w", "lo"]
  types = [3, 3, 3, 2, 3, 4, 4] + [6] * 256 + [1] * (len(pieces) - 263)
  return {
      "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces,
      "tokenizer.ggml.token_type": types,
      "tokenizer.ggml.scores": [-float(i) for i in range(len(pieces))],
      "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
      "tokenizer.ggml.unknown_token_id": 3,
      "tokenizer.ggml.add_space_prefix": False, **changes}


_ALL = [_byte_level(), _byte_level("qwen2"), _sentencepiece()]
_NAMES = ["smollm", "qwen2", "gemma"]


@pytest.fixture(params=_ALL, ids=_NAMES)
def toy(request):
  return tokenizer.Tokenizer.from_gguf(request.param)


@pytest.mark.parametrize("text", _TEXTS)
def test_round_trip(toy, text):
  assert toy.decode(toy.encode(text)) == text


def _pieces(toy, text, **options):
  return [toy.token_strings()[i] for i in toy.encode(text, **options)]


@pytest.mark.parametrize("metadata, text, expected", [
    (_ALL[0], "hello  w", ["hel", "lo", "Ġ", "Ġw"]),
    (_ALL[0], "12 34", ["1", "2", "Ġ", "3", "4"]),  # SmolLM splits digits
    (_ALL[1], "e\u0301", ["Ã", "©"]),  # Qwen2 composes accents
    # Runs of spaces are pieces of their own, longest first.
    (_ALL[2], "hello     w", ["<bos>", "hello", "▁▁▁", "▁▁", "w"]),
    (_ALL[2], "helo", ["<bos>", "he", "lo"]),
    (_ALL[2], "é", ["<bos>", "<0xC3>", "<0xA9>"]),
    (_ALL[2], "w<end_of_turn>", ["<bos>", "w", "<end_of_turn>"]),
])
def test_pieces(metadata, text, expected):
  assert _pieces(tokenizer.Tokenizer.from_gguf(metadata), text) == expected


def test_special_tokens():
  toy = tokenizer.Tokenizer.from_gguf(_ALL[0])
  assert _pieces(toy, "<|im_end|>h") == ["<|im_end|>", "h"]
  plain = toy.encode("<|im_end|>h", parse_special=False)
  assert 2 not in plain and toy.decode(plain) == "<|im_end|>h"
  assert toy.encode("<|im_end|>") == [2]  # the switch does not stick
  assert toy.decode([2, toy.encode("h")[0]]) == "h"
  assert toy.decode([2], skip_special=False) == "<|im_end|>"
  assert toy.decode([10**6]) == ""


def test_bos():
  byte, piece = (tokenizer.Tokenizer.from_gguf(m) for m in (_ALL[0], _ALL[2]))
  assert (byte.add_bos, piece.add_bos) == (False, True)
  assert byte.encode("h", add_bos=True)[0] == 1
  assert byte.encode("<|im_start|>h", add_bos=True).count(1) == 1
  assert 2 not in piece.encode("h", add_bos=False)
  none = _byte_level()
  del none["tokenizer.ggml.bos_token_id"]
  with pytest.raises(TokenizerError, match="no BOS"):
    tokenizer.Tokenizer.from_gguf(none).encode("h", add_bos=True)


def test_every_end_token_counts():
  toy = tokenizer.Tokenizer.from_gguf(_ALL[0])
  assert toy.eos_ids == (2, 0)  # the declared one first
  assert tokenizer.Tokenizer.from_gguf(_ALL[2]).eos_ids == (1, 4)
  extra = _byte_level(**{"tokenizer.ggml.eot_token_id": 9})
  assert tokenizer.Tokenizer.from_gguf(extra).eos_ids == (2, 9, 0)
  assert (toy.bos_id, toy.pad_id) == (1, 2)
  assert toy.vocab_size == len(_ALL[0]["tokenizer.ggml.tokens"])


@pytest.mark.parametrize("change, text", [
    ({"tokenizer.ggml.pre": "mystery"}, "'mystery'; known are qwen2, smollm"),
    ({"tokenizer.ggml.model": "bert"}, "'bert'; known are gpt2, llama"),
    ({"tokenizer.ggml.tokens": ["a", "a"]}, "2 entries but only 1"),
])
def test_unknown_kinds(change, text):
  with pytest.raises(TokenizerError, match=text):
    tokenizer.Tokenizer.from_gguf(_byte_level(**change))
  prefix = _sentencepiece(**{"tokenizer.ggml.add_space_prefix": True})
  with pytest.raises(TokenizerError, match="add_space_prefix"):
    tokenizer.Tokenizer.from_gguf(prefix)
  with pytest.raises(TokenizerError, match="tokenizer.ggml.model"):
    tokenizer.Tokenizer.from_gguf({})


def test_cache_serves_only_its_own_vocabulary(tmp_path, monkeypatch):
  path = tmp_path / "deep" / "t.json"
  first = tokenizer.Tokenizer.from_gguf(_ALL[2], path)
  built = []
  monkeypatch.setitem(
      tokenizer.vocab._MODELS, "llama",
      lambda *a, real=tokenizer.vocab._MODELS["llama"]: built.append(1)
      or real(*a))
  again = tokenizer.Tokenizer.from_gguf(_ALL[2], path)
  assert not built and first.compare(again) is None
  assert again.encode("hello  w") == first.encode("hello  w")
  other = _sentencepiece(**{"tokenizer.ggml.unknown_token_id": 0})
  tokenizer.Tokenizer.from_gguf(other, path)  # another vocabulary
  assert built == [1]
  path.write_text("{")  # damaged
  assert tokenizer.Tokenizer.from_gguf(other, path).encode("h")
  assert built == [1, 1]


def test_compare():
  first = tokenizer.Tokenizer.from_gguf(_ALL[0])
  assert first.compare(tokenizer.Tokenizer.from_gguf(_ALL[1])) is None
  tokens = _ALL[0]["tokenizer.ggml.tokens"]
  types = _ALL[0]["tokenizer.ggml.token_type"]
  size = len(tokens)
  padded = _byte_level(**{
      "tokenizer.ggml.tokens": [*tokens, f"[PAD{size}]"],
      "tokenizer.ggml.token_type": [*types, 5]})
  assert first.compare(tokenizer.Tokenizer.from_gguf(padded)) is None
  longer = _byte_level(**{
      "tokenizer.ggml.tokens": [*tokens, "extra"],
      "tokenizer.ggml.token_type": [*types, 1]})
  text = first.compare(tokenizer.Tokenizer.from_gguf(longer))
  for part in (f"id {size} on (nothing against 'extra')",
               f"sizes {size} and {size + 1}", f"{size} strings in common"):
    assert part in text
  assert "id 0 on" in first.compare(tokenizer.Tokenizer.from_gguf(_ALL[2]))


_MESSAGES = [{"role": "user", "content": "hi"}]


def _with_template(template):
  return tokenizer.Tokenizer.from_gguf(
      _byte_level(**{"tokenizer.chat_template": template}))


def test_chat_template():
  toy = tokenizer.Tokenizer.from_gguf(_ALL[0])
  text = toy.apply_chat_template(_MESSAGES)
  assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
  assert toy.encode(text).count(1) == 2
  assert not toy.apply_chat_template(
      _MESSAGES, add_generation_prompt=False).endswith("assistant\n")
  assert len(toy.template_hash) == 64


@pytest.mark.parametrize("template, expected", [
    ("{{ bos_token }}|{{ eos_token }}", "<|im_start|>|<|im_end|>"),
    ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
    ("{{ tools is none }}", "True"),
    ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}"
     "{% endfor %}", "1"),
    ("{% generation %}x{% endgeneration %}", "x"),
    ("{{ strftime_now('%Y') | length }}", "4"),
    ("{{ extra }}", "more"),
])
def test_template_functions(template, expected):
  assert _with_template(template).apply_chat_template(
      _MESSAGES, extra="more") == expected


@pytest.mark.parametrize("template, text", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% if %}", "chat template"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    (None, "no chat template"),
])
def test_template_errors(template, text):
  with pytest.raises(TokenizerError, match=text):
    _with_template(template).apply_chat_template(_MESSAGES)


@pytest.fixture
def folder(tmp_path):
  toy = tokenizer.Tokenizer.from_gguf(_ALL[0], tmp_path / "tokenizer.json")
  for name, value in {
      "tokenizer_config": {
          "bos_token": None, "eos_token": {"content": "<|im_end|>"},
          "chat_template": [{"name": "default", "template": "config"}]},
      "special_tokens_map": {"pad_token": "<|endoftext|>"},
      "generation_config": {"eos_token_id": [2, 5]}}.items():
    (tmp_path / f"{name}.json").write_text(json.dumps(value))
  return tmp_path, toy


def test_folder(folder):
  path, toy = folder
  found = tokenizer.Tokenizer.from_folder(path)
  assert found.compare(toy) is None
  assert found.eos_ids == (2, 5, 0)
  assert (found.bos_id, found.pad_id, found.add_bos) == (None, 0, False)
  assert found.apply_chat_template(_MESSAGES) == "config"
  (path / "chat_template.jinja").write_text("file")
  again = tokenizer.Tokenizer.from_file(path / "tokenizer.json")
  assert again.chat_template == "file"


def test_folder_errors(tmp_path, folder):
  with pytest.raises(TokenizerError, match="tokenizer.json"):
    tokenizer.Tokenizer.from_folder(tmp_path / "absent")
  with pytest.raises(TokenizerError, match="expected a .gguf"):
    tokenizer.Tokenizer.from_file(tmp_path / "vocab.txt")


@pytest.fixture(scope="module")
def real():
  try:
    path = hub.resolve("smollm2-135m-instruct", offline=True, quiet=True)
  except hub.HubError as error:
    pytest.skip(f"no weights: {error}")
  return tokenizer.Tokenizer.from_gguf(gguf.read(path).metadata)


@pytest.mark.weights
def test_real_tokenizer(real):
  for text in _TEXTS:
    ids = real.encode(text)
    assert real.decode(ids) == text
    stream = tokenizer.StreamDecoder(real)
    assert "".join(stream.push([i]) for i in ids) + stream.flush() == text
  assert (real.vocab_size, real.bos_id, real.pad_id) == (49152, 1, 2)
  assert real.eos_ids == (2, 0) and not real.add_bos


@pytest.mark.weights
def test_real_template(real):
  text = real.apply_chat_template(_MESSAGES)
  assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
  assert text.endswith("user\nhi<|im_end|>\n<|im_start|>assistant\n")
  ids = real.encode(text)
  assert ids.count(1) == 3 and ids.count(2) == 2
