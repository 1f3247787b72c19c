"""Rebuilds a tokenizer from the vocabulary inside a GGUF file.

GGUF names the text splitting of byte-level models (`tokenizer.ggml.pre`) but
does not spell it out, so it is written down here for each family. A family
that is not listed is refused: a nearly right tokenizer gives plausible text
and wrong measurements. SentencePiece models need no such table, but those
that put a space before each text (Llama 2) are refused too: tools disagree on
where that space goes beside special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import hashlib
import os
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from specjax.io.errors import TokenizerError

# Part of the cache key; raise it whenever a build rule below changes.
_RECIPE = 1
# Token types of GGUF.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def build(
    metadata: Mapping[str, Any], cache_path: str | Path | None = None
) -> tokenizers.Tokenizer:
  """Builds the tokenizer that GGUF metadata describes.

  Args:
    metadata: `GGUFFile.metadata`, with the `tokenizer.ggml.*` keys.
    cache_path: where to keep the result as a `tokenizer.json` (with a `.key`
      file beside it). It is used again only for the very same vocabulary,
      merges and build rules; SentencePiece vocabularies take seconds without.

  Returns:
    A tokenizer whose ids are those of the file.

  Raises:
    TokenizerError: if a key is missing or the kind is not known.
  """
  model = _need(metadata, "tokenizer.ggml.model")
  tokens = _need(metadata, "tokenizer.ggml.tokens")
  types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
  if len(set(tokens)) != len(tokens):
    raise TokenizerError(
        f"the vocabulary has {len(tokens)} entries but only "
        f"{len(set(tokens))} different strings; the file is damaged")
  if model not in _MODELS:
    raise TokenizerError(
        f"tokenizer.ggml.model is {model!r}; known are "
        f"{', '.join(sorted(_MODELS))}")
  key = _fingerprint(metadata)
  cached = _load(cache_path, key)
  if cached is not None:
    return cached
  built = _MODELS[model](metadata, tokens, types)
  _save(built, cache_path, key)
  return built


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
  """Byte-level BPE: merges are given, text splits depend on the family."""
  pre = metadata.get("tokenizer.ggml.pre")
  if pre not in _PRE:
    raise TokenizerError(
        f"tokenizer.ggml.pre is {pre!r}; known are "
        f"{', '.join(sorted(_PRE))}. Give the model's own tokenizer.json "
        "instead")
  merges = [
      tuple(m.split(" ")) for m in _need(metadata, "tokenizer.ggml.merges")]
  result = tokenizers.Tokenizer(models.BPE(
      vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
  _PRE[pre](result)
  result.decoder = decoders.ByteLevel()
  _add(result, tokens, types, is_normalized=False)
  return result


def _use_smollm(result: tokenizers.Tokenizer) -> None:
  result.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


def _use_qwen2(result: tokenizers.Tokenizer) -> None:
  result.normalizer = normalizers.NFC()
  result.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(_QWEN2), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
  """SentencePiece BPE: merges follow from the scores of the pieces.

  User-defined pieces (runs of spaces and newlines in Gemma) are taken whole,
  longest first, before any merge, as SentencePiece does.
  """
  scores = _need(metadata, "tokenizer.ggml.scores")
  if metadata.get("tokenizer.ggml.add_space_prefix", True):
    raise TokenizerError(
        "tokenizer.ggml.add_space_prefix is true or absent; only "
        "SentencePiece models without that space are known. Give the model's "
        "own tokenizer.json instead")
  # Files spell user-defined runs with plain spaces, the model with "▁".
  tokens = [
      t.replace(" ", "▁") if kind == _USER_DEFINED else t
      for t, kind in zip(tokens, types, strict=True)]
  unknown = metadata.get("tokenizer.ggml.unknown_token_id")
  result = tokenizers.Tokenizer(models.BPE(
      vocab={t: i for i, t in enumerate(tokens)},
      merges=_merges_from_scores(tokens, types, scores),
      unk_token=None if unknown is None else tokens[unknown],
      fuse_unk=True, byte_fallback=True))
  result.normalizer = normalizers.Replace(" ", "▁")
  result.decoder = decoders.Sequence([
      decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
  # Their strings hold "▁", so they must be looked for after normalisation.
  _add(result, tokens, types, is_normalized=True)
  return result


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
  """Lists every split of every piece, best score of the whole first."""
  ids = {t: i for i, t in enumerate(tokens)}
  ranked: list[tuple[float, int, int, tuple[str, str]]] = []
  for token, kind, score in zip(tokens, types, scores, strict=True):
    if kind != _NORMAL:
      continue
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in ids and right in ids:
        ranked.append((-score, ids[left], ids[right], (left, right)))
  ranked.sort()
  return [pair for *_, pair in ranked]


def _add(
    result: tokenizers.Tokenizer, tokens: Sequence[str],
    types: Sequence[int], *, is_normalized: bool) -> None:
  """Marks control tokens as special and user-defined ones as unsplit."""
  result.add_special_tokens([
      tokenizers.AddedToken(t, normalized=False, special=True)
      for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL])
  result.add_tokens([
      tokenizers.AddedToken(t, normalized=is_normalized, special=False)
      for t, kind in zip(tokens, types, strict=True)
      if kind == _USER_DEFINED])


_Builder = Callable[
    [Mapping[str, Any], Sequence[str], Sequence[int]], tokenizers.Tokenizer]
_MODELS: dict[str, _Builder] = {"gpt2": _byte_level, "llama": _sentencepiece}
_PRE: dict[str, Callable[[tokenizers.Tokenizer], None]] = {
    "qwen2": _use_qwen2, "smollm": _use_smollm}


def _need(metadata: Mapping[str, Any], key: str) -> Any:
  if key not in metadata:
    raise TokenizerError(f"the file has no {key}; it holds no tokenizer")
  return metadata[key]


def _fingerprint(metadata: Mapping[str, Any]) -> str:
  digest = hashlib.sha256(f"{_RECIPE} {tokenizers.__version__}".encode())
  for key in sorted(metadata):
    if key.startswith("tokenizer.ggml."):
      digest.update(f"{key}={metadata[key]!r}".encode())
  return digest.hexdigest()


def _load(
    cache_path: str | Path | None, key: str) -> tokenizers.Tokenizer | None:
  if cache_path is None:
    return None
  path = Path(cache_path)
  try:
    if path.with_name(path.name + ".key").read_text() == key:
      return tokenizers.Tokenizer.from_file(str(path))
  except Exception:  # absent, cut or from another version: build it again
    pass
  return None


def _save(
    result: tokenizers.Tokenizer, cache_path: str | Path | None, key: str
) -> None:
  """Writes the cache; failing to is no error (a read-only folder)."""
  if cache_path is None:
    return
  path = Path(cache_path)
  marker = path.with_name(path.name + ".key")
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The key goes first and comes last, so it never vouches for another file.
    marker.unlink(missing_ok=True)
    partial.write_text(result.to_str(), encoding="utf-8")
    os.replace(partial, path)
    marker.write_text(key)
  except OSError:
    partial.unlink(missing_ok=True)
