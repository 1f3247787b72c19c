"""Drafters by name: vLLM's speculative configuration, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import numbers
from typing import Any

from specjax.core import control
from specjax.drafters import Adaptive, InputGuided, Lookup, Null, SmallLM
from specjax.host.load import Model

# Other engines' names for the same thing -> the one that we print.
_ALIASES = {
    'num_assistant_tokens': 'num_speculative_tokens',
    'speculate_k': 'num_speculative_tokens',
    'max_draft_len': 'num_speculative_tokens',
    'max_matching_ngram_size': 'prompt_lookup_max',
    'assistant_confidence_threshold': 'draft_confidence_threshold',
    'num_assistant_tokens_schedule': 'draft_len_schedule',
}
_METHODS = {'ngram_gpu': 'ngram', 'prompt_lookup': 'ngram', 'lookup': 'ngram',
            'none': 'null', 'iad': 'input_guided'}
_SHARED = {'method', 'num_speculative_tokens', 'draft_len_schedule',
           'exact_shape', 'draft_cost', 'widths'}
_KEYS = {
    'null': set(),
    'ngram': {'prompt_lookup_min', 'prompt_lookup_max', 'prefer'},
    'input_guided': {'max_ngram'},
    'draft_model': {'model', 'draft_confidence_threshold'},
}
_TYPES: dict[str, Any] = {
    'method': str, 'num_speculative_tokens': int, 'draft_len_schedule': str,
    'exact_shape': bool, 'draft_cost': numbers.Real, 'widths': Sequence,
    'prompt_lookup_min': int, 'prompt_lookup_max': int, 'prefer': str,
    'max_ngram': int, 'model': (str, Model),
    'draft_confidence_threshold': numbers.Real}
_TYPE_NAMES = {str: 'a string', int: 'an integer', bool: 'true or false',
               numbers.Real: 'a number', Sequence: 'a list of integers',
               (str, Model): 'a source or a Model'}
_SCHEDULES = ('constant', 'heuristic', 'confidence', 'tracking')


def build(
    config: Mapping[str, Any], target: Model,
    load: Callable[[str], Model] | None = None,
) -> tuple[Any, Any]:
  """Returns `(drafter, drafter params)` of a speculative configuration.

  Args:
    config: vLLM's JSON: `method` ('ngram', 'draft_model', also 'null' and
      'input_guided'), `num_speculative_tokens`, `prompt_lookup_min/max`,
      `model`; and `draft_len_schedule` ('constant', 'heuristic',
      'confidence', 'tracking'), `draft_confidence_threshold`,
      `exact_shape`, `widths` (block widths compiled beside K when
      `exact_shape` is false), `draft_cost`, `prefer`, `max_ngram`. With
      `model` and no `method` the method is 'draft_model', as in vLLM.
    target: the model that will verify.
    load: loads `config['model']` when that is a source, not a `Model`.

  Raises:
    ValueError: unknown key, method or schedule; vocabularies that differ.
  """
  config = {_ALIASES.get(k, k): v for k, v in dict(config).items()
            if v is not None}
  method = config.get(
      'method', 'draft_model' if 'model' in config else 'ngram')
  method = _METHODS.get(str(method), method)
  if method not in list(_KEYS):  # a list: what is not hashable is unknown too
    raise ValueError(f"speculative method {config['method']!r}: known are "
                     f"{', '.join(sorted(_KEYS))}")
  allowed = _SHARED | _KEYS[method]
  unknown = sorted(set(config) - allowed)
  if unknown:
    raise ValueError(f'speculative_config keys {unknown} are unknown for '
                     f'method {method!r}; known are {sorted(allowed)}')
  for key, value in config.items():
    kind = _TYPES[key]
    if not isinstance(value, kind) or (
        isinstance(value, bool) and kind is not bool):
      raise ValueError(f'speculative_config: {key}={value!r}: must be '
                       f'{_TYPE_NAMES[kind]}')
  drafter, params = _plain(method, config, target, load)
  return _scheduled(drafter, config), params


def _plain(method: str, config: dict[str, Any], target: Model, load):
  """Returns the drafter without a length schedule, and its parameters."""
  kwargs = {k: config[k] for k in _KEYS[method] & set(config)}
  if 'num_speculative_tokens' in config:
    kwargs['num_speculative_tokens'] = config['num_speculative_tokens']
  if method == 'null':
    return Null(**kwargs), None
  if method == 'ngram':
    # vLLM lets one bound imply the other.
    low, high = kwargs.get('prompt_lookup_min'), kwargs.get(
        'prompt_lookup_max')
    if low is not None and high is None:
      kwargs['prompt_lookup_max'] = max(low, Lookup.prompt_lookup_max)
    return Lookup(**kwargs), None
  if method == 'input_guided':
    return InputGuided(**kwargs), None
  model = kwargs.pop('model', None)
  if isinstance(model, str) and load is not None:
    model = load(model)
  if not isinstance(model, Model):
    raise ValueError("method 'draft_model' needs 'model'")
  lm = draft_lm(target, model)
  threshold = kwargs.pop('draft_confidence_threshold', 0.0)
  drafter = SmallLM(model=lm, confidence_threshold=threshold, **kwargs)
  return drafter, model.params


def _scheduled(drafter: Any, config: dict[str, Any]) -> Any:
  """Wraps a drafter in the controller that the configuration names."""
  schedule = config.get('draft_len_schedule', 'constant')
  if schedule not in _SCHEDULES:
    raise ValueError(f'draft_len_schedule={schedule!r}: known are '
                     f"{', '.join(_SCHEDULES)}")
  if schedule == 'constant' or drafter.topology.num_nodes == 0:
    return drafter
  if schedule == 'confidence' and not drafter.states_law:
    raise ValueError(
        "draft_len_schedule='confidence' needs a drafter that reports its "
        "probabilities ('draft_model'); use 'heuristic' or 'tracking'")
  exact = config.get('exact_shape', True)
  cost = config.get('draft_cost', 0.0)
  if cost < 0:
    raise ValueError(f'draft_cost={cost}: must be >= 0')
  controllers: dict[str, Any] = {
      'heuristic': control.Heuristic(), 'confidence': control.Confidence(),
      'tracking': control.Tracking(draft_cost=cost)}
  controller = controllers[schedule]
  if not exact and isinstance(drafter, SmallLM):
    drafter = drafter.resyncing()
  num = drafter.topology.num_nodes
  widths = tuple(config.get('widths') or {0, 1, num // 2} - {num})
  if not all(isinstance(w, int) for w in widths):
    raise ValueError(f'widths={list(widths)}: must be integers')
  return Adaptive(drafter, controller, exact_shape=exact, widths=widths)


def draft_lm(target: Model, drafter: Model) -> Any:
  """Returns the functions of a model that is to draft for `target`.

  It must take prompt chunks that are as long as the target's.

  Raises:
    ValueError: the vocabularies differ.
  """
  check_vocabularies(target, drafter)
  if drafter.lm.chunk >= target.lm.chunk:
    return drafter.lm
  return dataclasses.replace(drafter.lm, chunk=target.lm.chunk)


def check_vocabularies(target: Model, drafter: Model) -> None:
  """Raises ValueError when a drafter speaks another vocabulary."""
  advice = ('drafts must be token ids of the target; use a drafter of the '
            "target's family, or method 'ngram'")
  if target.tokenizer is not None and drafter.tokenizer is not None:
    difference = target.tokenizer.compare(drafter.tokenizer)
    if difference:
      raise ValueError(f'the vocabularies of {target.name} and '
                       f'{drafter.name} differ: {difference}; {advice}')
  if target.vocab_size != drafter.vocab_size:
    raise ValueError(
        f'{target.name} scores {target.vocab_size} tokens and {drafter.name} '
        f'{drafter.vocab_size}; {advice}')
