"""Hugging Face generate on the same weights and device, for comparison."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import numpy as np

from benchmarks import setup
import specjax
from specjax.models import weights

NEW = 128


def to_torch(model) -> Any:
  """Returns a transformers model with the weights of `model`, on a device.

  Of the Llama or the Qwen2 architecture: biases decide.
  """
  import torch
  import transformers

  c = model.lm.config
  name = 'Qwen2' if c.qkv_bias else 'Llama'
  config = getattr(transformers, f'{name}Config')(
      vocab_size=c.vocab_size, hidden_size=c.embed_dim,
      intermediate_size=c.mlp_dim, num_hidden_layers=c.num_layers,
      num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
      head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
      tie_word_embeddings=c.tied, max_position_embeddings=32768,
      rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_base},
      bos_token_id=None, eos_token_id=list(model.eos) or None,
      pad_token_id=0)
  net = getattr(transformers, f'{name}ForCausalLM')(config)
  tensors = {k: torch.from_numpy(np.array(v, np.float32))
             for k, v in weights.export(c, model.params).items()}
  missing, unexpected = net.load_state_dict(tensors, strict=False)
  if unexpected or [m for m in missing if m != 'lm_head.weight']:
    raise ValueError(f'missing {missing}, unexpected {unexpected}')
  return net.to(getattr(torch, c.dtype)).to(device()).eval()


def device() -> str:
  """Returns the device that torch is to use."""
  import torch
  return 'cuda' if torch.cuda.is_available() else 'cpu'


def _too_long(*unused):
  raise TimeoutError('over the time limit of a mode')


def section(model: specjax.Model, questions: str, repeats: int, save,
            limit: int = 75) -> Any:
  """Milliseconds a token of generate: dynamic, static + compile, lookup.

  `save` is called after each mode; a mode over `limit` seconds is given up.
  """
  import torch

  signal.signal(signal.SIGALRM, _too_long)

  net = to_torch(model)
  with open(questions, encoding='utf-8') as file:
    rows = [json.loads(line) for line in file]
  row = next(r for r in rows if r['category'] == 'summarization')
  text = model.tokenizer.apply_chat_template(
      [{'role': 'user', 'content': row['turns'][0]}])
  ids = torch.tensor([model.tokenizer.encode(text, add_bos=False)]).cuda()
  mask = torch.ones_like(ids)
  base = dict(attention_mask=mask, do_sample=False, max_new_tokens=NEW,
              min_new_tokens=NEW)
  modes = {
      'dynamic': {}, 'prompt_lookup': {'prompt_lookup_num_tokens': 7},
      'static_compile': {'cache_implementation': 'static'}}
  out: dict[str, Any] = {'new_tokens': NEW, 'prompt': int(ids.shape[1])}
  out['specjax'] = {}
  drafters = {'plain': None, 'lookup_k7': {
      'method': 'ngram', 'num_speculative_tokens': 7,
      'prompt_lookup_min': 2, 'prompt_lookup_max': 4}}
  for name, drafter in drafters.items():
    times = []
    for i in range(1 + min(repeats, 5)):
      result = specjax.generate(
          model, drafter, [ids[0].tolist()],
          specjax.Sampling(max_new_tokens=NEW, ignore_eos=True))
      if i:
        times.append(result.wall_s / NEW * 1e3)
    out['specjax'][name] = {'ms_a_token': setup.spread(times)}
  for name, extra in modes.items():
    times = []
    signal.alarm(limit)
    try:
      for i in range(2 + min(repeats, 5)):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        net.generate(ids, **base, **extra)
        torch.cuda.synchronize()
        if i >= 2:  # two warm-ups: compilation and its guards
          times.append((time.perf_counter() - begin) / NEW * 1e3)
      out[name] = {'ms_a_token': setup.spread(times)}
    except Exception as error:  # a peer's failure is a result, not ours
      out[name] = {'failed': repr(error)[:300]}
    signal.alarm(0)
    save(dict(out))
  return out
