"""Statistics, closed forms and the loop's G-tests, against known numbers."""

import dataclasses
import types

import numpy as np
import pytest

from specjax.certificates import acceptance, fit, jobs, sampled, toys
from specjax.certificates import setting as setting_lib
from specjax.certificates.fit import Cells
from specjax.certificates.setting import Laws, Setting
from specjax.core import topologies, tree
from specjax.core.types import IID, POINT, TOP_PLUS_ONE, WITHOUT_REPLACEMENT
from specjax.drafters import ChainLM
from specjax.verify import Speculative

# Section 0.7 of the verification card, in its own numbers.
CHAIN_P, CHAIN_Q = [.5, .3, .2], [.2, .3, .5]
A_P, A_Q = [.1, .2, .3, .4], [.4, .3, .2, .1]


def walk(p, q, topology, mode) -> acceptance.Walk:
  """Returns a walk over laws that do not depend on the text."""
  table = {'target': p, 'drafter': q, 'rank': q}
  kind = types.SimpleNamespace(new=99, eos=-1)
  laws = types.SimpleNamespace(
      setting=types.SimpleNamespace(kinds=[kind]),
      of=lambda who, kind, text: np.asarray(table[who]))
  return acceptance.Walk(laws, 0, topology, mode)


def kept(form, p, q, topology, mode) -> float:
  it = walk(p, q, topology, mode)
  return it.follow(lambda row, text: form(it, row, text))


@pytest.mark.parametrize('num, token, block', [
    (1, .7, .7), (2, 1.19, 1.25), (3, 1.533, 1.695), (4, 1.7731, 2.0635)])
def test_chains(num, token, block):
  args = CHAIN_P, CHAIN_Q, tree.chain(num), IID
  assert kept(acceptance.rejection, *args) == pytest.approx(token)
  assert acceptance.block(walk(*args)) == pytest.approx(block)


@pytest.mark.parametrize('widths, without, replaced', [
    ((2,), .82, .76), ((2, 2), 1.4924, 1.3376), ((2, 1), 1.394, 1.292),
    ((1, 2), 1.274, 1.232), ((2, 1, 1), 1.7958, 1.6644)])
def test_trees_by_recursive_rejection(widths, without, replaced):
  shape = topologies.branching(widths)
  for mode, want in ((WITHOUT_REPLACEMENT, without), (IID, replaced)):
    got = kept(acceptance.rejection, CHAIN_P, CHAIN_Q, shape, mode)
    assert got == pytest.approx(want)


@pytest.mark.parametrize('form, mode, num, want', [
    (acceptance.rejection, IID, 3, .768),
    (acceptance.rejection, WITHOUT_REPLACEMENT, 3, .8402976190),
    (acceptance.top_plus_one, TOP_PLUS_ONE, 2, .7666666667),
    (acceptance.top_plus_one, TOP_PLUS_ONE, 3, .9333333333),
    (acceptance.points, POINT, 2, .3), (acceptance.points, POINT, 3, .6)])
def test_several_drafts_at_one_position(form, mode, num, want):
  shape = topologies.branching((num,))
  assert kept(form, A_P, A_Q, shape, mode) == pytest.approx(want)


def test_coupled_drafts_match_as_often_as_simulated():
  rng = np.random.default_rng(0)
  noise = rng.gumbel(size=(200_000, 4))
  same = np.mean((np.log(A_P) + noise).argmax(1)
                 == (np.log(A_Q) + noise).argmax(1))
  want = kept(acceptance.coupled, A_P, A_Q, tree.chain(1), IID)
  assert same == pytest.approx(want, abs=0.005)
  tv = 0.4
  assert (1 - tv) / (1 + tv) <= want <= 1 - tv


def test_end_tokens_and_limits_are_not_kept():
  it = walk(CHAIN_P, CHAIN_P, tree.chain(3), IID)
  assert kept(acceptance.rejection, CHAIN_P, CHAIN_P, tree.chain(3),
              IID) == pytest.approx(3)
  it._new, it._eos = 3, 2
  got = it.follow(lambda row, text: acceptance.rejection(it, row, text))
  # Depth 2 at most; 0.8 that a token is no end.
  assert got == pytest.approx(.8 + .8**2)
  assert acceptance.block(it) == pytest.approx(.8 + .8**2)


def test_g_test_is_uniform_under_the_law_and_finds_what_it_states():
  rng = np.random.default_rng(1)
  law = rng.dirichlet(np.full(60, 0.5))
  law[7] = 0.0
  law /= law.sum()
  p_values = [fit.g_test([Cells(rng.multinomial(4000, law), law)]).p_value
              for _ in range(600)]
  for level in (0.5, 0.1, 0.02):
    share = np.mean(np.less(p_values, level))
    assert share == pytest.approx(
        level, abs=5 * np.sqrt(level * (1 - level) / 600) + 0.2 * level)
  test = fit.g_test([Cells(rng.multinomial(4000, law), law)])
  distance = fit.detectable_tv(test.freedom, 4000, 1e-3, 0.99)
  other = law.copy()
  other[np.argmax(law)] -= distance  # cells that are never merged
  other[np.argsort(-law)[1]] += distance
  found = [fit.g_test([Cells(rng.multinomial(4000, other), law)]).p_value
           < 1e-3 for _ in range(300)]
  assert np.mean(found) > 0.98
  impossible = np.zeros(60)
  impossible[7] = 1
  assert fit.g_test([Cells(impossible, law)]).p_value == 0


def test_noise_bounds_the_plug_in_distance():
  rng = np.random.default_rng(2)
  law = rng.dirichlet(np.ones(200))
  seen = [[Cells(rng.multinomial(3000, law), law)] for _ in range(200)]
  above = [fit.total_variation(s) > fit.noise(s, 1e-3) for s in seen]
  assert not any(above)
  # A bound, and not a far one.
  assert np.mean([fit.total_variation(s) for s in seen]) > 0.5 * fit.noise(
      seen[0], 1e-3)


@pytest.mark.parametrize('setting', [
    Setting(), Setting(3), Setting(all_greedy=True), Setting(9)],
    ids=['4', '3', 'greedy', '9'])
def test_laws_of_texts(setting):
  laws, base = Laws(setting), setting.vocab_size + 1
  for kind, it in enumerate(setting.kinds):
    law = laws.texts(kind)
    assert law.sum() == pytest.approx(1)
    texts = np.stack(np.unravel_index(
        np.flatnonzero(law), (base,) * setting.length), axis=1)
    over = texts == setting.vocab_size
    assert (over.sum(axis=1) >= setting.length - it.new).all()
    assert (np.diff(over.astype(int), axis=1) >= 0).all()  # ends once
    ended = (texts == it.eos)[:, :-1] & ~over[:, 1:]
    assert not ended.any()
  with pytest.raises(ValueError, match='vocab_size=2'):
    Setting(2)


@dataclasses.dataclass(frozen=True)
class SlightlyWrong(Speculative):
  """Accepts 3 % more than it may, and says nothing of it."""

  def numerator(self, params, context, draft, scores, test):
    return test.p + 0.03


@pytest.fixture(scope='module')
def program():
  """A right rule and a wrong one, over one draft a round."""
  setting = Setting(filters=False)
  model = toys.ToyLM(setting.vocab_size)
  return sampled.Program(
      setting, model, ChainLM(1, model), (Speculative(), SlightlyWrong()),
      setting.models())


def test_a_right_rule_passes_with_its_acceptance(program):
  laws = Laws(program.setting)
  rates = acceptance.expected(laws, program.drafter, Speculative())
  bound = acceptance.bounds(laws, program.drafter)
  # With one draft it is the best rule; ends of texts are not kept.
  ends = np.array([it.eos >= 0 for it in program.setting.kinds])
  np.testing.assert_allclose(rates[~ends], bound[~ends], atol=1e-6)
  assert (rates[ends] < bound[ends] - 0.1).all()
  row = sampled.certify(program, 0, 'right', seed=0, batches=2,
                        expected=rates, bound=bound)
  assert row.passed and row.attempts == 1 and row.count == 2 * sampled.BATCH
  assert row.accepted == pytest.approx(row.expected, abs=0.02)
  wrong = sampled.certify(
      program, 0, 'other acceptance', seed=0, batches=2, expected=rates + 0.1)
  assert not wrong.passed and wrong.attempts == 2
  assert wrong.note == 'acceptance off' and wrong.p_value > 1e-4


def test_a_wrong_rule_fails_twice(program):
  row = sampled.certify(program, 1, 'wrong', seed=0, batches=4)
  assert not row.passed and row.attempts == 2
  assert row.count == 4 * sampled.MORE * sampled.BATCH
  assert row.p_value < sampled.SIZE_AGAIN


def test_rows_do_not_depend_on_which_are_made():
  assert sampled.row_seed('a', 0, 0) != sampled.row_seed('a', 0, 1)
  assert sampled.row_seed('a', 0, 0) != sampled.row_seed('b', 0, 0)


def test_made_ends_with_the_text():
  setting = Setting()
  context = toys.context([[1], [0, 2]], size=8)
  context = context.replace(length=context.length + np.array([2, 0]))
  made = setting_lib.made(setting, context)
  assert made.tolist() == [[0, 0, 4, 4], [4, 4, 4, 4]]


class Broken:
  """A job that makes one row and then breaks down."""

  needs_quiet = False
  names = ('fine', 'not fine')

  def run(self, names, seed, batches):
    yield jobs.Row('fine', 'sampled', True)
    raise RuntimeError('broken')


def test_a_job_that_raises_fails_its_rows_only():
  rows = jobs.run([Broken()])
  assert [(r.name, r.passed) for r in rows] == [
      ('fine', True), ('not fine', False)]
  assert rows[1].note == 'RuntimeError: broken'
  with pytest.raises(ValueError, match='no row'):
    jobs.run([Broken()], only='nothing')
