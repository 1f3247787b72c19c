"""Text while it is being generated: detokenisation and stop strings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from specjax.io.errors import TokenizerError

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Decoder(Protocol):
  """What a `StreamDecoder` needs of a tokenizer."""

  @property
  def byte_ids(self) -> frozenset[int]:
    """Ids that stand for one raw byte of a SentencePiece vocabulary."""

  @property
  def special_ids(self) -> frozenset[int]:
    """Ids left out of decoded text."""

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Returns the text of the ids."""


class StreamDecoder:
  """Turns ids into text piece by piece.

  The pieces, with that of `flush`, concatenate to `decode` of all ids. A
  piece never ends inside a UTF-8 character: such bytes wait for the next id.
  Each id costs two decodings of a few ids, however long the text.
  """

  def __init__(self, tokenizer: Decoder, *, skip_special: bool = True):
    """Starts an empty text.

    Args:
      tokenizer: gives the decoding.
      skip_special: leave special tokens out of the text.
    """
    self._tokenizer = tokenizer
    self._skip_special = skip_special
    # Ids whose text is out, kept because a decoder may treat the first id of
    # a text differently (leading spaces); then ids whose text is held back.
    self._context: list[int] = []
    self._held: list[int] = []

  def push(self, ids: Iterable[int]) -> str:
    """Returns the text that is final once `ids` are appended, maybe ""."""
    pieces = []
    for token in map(int, ids):
      if self._skip_special and token in self._tokenizer.special_ids:
        continue
      self._held.append(token)
      # One more byte can spoil the decoding of the bytes before it, so a run
      # of byte tokens is final only when another token follows.
      if token in self._tokenizer.byte_ids:
        continue
      text = self._new_text()
      if not text.endswith(_REPLACEMENT):
        pieces.append(text)
        self._context, self._held = self._held, []
    return "".join(pieces)

  def flush(self) -> str:
    """Returns the text held back and starts an empty text."""
    text = self._new_text() if self._held else ""
    self._context, self._held = [], []
    return text

  def _new_text(self) -> str:
    before, after = (
        self._tokenizer.decode(ids, skip_special=self._skip_special)
        for ids in (self._context, self._context + self._held))
    return after[len(before):]


class StopStrings:
  """Searches stop strings in text that arrives in pieces.

  The text is cut before the stop string that is complete first (the longest
  of several that end together), wherever the borders of the pieces lie. Text
  that may be the beginning of a stop string is held back.
  """

  def __init__(self, stops: Iterable[str]):
    """Starts a search.

    Args:
      stops: strings, none of them empty; an empty collection stops never.

    Raises:
      TokenizerError: if a stop string is empty.
    """
    self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
    if not all(self._stops):
      raise TokenizerError("a stop string is empty; it would stop at once")
    self._held = ""
    self._hit: str | None = None

  @property
  def hit(self) -> str | None:
    """The stop string that was found, or None."""
    return self._hit

  def push(self, text: str) -> str:
    """Returns the text that may be shown; after a hit always ""."""
    if self._hit is not None:
      return ""
    text = self._held + text
    found = [
        (start + len(stop), start, stop) for stop in self._stops
        if (start := text.find(stop)) >= 0]
    if found:
      _, start, self._hit = min(found)
      self._held = ""
      return text[:start]
    cut = len(text) - self._overlap(text)
    self._held = text[cut:]
    return text[:cut]

  def flush(self) -> str:
    """Returns the text held back: no more will come."""
    text, self._held = self._held, ""
    return text

  def _overlap(self, text: str) -> int:
    """Returns the length of the longest tail that begins a stop string."""
    longest = max((len(s) - 1 for s in self._stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
      tail = text[-length:]
      if any(s.startswith(tail) for s in self._stops):
        return length
    return 0
