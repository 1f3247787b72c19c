"""A tiny random model with a byte tokenizer: programs run without data."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from specjax.host.load import Model, random_model
from specjax.io.tokenizer import Tokenizer
from specjax.models.transformer_config import TransformerConfig

_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n"
    '{% endfor %}<|assistant|>')


def tokenizer() -> Tokenizer:
  """Returns a tokenizer with a token per byte and an end token (256)."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {letter: i for i, letter in enumerate(letters)}
  vocab['<end>'] = len(vocab)
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(['<end>'])
  return Tokenizer(backend, eos_ids=(vocab['<end>'],),
                   chat_template=_TEMPLATE)


def config(vocab_size: int = 257, **kwargs) -> TransformerConfig:
  """Returns the shape of a two-layer decoder."""
  shape = dict(
      vocab_size=vocab_size, num_layers=2, embed_dim=32, mlp_dim=64,
      num_heads=4, num_kv_heads=2, head_dim=8)
  return TransformerConfig(**{**shape, **kwargs})


def model(*, seed: int = 0, mesh=None, **kwargs) -> Model:
  """Returns a tiny random model; equal seeds give equal weights."""
  text = tokenizer()
  return random_model(config(**kwargs), seed=seed, mesh=mesh, chunk=64,
                      tokenizer=text, eos=text.eos_ids)
