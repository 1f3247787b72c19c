"""Attention over a cache, and the cache itself.

A layer's cache is a dict `{'k', 'v'}` of `[B, G, slots, H]` (G key-value
heads; heads before slots, so that the matrix products read it as it lies: on
CPUs the other order costs a transposed copy of the cache a layer, on GPUs
both are equally fast), plus `'slot' int32[B, slots]` for sliding windows,
whose slots are a ring. Entry `base + t` of a block goes to slot `base + t`
(modulo the ring);
masks compare what is stored in a slot, never the slot's index, so stale
entries are invisible and rolling back writes nothing.

`attend` is the seam for custom kernels: nothing else touches keys and values.
"""

from __future__ import annotations

from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

Array = jax.Array
Cache = dict[str, Array]

# Finite, so that a row that sees nothing is not NaN; exp of it is zero.
UNSEEN = -1e30


class Block(struct.PyTreeNode, kw_only=True):
  """Where the T tokens of one call stand.

  A tree may be fed in several calls, a level at a time. Its nodes are entries
  0, 1, ... of a scratch region that begins at slot `base`; one call feeds
  entries `start` to `start + T - 1`, earlier calls have fed the others.

  Attributes:
    base: int32[B], slot of entry 0; everything below it is committed and
      visible.
    position: int32[B,T], rotary position (`base` plus depth for a tree).
    fed: bool[B,T] or None (all); unfed entries are not stored, so nothing
      may have one as an ancestor.
    ancestors: bool[T,start+T] or [B,T,start+T], which entries a token sees,
      itself included; parents come before their children. None for a chain,
      which sees every entry up to itself.
    entry_position: int32[B,start+T], `position` of all entries. Only sliding
      windows read it; may be None when `start` is 0.
    start: static; number of entries that earlier calls have fed, >= 0.
    exact: static; attend to a tree in path order (see `Sight.view`).
    first: int32[B] or None; slots before it are never seen (a prompt padded
      on its left).
    whole: static; the T tokens are the whole text (`base` 0, `start` 0):
      attention reads this call's keys and the cache is left alone. For
      training, where `ancestors` keeps packed documents apart.
  """

  base: Array
  position: Array
  fed: Array | None = None
  ancestors: Array | None = None
  entry_position: Array | None = None
  first: Array | None = None
  start: int = struct.field(pytree_node=False, default=0)
  exact: bool = struct.field(pytree_node=False, default=False)
  whole: bool = struct.field(pytree_node=False, default=False)

  @property
  def size(self) -> int:
    """Entries so far, this call's included: start + T."""
    return self.start + self.position.shape[1]

  @property
  def slot(self) -> Array:
    """int32[B,T], the slot that each token is stored under."""
    return self.base[:, None] + jnp.arange(self.start, self.size)


class Sight(NamedTuple):
  """What each token of a block attends to.

  Attributes:
    seen: bool[B,T,slots], which keys it may see.
    view: int32[B,T,slots] or None. The slot whose entry a token finds at each
      slot: its ancestors follow the committed entries, root first, as if its
      path had been decoded as a chain. None: slots as they are.
  """

  seen: Array
  view: Array | None = None


def empty_cache(
    batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype,
    *, ring: int | None = None,
) -> Cache:
  """Returns zeroed keys and values; `ring` slots when a window bounds them.

  Zeros, not uninitialised memory: 0 * NaN would leak from a masked slot.
  """
  if ring is not None and ring >= capacity:
    # Nothing to save, and a ring shorter than asked would let a write past
    # the end wrap onto keys that are still seen, where it should be dropped.
    ring = None
  slots = capacity if ring is None else ring
  shape = (batch, num_kv_heads, slots, head_dim)
  cache = {'k': jnp.zeros(shape, dtype), 'v': jnp.zeros(shape, dtype)}
  if ring is not None:
    cache['slot'] = jnp.full((batch, slots), -1, jnp.int32)
  return cache


def write(cache: Cache, block: Block, k: Array, v: Array) -> Cache:
  """Stores `k, v [B,T,G,H]`; entries past the end or not fed are dropped.

  A vmapped row scatter: no collective when rows or heads are sharded, and no
  clamping at the end (a slice update would overwrite valid entries).
  """
  dest = _dest(cache, block)
  put = jax.vmap(  # rows, then heads
      jax.vmap(lambda old, i, x: old.at[i].set(x, mode='drop'),
               in_axes=(0, None, 0)))
  # XLA on CPUs turns a scatter of one entry into slice updates, duplicates
  # them and copies the cache in between; a second entry, dropped, keeps it.
  lone = dest.size == 1 and jax.default_backend() == 'cpu'
  if lone:
    dest = jnp.pad(dest, ((0, 0), (0, 1)),
                   constant_values=cache['k'].shape[2])
  new = {}
  for name, x in (('k', k), ('v', v)):
    x = jnp.moveaxis(x, 2, 1).astype(cache[name].dtype)
    if lone:
      x = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0)))
    new[name] = put(cache[name], dest, x)
  if 'slot' in cache:
    new['slot'] = write_slots(cache, block)
  return new


def write_slots(cache: Cache, block: Block) -> Array:
  """Returns a ring's `slot int32[B,slots]` after `block` is written."""
  put = jax.vmap(lambda old, i, x: old.at[i].set(x, mode='drop'))
  return put(cache['slot'], _dest(cache, block), block.slot)


def _dest(cache: Cache, block: Block) -> Array:
  """Returns where entries go, int32[B,T]; out of range is dropped."""
  slots, slot = cache['k'].shape[2], block.slot
  keep = slot >= 0
  if block.fed is not None:
    keep &= block.fed
  dest = slot % slots if 'slot' in cache else slot
  return jnp.where(keep, dest, slots)  # -1 would wrap


def sight(cache: Cache, block: Block, window: int | None) -> Sight:
  """Returns what the tokens of a block attend to.

  `cache` is as it was *before* the block is written; one sight serves all
  layers of a kind.

  Raises:
    ValueError: a window needs the positions of entries that earlier calls
      have fed.
  """
  if block.whole:
    return Sight(_whole_mask(block, window))
  if 'slot' in cache:
    stored = write_slots(cache, block)
  else:
    stored = jnp.arange(cache['k'].shape[2])[None]
  stored = stored[:, None, :]  # [B|1,1,slots]
  if block.ancestors is None:
    seen = (stored >= 0) & (stored <= block.slot[..., None])
    if block.first is not None:
      seen &= stored >= block.first[:, None, None]
    if window is not None:
      seen &= stored > block.slot[..., None] - window
    return Sight(seen)
  seen = _tree_mask(stored, block, window)
  if not block.exact:
    return Sight(seen)
  return _path_order(stored, block, seen, is_ring='slot' in cache)


def _whole_mask(block: Block, window: int | None) -> Array:
  """Returns bool[B,T,T] for a block that is the whole text."""
  size = block.position.shape[1]
  seen = (jnp.tril(jnp.ones((size, size), bool)) if block.ancestors is None
          else block.ancestors)
  seen = jnp.broadcast_to(seen, block.position.shape + (size,))
  if window is not None:
    gap = block.position[:, :, None] - block.position[:, None]
    seen &= gap < window
  if block.first is not None:
    seen &= jnp.arange(size) >= block.first[:, None, None]
  return seen


def _tree_mask(stored: Array, block: Block, window: int | None) -> Array:
  """Returns bool[B,T,slots]; `stored int32[B|1,1,slots]` after the write."""
  base = block.base[:, None, None]
  seen = (stored >= 0) & (stored < base)
  if block.first is not None:
    seen &= stored >= block.first[:, None, None]
  if window is not None:
    seen &= stored > block.position[..., None] - window
  inside = stored - base  # entry of the scratch region
  local = _above(block)
  if window is not None:
    entries = block.entry_position
    if entries is None:
      if block.start:
        raise ValueError(
            f'entry_position is None, but start={block.start}: a sliding '
            'window compares positions, of earlier entries too')
      entries = block.position
    gap = block.position[:, :, None] - entries[:, None, :]
    local &= gap < window
  index = jnp.clip(jnp.broadcast_to(
      inside, (inside.shape[0], 1, inside.shape[2])), 0, block.size - 1)
  hit = jnp.take_along_axis(local, index, axis=2)
  return seen | (hit & (inside >= 0) & (inside < block.size))


def _above(block: Block) -> Array:
  """Returns `ancestors` as bool[B,T,start+T]."""
  assert block.ancestors is not None
  return jnp.broadcast_to(
      block.ancestors, block.position.shape + (block.size,))


def _path_order(
    stored: Array, block: Block, seen: Array, *, is_ring: bool
) -> Sight:
  """Returns the sight of tokens that find their paths stored as chains.

  Sums run over slots. Once the path to a node is committed, its entries lie
  behind the prefix; here they are looked up as if they already did, so that
  the same numbers are added in the same order. A ring keeps this promise:
  entry e of a text is always in slot e modulo the ring.

  Args:
    stored: int32[B|1,1,slots], entry in each slot after the write.
    block: of a tree.
    seen: bool[B,T,slots], for slots as they are.
    is_ring: whether slots wrap around.
  """
  slots = stored.shape[2]
  above = _above(block)
  # path[..., i] is the entry of the i-th ancestor: parents come first.
  place = jnp.where(above, jnp.cumsum(above, axis=-1) - 1, -1)
  path = jnp.argmax(
      place[:, :, None] == jnp.arange(block.size)[:, None], axis=-1)
  length = jnp.sum(above, axis=-1)[..., None]
  base = block.base[:, None, None]
  here = jnp.arange(slots)
  inside = here - base
  if is_ring:
    inside = inside % slots
  on_path = (inside >= 0) & (inside < length)
  view = base + jnp.take_along_axis(
      path, jnp.clip(inside, 0, block.size - 1), axis=2)
  if is_ring:
    view = view % slots
  view = jnp.where(on_path, view, here)
  # Entries of the region are seen in their path's order only.
  found = jnp.take_along_axis(
      seen, view, axis=2, mode='fill', fill_value=False)
  return Sight(found & (on_path | (stored < base)), view)


def attend(
    q: Array, k: Array, v: Array, sight: Sight, *, scale: float,
    softcap: float | None, precision,
) -> Array:
  """Grouped-query attention of T tokens over a cache.

  Args:
    q: [B,T,G,Q,H] (Q query heads share a key-value head).
    k: [B,G,slots,H]. v: the same.
    sight: what each token sees. A token that sees nothing (padding) gets the
      mean of everything: finite, and never used. With a `view`, every token
      reads its own copy of keys and values, 2 * B * T * G * slots * H numbers:
      for short contexts.
    scale: multiplies the scores. softcap: bounds them by tanh, or None.
    precision: of the matrix products.

  Returns:
    [B,T,G,Q,H] in q's dtype. Scores and softmax are float32.
  """
  batch, size, groups, per, head_dim = q.shape
  if sight.view is not None:
    # Every token becomes a row of one token.
    fold = lambda x: x.reshape((batch * size,) + x.shape[2:])  # noqa: E731
    own = jax.vmap(jax.vmap(  # rows, then tokens
        lambda x, i: jnp.take(x, i, axis=1, mode='clip'), in_axes=(None, 0)))
    out = attend(
        fold(q)[:, None], fold(own(k, sight.view)), fold(own(v, sight.view)),
        Sight(fold(sight.seen)[:, None]), scale=scale, softcap=softcap,
        precision=precision)
    return out.reshape(q.shape)
  slots = k.shape[2]
  # One batched matrix product per row and key-value head.
  rows = jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(
      batch, groups, per * size, head_dim)
  scores = jnp.einsum('bgrh,bgsh->bgrs', rows, k, precision=precision,
                      preferred_element_type=jnp.float32) * scale
  if softcap is not None:
    scores = jnp.tanh(scores / softcap) * softcap
  scores = scores.reshape(batch, groups, per, size, slots)
  scores = jnp.where(sight.seen[:, None, None], scores, UNSEEN)
  # The plain softmax: XLA on GPUs knows its pattern and makes one kernel.
  probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(
      batch, groups, per * size, slots)
  out = jnp.einsum('bgrs,bgsh->bgrh', probs, v, precision=precision,
                   preferred_element_type=jnp.float32)
  out = out.astype(q.dtype).reshape(batch, groups, per, size, head_dim)
  return jnp.transpose(out, (0, 3, 1, 2, 4))


def compact(cache: Cache, root: Array, path: Array) -> Cache:
  """Moves the entries of an accepted tree path behind the root.

  Args:
    cache: a layer's cache, block written at `root`.
    root: int32[B], slot of the block's row 0.
    path: int32[B,D+1] rows of the block, root first; padding may repeat any
      row (its target slots are stale and masked).

  Returns:
    The cache with row `path[i]` stored at `root + i`. D + 1 entries a row
    move; the rest is untouched.
  """
  slots = cache['k'].shape[2]
  source = root[:, None] + path
  dest = stored = root[:, None] + jnp.arange(path.shape[1])
  if 'slot' in cache:
    source, dest = source % slots, dest % slots

  def move(heads: Array, src: Array, dst: Array) -> Array:
    taken = jnp.take(heads, src, axis=1, mode='clip')
    return heads.at[:, dst].set(taken, mode='drop')

  new = {name: jax.vmap(move)(cache[name], source, dest) for name in 'kv'}
  if 'slot' in cache:
    put = jax.vmap(lambda old, i, x: old.at[i].set(x, mode='drop'))
    new['slot'] = put(cache['slot'], dest, stored)
  return new
