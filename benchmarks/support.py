"""What the scripts share: models, questions, drafters that take turns."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import setup
import specjax
from specjax.core import loop
from specjax.core.round import Engine
from specjax.core.types import Models
from specjax.data import filters
from specjax.data import questions as builtin_questions
from specjax.distill import kinds, measure
from specjax.host import drafter as drafter_lib
from specjax.host import methods, tiny
from specjax.host.drafter import Loaded
from specjax.host.load import Model
from specjax.verify import get as rule_named


def load(name: str, dtype: str | None = None) -> Model:
  """Returns a target; 'tiny' is a random one that needs no data.

  `dtype` None is the model's own.
  """
  if name == 'tiny':
    return tiny.model(dtype=dtype or 'float32')
  return specjax.load(name, dtype=dtype, quiet=True)


def drafter(model: Model, folder: str) -> Loaded:
  """Returns the drafter of a folder; 'tiny' is a random one."""
  if folder != 'tiny':
    return drafter_lib.load_drafter(folder, model)
  task = kinds.build(
      'dspark', model.lm.config, 64, model=dict(
          num_layers=1, num_taps=2, num_slots=3, markov_rank=4))
  net = task.init(jax.random.key(0), model.params)
  params = task.attach(net, model.params, range(32, 96))
  return Loaded(task.source(), params, {'kind': 'dspark', 'num_draft': 3})


def build(model: Model, config: dict[str, Any] | None, folder: str = ''):
  """Returns `(drafter, params)` of a speculative configuration.

  `folder` takes the place of a `model` that is '{dir}'.
  """
  config = dict(config or {'method': 'null'})
  if config.get('model') == '{dir}':
    config['model'] = drafter(model, folder)
  return methods.build(config, model, specjax.load)


def record(out: str, setting: dict[str, Any]) -> setup.Record:
  """Returns a record to fill; sections of an earlier run are kept.

  Raises:
    ValueError: that run was of another setting or device.
  """
  made = setup.Record(out)
  setting = json.loads(json.dumps(setting))
  made.data['setting'] = setting
  if made.path.exists():
    found = json.loads(made.path.read_text())
    for name in ('setting', 'device'):
      if found.get(name) != made.data[name]:
        raise ValueError(f'{out}: of another {name}, {found.get(name)}; give '
                         'another --out')
    made.data['sections'] = found['sections']
  return made


def compile_all(
    jobs: Iterable[Callable[[], Any]], threads: int
) -> list[Any]:
  """Runs compilations side by side; returns what they return."""
  with ThreadPoolExecutor(threads) as pool:
    return [job.result() for job in [pool.submit(j) for j in jobs]]


def options(
    description: str | None, **defaults: Any
) -> argparse.ArgumentParser:
  """Returns a parser of what these scripts have in common.

  Args:
    description: of the script.
    **defaults: of `target`, `drafter` (None: must be given), `num_questions`
      and `slots`.
  """
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument('--out', required=True)
  parser.add_argument('--target', default=defaults['target'])
  parser.add_argument(
      '--drafter', default=defaults['drafter'],
      required=defaults['drafter'] is None, help="a folder, or 'tiny'")
  parser.add_argument('--questions', default='')
  parser.add_argument(
      '--num_questions', type=int, default=defaults['num_questions'])
  parser.add_argument('--new_tokens', type=int, default=256)
  parser.add_argument('--slots', default=defaults['slots'])
  parser.add_argument('--threads', type=int, default=14)
  return parser


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt in tokens; `size` is the slots that its programs have."""

  category: str
  tokens: tuple[int, ...]
  size: int


def questions(model, path: str, limit: int, sizes: Sequence[int], new: int):
  """Returns first turns in the target's template, spread over the file.

  Args:
    model: a target with a tokenizer. path: rows of `{"turns": [...]}`; '' is
      the questions that come with the library.
    limit: of their number.
    sizes: slots of a program; a question takes the first that holds it and
      `new` tokens more.

  Returns:
    `(questions, number that no size holds)`.
  """
  if path:
    rows = [json.loads(line) for line in open(path) if line.strip()]
    texts = [(r.get('category', 'other'), r['turns'][0]) for r in rows]
  else:
    texts = [(q.category, q.turns[0]) for q in builtin_questions.QUESTIONS]
  step = max(len(texts) / limit, 1)
  picked = [texts[int(i * step)] for i in range(min(limit, len(texts)))]
  found, dropped = [], 0
  for category, text in picked:
    templated = model.tokenizer.apply_chat_template(
        [{'role': 'user', 'content': text}])
    tokens = model.tokenizer.encode(templated, add_bos=False)
    fits = [s for s in sizes if len(tokens) + new <= s]
    if fits:
      found.append(Question(category, tuple(tokens), fits[0]))
    else:
      dropped += 1
  return found, dropped


class Runner:
  """One drafter: its two programs at each size, and what it has decoded."""

  def __init__(self, name, model, drafter, params, temperature, new):
    rule = 'greedy' if not temperature else 'speculative'
    self.name, self.model, self.new = name, model, new
    self.temperature = temperature
    self.engine = Engine(model.lm, drafter, rule_named(rule))
    self.params = Models(target=model.params, drafter=params)
    self.programs: dict[int, Any] = {}
    self.rows: list[dict[str, Any]] = []
    self.histogram = np.zeros(
        drafter.topology.max_depth + 1, np.int64)

  def clear(self) -> None:
    """Forgets what has been decoded."""
    self.rows.clear()
    self.histogram[:] = 0

  def context(self, question: Question, seed: int):
    """Returns a batch of one."""
    built = measure.context(
        [question.tokens], self.new, size=question.size, seed=seed,
        eos=self.model.eos, temperature=self.temperature)
    return built.replace(token_round=jnp.full(built.tokens.shape, -1))

  def compile(self, size: int) -> None:
    """Compiles both programs ahead of time, once for each size.

    Raises:
      ValueError: the drafter or the target cannot take such a shape.
    """
    if size in self.programs:
      return
    run, admit = loop.compiled()
    context = self.context(Question('', (1, 2, 3), size), 0)
    empty = jax.jit(lambda c: loop.empty(self.engine, c))
    state = jax.eval_shape(empty, context)
    rows = jnp.ones((1,), bool)
    self.programs[size] = (
        empty.lower(context).compile(),
        admit.lower(self.engine, self.params, state, rows, context,
                    chunk=64).compile(),
        run.lower(self.engine, self.params, state, np.int32(1)).compile())

  def __call__(self, question: Question, seed: int) -> None:
    """Decodes one question and notes what happened."""
    empty, admit, run = self.programs[question.size]
    context = self.context(question, seed)
    state = empty(context)
    state = jax.block_until_ready(admit(
        self.params, state, jnp.ones((1,), bool), context))
    seconds, state = setup.timed(run, self.params, state, np.int32(10**6))
    length = int(state.context.length[0])
    start = len(question.tokens)
    new = np.asarray(state.context.tokens[0, start:length])
    rounds = np.asarray(state.context.token_round[0, start:length])
    loop_at = filters.trailing_loop(new)
    cut = loop_at[0] if loop_at else len(new)
    self.histogram += np.asarray(state.metrics.histogram[0])
    self.rows.append({
        'category': question.category, 'tokens': len(new),
        'rounds': int(state.context.rounds[0]), 'seconds': seconds,
        'fresh_tokens': int(cut),
        'fresh_rounds': int(rounds[cut - 1]) + 1 if cut else 0,
        'text': new.tolist()})


def able(
    runners: Sequence[Runner], sizes: Iterable[int], threads: int
) -> tuple[list[Runner], dict[str, str]]:
  """Compiles; returns the runners that can be, and why the others cannot."""
  def reason(runner: Runner, size: int) -> str | None:
    try:
      runner.compile(size)
    except ValueError as error:
      return str(error)
    return None

  jobs = [(r, s) for r in runners for s in sorted(set(sizes))]
  found = compile_all([functools.partial(reason, *j) for j in jobs], threads)
  failed = {runner.name: why for (runner, _), why in zip(
      jobs, found, strict=True) if why is not None}
  return [r for r in runners if r.name not in failed], failed


def take_turns(
    runners: Sequence[Runner], asked: Sequence[Question], threads: int,
    done: Callable[[int], None] | None = None,
) -> None:
  """Decodes each question with all runners in turn, after a warm-up.

  Args:
    runners: whose programs are compiled here. asked: at least one question.
    threads: of compilation.
    done: called after each question with the number of them.
  """
  begin = time.perf_counter()
  compile_all([functools.partial(r.compile, s) for r in runners
               for s in sorted({q.size for q in asked})], threads)
  print(f'compiled in {time.perf_counter() - begin:.0f} s', flush=True)
  for number, question in enumerate([asked[0], *asked]):
    for runner in runners:
      runner(question, number)
    if not number:
      for runner in runners:
        runner.clear()
    elif done:
      done(number)


def summary(runner: Runner, plain: Runner) -> dict[str, Any]:
  """Returns what a table shows of a drafter."""
  total = lambda key, rows=runner.rows: sum(r[key] for r in rows)  # noqa: E731
  at_least = np.cumsum(runner.histogram[::-1])[::-1] / max(
      runner.histogram.sum(), 1)
  speed = [a['seconds'] / max(a['tokens'], 1) / (
      b['seconds'] / max(b['tokens'], 1))
           for a, b in zip(plain.rows, runner.rows, strict=True)]
  categories = sorted({r['category'] for r in runner.rows})
  step = 1e3 * sum(r['seconds'] for r in plain.rows) / sum(
      r['rounds'] for r in plain.rows)
  ms_round = 1e3 * total('seconds') / total('rounds')

  def of(category):
    rows = [r for r in runner.rows if r['category'] == category]
    return {'tau': total('tokens', rows) / total('rounds', rows),
            'n': len(rows)}

  return {
      'tau': total('tokens') / total('rounds'),
      'tau_before_repetition': total('fresh_tokens') / max(
          total('fresh_rounds'), 1),
      'share_repetition': 1 - total('fresh_tokens') / total('tokens'),
      'speedup': (sum(r['seconds'] for r in plain.rows)
                  / sum(r['tokens'] for r in plain.rows))
                 / (total('seconds') / total('tokens')),
      'speedup_by_question': setup.spread(speed),
      'tokens_per_s': total('tokens') / total('seconds'),
      'ms_round': ms_round, 'round_over_plain_step': ms_round / step,
      'accepted_at_depth': at_least[1:].tolist(),
      'conditional': (at_least[1:] / np.maximum(
          at_least[:-1], 1e-9)).tolist(),
      'same_text_as_plain': sum(
          a['text'] == b['text'] for a, b in zip(
              plain.rows, runner.rows, strict=True)),
      'by_category': {c: of(c) for c in categories}}
