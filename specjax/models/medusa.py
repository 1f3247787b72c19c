"""Heads on the target's last state, one for each token ahead: Medusa, Hydra.

Medusa's head i reads the state alone. Hydra's also reads the embeddings of
the tokens on the path before its own, so that the drafts of a path fit
together. In both, residual blocks change the state and a matrix scores it.

With `state` the one that the target's own head turned into the law of the
token after next position t, head i (from 0) gives the law of token t + 2 + i:
token t + 1 is known, it is the pending one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from specjax.models import draft_vocab, weights
from specjax.models.transformer import declare
from specjax.models.transformer_config import TransformerConfig

Array = jax.Array

KINDS = ('medusa', 'hydra')
HEADS = ('own', 'target')


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
  """The shape of a stack of heads. Hashable.

  Attributes:
    embed_dim: D, the target's. vocab_size: the target's V.
    draft_vocab_size: W, tokens that can be drafted.
    num_heads: M, tokens drafted one after another.
    kind: 'medusa' or 'hydra'.
    head: what scores the changed state. 'own': a trained [W,D] matrix each,
      kept as its difference from the target's rows; 'target': these rows,
      frozen, M W D parameters fewer.
    num_layers: residual blocks a head.
    embed_scale: multiplies the target's embeddings, or None.
    final_softcap: tanh bound of logits, or None.
    dtype: of matrices and states; logits are float32.
  """

  embed_dim: int
  vocab_size: int
  draft_vocab_size: int
  num_heads: int = 4
  kind: str = 'medusa'
  head: str = 'own'
  num_layers: int = 1
  embed_scale: float | None = None
  final_softcap: float | None = None
  dtype: str = 'float32'

  def __post_init__(self):
    for name, value, known in (
        ('kind', self.kind, KINDS), ('head', self.head, HEADS)):
      if value not in known:
        raise ValueError(f'{name}={value!r}: known are {", ".join(known)}')
    if self.num_heads < 1 or self.num_layers < 1:
      raise ValueError(f'num_heads={self.num_heads}, num_layers='
                       f'{self.num_layers}: must be >= 1')
    if not 1 <= self.draft_vocab_size <= self.vocab_size:
      raise ValueError(
          f'draft_vocab_size={self.draft_vocab_size}: must be in '
          f'[1, {self.vocab_size}]')

  @property
  def reads_path(self) -> bool:
    """Whether a head reads the tokens before its own."""
    return self.kind == 'hydra'

  @property
  def num_inputs(self) -> int:
    """Width of what the first residual block reads."""
    return self.embed_dim * (1 + self.num_heads * self.reads_path)

  @property
  def precision(self) -> jax.lax.Precision:
    """float32 means float32, also where the hardware prefers TF32."""
    if self.dtype == 'float32':
      return jax.lax.Precision.HIGHEST
    return jax.lax.Precision.DEFAULT


def for_target(
    target: TransformerConfig, draft_vocab_size: int | None = None, **kwargs
) -> HeadsConfig:
  """Returns heads for a target; W is V unless it is given.

  `kwargs` are other attributes of `HeadsConfig`.
  """
  return HeadsConfig(**{**dict(
      embed_dim=target.embed_dim, vocab_size=target.vocab_size,
      draft_vocab_size=draft_vocab_size or target.vocab_size,
      embed_scale=target.embed_scale, final_softcap=target.final_softcap,
      dtype=target.dtype), **kwargs})


class HeadsNet(nn.Module):
  """The residual blocks of all heads.

  Fresh weights, all 0, leave the state as it is: every head starts as the
  target's own. Hydra's linear residual is kept as its difference from one
  that passes the state on, as matrices are from the target's rows.
  """

  config: HeadsConfig

  def setup(self):
    c = self.config
    zeros = nn.initializers.zeros_init()
    shape = (c.num_heads, c.num_inputs, c.embed_dim)
    axes = (None, None, 'embed')
    self.linear = declare(self, 'linear', shape, axes, c.dtype, zeros)
    self.bias = declare(
        self, 'bias', (c.num_heads, c.embed_dim), axes[1:], c.dtype, zeros)
    if c.reads_path:
      self.residual = declare(
          self, 'residual', shape, axes, c.dtype, zeros)
    more = c.num_layers - 1
    if more:
      self.more_linear = declare(
          self, 'more_linear', (more, c.num_heads, c.embed_dim, c.embed_dim),
          (None, *axes), c.dtype, zeros)
      self.more_bias = declare(
          self, 'more_bias', (more, c.num_heads, c.embed_dim), axes, c.dtype,
          zeros)

  def __call__(self, x: Array, index: Any = None) -> Array:
    """Runs the residual blocks of one head or of all.

    Args:
      x: [...,m,I], inputs; m is 1 with an index, else M. Of Hydra's a prefix
        will do: what is left out counts as zeros.
      index: int or int32[], the head in [0, M), or None for all.

    Returns:
      [...,m,D].
    """
    x = x.astype(self.linear.dtype)
    size = x.shape[-1]
    linear = take_head(self.linear[:, :size], index)
    kept = x[..., :self.config.embed_dim]
    if self.config.reads_path:
      kept += self._product(x, take_head(self.residual[:, :size], index))
    x = kept + nn.silu(
        self._product(x, linear) + take_head(self.bias, index))
    for layer in range(self.config.num_layers - 1):
      linear = take_head(self.more_linear[layer], index)
      bias = take_head(self.more_bias[layer], index)
      x = x + nn.silu(self._product(x, linear) + bias)
    return x

  def _product(self, x: Array, matrix: Array) -> Array:
    return jnp.einsum('...mi,mio->...mo', x, matrix,
                      precision=self.config.precision)


def take_head(stack: Array, index: Any) -> Array:
  """Returns [1,...] of `stack [M,...]` at an index, or all of it at None."""
  if index is None:
    return stack
  return jax.lax.dynamic_index_in_dim(stack, index, axis=0)


def init(config: HeadsConfig, key: Array) -> Any:
  """Returns fresh parameters, boxed with their logical axes.

  Those of `HeadsNet`, and `head [M,W,D]` where heads have matrices of their
  own. All are 0.
  """
  x = jnp.zeros((1, config.num_heads, config.num_inputs), config.dtype)
  params = dict(HeadsNet(config).init(key, x)['params'])
  if config.head == 'own':
    shape = (config.num_heads, config.draft_vocab_size, config.embed_dim)
    params['head'] = nn.LogicallyPartitioned(
        jnp.zeros(shape, config.dtype), (None, 'vocab', 'embed'))
  return params


@dataclasses.dataclass(frozen=True)
class HeadsModel:
  """Pure functions of a stack of heads, as source and trainer need them.

  Parameters are `{'net', 'head', 'ids', 'inverse'}`: trained weights, the
  rows of the target's head that can be drafted (`attach`) or the finished
  matrices of all heads (`fold`), and the draft vocabulary.

  References: Medusa, arXiv:2401.10774; Hydra, arXiv:2402.05109.
  """

  config: HeadsConfig

  taps = ('final',)

  @property
  def num_heads(self) -> int:
    """M, tokens drafted one after another."""
    return self.config.num_heads

  @property
  def reads_path(self) -> bool:
    """Whether a head reads the tokens before its own."""
    return self.config.reads_path

  def init(self, key: Array) -> Any:
    """Returns fresh weights in float32: every head is the target's own."""
    return weights.trainable(init(self.config, key))

  def attach(self, net: Any, target: Any, ids: Any) -> Any:
    """Returns the parameters for training and decoding.

    Args:
      net: trained weights. target: the target's parameters.
      ids: int[W], ascending draft vocabulary.

    Raises:
      ValueError: a draft vocabulary that does not fit the config.
    """
    c = self.config
    table = draft_vocab.table(ids, c.vocab_size, c.draft_vocab_size)
    return {'net': net, 'head': draft_vocab.rows(target, table['ids']),
            **table}

  def fold(self, params: Any) -> Any:
    """Returns the parameters with every head's matrix added up: [M,W,D].

    The same law up to rounding, and half of what a draft reads. For decoding
    only. Parameters without matrices of their own are returned unchanged.
    """
    if 'head' not in params['net']:
      return params
    net = dict(params['net'])
    own = net.pop('head').astype(jnp.float32)
    rows = params['head']
    head = (rows.astype(jnp.float32) + own).astype(rows.dtype)
    return {**params, 'net': net, 'head': head}

  def empty(self, batch: int) -> Array:
    """Returns states [B,D] of zeros."""
    return jnp.zeros((batch, self.config.embed_dim), self.config.dtype)

  def hidden(
      self, params: Any, target: Any, state: Array, path: Array | None,
      index: Any = None,
  ) -> Array:
    """Returns the changed states of one head or of all.

    Args:
      target: the target's parameters (embeddings, for Hydra).
      state: [...,D], the target's.
      path: int32[...,M], the pending token and the drafts after it; head i
        reads the first i + 1. None for Medusa.
      index: int or int32[], the head in [0, M), or None for all.

    Returns:
      [...,D] of a head, [...,M,D] of all.
    """
    c = self.config
    heads = jnp.arange(c.num_heads) if index is None else (
        jnp.asarray(index)[None])
    shape = state.shape[:-1] + heads.shape
    x = jnp.broadcast_to(
        state.astype(c.dtype)[..., None, :], shape + (c.embed_dim,))
    if c.reads_path:
      assert path is not None
      # A head that is known while tracing reads no more than it needs.
      path = path[..., :index + 1] if isinstance(index, int) else path
      read = jnp.arange(path.shape[-1]) <= heads[:, None]
      tokens = draft_vocab.embed(c, target, path)[..., None, :, :]
      tokens = jnp.where(read[..., None], tokens, 0)
      x = jnp.concatenate([x, tokens.reshape(shape + (-1,))], axis=-1)
    net: Any = HeadsNet(c)
    out = net.apply({'params': params['net']}, x, index)
    return out if index is None else out[..., 0, :]

  def logits(self, params: Any, hidden: Array, index: Any = None) -> Array:
    """Returns f32[...,W] or f32[...,M,W] of what `hidden` returned."""
    if index is not None:
      hidden = hidden[..., None, :]
    c, own, base = self.config, params['net'].get('head'), params['head']
    logits = jnp.float32(0)
    if base.ndim == 2:
      logits = draft_vocab.product(c, base, hidden)
    else:
      own = base
    if own is not None:
      logits += draft_vocab.product(
          c, take_head(own, index), hidden, '...md,mvd->...mv')
    return draft_vocab.bounded(
        c, logits if index is None else logits[..., 0, :])

  def teacher(self, params: Any, final: Array) -> Array:
    """Returns f32[...,W], the target's logits of `final [...,D]`.

    Of parameters that `attach` returned.
    """
    return draft_vocab.scores(self.config, params['head'], final)

  def spread(self, params: Any, logits: Array) -> Array:
    """Returns f32[...,V] of f32[...,W]."""
    return draft_vocab.spread(logits, params['inverse'])
