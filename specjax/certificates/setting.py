"""What is decoded when a certificate is sampled: models, rows, exact laws.

Two models of V tokens (toys, unless a subclass of `Setting` brings others),
and rows of four kinds side by side in each batch: ragged prompts, own
temperatures, filters, penalties, end tokens and limits; one kind is greedy.
Texts are short, so that the law of a whole text is a table.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.certificates import reference, toys
from specjax.core.types import Context, Models

# Kinds of rows, in the order in which they alternate.
_PROMPTS = ((1,), (0, 2, 0), (3, 1, 2, 3), (2, 2))
_COLUMNS: dict[str, tuple[float, ...]] = {
    'temperature': (1.0, 0.7, 1.4, 0.0), 'top_k': (0, 3, 0, 0),
    'top_p': (1.0, 1.0, 0.9, 1.0), 'min_p': (0.0, 0.0, 0.02, 0.0),
    'presence_penalty': (0.0, 0.6, 0.0, 0.5),
    'repetition_penalty': (1.0, 1.0, 1.2, 1.0)}
NUM_KINDS = len(_PROMPTS)
# Cells in the table of a text: its length follows from the vocabulary.
_MOST_CELLS = 4000


class Kind(NamedTuple):
  """One kind of row.

  Attributes:
    prompt: token ids. new: tokens at most. eos: end token, or -1.
    options: of `reference.law`.
  """

  prompt: tuple[int, ...]
  new: int
  eos: int
  options: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Setting:
  """Models and rows.

  A subclass with other models overrides `target`, `models` and `logits`.

  Attributes:
    vocab_size: V >= 3.
    all_greedy: every row is greedy, told to the compiler (no temperature).
    filters: rows have a top-k and a top-p; these take most of a round.
    drafter_scale: spread of the drafter's logits. Its errors should be many:
      with a good drafter a fault hides.
  """

  vocab_size: int = 4
  all_greedy: bool = False
  filters: bool = True
  drafter_scale: float = 1.5

  def __post_init__(self):
    if self.vocab_size < 3:
      raise ValueError(f'vocab_size={self.vocab_size}: must be >= 3')

  @property
  def length(self) -> int:
    """Tokens in the longest text, 2 to 4."""
    return max([n for n in (2, 3, 4)
                if (self.vocab_size + 1)**n <= _MOST_CELLS], default=2)

  @property
  def names(self) -> tuple[str, ...]:
    """Options that are set."""
    if self.all_greedy:
      return ('presence_penalty', 'repetition_penalty')
    return tuple(n for n in _COLUMNS
                 if self.filters or n not in ('top_k', 'top_p'))

  @functools.cached_property
  def kinds(self) -> tuple[Kind, ...]:
    """The kinds of rows."""
    # One kind ends before the deepest draft does, one on an end token.
    new = (self.length, self.length - 1, self.length, self.length)
    return tuple(
        Kind(tuple(t % self.vocab_size for t in prompt), new[i],
             self.vocab_size - 1 if i == 2 else -1,
             {n: _COLUMNS[n][i] for n in self.names})
        for i, prompt in enumerate(_PROMPTS))

  @property
  def target(self) -> Any:
    """The target that is decoded, a `core.types.Target`."""
    return toys.ToyLM(self.vocab_size)

  def logits(
      self, who: str, kind: int, made: tuple[int, ...], begun: int
  ) -> np.ndarray:
    """Returns raw logits f[V] of the next token of a kind's text.

    Args:
      who: 'target' or 'drafter'. kind: of row. made: tokens behind the
        prompt.
      begun: of the drafter: how many of them were there when its round
        began; the others are its drafts. The toy does not care.
    """
    del begun
    text = (0, *self.kinds[kind].prompt, *made)
    return self.tables[who][text[-2], text[-1]]

  @functools.cached_property
  def tables(self) -> dict[str, np.ndarray]:
    """Logits f32[V,V,V] of the target and of the drafter."""
    return {'target': toys.table(0, self.vocab_size, 0.5),
            'drafter': toys.table(15, self.vocab_size, self.drafter_scale)}

  def models(self, drafter: Any = None, verifier: Any = None) -> Models:
    """Returns parameters: of the toy models unless `drafter` is given."""
    table = {k: jnp.asarray(v) for k, v in self.tables.items()}
    return Models(
        target={'table': table['target']},
        drafter={'table': table['drafter']} if drafter is None else drafter,
        verifier=verifier)

  def context(
      self, rows: int, depth: int, key: jax.Array,
      condition: Any = None,
  ) -> Context:
    """Returns `rows` rows, kinds in turn.

    `depth` is the drafter's: a buffer that a whole block fits.
    """
    def column(values, dtype=jnp.float32):
      return jnp.asarray(np.resize(values, rows), dtype)

    options = toys.sampled(rows).replace(
        temperature=None if self.all_greedy else column(
            _COLUMNS['temperature']),
        eos=column([k.eos for k in self.kinds], jnp.int32)[:, None],
        **{n: column(_COLUMNS[n], jnp.int32 if n == 'top_k' else jnp.float32)
           for n in self.names if n != 'temperature'})
    size = max(len(p) for p in _PROMPTS) + max(self.length, depth + 1)
    prompts = [list(k.prompt) for k in self.kinds] * (rows // NUM_KINDS)
    context = toys.context(
        prompts, size=size, options=options,
        keys=jax.random.split(key, rows),
        condition=condition,
        token_round=jnp.full((rows, size), -1, jnp.int32))
    new = column([k.new for k in self.kinds], jnp.int32)
    return context.replace(limit=context.length + new)


class Laws:
  """Exact laws f64[V] of the next token, given a kind and what it has made.

  `of(who, kind, made, begun=0)`; see `Setting.logits`.

  Attributes:
    setting: whose. greedy: the target's rows are taken as greedy (what rule
      'greedy' promises).
  """

  def __init__(self, setting: Setting, greedy: bool = False):
    self.setting = setting
    self._more = {'temperature': 0.0} if greedy else {}
    self.of = functools.cache(self._of)

  def _of(
      self, who: str, kind: int, made: tuple[int, ...], begun: int = 0
  ) -> np.ndarray:
    """Returns the law of 'target' or 'drafter', or 'rank': see below.

    'rank' is the drafter's law before temperature and filters, which orders
    tokens for deterministic drafters.
    """
    it = self.setting.kinds[kind]
    logits = self.setting.logits(
        'target' if who == 'target' else 'drafter', kind, made, begun)
    options: dict[str, Any] = dict(it.options)
    if who == 'rank':
      options |= {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0}
    elif who == 'target':
      options |= self._more
    return reference.law(logits, it.prompt, made, **options)

  def texts(self, kind: int) -> np.ndarray:
    """Returns the law of whole texts, f64[(V+1)^L].

    Texts are numbers in base V + 1 with the first token in front; V stands
    for "nothing, the text is over".
    """
    base, length = self.setting.vocab_size + 1, self.setting.length
    it = self.setting.kinds[kind]
    out = np.zeros(base**length)

    def add(made: tuple[int, ...], weight: float) -> None:
      if len(made) == it.new or it.eos in made:
        rest = (base - 1,) * (length - len(made))
        out[np.ravel_multi_index(made + rest, (base,) * length)] = weight
        return
      for token, p in enumerate(self.of('target', kind, made)):
        if p > 0:
          add((*made, token), weight * p)

    add((), 1.0)
    return out


def made(setting: Setting, context: Context) -> np.ndarray:
  """Returns what was made, int[B,L], as in `Laws.texts`."""
  tokens = np.asarray(context.tokens)
  start = np.asarray(context.prompt_length)[:, None]
  where = start + np.arange(setting.length)
  inside = where < np.asarray(context.length)[:, None]
  where = np.minimum(where, tokens.shape[1] - 1)
  return np.where(
      inside, np.take_along_axis(tokens, where, axis=1), setting.vocab_size)
