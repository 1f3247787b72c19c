"""What cannot work is refused on the host, before anything is compiled."""

import compilations
import numpy as np
import pytest

from specjax import verify
from specjax.core import tree
from specjax.core.types import (
  IID,
  MATCH,
  MODE_NAMES,
  POINT,
  TOP_PLUS_ONE,
  WITHOUT_REPLACEMENT,
)
from specjax.verify import (
  Block,
  Gumbel,
  Judge,
  KSeq,
  Lantern,
  Lenient,
  OptimalTransport,
  Speculative,
  Traversal,
  Typical,
  get,
  neighbours,
)

CHAIN, PAIR = tree.chain(3), tree.from_parents([0, 0])
FREE = tree.Topology(num_nodes=4, max_depth=3, max_children=2,
                     is_chain=False, parents=None)
TABLE = {'neighbours': np.zeros((50, 8), np.int32)}
HEAD = dict.fromkeys(('weight', 'bias', 'mean', 'scale'), np.zeros(3))


@pytest.fixture(autouse=True)
def nothing_is_compiled():
  """Fails a test in which XLA was asked for anything."""
  before = compilations.counts()
  yield
  assert compilations.counts() == before


def test_every_name_makes_a_rule():
  """All known names, with the options that they insist on."""
  needs = {'lantern': {'delta': 0.1}}
  assert list(verify.names()) == sorted(set(verify.names()))
  for name in verify.names():
    rule = get(name, **needs.get(name, {}))
    assert isinstance(rule, verify.Rule)
    assert rule.name in verify.names()
    assert rule == get(name, **needs.get(name, {}))  # one trace for both
    assert hash(rule) == hash(get(name, **needs.get(name, {})))
  assert {type(get(n, **needs.get(n, {}))) for n in verify.names()} == set(
      verify.RULES)


@pytest.mark.parametrize('name,options,rule', [
    ('recursive_rejection', {}, Speculative()),
    ('lantern++', {}, Lantern(lam=2.0)),
    ('lantern++', {'lam': 3.0, 'offset': 4}, Lantern(lam=3.0, offset=4)),
    ('medusa', {'epsilon': 0.2}, Typical(0.2, form='medusa')),
    ('lenient', {'lenience': 1}, Lenient(1)),
    ('judge', {'threshold': 0}, Judge(0))], ids=str)
def test_presets_and_options(name, options, rule):
  assert get(name, **options) == rule


def test_lossy_rules_say_so():
  """Those that may change the law, and no other."""
  lossy = {rule.name for rule in verify.RULES if rule.lossy}
  assert lossy == {
      'lenient', 'typical', 'lantern', 'judge', 'grouped', 'cspd'}


@pytest.mark.parametrize('name', ['', 'speculativ', 'Speculative', 'none'])
def test_unknown_name_lists_the_known_ones(name):
  with pytest.raises(ValueError, match=f"verify='{name}'.*block.*typical"):
    get(name)


@pytest.mark.parametrize('name,option,known', [
    ('lenient', 'lenient', 'lenience'), ('typical', 'eps', 'epsilon, delta'),
    ('block', 'lenience', 'none'), ('spechub', 'n', 'none')])
def test_unknown_option_lists_the_known_ones(name, option, known):
  with pytest.raises(ValueError, match=f"'{name}'.*'{option}'.*{known}"):
    get(name, **{option: 1})


NAN = float('nan')
OUT_OF_RANGE = [
    ('lenient', {'lenience': 0}, 'lenience=0'),
    ('lenient', {'lenience': 1.01}, 'lenience=1.01'),
    ('lenient', {'lenience': NAN}, 'lenience=nan'),
    ('typical', {'epsilon': -0.1}, 'epsilon=-0.1'),
    ('typical', {'epsilon': 1.1}, 'epsilon=1.1'),
    ('typical', {'delta': -0.1}, 'delta=-0.1'),
    ('typical', {'delta': NAN}, 'delta=nan'),
    ('typical', {'form': 'eagle'}, "form='eagle'"),
    ('lantern', {}, 'give one of them'),
    ('lantern', {'delta': 0.1, 'lam': 2.0}, 'give one of them'),
    ('lantern', {'delta': -0.1}, 'delta=-0.1'),
    ('lantern', {'delta': 1.1}, 'delta=1.1'),
    ('lantern', {'delta': NAN}, 'delta=nan'),
    ('lantern', {'lam': 0.99}, 'lam=0.99'),
    ('lantern', {'lam': NAN}, 'lam=nan'),
    ('lantern', {'lam': 2.0, 'num_neighbours': -1}, 'num_neighbours=-1'),
    ('lantern', {'lam': 2.0, 'offset': -1}, 'offset=-1'),
    ('lantern', {'lam': 2.0, 'residual': 'ones'}, "residual='ones'"),
    ('lantern++', {'delta': 0.1}, 'takes lam, not delta'),
    ('lantern++', {'lam': 0.5}, 'lam=0.5'),
    ('judge', {'threshold': -0.1}, 'threshold=-0.1'),
    ('judge', {'threshold': 1.1}, 'threshold=1.1'),
    ('judge', {'threshold': NAN}, 'threshold=nan'),
    ('gumbel', {'num_noise': 0}, 'num_noise=0'),
    ('optimal_transport', {'drafts': 'top'}, "drafts='top'"),
]


@pytest.mark.parametrize('name,options,message', OUT_OF_RANGE, ids=str)
def test_values_out_of_range(name, options, message):
  with pytest.raises(ValueError, match=message):
    get(name, **options)


def example(rule_class):
  """Returns a rule, the arrays it needs and a topology that it takes."""
  if rule_class is Lantern:
    return Lantern(8, delta=0.1), TABLE, PAIR
  if rule_class is Judge:
    return Judge(), HEAD, PAIR
  return rule_class(), None, CHAIN if rule_class.chains_only else PAIR


by_class = pytest.mark.parametrize(
    'rule_class', verify.RULES, ids=lambda c: c.name)


@by_class
@pytest.mark.parametrize('mode', range(len(MODE_NAMES)), ids=MODE_NAMES)
def test_kinds_of_drafts(rule_class, mode):
  """Kinds that a rule does not claim are refused, with what to use."""
  rule, params, topology = example(rule_class)
  if rule_class is OptimalTransport and mode == WITHOUT_REPLACEMENT:
    rule = OptimalTransport('without_replacement')
  vocab_size = 0 if rule.continuous else 60
  if mode in rule.modes:
    rule.check(topology, (mode,), vocab_size, params)
    return
  with pytest.raises(ValueError) as caught:
    rule.check(topology, (mode,), vocab_size, params)
  message = str(caught.value)
  assert f'makes {MODE_NAMES[mode]} drafts' in message
  assert message.endswith(rule.advice) and 'use ' in rule.advice
  # A combinator's kinds are all looked at.
  with pytest.raises(ValueError, match=MODE_NAMES[mode]):
    rule.check(topology, (rule.modes[0], mode), vocab_size, params)


@by_class
def test_other_kind_of_tokens(rule_class):
  """Rules of densities refuse vocabularies; the others real numbers."""
  rule, params, topology = example(rule_class)
  wrong, what = (60, 'real numbers') if rule.continuous else (
      0, 'a vocabulary')
  with pytest.raises(ValueError, match=f'{rule.name}.*for tokens of {what}'):
    rule.check(topology, (rule.modes[0],), wrong, params)


def test_kinds_that_the_lossless_rules_claim():
  """Said once more: the loop above only holds rules to their own word."""
  refused = {rule.name: {MODE_NAMES[m] for m in range(len(MODE_NAMES))
                         if m not in rule.modes} for rule in verify.RULES}
  drawn = {'iid', 'without_replacement', 'top_plus_one'}
  densities = [rule.name for rule in verify.RULES if rule.continuous]
  assert sorted(densities) == ['cspd', 'path_exact', 'reflection']
  for name in densities:
    assert refused.pop(name) == {
        'without_replacement', 'top_plus_one', 'point', 'match'}
  assert {k: v for k, v in refused.items() if v} == {
      'block': {'without_replacement', 'top_plus_one', 'point', 'match'},
      'k_seq': {'without_replacement', 'top_plus_one', 'point', 'match'},
      'traversal': {'top_plus_one', 'match'},
      'greedy_multi_draft': {'iid', 'without_replacement'},
      'optimal_transport': {'top_plus_one', 'point', 'match'},
      'gumbel': drawn}


def test_nothing_drafted_is_fine_for_everyone():
  """Plain decoding: the kind says nothing then."""
  for rule in (Block(), Gumbel(), Traversal(), OptimalTransport()):
    rule.check(tree.chain(0), (POINT, IID), 60, None)


def test_single_drawn_child_is_no_multi_draft():
  """A chain of drawn tokens is speculative sampling under another name."""
  get('spechub').check(CHAIN, (IID,), 60, None)
  with pytest.raises(ValueError, match='top_plus_one'):
    get('spechub').check(PAIR, (IID,), 60, None)


CANNOT = [
    (Block(), PAIR, (IID,), None, "'block' is for chains.*2 nodes.*traversal"),
    (Block(), FREE, (IID,), None, "'block' is for chains"),
    (KSeq(), CHAIN, (IID,), None, "two or more.*'speculative' or 'block'"),
    (KSeq(), PAIR, (POINT,), None, "kind iid.*point drafts.*'speculative'"),
    (Traversal(), FREE, (IID,), None, "static tree; use 'match'"),
    (OptimalTransport(), FREE, (IID,), None, 'static tree'),
    (OptimalTransport(), PAIR, (WITHOUT_REPLACEMENT,), None,
     "drafts='iid', and the drafter draws otherwise"),
    (OptimalTransport('without_replacement'), PAIR, (IID,), None,
     "drafts='without_replacement', and"),
    (Lantern(8, lam=2.0), CHAIN, (IID,), None, 'needs a codebook'),
    (Lantern(8, lam=2.0), CHAIN, (IID,), {}, 'needs a codebook'),
    (Lantern(8, lam=2.0), CHAIN, (IID,), HEAD, 'needs a codebook'),
    (Lantern(9, lam=2.0), CHAIN, (IID,), TABLE,
     'num_neighbours=9: the table holds 8 of 50'),
    (Lantern(8, lam=2.0, offset=11), CHAIN, (IID,), TABLE,
     '50 codebook entries from id 11 .* vocabulary of 60'),
    (Judge(), CHAIN, (IID,), None, 'needs a trained head'),
    (Judge(), CHAIN, (IID,), TABLE, 'needs a trained head'),
    (Judge(), CHAIN, (IID,), {k: 0 for k in HEAD if k != 'scale'},
     'weight, bias, mean, scale'),
    (Typical(form='medusa'), CHAIN, (POINT, IID), None, "form='residual'"),
]


@pytest.mark.parametrize(
    'rule,topology,modes,params,message', CANNOT,
    ids=[f'{i}-{case[0].name}' for i, case in enumerate(CANNOT)])
def test_what_a_rule_cannot_verify(rule, topology, modes, params, message):
  with pytest.raises(ValueError, match=message):
    rule.check(topology, modes, 60, params)


def test_optimal_transport_is_for_small_vocabularies():
  """V^n tuples: the limit is on their number, not on V alone."""
  rule = OptimalTransport()
  for rule_of_kind, mode in ((rule, IID), (
      OptimalTransport('without_replacement'), WITHOUT_REPLACEMENT)):
    rule_of_kind.check(PAIR, (mode,), 60, None)
    with pytest.raises(ValueError, match=r'49152\^2.*greedy_multi_draft'):
      rule_of_kind.check(PAIR, (mode,), 49152, None)
  with pytest.raises(ValueError, match=r'100\^4 = 100000000 tuples'):
    rule.check(tree.from_parents([0] * 4), (IID,), 100, None)


def test_what_fits_exactly_is_taken():
  """The limits themselves are inside."""
  Lantern(8, lam=2.0, offset=10).check(CHAIN, (IID,), 60, TABLE)
  Lantern(0, lam=2.0).check(CHAIN, (IID,), 60, None)  # reads no table
  Judge().check(CHAIN, (IID,), 60, HEAD)
  Lenient(1.0).check(FREE, (MATCH, TOP_PLUS_ONE), 60, None)


@pytest.mark.parametrize('parents,message', [
    ((1,), r'parents\[0\]=1'), ((0, 2), r'parents\[1\]=2'),
    ((2, 0), r'parents\[0\]=2'), ((-1,), r'parents\[0\]=-1'),
    ((0, 3, 1), r'no cycle')], ids=str)
def test_cycles_and_unordered_parents(parents, message):
  """However the topology is made."""
  with pytest.raises(ValueError, match=message):
    tree.from_parents(parents)
  with pytest.raises(ValueError, match=message):
    tree.Topology(num_nodes=len(parents), max_depth=1, max_children=1,
                  is_chain=False, parents=parents)


@pytest.mark.parametrize('wrong,message', [
    ({'max_depth': 1}, 'max_depth=1.* 2 deep'),
    ({'max_depth': 3}, 'max_depth=3.* 2 deep'),
    ({'max_depth': 4}, r'max_depth=4: must be in \[0, 3\]'),
    ({'max_depth': -1}, 'max_depth=-1'),
    ({'max_children': 1}, 'max_children=1.*up to 2'),
    ({'max_children': 3}, 'max_children=3.*up to 2'),
    ({'is_chain': True}, 'is_chain=True'),
    ({'num_nodes': 2}, '3 parents for 2 nodes'),
    ({'num_nodes': -1}, 'num_nodes=-1')], ids=str)
def test_counts_that_the_parents_contradict(wrong, message):
  right = {'num_nodes': 3, 'max_depth': 2, 'max_children': 2,
           'is_chain': False, 'parents': (0, 0, 1)}
  assert tree.Topology(**right) == tree.from_parents((0, 0, 1))
  with pytest.raises(ValueError, match=message):
    tree.Topology(**{**right, **wrong})


def test_a_chain_must_say_that_it_is_one():
  """Targets skip masks and commits for chains: the flag must not lie."""
  with pytest.raises(ValueError, match='is_chain=False'):
    tree.Topology(num_nodes=2, max_depth=2, max_children=1, is_chain=False,
                  parents=(0, 1))


@pytest.mark.parametrize('codebook,num,message', [
    (np.zeros(5), 1, r'shape \(5,\)'),
    (np.zeros((2, 3, 4)), 1, r'shape \(2, 3, 4\)'),
    (np.full((5, 2), np.nan), 1, 'finite'),
    (np.full((5, 2), np.inf), 1, 'finite'),
    (np.zeros((5, 2)), 0, 'num_neighbours=0.*5 entries'),
    (np.zeros((5, 2)), 5, 'allows 1 to 4'),
    (np.zeros((1, 2)), 1, 'codebook of 1'),
    (np.zeros((0, 2)), 1, 'codebook of 0')], ids=str)
def test_codebooks_without_neighbours(codebook, num, message):
  with pytest.raises(ValueError, match=message):
    neighbours(codebook, num)
