"""Logical axes to mesh axes, as tables."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from specjax.parallel.mesh import DATA, MODEL

# Logical name of a parameter axis -> mesh axis (None: replicated).
PARAM_RULES: dict[str | None, str | None] = {
    None: None, 'embed': None, 'vocab': MODEL, 'mlp': MODEL,
    'kv_heads': MODEL, 'heads': MODEL}


def _fits(size: int, axis: str | None, mesh: Mesh) -> str | None:
  """Replicates an axis that the mesh does not divide."""
  if axis is None or size % mesh.shape[axis]:
    return None
  return axis


def param_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
  """Returns a `NamedSharding` for each parameter.

  Args:
    mesh: with axes `data`, `model`.
    axes: tree of tuples of logical names (`models.weights.logical_axes`).
    shapes: tree of arrays or `ShapeDtypeStruct`s, same structure.
  """
  def one(shape, names):
    spec = [_fits(n, PARAM_RULES[name], mesh)
            for n, name in zip(shape.shape, names, strict=True)]
    return NamedSharding(mesh, P(*spec))
  return jax.tree.map(one, shapes, axes)


def state_shardings(mesh: Mesh, shapes: Any, batch: int) -> Any:
  """Returns shardings of a state: rows over `data`, heads over `model`.

  A leaf that leads with B is split by rows; keys and values (`[B, G, slots,
  H]` under 'k' and 'v') also by key-value heads. Everything else, and
  whatever the mesh does not divide, is replicated.
  """
  def one(path, leaf):
    if leaf.ndim == 0 or leaf.shape[0] != batch:
      return NamedSharding(mesh, P())
    spec = [_fits(batch, DATA, mesh)] + [None] * (leaf.ndim - 1)
    name = getattr(path[-1], 'key', None)
    if name in ('k', 'v') and leaf.ndim == 4:
      spec[1] = _fits(leaf.shape[1], MODEL, mesh)
    return NamedSharding(mesh, P(*spec))
  return jax.tree_util.tree_map_with_path(one, shapes)


def put(tree: Any, shardings: Any) -> Any:
  """Places host arrays; every process passes the whole (equal) array."""
  def one(x, sharding):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = one(jax.random.key_data(x), sharding)
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
  return jax.tree.map(one, tree, shardings)


def on_mesh(tree: Any, mesh: Mesh) -> Any:
  """Replicates what lives elsewhere (a drafter that was loaded apart).

  The compiled loop would copy it to the mesh at every call.
  """
  everywhere = NamedSharding(mesh, P())
  devices = set(mesh.devices.flat)

  def one(x):
    if isinstance(x, jax.Array) and x.sharding.device_set == devices:
      return x
    return put(x, everywhere)
  return jax.tree.map(one, tree)


def fetch(tree: Any) -> Any:
  """Returns host copies of global arrays, on every process."""
  def one(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
  return jax.tree.map(one, tree)
