"""Text to token ids and back, special tokens, chat templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import functools
import hashlib
from pathlib import Path
import re
import threading
from typing import Any

import tokenizers

from specjax.io import chat, vocab
from specjax.io.errors import FormatError, TokenizerError
from specjax.io.safetensors import id_list, read_json
from specjax.io.stream import StopStrings, StreamDecoder

__all__ = ["StopStrings", "StreamDecoder", "Tokenizer"]

# Tokens that end an answer whether or not a file declares them. They count
# only where the vocabulary marks them as added tokens: "</s>" and the like
# are ordinary text (HTML) in many vocabularies.
_END_NAMES = (
    "<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>",
    "<|end_of_text|>", "<|end|>")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
  """A tokenizer with what a decoder needs to know about its model.

  Attributes:
    bos_id: beginning-of-sequence id, or None.
    eos_ids: every id that ends an answer, the declared one first; maybe ().
    pad_id: declared padding id, or None.
    add_bos: whether the model was trained with BOS before each text.
    chat_template: jinja2 source, or None for a base model.
  """

  def __init__(
      self,
      backend: tokenizers.Tokenizer,
      *,
      bos_id: int | None = None,
      eos_ids: Iterable[int] = (),
      pad_id: int | None = None,
      add_bos: bool = False,
      chat_template: str | None = None,
  ):
    """Wraps a backend; end-of-turn tokens it has join `eos_ids`."""
    self._backend = backend
    self._lock = threading.Lock()
    added = backend.get_added_tokens_decoder()
    names = {token.content: i for i, token in added.items()}
    ends = [names[name] for name in _END_NAMES if name in names]
    self.bos_id = bos_id
    self.eos_ids = tuple(dict.fromkeys([*eos_ids, *sorted(ends)]))
    self.pad_id = pad_id
    self.add_bos = add_bos
    self.chat_template = chat_template

  def state(self) -> dict[str, Any]:
    """Returns everything that `from_state` needs, as plain JSON values."""
    return {
        'backend': self._backend.to_str(), 'bos_id': self.bos_id,
        'eos_ids': list(self.eos_ids), 'pad_id': self.pad_id,
        'add_bos': self.add_bos, 'chat_template': self.chat_template}

  @classmethod
  def from_state(cls, state: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer that `state` described."""
    backend = tokenizers.Tokenizer.from_str(state['backend'])
    rest = {k: v for k, v in state.items() if k != 'backend'}
    return cls(backend, **rest)

  @classmethod
  def from_gguf(
      cls,
      metadata: Mapping[str, Any],
      cache_path: str | Path | None = None,
  ) -> Tokenizer:
    """Builds the tokenizer of a GGUF file.

    Args:
      metadata: `GGUFFile.metadata`.
      cache_path: see `vocab.build`; worth giving for SentencePiece models.

    Raises:
      TokenizerError: if the kind of tokenizer is not known.
    """
    key = "tokenizer.ggml."
    ends = [
        metadata[key + name] for name in (
            "eos_token_id", "eot_token_id", "eom_token_id")
        if key + name in metadata]
    bos_id = metadata.get(key + "bos_token_id")
    # llama.cpp's defaults where the file is silent.
    add_bos = metadata.get(
        key + "add_bos_token", metadata.get(key + "model") == "llama")
    return cls(
        vocab.build(metadata, cache_path), bos_id=bos_id, eos_ids=ends,
        pad_id=metadata.get(key + "padding_token_id"),
        add_bos=bool(add_bos) and bos_id is not None,
        chat_template=metadata.get("tokenizer.chat_template"))

  @classmethod
  def from_folder(cls, path: str | Path) -> Tokenizer:
    """Reads a Hugging Face style folder.

    Uses `tokenizer.json`; and, where present, `tokenizer_config.json`,
    `special_tokens_map.json`, `chat_template.jinja` (which wins over a
    template in the configuration), `config.json` and
    `generation_config.json` (whose stop ids are united).

    Raises:
      TokenizerError: if `tokenizer.json` is missing or not readable.
      FormatError: if one of the other files is not a JSON object.
    """
    folder = Path(path)
    backend = _load(folder / "tokenizer.json")
    files = {
        name: read_json(folder / f"{name}.json")
        if (folder / f"{name}.json").is_file() else {}
        for name in ("special_tokens_map", "tokenizer_config", "config",
                     "generation_config")}
    names = {**files["special_tokens_map"], **files["tokenizer_config"]}

    def find(key: str) -> list[int]:
      entry = names.get(f"{key}_token")
      text = entry.get("content") if isinstance(entry, dict) else entry
      number = backend.token_to_id(text) if isinstance(text, str) else None
      return [] if number is None else [number]

    both = [files["config"], files["generation_config"]]
    bos = find("bos") or id_list(both[0], "bos_token_id")
    pad = find("pad") or id_list(both[0], "pad_token_id")
    ends = find("eos") + [i for c in both for i in id_list(c, "eos_token_id")]
    bos_id = bos[0] if bos else None
    add_bos = names.get("add_bos_token")
    if add_bos is None:
      # Newer folders say it only through the post-processor.
      add_bos = backend.encode("a").ids[:1] == [bos_id]
    return cls(
        backend, bos_id=bos_id, eos_ids=ends, pad_id=pad[0] if pad else None,
        add_bos=bool(add_bos) and bos_id is not None,
        chat_template=_find_template(folder, names))

  @classmethod
  def from_file(cls, path: str | Path) -> Tokenizer:
    """Reads a `.gguf` file, or a `tokenizer.json` with the folder around it.

    Raises:
      TokenizerError: if the file is not readable or has another name.
    """
    path = Path(path)
    if path.suffix == ".gguf":
      from specjax.io import gguf  # slow to import, needed here only
      return cls.from_gguf(gguf.read(path).metadata)
    if path.name == "tokenizer.json":
      return cls.from_folder(path.parent)
    if path.suffix == ".json":
      return cls(_load(path))
    raise TokenizerError(f"{path}: expected a .gguf or tokenizer.json file")

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    return len(self.token_strings())

  @functools.cached_property
  def special_ids(self) -> frozenset[int]:
    """Ids that `decode` leaves out by default."""
    added = self._backend.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)

  @functools.cached_property
  def byte_ids(self) -> frozenset[int]:
    """Ids of byte-fallback tokens `<0x00>` to `<0xFF>`, if any."""
    return frozenset(
        i for i, s in enumerate(self.token_strings())
        if s is not None and _BYTE.fullmatch(s))

  def encode(
      self, text: str, add_bos: bool | None = None, *,
      parse_special: bool = True) -> list[int]:
    """Encodes text.

    Args:
      text: any text; a rendered chat template needs `parse_special`.
      add_bos: put BOS first; None does what the model was trained with. BOS
        is never doubled: a template may have written it already.
      parse_special: read special tokens spelled out in the text as such.
        False treats them as ordinary characters (untrusted text).

    Raises:
      TokenizerError: if BOS is asked for and there is none.
    """
    with self._lock:  # the switch belongs to the shared backend
      self._backend.encode_special_tokens = not parse_special
      ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
    if add_bos is None:
      add_bos = self.add_bos
    if not add_bos:
      return ids
    if self.bos_id is None:
      raise TokenizerError("add_bos: this tokenizer has no BOS token")
    return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Decodes ids; incomplete UTF-8 becomes U+FFFD, unknown ids nothing."""
    return self._backend.decode(
        [int(i) for i in ids], skip_special_tokens=skip_special)

  def apply_chat_template(
      self,
      messages: Sequence[Mapping[str, Any]],
      add_generation_prompt: bool = True,
      **kwargs: Any,
  ) -> str:
    """Renders messages with the model's template; see `chat.render`.

    Args:
      messages: `{"role": ..., "content": ...}` each, oldest first.
      add_generation_prompt: end with the opening of the model's answer.
      **kwargs: more variables of the template, for example `tools`.

    Raises:
      TokenizerError: if the model has no template, or it rejects the
        messages.
    """
    if self.chat_template is None:
      raise TokenizerError(
          "this model has no chat template (a base model?); give it plain "
          "text prompts instead of messages")
    special = {
        "bos_token": self.bos_id, "pad_token": self.pad_id,
        "eos_token": self.eos_ids[0] if self.eos_ids else None}
    strings = {
        name: "" if i is None else self._backend.id_to_token(i)
        for name, i in special.items()}
    return chat.render(
        self.chat_template, messages,
        add_generation_prompt=add_generation_prompt, **{**strings, **kwargs})

  @property
  def template_hash(self) -> str | None:
    """sha256 of the chat template in hexadecimal, or None."""
    if self.chat_template is None:
      return None
    return hashlib.sha256(self.chat_template.encode()).hexdigest()

  def token_strings(self) -> tuple[str | None, ...]:
    """Returns the string of each id as stored; None where an id is unused."""
    return self._strings

  @functools.cached_property
  def _strings(self) -> tuple[str | None, ...]:
    ids = self._backend.get_vocab(with_added_tokens=True)
    strings: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
    for token, i in ids.items():
      strings[i] = token
    return tuple(strings)

  def compare(self, other: Tokenizer) -> str | None:
    """Says how two vocabularies differ; None if they agree id for id.

    Unused ids at the end, which files pad with `[PAD<id>]`, do not count.
    """
    mine, theirs = map(_without_padding, (
        self.token_strings(), other.token_strings()))
    if mine == theirs:
      return None
    pairs = zip(mine, theirs, strict=False)
    shorter = min(len(mine), len(theirs))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    shown = [repr(s[first]) if first < len(s) else "nothing"
             for s in (mine, theirs)]
    shared = len((set(mine) & set(theirs)) - {None})
    return (
        f"vocabularies differ from id {first} on ({shown[0]} against "
        f"{shown[1]}); sizes {len(mine)} and {len(theirs)}, {shared} strings "
        "in common")


def _without_padding(strings: Sequence[str | None]) -> Sequence[str | None]:
  end = len(strings)
  while end and strings[end - 1] in (None, f"[PAD{end - 1}]"):
    end -= 1
  return strings[:end]


def _load(path: Path) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception
    raise TokenizerError(f"cannot read {path}: {error}") from error


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
  """Returns the template of a folder; a file wins over the configuration."""
  file = folder / "chat_template.jinja"
  if file.is_file():
    try:
      return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
      raise FormatError(f"{file}: not UTF-8") from error
  template = config.get("chat_template")
  if isinstance(template, list):  # several, by name
    named = {t.get("name"): t.get("template") for t in template}
    if "default" not in named:
      raise TokenizerError(
          f"{folder}: chat templates {', '.join(map(str, named))}, but none "
          "named default")
    template = named["default"]
  return template
