"""Drafters by name: vLLM's speculative configuration, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import numbers
from typing import Any

from specjax.core import topologies
from specjax.core import tree as tree_lib
from specjax.drafters import (
  ChainLM,
  GrownLM,
  InputGuided,
  Jacobi,
  Lookup,
  LookupTree,
  Null,
  TreeLM,
)
from specjax.drafters.chain_density import ChainDensity
from specjax.drafters.copying import Copying
from specjax.drafters.source import LanguageModel
from specjax.host import drafter as trained
from specjax.host import mar, schedules, shapes, vocab_trim
from specjax.host.load import Model
from specjax.io import drafter_file

# Other engines' names for the same thing -> the one that we print.
_ALIASES = {
    'num_assistant_tokens': 'num_speculative_tokens',
    'speculate_k': 'num_speculative_tokens',
    'max_draft_len': 'num_speculative_tokens',
    'max_matching_ngram_size': 'prompt_lookup_max',
    'assistant_confidence_threshold': 'draft_confidence_threshold',
    'num_assistant_tokens_schedule': 'draft_len_schedule',
    'max_total_draft_tokens': 'num_speculative_tokens',
    'speculative_num_draft_tokens': 'num_speculative_tokens',
    'speculative_eagle_topk': 'tree_top_k',
    'dynamic_tree_max_topK': 'tree_top_k',
    'speculative_num_steps': 'tree_depth',
}
_METHODS = {'ngram_gpu': 'ngram', 'prompt_lookup': 'ngram', 'lookup': 'ngram',
            'none': 'null', 'iad': 'input_guided', 'eagle1': 'eagle',
            'eagle2': 'eagle', 'hass': 'eagle'}
# Methods of drafters that `train.drafter` made -> the kinds that they are.
_TRAINED: dict[str, tuple[str, ...]] = {
    'dspark': ('dspark',), 'dflash': ('dflash',), 'eagle3': ('eagle3',),
    'eagle': ('eagle1', 'hass'), 'medusa': ('medusa',), 'hydra': ('hydra',),
    'small_lm': ('small_lm',), 'draft_head': ()}
_HEAD_KEYS = {
    'model', 'draft_confidence_threshold', 'draft_acceptance_threshold',
    'speculative_token_tree', 'draft_sample_method', 'use_dynamic_tree',
    'tree_depth', 'tree_top_k', 'lattice', 'num_candidates', 'copy_max'}
_SHARED = {'method', 'num_speculative_tokens', 'draft_len_schedule',
           'exact_shape', 'draft_cost', 'widths', 'round_costs'}
_KEYS = {
    'null': set(),
    'ngram': {'prompt_lookup_min', 'prompt_lookup_max', 'prefer',
              'prompt_lookup_lengths'},
    'input_guided': {'max_ngram'},
    'jacobi': {'init', 'width', 'redraft'},
    'draft_model': {'model', 'draft_confidence_threshold',
                    'speculative_token_tree', 'draft_sample_method',
                    'use_dynamic_tree', 'tree_depth', 'tree_top_k',
                    'draft_vocab', 'draft_vocab_counts', 'prefill'},
    **dict.fromkeys(_TRAINED, _HEAD_KEYS),
}
_TYPES: dict[str, Any] = {
    'method': str, 'num_speculative_tokens': int, 'draft_len_schedule': str,
    'exact_shape': bool, 'draft_cost': numbers.Real, 'widths': Sequence,
    'round_costs': Sequence,
    'prompt_lookup_min': int, 'prompt_lookup_max': int, 'prefer': str,
    'max_ngram': int, 'init': str, 'width': int, 'redraft': str,
    'model': (str, Model, trained.Loaded),
    'draft_confidence_threshold': numbers.Real,
    'draft_acceptance_threshold': numbers.Real, 'lattice': bool,
    'num_candidates': int, 'copy_max': int,
    'prompt_lookup_lengths': Sequence, 'use_dynamic_tree': bool,
    'speculative_token_tree': (str, Sequence, tree_lib.Topology),
    'draft_sample_method': str, 'tree_depth': int, 'tree_top_k': int,
    'draft_vocab': (str, int, Sequence), 'draft_vocab_counts': str,
    'prefill': int}
_TYPE_NAMES = {str: 'a string', int: 'an integer', bool: 'true or false',
               numbers.Real: 'a number', Sequence: 'a list of integers',
               (str, Model, trained.Loaded): 'a source, a folder or a Model',
               (str, Sequence, tree_lib.Topology): 'a tree',
               (str, int, Sequence): 'a path, a number or a list of ids'}
# vLLM's words for how a drafter chooses its tokens.
_SAMPLE_METHODS = {'greedy': 'top_k', 'probabilistic': 'iid'}


def build(
    config: Mapping[str, Any], target: Model,
    load: Callable[[str], Model] | None = None,
) -> tuple[Any, Any]:
  """Returns `(drafter, drafter params)` of a speculative configuration.

  Args:
    config: vLLM's JSON: `method` ('ngram', 'draft_model', also 'null' and
      'input_guided'), `num_speculative_tokens`, `prompt_lookup_min/max`,
      `model`; and `draft_len_schedule` ('constant', 'heuristic',
      'confidence', 'tracking', 'shared'), `draft_confidence_threshold`,
      `exact_shape`, `widths` (block widths compiled beside K when
      `exact_shape` is false), `draft_cost`, `round_costs` (of 'shared': of
      each width above 0, K last), `prefer`, `max_ngram`. With
      `model` and no `method` the method is 'draft_model', as in vLLM.
      Trees: `prompt_lookup_lengths` (tokens of each match, side by side);
      `speculative_token_tree` (`core.topologies.parse`) with
      `draft_sample_method` ('iid', 'without_replacement', 'top_k',
      'top_plus_one', 'coupled'); or `use_dynamic_tree` with `tree_depth`
      and `tree_top_k`, `num_speculative_tokens` nodes.
      'jacobi' (`drafters.Jacobi`): `init`, `width`, `redraft`.
      Of a small model, `draft_vocab`: the tokens that it may draft
      (`host.vocab_trim.read`), with `draft_vocab_counts`; where tokens are
      real numbers, `prefill`.
      Drafters that `train.drafter` made: 'dspark', 'dflash', 'eagle3',
      'eagle', 'medusa', 'hydra', 'small_lm', or 'draft_head' for any of
      them, `model` being their folder; the keys of trees,
      `draft_acceptance_threshold` (chains, of the confidence head), and of
      block drafters `lattice`, `num_candidates` and `copy_max`
      (`host.shapes.shape`; copies are on unless it is 0).
    target: the model that will verify.
    load: loads `config['model']` when that is a source, not a `Model`.

  Raises:
    ValueError: unknown key, method or schedule; vocabularies that differ.
  """
  config = {_ALIASES.get(k, k): v for k, v in dict(config).items()
            if v is not None}
  method = config.get('method', _implied(config.get('model')))
  method = _METHODS.get(str(method), method)
  if method not in list(_KEYS):  # a list: what is not hashable is unknown too
    raise ValueError(f"speculative method {config['method']!r}: known are "
                     f"{', '.join(sorted(_KEYS))}")
  allowed = _SHARED | _KEYS[method]
  unknown = sorted(set(config) - allowed)
  if unknown:
    hint = ''
    if 'method' not in config and set(unknown) <= _HEAD_KEYS:
      hint = f" (model={config.get('model')!r} is no folder of a drafter)"
    raise ValueError(f'speculative_config keys {unknown} are unknown for '
                     f'method {method!r}{hint}; known are {sorted(allowed)}')
  for key, value in config.items():
    kind = _TYPES[key]
    if not isinstance(value, kind) or (
        isinstance(value, bool) and kind is not bool):
      raise ValueError(f'speculative_config: {key}={value!r}: must be '
                       f'{_TYPE_NAMES[kind]}')
  drafter, params = _plain(method, config, target, load)
  return schedules.scheduled(drafter, config), params


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
    return _lookup(kwargs), None
  if method == 'input_guided':
    return InputGuided(**kwargs), None
  if method == 'jacobi':
    guess = {'guess': kwargs.pop('init')} if 'init' in kwargs else {}
    return Jacobi(vocab_size=target.vocab_size, **guess, **kwargs), None
  model = kwargs.pop('model', None)
  if method in _TRAINED:
    return _trained(method, model, kwargs, target)
  if isinstance(model, str) and load is not None:
    model = load(model)
  if not isinstance(model, Model):
    raise ValueError("method 'draft_model' needs 'model'")
  if not target.vocab_size:
    return _continuous(target, model, kwargs), model.params
  if 'prefill' in kwargs:
    raise ValueError("'prefill' is for tokens of real numbers")
  lm, params = draft_lm(target, model), model.params
  vocab, counts = (kwargs.pop(key, None)
                   for key in ('draft_vocab', 'draft_vocab_counts'))
  if counts is not None and not isinstance(vocab, int):
    raise ValueError("'draft_vocab_counts' goes with a number of tokens, "
                     "'draft_vocab'")
  if vocab is not None:
    lm, params = vocab_trim.trim(lm, params, vocab_trim.read(
        vocab, target.vocab_size, counts=counts, always=target.eos))
  return _small(lm, kwargs), params


def _continuous(target: Model, model: Model, kwargs: dict[str, Any]) -> Any:
  """Returns a chain of tokens of real numbers."""
  more = sorted(set(kwargs) - {'num_speculative_tokens', 'prefill'})
  if more:
    raise ValueError(f'speculative_config keys {more}: are for ids')
  return ChainDensity(model=mar.draft_lm(target, model), **kwargs)


def _implied(model: Any) -> str:
  """Returns the method of a configuration that names none."""
  if model is None:
    return 'ngram'
  is_head = isinstance(model, trained.Loaded) or (
      isinstance(model, str) and drafter_file.is_drafter(model))
  return 'draft_head' if is_head else 'draft_model'


def _trained(
    method: str, model: Any, kwargs: dict[str, Any], target: Model
) -> tuple[Any, Any]:
  """Returns a trained drafter in the shape asked for, its parameters."""
  if not isinstance(model, (str, trained.Loaded)):
    raise ValueError(f"method {method!r} needs 'model': the folder of a "
                     'drafter')
  if isinstance(model, str):
    model = trained.load_drafter(model, target)
  kind, kinds = model.facts.get('kind'), _TRAINED[method]
  if kinds and kind not in kinds:
    raise ValueError(f'method {method!r}: this drafter is of kind {kind!r}; '
                     "use that, or 'draft_head'")
  return shapes.shape(
      model.source, model.num_draft, kwargs,
      copy_max=len(Copying.shares)), model.params


def _lookup(kwargs: dict[str, Any]) -> Any:
  """Returns prompt lookup with one match, or with several."""
  lengths = kwargs.pop('prompt_lookup_lengths', None)
  if lengths is None:
    return Lookup(**kwargs)
  if 'num_speculative_tokens' in kwargs:
    raise ValueError('prompt_lookup_lengths and num_speculative_tokens: give '
                     'one of them')
  return LookupTree(lengths=tuple(lengths), **kwargs)


def _small(lm: Any, kwargs: dict[str, Any]) -> Any:
  """Returns a small model's drafter: a chain, a static tree, a grown one."""
  threshold = kwargs.pop('draft_confidence_threshold', 0.0)
  tree = kwargs.pop('speculative_token_tree', None)
  method = kwargs.pop('draft_sample_method', None)
  method = _SAMPLE_METHODS.get(str(method), method)
  dynamic = kwargs.pop('use_dynamic_tree', False)
  if not dynamic and {'tree_depth', 'tree_top_k'} & set(kwargs):
    raise ValueError("'tree_depth' and 'tree_top_k' are for "
                     "'use_dynamic_tree': true")
  if dynamic:
    if tree is not None or method not in (None, 'top_k'):
      raise ValueError("'use_dynamic_tree' grows its own tree of top tokens: "
                       "leave out 'speculative_token_tree' and "
                       "'draft_sample_method'")
    grown = GrownLM(model=lm, **kwargs)
    scratch = max(grown.num_scratch, grown.tree_depth + 1)
    if lm.chunk < scratch:  # sliding windows keep that many more entries
      lm = dataclasses.replace(lm, chunk=scratch)
    return dataclasses.replace(grown, model=lm)
  if tree is None and method in (None, 'iid'):
    return ChainLM(model=lm, confidence_threshold=threshold, **kwargs)
  if threshold:
    raise ValueError("'draft_confidence_threshold' is for chains that are "
                     "drawn ('iid')")
  if tree is None:
    tree = tree_lib.chain(
        kwargs.pop('num_speculative_tokens', ChainLM.num_speculative_tokens))
  topology = topologies.parse(tree)
  num = kwargs.pop('num_speculative_tokens', topology.num_nodes)
  if num != topology.num_nodes:
    raise ValueError(f'num_speculative_tokens={num}: the tree has '
                     f'{topology.num_nodes} nodes')
  return TreeLM(tree=topology, model=lm, **(
      {} if method is None else {'draft_sample_method': method}))


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


def context_of(drafter: Any) -> int | None:
  """Returns the context of a drafter's language model, in tokens.

  None: it has none, or nobody says how much.
  """
  while hasattr(drafter, 'drafter'):  # a length schedule around it
    drafter = drafter.drafter
  model = getattr(drafter, 'model', None)
  if isinstance(model, LanguageModel):
    model = model.model
  return getattr(model, 'max_length', None)


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
