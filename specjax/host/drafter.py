"""Trained drafters: kept in a folder, loaded for a target."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from specjax.drafters.block import BlockSource
from specjax.drafters.eagle import EagleSource
from specjax.drafters.medusa import HeadsSource
from specjax.drafters.source import LanguageModel
from specjax.host.load import Model
from specjax.io import checkpoint, drafter_file
from specjax.io.errors import FormatError
from specjax.models import trained
from specjax.parallel import rules

_SOURCES: dict[str, Any] = {
    'block': BlockSource, 'eagle': EagleSource, 'heads': HeadsSource,
    'small_lm': LanguageModel}
# Rows of the embedding that tell weights apart.
_ROWS = 256


class Loaded(NamedTuple):
  """A drafter that is ready to decode.

  Attributes:
    source: what a shape drafts from (`drafters.source.Source`).
    params: `params.drafter`.
    facts: `config.json`.
  """

  source: Any
  params: Any
  facts: dict[str, Any]

  @property
  def num_draft(self) -> int:
    """Tokens a round, unless a decoder is told otherwise."""
    return int(self.facts['num_draft'])


def save_drafter(
    folder: str | Path, model: Any, net: Any, ids: Any, target: Model, *,
    kind: str, num_draft: int, form: str = 'bfloat16',
    facts: Mapping[str, Any] | None = None,
) -> Path:
  """Writes a trained drafter; `load_drafter` reads it.

  Args:
    folder: replaced if it holds a drafter.
    model: its pure functions (`BlockModel`, `EagleModel`, `HeadsModel`,
      `SmallLMModel`).
    net: trained weights. ids: int[W], the draft vocabulary.
    target: the model that it drafts for.
    kind: how it was trained ('dspark', ...).
    num_draft: tokens a round, unless a decoder is told otherwise.
    form: of matrices: 'float32', 'bfloat16' or 'int8'.
    facts: more JSON values to keep: origin, scores.

  Raises:
    ValueError: weights that are not finite. OutputError: disk full.
  """
  config = target.lm.config
  about = {
      'kind': kind, 'num_draft': num_draft, 'model': trained.to_values(model),
      'target': {
          'name': target.name, 'weights': fingerprint(target),
          'guidance': target.guidance,
          'embed_dim': config.embed_dim, 'num_layers': config.num_layers,
          'vocab_size': config.vocab_size}}
  return drafter_file.write(
      folder, named(rules.fetch(net)), ids, {**about, **(facts or {})},
      form=form)


def load_drafter(folder: str | Path, target: Model) -> Loaded:
  """Reads what `save_drafter` wrote, or a drafter of another project.

  Matrices get the target's dtype, vectors stay float32. Formats of others
  are those of `host.interchange`.

  Raises:
    ValueError: the folder holds no drafter, is damaged, or is not for such a
      target: another hidden size or vocabulary, layers that it does not have.

  Warns:
    UserWarning: the target has other weights than the one that it was
      trained for, or another guidance; drafts are then accepted less often.
  """
  if drafter_file.whose(folder) == 'other':
    from specjax.host import interchange  # which imports this module
    return interchange.load(folder, target)
  arrays, ids, facts = drafter_file.read(folder)
  model = _model(folder, facts, target.lm.config.dtype)
  _check_target(folder, model, target)
  net = _tree(folder, arrays, trained.abstract(model))
  if facts['target'].get('weights') != fingerprint(target):
    warnings.warn(
        f'{folder}: trained for other weights than those of {target.name} '
        f'({facts["target"].get("name")}): expect fewer accepted drafts',
        stacklevel=2)
  scale = facts['target'].get('guidance', 1.0)
  if scale != target.guidance:
    warnings.warn(
        f'{folder}: trained for guidance {scale:g}, used at '
        f'{target.guidance:g}: expect fewer accepted drafts', stacklevel=2)
  try:
    params = model.attach(net, target.params, ids)
  except ValueError as error:
    raise FormatError(f'{folder}: {error}') from error
  if target.mesh is not None:
    params = rules.on_mesh(params, target.mesh)
  source = _SOURCES[trained.family(model)](model)
  return Loaded(source, params, facts)


def carry_over(folder: str | Path, net: Any, ids: Any) -> Any:
  """Returns `net` with the weights of a saved drafter: to train on from.

  Its draft vocabulary may be another one: what belongs to a token goes to
  that token, tokens that are new keep the fresh weights.

  Raises:
    FormatError: no drafter (states of a training run are none), or a tensor
      of another shape; the message names the first one and both shapes.
  """
  _no_state(Path(folder))
  arrays, old, facts = drafter_file.read(folder)
  axes = _draft_axes(_model(folder, facts))
  ids = np.asarray(ids)
  _, mine, theirs = np.intersect1d(ids, old, return_indices=True)
  # What it would be with as many tokens as the saved one drafts.
  wanted = {name: tuple(n + (len(old) - len(ids)) * (i == axes.get(name))
                        for i, n in enumerate(leaf.shape))
            for name, leaf in named(net).items()}
  _same_shapes(folder, {k: x.shape for k, x in arrays.items()}, wanted)

  def one(path, leaf):
    name = _name(path)
    array, axis = arrays[name], axes.get(name)
    if axis is None:
      return jnp.asarray(array, leaf.dtype)
    # Rows beyond the vocabulary, at the end, are everybody else's.
    extra = np.arange(leaf.shape[axis] - len(ids))
    out = np.moveaxis(np.array(leaf), axis, 0)
    out[np.append(mine, len(ids) + extra)] = np.moveaxis(array, axis, 0)[
        np.append(theirs, len(old) + extra)]
    return jnp.asarray(np.moveaxis(out, 0, axis), leaf.dtype)
  return jax.tree_util.tree_map_with_path(one, net)


def _no_state(folder: Path) -> None:
  """Raises FormatError for states of a training run, or its whole --out."""
  if (folder / 'config.json').is_file():
    return
  places = [folder, *folder.glob('*'), *folder.glob('checkpoints/*')]
  if any(map(checkpoint.is_checkpoint, places)):
    raise FormatError(
        f'{folder}: holds states of training, and wanted is a drafter: give '
        "the folder 'drafter' that train.drafter wrote to its --out")


def _same_shapes(
    folder: Any, found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
) -> None:
  """Raises FormatError naming the first tensor that differs."""
  for name in [*wanted, *found]:
    have, need = (list(x[name]) if name in x else 'absent'
                  for x in (found, wanted))
    if have != need:
      raise FormatError(f'{folder}: a drafter of another size or kind: '
                        f'{name} is {have} there, {need} here')


def fingerprint(target: Model) -> str:
  """Returns a hash that tells a target's weights from others' of its shape.

  Of a part of them, in bfloat16: equal however they were loaded.
  """
  found = hashlib.sha256()
  rows = rules.fetch(target.params['embedding'][:_ROWS])
  found.update(np.asarray(rows).astype(ml_dtypes.bfloat16).tobytes())
  for leaf in jax.tree.leaves(target.params):
    if leaf.ndim == 1:  # norms: few, and every layer has them
      found.update(np.asarray(rules.fetch(leaf)).astype(
          ml_dtypes.bfloat16).tobytes())
  return found.hexdigest()


def named(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree of dicts by name: 'layer_0.mlp.down'."""
  return {_name(path): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple) -> str:
  return '.'.join(str(entry.key) for entry in path)


def _model(folder: Any, facts: Mapping[str, Any], dtype: str | None = None
           ) -> Any:
  """Returns the pure functions of a saved drafter."""
  for key in ('model', 'target', 'num_draft'):
    if key not in facts:
      raise FormatError(f'{folder}/config.json: no {key!r}')
  values = facts['model']
  if dtype is not None:
    values = {**values, 'config': _in_dtype(values.get('config', {}), dtype)}
  return trained.from_values(values)


def _draft_axes(model: Any) -> dict[str, int]:
  """Returns, by name, the axis of a weight that counts drafted tokens."""
  small, large = (named(trained.abstract(type(model)(dataclasses.replace(
      model.config, draft_vocab_size=n)))) for n in (1, 2))
  # Sizes alone do not tell: as many tokens as channels may be drafted.
  return {name: axis for name, x in small.items()
          for axis, n in enumerate(x.shape) if n != large[name].shape[axis]}


def _in_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """Returns a model's config for a target that computes in `dtype`."""
  if 'decoder' in config:
    return {**config, 'decoder': {**config['decoder'], 'dtype': dtype}}
  return {**config, 'dtype': dtype}


def _check_target(folder: Any, model: Any, target: Model) -> None:
  """Raises FormatError when shapes do not fit."""
  config = target.lm.config
  width, vocab_size, _ = trained.sizes(model)
  for what, have, need in (
      ('hidden size', config.embed_dim, width),
      ('vocabulary', config.vocab_size, vocab_size)):
    if need is not None and have != need:
      raise FormatError(f'{folder}: drafts for a target of {what} {need}, '
                        f'{target.name} has {have}')
  layers = [t for t in getattr(model.config, 'taps', ())
            if not 0 <= t <= config.num_layers]
  if layers:
    raise FormatError(
        f'{folder}: reads the hidden states {layers}, {target.name} has 0 to '
        f'{config.num_layers}')


def _tree(folder: Any, arrays: dict[str, Any], wanted: Any) -> Any:
  """Returns the weights as a tree, in their dtypes."""
  expected = named(wanted)
  missing = sorted(set(expected) - set(arrays))
  extra = sorted(set(arrays) - set(expected))
  if missing or extra:
    raise FormatError(
        f'{folder}: tensors missing: {missing or "none"}, unknown: '
        f'{extra or "none"}')

  def one(path, leaf):
    array = arrays[_name(path)]
    if array.shape != leaf.shape:
      raise FormatError(f'{folder}: tensor {_name(path)!r} has shape '
                        f'{array.shape}, expected {leaf.shape}')
    is_matrix = array.ndim >= 2
    return jnp.asarray(array, leaf.dtype if is_matrix else jnp.float32)
  return jax.tree_util.tree_map_with_path(one, wanted)
