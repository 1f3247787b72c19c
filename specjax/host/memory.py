"""What a run will need, said before anything is allocated."""

from __future__ import annotations

import math
import os
from typing import Any

import jax


def tree_bytes(tree: Any, shardings: Any = None) -> int:
  """Returns bytes of a tree of arrays or shapes, on its fullest device.

  Args:
    tree: arrays, or shapes with dtypes.
    shardings: where the leaves will be; None takes where they are, and the
      whole leaf where that is not known.
  """
  def size(leaf, sharding=None) -> int:
    sharding = sharding or getattr(leaf, 'sharding', None)
    shape = leaf.shape
    if sharding is not None:
      shape = sharding.shard_shape(shape)
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return math.prod(shape) * (8 if is_key else leaf.dtype.itemsize)

  if shardings is None:
    return sum(map(size, jax.tree.leaves(tree)))
  return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))


def device_limit(device: jax.Device) -> int | None:
  """Returns the bytes a device may use, or None when nobody knows."""
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return int(stats['bytes_limit'])
  if device.platform == 'cpu':
    try:
      return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (ValueError, OSError):
      return None
  return None


def check(
    params: Any, state: Any, *, batch: int, size: int, num_draft: int,
    vocab_size: int, num_devices: int = 1, shardings: Any = None,
    limit: int | None = None,
) -> int:
  """Raises MemoryError when a run cannot fit; returns its bytes a device.

  An estimate: parameters (already there), the state, and the float32 logits
  of one round three times over (raw, processed, noise).

  Args:
    params, state: arrays or shapes. batch: B. size: S. num_draft: N.
    vocab_size: V. num_devices: that the logits are split over.
    shardings: of the state.
    limit: bytes of one device; None asks the device.
  """
  weights = tree_bytes(params)
  states = tree_bytes(state, shardings)
  logits = 3 * 4 * batch * (num_draft + 1) * vocab_size // num_devices
  need = weights + states + logits
  if limit is None:
    limit = device_limit(jax.local_devices()[0])
  if limit is not None and need > limit:
    gib = 2**30
    raise MemoryError(
        f'this run needs about {need / gib:.2f} GiB a device (parameters '
        f'{weights / gib:.2f}, caches and state {states / gib:.2f} for '
        f'{batch} rows of {size} tokens, logits {logits / gib:.2f}), and the '
        f'device has {limit / gib:.2f} GiB: lower the batch size, '
        'max_new_tokens or num_speculative_tokens, or use more devices')
  return need
