"""The types that every drafter, target and rule shares, and their contracts.

Letters in shapes: B rows, S sequence capacity (tokens), N drafted slots (the
pending root is not counted), R law rows, M expanded parents, D = max_depth of
the topology, V vocabulary, C channels of a continuous token.

A round is five verbs: propose, score, verify, commit, sync (`core.round`).
`Target`, `Drafter` and `Verifier` below say what each verb is handed, what it
may touch and what it must return.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from flax import struct
import jax
import jax.numpy as jnp

from specjax.core.tree import Topology

Array = jax.Array
PyTree = Any

# How a drafted token was chosen. Traced, since combinators mix them in a row.
# A point stands for the one-hot law of its token.
IID = 0  # drawn from `draft_law`; siblings independent, with replacement
WITHOUT_REPLACEMENT = 1  # drawn from `draft_law` renormalised over the rest
TOP_PLUS_ONE = 2  # all but the last sibling deterministic, the last drawn
POINT = 3  # deterministic, or drawn from a law that nobody can state
MATCH = 4  # like POINT, and to be verified by sample-and-match
MODE_NAMES = ('iid', 'without_replacement', 'top_plus_one', 'point', 'match')


class Models(struct.PyTreeNode, kw_only=True):
  """Parameters of the three parties. Read only; never donated."""

  target: PyTree
  drafter: PyTree = None
  verifier: PyTree = None  # judge heads, neighbour tables


class Options(struct.PyTreeNode, kw_only=True):
  """Per-row sampling options. A `None` stage is compiled out for all rows.

  Ranges are checked on the host (`Sampling`), not here. `temperature=None`
  says that every row is greedy: laws are then `Point` and nothing of size V
  is exponentiated.
  """

  temperature: Array | None = None  # f32[B] >= 0; 0 is greedy
  top_k: Array | None = None  # int32[B]; <= 0 is off
  top_p: Array | None = None  # f32[B] in (0, 1]; 1 is off
  min_p: Array | None = None  # f32[B] in [0, 1]; 0 is off
  repetition_penalty: Array | None = None  # f32[B] > 0; 1 is off
  presence_penalty: Array | None = None  # f32[B], logits
  frequency_penalty: Array | None = None  # f32[B], logits
  bias: Array | None = None  # f32[B,V], logits; -inf bans
  eos: Array | None = None  # int32[B,E], padded with -1
  min_new: Array | None = None  # int32[B]; EOS is banned before that many
  constraint: Any = None  # a `law.Constraint` (grammar), or None


class Context(struct.PyTreeNode, kw_only=True):
  """What has been said so far. Only `core.round` appends to it.

  `tokens[b, :length[b]]` is final and never rewritten; its last token is
  *pending*: no model has been fed with it. Everything after is stale.
  """

  tokens: Array  # int32[B,S] | float32[B,S,C], generation order
  length: Array  # int32[B] >= 1
  prompt_length: Array  # int32[B] in [1, length]
  limit: Array  # int32[B] <= S; the row is done at this length
  done: Array  # bool[B]
  rounds: Array  # int32[B], frozen when done
  keys: Array  # key[B], never advanced: `core.keys` derives from them
  options: Options
  condition: PyTree = None  # class, caption, guidance partner
  token_round: Array | None = None  # int32[B,S]: round that emitted a token
  token_kept: Array | None = None  # bool[B,S]: it was an accepted draft
  log_probs: Any = None  # {'raw', 'processed'}: f32[B,S] when asked for

  @property
  def root(self) -> Array:
    """Position of the pending token, int32[B]."""
    return self.length - 1


class Metrics(struct.PyTreeNode, kw_only=True):
  """Counts per row since it was admitted; frozen when the row is done."""

  histogram: Array  # int32[B,D+1]: rounds by number of accepted drafts
  drafted: Array  # int32[B,D]: rounds that drafted at this depth
  accepted: Array  # int32[B,D]: rounds that accepted at this depth (joint)
  ranks: Array  # int32[B,D,C]: ... of them by draw order among siblings
  excess: Array  # f32[B]: sum over rounds of the one-step TV estimate
  gave_up: Array  # int32[B]: capped residual draws
  bad_round: Array  # int32[B]: first round with non-finite logits, or -1


class SpecState(struct.PyTreeNode, kw_only=True):
  """Everything a round changes. Donated to the compiled loop."""

  context: Context
  target: PyTree
  drafter: PyTree
  metrics: Metrics


class Draft(struct.PyTreeNode, kw_only=True):
  """What a drafter proposes. Slot i (0-based) is row i + 1 of `Scores`.

  The law handed over is exactly the law that the tokens were drawn from;
  deterministic tokens are `POINT` and need none. A slot with `valid=False`
  was not drafted: verification ends before it with a plain target draw.
  `valid` may depend only on what was known before the slot was drawn.
  """

  topology: Topology = struct.field(pytree_node=False)
  tokens: Array  # int32[B,N] | float32[B,N,C]
  valid: Array  # bool[B,N]
  mode: Array  # int32[N] or [B,N]
  parents: Array | None = None  # int32[B,N] rows of Scores; None: topology's
  sibling: Array | None = None  # int32[N] or [B,N], draw order at a parent
  draft_law: Any = None  # Law [B,M,...], or None when every slot is POINT
  law_row: Array | None = None  # int32[N] or [B,N] rows of it; None: slot i
  event: PyTree = None  # what the laws score, when it is not the token
  resume: Any = None  # read by the target only (early exit, mask blocks)
  aux: PyTree = None  # read by the proposing drafter's `sync` only


class Scores(struct.PyTreeNode, kw_only=True):
  """The target's answer: row 0 follows the root, row i + 1 follows slot i.

  Of targets that make several tokens at once (`sets`, chains only), rows of
  one set have laws that do not depend on the drafts of that set: a rejection
  ends only what comes after its set.
  """

  target_law: Any  # Law [B,N+1,...], after `core.law`
  sets: Array | None = None  # int32[B,N+1], ascending; -1: was not scored
  taps: dict[str, Array] = struct.field(default_factory=dict)
  finite: Array | None = None  # bool[B,N+1]: `pipeline.healthy`
  raw: Array | None = None  # f32[B,N+1,V] before `core.law`, when asked for
  aux: PyTree = None


class Verdict(struct.PyTreeNode, kw_only=True):
  """What a rule decides. All rules return law-bearing tokens, never -1."""

  path: Array  # int32[B,D+1]: rows of Scores, root first, padded with N+1
  num_accepted: Array  # int32[B] in [0, D]
  next_token: Array  # [B] or [B,C]: correction or bonus
  excess: Array  # f32[B]: extra acceptance of a lossy rule (one-step TV)
  gave_up: Array  # bool[B]: a configured cap ended a residual draw
  # Of rules that correct inside a path (`Scores.sets`); then `num_accepted`
  # counts what is emitted before `next_token`, accepted or not.
  tokens: Array | None = None  # [B,N(,C)], in the place of the drafts
  kept: Array | None = None  # bool[B,N]: the draft is what is emitted


@runtime_checkable
class Target(Protocol):
  """A model that scores drafts. A frozen, hashable dataclass.

  Fields are plain values; methods are pure functions. Two equal instances
  trace once. `params` is always `Models`, `state` the whole `SpecState`.
  """

  def empty(self, batch: int, capacity: int) -> PyTree:
    """Returns an empty target state for `capacity` slots a row."""
    ...

  def init(
      self,
      params: Models,
      state: SpecState,
      position: Array,
      fed: Array,
      taps: tuple[str, ...],
  ) -> tuple[SpecState, dict[str, Array]]:
    """Feeds `context.tokens` at `position int32[B,T]` where `fed bool[B,T]`.

    A chunk of a prompt. Slots with `fed=False` (padding, the pending token,
    rows that are not being admitted) must leave the state untouched.
    """
    ...

  def score(
      self,
      params: Models,
      state: SpecState,
      draft: Draft,
      taps: tuple[str, ...],
  ) -> tuple[Scores, SpecState]:
    """Scores the root and the N slots in one call; may write scratch slots."""
    ...

  def commit(
      self, state: SpecState, draft: Draft, verdict: Verdict
  ) -> SpecState:
    """Makes the accepted path's entries contiguous. Nothing for a chain."""
    ...


@runtime_checkable
class Drafter(Protocol):
  """A proposer. A frozen, hashable dataclass, like `Target`."""

  @property
  def topology(self) -> Topology:
    """Static shape of what `propose` returns."""
    ...

  @property
  def taps(self) -> tuple[str, ...]:
    """Names of the target's hidden states that this drafter reads."""
    ...

  @property
  def modes(self) -> tuple[int, ...]:
    """Ways in which slots are chosen (IID, ...) when rows are sampled."""
    ...

  def empty(self, batch: int, capacity: int) -> PyTree:
    """Returns an empty drafter state."""
    ...

  def init(
      self,
      params: Models,
      state: SpecState,
      position: Array,
      fed: Array,
      taps: dict[str, Array],
  ) -> SpecState:
    """Takes in a chunk of the prompt, after the target did."""
    ...

  def propose(
      self, params: Models, state: SpecState
  ) -> tuple[Draft, SpecState]:
    """Drafts. Must not change anything that a committed token relies on."""
    ...

  def sync(
      self,
      params: Models,
      state: SpecState,
      draft: Draft,
      scores: Scores,
      verdict: Verdict,
  ) -> SpecState:
    """Learns the verdict: catch up, roll back, keep a tail, adapt."""
    ...


@runtime_checkable
class Verifier(Protocol):
  """An acceptance rule. A frozen, hashable dataclass."""

  @property
  def name(self) -> str:
    """Its name in configs and summaries."""
    ...

  @property
  def lossy(self) -> bool:
    """Whether the output law may differ from the target's."""
    ...

  @property
  def taps(self) -> tuple[str, ...]:
    """Names of the target's hidden states that this rule reads."""
    ...

  def check(
      self, topology: Topology, modes: tuple[int, ...], vocab_size: int,
      params: PyTree,
  ) -> None:
    """Raises ValueError when it cannot verify such drafts. On the host."""
    ...

  def verify(
      self, params: Models, context: Context, draft: Draft, scores: Scores
  ) -> Verdict:
    """Decides which path is kept and draws the token that follows it."""
    ...


def empty_metrics(batch: int, topology: Topology) -> Metrics:
  """Returns zeroed counters for `batch` rows."""
  max_depth, most = topology.max_depth, topology.max_children
  return Metrics(
      histogram=jnp.zeros((batch, max_depth + 1), jnp.int32),
      drafted=jnp.zeros((batch, max_depth), jnp.int32),
      accepted=jnp.zeros((batch, max_depth), jnp.int32),
      ranks=jnp.zeros((batch, max_depth, most), jnp.int32),
      excess=jnp.zeros((batch,), jnp.float32),
      gave_up=jnp.zeros((batch,), jnp.int32),
      bad_round=jnp.full((batch,), -1, jnp.int32),
  )


def select_rows(rows: Array, new: PyTree, old: PyTree) -> PyTree:
  """Returns `new` on the rows where `rows bool[B]` is set, else `old`.

  Every leaf must lead with B; a node that defines `admit(rows, new)` (a
  constraint with tables that all rows share) decides for itself.
  """
  def is_custom(x: Any) -> bool:
    return hasattr(x, 'admit')

  def pick(o: Any, n: Any) -> Any:
    if is_custom(o):
      return o.admit(rows, n)
    if jnp.issubdtype(o.dtype, jax.dtypes.prng_key):
      data = select_rows(rows, jax.random.key_data(n), jax.random.key_data(o))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(o))
    if o.ndim == 0:  # shared by the batch: survives an admission
      return o
    return jnp.where(rows.reshape((-1,) + (1,) * (o.ndim - 1)), n, o)

  return jax.tree.map(pick, old, new, is_leaf=is_custom)
