"""`specjax.generate`: prompts in, texts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import time
from typing import Any
import warnings

from specjax import verify as rules
from specjax.core.round import Engine
from specjax.core.types import (
  IID,
  MATCH,
  POINT,
  TOP_PLUS_ONE,
  WITHOUT_REPLACEMENT,
  Models,
)
from specjax.drafters import ChainLM, Null
from specjax.host import methods, rows
from specjax.host import requests as requests_lib
from specjax.host.decoder import Decoder, Progress
from specjax.host.dialogue import Dialogue
from specjax.host.load import Model
from specjax.host.requests import Request, Result
from specjax.host.results import Results
from specjax.io.options import Sampling
from specjax.io.prompts import Prompt

# Sequence capacities come in steps, so that similar prompts share a program.
_SIZE_STEP = 64
# Prompt tokens fed at a time. Fixed: if it followed the prompts of a run, the
# bits of a prompt's cache would depend on its neighbours.
_PREFILL_CHUNK = 64


def generate(
    target: Model, drafter: Any, prompts: Sequence[Any],
    sampling: Sampling | Sequence[Sampling] | None = None, *,
    drafter_params: Any = None, verify: Any = 'auto',
    verifier_params: Any = None,
    batch_size: int | None = None, capacity: int | None = None,
    seed: int = 0, exact: bool = False, rounds_per_chunk: int = 16,
    constraint: Any = None, online: Any = None,
    on_text: Callable[[Request, str], None] | None = None,
    on_result: Callable[[Result], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Results:
  """Decodes prompts speculatively.

  With an exact rule (all but the ones that say that they are lossy) the
  texts follow the target's law under `sampling`, whatever the drafter. With
  'greedy' and 'match' they are, bit for bit, those of the null drafter at
  the same block shape.

  Args:
    target: from `specjax.load`.
    drafter: a drafter from `specjax.drafters`; a `Model` of the target's
      vocabulary (an independent draft model); a speculative configuration
      (a dict in vLLM's form); or None for plain decoding.
    prompts: each a string (completed as it is), a list of
      `{'role', 'content'}` messages (the chat template is applied), a list
      of token ids, an `io.prompts.Prompt` (whose turns are a dialogue), or a
      `host.requests.Start` (tokens of any kind, and conditions).
    sampling: one for all prompts, or one for each; None is greedy.
    drafter_params: parameters of `drafter`, when it has any.
    verify: a rule, its name, or `{'name': ..., **options}`; 'auto' is
      'greedy' when all prompts are, else the exact rule that accepts most
      of such drafts ('block', 'traversal', 'greedy_multi_draft', 'match').
    verifier_params: arrays of the rule: a judge's head, LANTERN's
      neighbours.
    batch_size: slots; None takes min(8, number of requests).
    capacity: tokens a slot can hold, prompt included; None fits all, up to
      the context of the target.
    seed: of the run; requests without a seed of their own derive theirs.
    exact: pin the compiler's kernel choice (bitwise equality across
      separate compilations; may be slower).
    rounds_per_chunk: rounds between looks from the host.
    constraint: token masks (a grammar): a `core.pipeline.Constraint` for
      `batch_size` rows, or a function that makes one from the requests of
      the slots (None where vacant), so that each can have its own.
    online: a `distill.online.OnlineAdaptation`: the drafter has its
      parameters and learns from each finished request. Requests that are
      under way go on with the new weights; all outputs stay exact.
    on_text: called with text of a request as it becomes final.
    on_result: called with each result as it completes.
    on_progress: called after each chunk of rounds.

  Returns:
    Results in the order of prompts, samples and turns.

  Raises:
    ValueError: a prompt, option or combination that cannot be run; the
      message names it. A prompt must fit into the target's context with its
      `max_new_tokens`, and into a draft model's.
    MemoryError: it will not fit, said before allocation.
    FloatingPointError: NaN or infinite logits (request, round).
  """
  prompts, samplings = _pair(prompts, sampling)
  _check(target, samplings, batch_size=batch_size, capacity=capacity,
         rounds_per_chunk=rounds_per_chunk)
  drafter, drafter_params = _drafter(drafter, drafter_params, target)
  if online is not None:
    drafter_params = online.params
  dialogues = [
      Dialogue(target, prompt, one, index, seed)
      for index, (prompt, one) in enumerate(zip(prompts, samplings))]
  first = [r for d in dialogues for r in d.first()]
  rule = choose_rule(
      verify, drafter, samplings, target.vocab_size, verifier_params)
  _check_width(target, drafter)
  size = capacity or _size(dialogues, target.max_length)
  batch = batch_size or min(8, len(first))

  def check(request: Request) -> None:
    requests_lib.check_context(request, target.max_length, capacity)
    requests_lib.check_context(
        request, methods.context_of(drafter), capacity, 'the draft model')
    requests_lib.check(request, size, target.num_ids)

  for request in first:  # before anything is compiled
    check(request)
  stages = rows.stages(first, len(target.eos))
  decoder = Decoder(
      Engine(target.lm, drafter, rule),
      Models(target=target.params, drafter=drafter_params,
             verifier=verifier_params),
      batch=batch, size=size, stages=stages, vocab_size=target.vocab_size,
      eos=target.eos, tokenizer=target.tokenizer,
      chunk=min(_PREFILL_CHUNK, target.lm.chunk), mesh=target.mesh, exact=exact,
      rounds_per_chunk=rounds_per_chunk, constraint=constraint,
      num_ids=target.num_ids)

  def follow(result: Result) -> Request | None:
    asked = result.request.tokens
    if online is not None and online.add(
        (*asked, *result.tokens), len(asked), result.step_lengths,
        drafter.topology.max_depth):
      decoder.adopt(online.params)
    if on_result:
      on_result(result)
    following = dialogues[result.request.prompt_index].next(result)
    try:
      if following is not None:
        check(following)
    except ValueError as error:  # not worth the loss of all other answers
      warnings.warn(f'{error}; this dialogue ends here', stacklevel=2)
      return None
    return following

  start = time.perf_counter()
  results = decoder.run(
      first, on_text=on_text, on_result=follow, on_progress=on_progress)
  wall = time.perf_counter() - start
  results.sort(key=lambda r: (
      r.request.prompt_index, r.request.stream, r.request.turn))
  return Results(
      results=tuple(results), wall_s=wall, compile_s=decoder.compile_s,
      slot_rounds=decoder.slot_rounds, row_rounds=decoder.row_rounds,
      description={**_described(target, drafter, rule),
                   'batch_size': batch, 'capacity': size})


def _described(target: Model, drafter: Any, rule: Any) -> dict[str, Any]:
  """Returns what a summary says of a run's parts."""
  scoring = getattr(target.lm, 'scoring', None)
  return {
      'target': target.name, 'drafter': describe(drafter),
      **({'scoring': scoring} if scoring else {}),
      'verify': rule.name, 'lossy': rule.lossy,
      'num_speculative_tokens': drafter.topology.num_nodes}


def choose_rule(
    verify: Any, drafter: Any, samplings: Sequence[Sampling],
    vocab_size: int = 2, verifier_params: Any = None,
) -> Any:
  """Returns the rule to use; raises ValueError for a combination without.

  Args:
    verify: 'auto', a name, `{'name': ..., **options}`, or a rule.
    drafter, samplings: what it has to verify.
    vocab_size: of the target. verifier_params: tables or heads of the rule.
  """
  greedy = all(s.is_greedy for s in samplings)
  if not vocab_size and any(s.is_greedy for s in samplings):
    raise ValueError('temperature=0: tokens of real numbers have densities, '
                     'and at temperature 0 there is none: use one above 0')
  if verify == 'auto' and not vocab_size:
    verify = 'path_exact'
  if verify == 'auto':
    verify = 'greedy' if greedy else _best_rule(drafter)
  if isinstance(verify, Mapping):
    verify = rules.get(**verify)
  rule = rules.get(verify) if isinstance(verify, str) else verify
  if rule.name == 'greedy' and not greedy:
    raise ValueError("verify='greedy' is exact at temperature 0 only; use "
                     "'auto', 'match' or 'speculative' for sampled rows")
  rule.check(drafter.topology, drafter.modes, vocab_size, verifier_params)
  if greedy and not rule.lossy and isinstance(rule, rules.RULES):
    # Greedy drafts are points, and all exact rules coincide.
    return rules.get('greedy')
  return rule


def _best_rule(drafter: Any) -> str:
  """Returns the name of the exact rule that accepts most, for its cost."""
  kinds, topology = set(drafter.modes), drafter.topology
  if kinds <= {POINT, MATCH} or topology.num_nodes == 0:
    return 'match'
  if kinds <= {TOP_PLUS_ONE, POINT}:
    return 'greedy_multi_draft'
  if topology.is_chain:
    return 'block' if kinds <= {IID} else 'speculative'
  if kinds <= {IID, WITHOUT_REPLACEMENT} and topology.parents is not None:
    return 'traversal'
  return 'speculative'


def describe(drafter: Any) -> str:
  """Returns a short name of a drafter for tables."""
  inner = getattr(drafter, 'drafter', None)
  name = type(drafter).__name__
  if inner is not None:
    kind = type(drafter.controller).__name__
    return f'{name}({describe(inner)}, {kind})'
  return f'{name}(K={drafter.topology.num_nodes})'


def _drafter(drafter: Any, params: Any, target: Model) -> tuple[Any, Any]:
  if drafter is None:
    return Null(0), None
  if isinstance(drafter, Model) and not target.vocab_size:
    return methods.build({'model': drafter}, target)
  if isinstance(drafter, Model):
    return ChainLM(model=methods.draft_lm(target, drafter)), drafter.params
  if isinstance(drafter, Mapping):
    from specjax.host.load import load
    return methods.build(
        drafter, target,
        lambda source: load(source, dtype=target.dtype))
  if isinstance(drafter, type) or not hasattr(drafter, 'topology'):
    raise ValueError(
        f'drafter={drafter!r}: must be a drafter such as Lookup(7), a Model, '
        "a dict such as {'method': 'ngram'}, or None")
  return drafter, params


def _check(
    target: Model, samplings: Sequence[Sampling], **numbers: int | None
) -> None:
  """Raises ValueError for options that this target cannot be run with."""
  for name, value in numbers.items():
    if value is not None and (not isinstance(value, int) or value < 1):
      raise ValueError(f'{name}={value!r}: must be an integer >= 1')
  for one in samplings:
    one.check_ids(target.vocab_size, target.eos)
    if one.stop and target.tokenizer is None:
      raise ValueError(f'stop={one.stop!r}: stop strings need a tokenizer, '
                       f'and {target.name} has none')


def _check_width(target: Model, drafter: Any) -> None:
  """Raises ValueError when a target cannot take a block at once."""
  num, most = drafter.topology.num_nodes, target.lm.chunk - 1
  size = getattr(target.lm, 'num_tokens', None)
  if size is not None and num > size:
    raise ValueError(f'num_speculative_tokens={num}: an image has {size} '
                     'tokens')
  if num > most:
    raise ValueError(
        f'num_speculative_tokens={num}: this target takes at most {most} '
        f'(load it with chunk={num + 1} or more)')


def _pair(prompts, sampling):
  """Returns equally long lists of prompts and sampling options."""
  if isinstance(prompts, (str, Mapping, Prompt)):
    raise ValueError('prompts must be a list, also for one: [prompt]')
  prompts = list(prompts)
  if not prompts:
    raise ValueError('no prompts')
  if sampling is None:
    sampling = Sampling()
  if isinstance(sampling, Sampling):
    return prompts, [sampling] * len(prompts)
  samplings = list(sampling)
  if len(samplings) != len(prompts):
    raise ValueError(
        f'{len(samplings)} sampling options for {len(prompts)} prompts')
  return prompts, samplings


def _size(dialogues: Sequence[Dialogue], most: int | None) -> int:
  """Returns tokens a slot must hold, in steps, at most `most`."""
  size = max(d.longest() for d in dialogues)
  size = -(-size // _SIZE_STEP) * _SIZE_STEP
  return size if most is None else min(size, most)
