"""Rows come and go around the compiled loop: admission, refill, streaming."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Context, Models
from specjax.host import blame, memory
from specjax.host.requests import Request, Result, check
from specjax.host.rows import Stages, build_context
from specjax.host.text import RowText, finish
from specjax.parallel import rules

# Rounds without the host, when nobody waits for a text or a slot.
_UNBOUNDED = 1 << 30

# Compiles the same program to the same kernels in every process.
EXACT_OPTIONS = {'gpu': (('xla_gpu_autotune_level', 0),)}


@dataclasses.dataclass(frozen=True)
class Progress:
  """What is known after a chunk of rounds.

  Attributes:
    num_done, num_requests: of this run. new_tokens, row_rounds: so far,
      running rows included. elapsed_s: since the run began.
  """

  num_done: int
  num_requests: int
  new_tokens: int
  row_rounds: int
  elapsed_s: float


class Decoder:
  """Decodes any number of requests through a fixed number of slots.

  Finished rows are replaced by waiting requests between chunks of rounds, by
  the same two compiled programs. A request's text depends on neither its
  slot, nor its neighbours, nor the order.

  Attributes after `run`: `slot_rounds` (rounds times slots) and
  `row_rounds` (of them, those of unfinished rows); their ratio is the share
  of useful rows. `compile_s`, seconds.
  """

  def __init__(
      self, engine: Engine, params: Models, *, batch: int, size: int,
      stages: Stages, vocab_size: int, eos: Sequence[int] = (),
      tokenizer: Any = None, chunk: int = 64, rounds_per_chunk: int = 16,
      mesh: jax.sharding.Mesh | None = None, exact: bool = False,
      constraint: Any = None, num_ids: int | None = None,
  ):
    """Allocates the state and compiles.

    Args:
      engine, params: who plays, with what.
      batch: B, slots. size: S, tokens a slot can hold.
      stages: what the requests of this run use (`rows.stages`).
      vocab_size: V. eos: end tokens. tokenizer: for text and stop strings.
      chunk: prompt tokens fed at a time.
      rounds_per_chunk: between looks at the rows (streaming, refill).
      mesh: `parallel.make_mesh`, or None for one device.
      exact: pin the compiler's kernel choice, so that equal block shapes
        give equal bits across separate compilations.
      constraint: fresh token-mask state for B rows, or a function from the
        requests of B slots (None where vacant) to it, or None.
      num_ids: ids that a prompt may hold; None is V.

    Raises:
      MemoryError: the run cannot fit. ValueError: N + 1 or `chunk` exceed
        what the target takes at once.
    """
    if mesh is not None:
      params = rules.on_mesh(params, mesh)
    self.engine, self.params, self.stages = engine, params, stages
    self.batch, self.size, self.eos = batch, size, tuple(eos)
    self.vocab_size, self.tokenizer = vocab_size, tokenizer
    self.num_ids = num_ids or vocab_size
    self.chunk, self.rounds_per_chunk = chunk, rounds_per_chunk
    self._mesh, self._constraint = mesh, constraint
    self.slot_rounds = self.row_rounds = 0
    options: tuple = ()
    if exact:
      options = EXACT_OPTIONS.get(jax.default_backend(), ())
    self._run, self._admit = loop.compiled(options)
    self._allocate()

  def adopt(self, drafter: Any) -> None:
    """Takes other weights of the drafter, between two chunks of rounds.

    Outputs stay exact: a round is verified with the law of the weights that
    drafted. Equal shapes and dtypes compile nothing.
    """
    if self._mesh is not None:
      drafter = rules.on_mesh(drafter, self._mesh)
    self.params = self.params.replace(drafter=drafter)

  def _allocate(self) -> None:
    vacant = self._context([None] * self.batch)
    shapes = jax.eval_shape(
        lambda c: loop.empty(self.engine, c), vacant)
    num = 1 if self._mesh is None else self._mesh.size
    placed = None
    if self._mesh is not None:
      placed = rules.state_shardings(self._mesh, shapes, self.batch)
    memory.check(
        self.params, shapes, batch=self.batch, size=self.size,
        num_draft=self.engine.drafter.topology.num_nodes,
        vocab_size=self.vocab_size, num_devices=num, shardings=placed)
    start = time.perf_counter()
    make = jax.jit(loop.empty, static_argnums=0, out_shardings=placed)
    self.state = make(self.engine, self._place(vacant))
    no_rows = np.zeros((self.batch,), bool)
    self._start_rows(no_rows, vacant)
    self._advance(0)
    jax.block_until_ready(self.state)
    self.compile_s = time.perf_counter() - start

  def _context(self, slots: Sequence[Request | None]) -> Context:
    return build_context(
        slots, size=self.size, vocab_size=self.vocab_size, eos=self.eos,
        what=self.stages, constraint=(
            self._constraint(slots) if callable(self._constraint)
            else self._constraint))

  def _place(self, context: Context) -> Context:
    """Moves host arrays to the devices (rows over `data`)."""
    if self._mesh is None:
      return jax.tree.map(jnp.array, context)  # copies: donation is safe
    shardings = rules.state_shardings(
        self._mesh, context, self.batch)
    return rules.put(context, shardings)

  def _start_rows(self, rows: np.ndarray, context: Context) -> None:
    self.state = self._admit(
        self.engine, self.params, self.state, self._mask(rows),
        self._place(context), chunk=self.chunk)

  def _mask(self, rows: np.ndarray) -> jax.Array:
    """Returns bool[B] on the devices, placed as loosely as the state is.

    An array that is committed to its device spreads that to what is computed
    from it, and the loop would be compiled again for the committed state.
    """
    if self._mesh is None:
      return jnp.asarray(rows)
    return rules.put(rows, self.state.context.done.sharding)

  def _advance(self, num_rounds: int) -> None:
    self.state = self._run(
        self.engine, self.params, self.state, np.int32(num_rounds))

  def run(
      self, requests: Iterable[Request], *,
      on_text: Callable[[Request, str], None] | None = None,
      on_result: Callable[[Result], Request | None] | None = None,
      on_progress: Callable[[Progress], None] | None = None,
  ) -> list[Result]:
    """Decodes all requests; results in order of completion.

    Args:
      requests: each prompt must leave room for a token in a slot.
      on_text: called with new text of a request, as it becomes final.
      on_result: called with each result; may return a follow-up request
        (the next turn), which takes the next free slot.
      on_progress: called after each chunk of rounds.

    Raises:
      ValueError: a prompt does not fit. FloatingPointError: NaN or infinite
        logits, with request and round.
    """
    waiting = deque(requests)
    for request in waiting:
      check(request, self.size, self.num_ids)
    run = _Run(self, waiting, on_text, on_result, on_progress)
    return run.loop()


class _Run:
  """The state of one `Decoder.run` call."""

  def __init__(self, decoder, waiting, on_text, on_result, on_progress):
    self.decoder, self.waiting = decoder, waiting
    self.on_text, self.on_result = on_text, on_result
    self.on_progress = on_progress
    self.rows: list[RowText | None] = [None] * decoder.batch
    self.results: list[Result] = []
    self.begun = time.perf_counter()
    self.num_requests = len(waiting)

  def loop(self) -> list[Result]:
    """Runs until nothing waits and no row is left."""
    while self.waiting or any(self.rows):
      fresh = self._fill()
      # After an admission look after one round: that is the first token.
      num = 1 if fresh else self._patience()
      self._advance(num)
    return self.results

  def _patience(self) -> int:
    watched = (self.waiting or self.on_text or self.on_progress
               or any(r is not None and r.stops for r in self.rows))
    return self.decoder.rounds_per_chunk if watched else _UNBOUNDED

  def _fill(self) -> bool:
    """Puts waiting requests into vacant slots; True if there were any."""
    decoder = self.decoder
    slots: list[Request | None] = [None] * decoder.batch
    for row, text in enumerate(self.rows):
      if text is None and self.waiting:
        slots[row] = self.waiting.popleft()
    chosen = np.asarray([s is not None for s in slots])
    if not chosen.any():
      return False
    now = time.perf_counter()
    for row, request in enumerate(slots):
      if request is not None:
        self.rows[row] = RowText(
            request, decoder.tokenizer, now, decoder.eos)
    decoder._start_rows(chosen, decoder._context(slots))
    return True

  def _advance(self, num_rounds: int) -> None:
    """Runs a chunk, then looks at every row."""
    decoder = self.decoder
    decoder._advance(num_rounds)
    state = decoder.state
    seen = rules.fetch({
        'tokens': state.context.tokens, 'length': state.context.length,
        'done': state.context.done, 'rounds': state.context.rounds,
        'token_round': state.context.token_round,
        'token_kept': state.context.token_kept,
        'metrics': state.metrics, 'log_probs': state.context.log_probs})
    now = time.perf_counter()
    self._count(seen)
    halted = np.zeros((decoder.batch,), bool)
    bad_rows = []
    for row, text in enumerate(self.rows):
      if text is None:
        continue
      if seen['metrics'].bad_round[row] >= 0:
        bad_rows.append(f'request {text.request.id} (row {row}): '
                        + blame.report(
                            decoder.engine, decoder.params, decoder.state,
                            row, len(text.request.tokens)))
        continue
      start = len(text.request.tokens)
      new = seen['tokens'][row, start:seen['length'][row]]
      piece = text.update(new, now)
      if piece and self.on_text:
        self.on_text(text.request, piece)
      if seen['done'][row] or text.stopped:
        halted[row] = not seen['done'][row]
        self._finish(row, text, seen, now)
    if bad_rows:  # after its neighbours' results have been handed out
      raise FloatingPointError('; '.join(bad_rows))
    if halted.any():
      self._halt(halted)
    if self.on_progress:
      self._report(now)

  def _count(self, seen: dict[str, Any]) -> None:
    """Adds up slot-rounds: the longest active row tells the rounds run."""
    decoder = self.decoder
    ran = [int(seen['rounds'][row]) - text.rounds
           for row, text in enumerate(self.rows) if text is not None]
    for row, text in enumerate(self.rows):
      if text is not None:
        text.rounds = int(seen['rounds'][row])
    decoder.row_rounds += sum(ran)
    decoder.slot_rounds += max(ran, default=0) * decoder.batch

  def _finish(self, row: int, text: RowText, seen, now: float) -> None:
    """Turns a finished row into a result and vacates its slot."""
    result, tail = finish(text, row, seen, now)
    if tail and self.on_text:
      self.on_text(text.request, tail)
    self.rows[row] = None
    self.results.append(result)
    if self.on_result:
      follow_up = self.on_result(result)
      if follow_up is not None:
        check(follow_up, self.decoder.size, self.decoder.num_ids)
        self.waiting.append(follow_up)
        self.num_requests += 1

  def _halt(self, halted: np.ndarray) -> None:
    """Marks rows as done whose stop string the host has seen."""
    state = self.decoder.state
    done = state.context.done | self.decoder._mask(halted)
    self.decoder.state = state.replace(
        context=state.context.replace(done=done))

  def _report(self, now: float) -> None:
    made = sum(len(r.tokens) for r in self.results)
    made += sum(len(r.tokens) for r in self.rows if r is not None)
    self.on_progress(Progress(
        num_done=len(self.results), num_requests=self.num_requests,
        new_tokens=made, row_rounds=self.decoder.row_rounds,
        elapsed_s=now - self.begun))
