"""`specjax.generate` on a toy whose texts can be computed by hand.

All runs of a kind share a program: the same slots, capacity and stages (an
anchor request at the end uses every stage), whatever the other requests ask.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import toy_text

from specjax import Prompt, Sampling, generate
from specjax import verify as rules
from specjax.certificates import reference as numpy_law
from specjax.core import control
from specjax.core.automaton import Automaton
from specjax.drafters import Adaptive, ChainLM, Lookup, Null
from specjax.host.generate import choose_rule, describe

MODEL = toy_text.model()
TEXT = MODEL.tokenizer
END = toy_text.END
LOOKUP = Lookup(3)
ANCHOR = Sampling(
    temperature=1.0, top_p=0.9, repetition_penalty=1.1, min_new_tokens=1,
    logit_bias={3: 0.5}, log_probs=True, max_new_tokens=2)


def run(prompts, samplings, drafter=LOOKUP, model=MODEL, **kwargs):
  """Returns the results without the anchor's."""
  if isinstance(samplings, Sampling):
    samplings = [samplings] * len(prompts)
  kwargs = {'batch_size': 4, 'capacity': 160, **kwargs}
  return list(generate(
      model, drafter, [*prompts, 'anchor'], [*samplings, ANCHOR],
      **kwargs))[:-1]


def sampled(**kwargs) -> Sampling:
  return Sampling(**{'temperature': 1.0, 'max_new_tokens': 12, **kwargs})


def echo(start: str, num: int = 24) -> tuple[str, str]:
  """Returns a prompt that lookup copies well, and what greedy answers."""
  ids = TEXT.encode(start)
  answer = TEXT.decode(toy_text.greedy(MODEL, ids, num))
  return start + answer + start, answer


def test_every_kind_of_prompt():
  chat = [{'role': 'user', 'content': 'abc'}]
  turns = Prompt(id='two', turns=('hi', 'and?', 'so?'))
  results = run(
      ['abc', chat, [7, 8, 9], np.asarray([7, 8, 9]), turns,
       Prompt(id='text', text='abc'), Prompt(id='chat', messages=chat)],
      Sampling(max_new_tokens=6))
  for r in results:
    want = toy_text.greedy(MODEL, r.request.tokens, 6)
    assert list(r.tokens) == want and r.text == TEXT.decode(want)
    assert r.finish_reason == 'length' and 0 < r.ttft_s <= r.wall_s
  asked = [TEXT.decode(r.request.tokens, skip_special=False)
           for r in results]
  assert asked[:2] == ['abc', '<|user|>abc\n<|assistant|>']
  assert results[2].tokens == results[3].tokens
  assert [r.request.id for r in results] == [
      '0', '1', '2', '3', 'two', 'two.1', 'two.2', 'text', 'chat']
  assert [r.request.turn for r in results[4:7]] == [0, 1, 2]
  said = ''
  for user, r in zip(turns.turns, results[4:7]):
    said += f'<|user|>{user}\n<|assistant|>'
    assert TEXT.decode(r.request.tokens) == said
    said += f'{r.text}\n'
  assert results[7].tokens == results[0].tokens
  assert results[8].tokens == results[1].tokens


def test_samples_of_a_prompt_and_their_order():
  results = run(['ab', 'cd'], [sampled(n=3, seed=5), sampled(seed=5)])
  assert [(r.request.prompt_index, r.request.stream) for r in results] == [
      (0, 0), (0, 1), (0, 2), (1, 0)]
  assert len({r.text for r in results[:3]}) == 3
  alone, = run(['ab'], sampled(seed=5))
  assert alone.text == results[0].text


def test_a_seed_gives_one_text_in_any_company():
  prompts = ['ab', 'cd', 'ab', 'a much longer prompt', 'ab', 'x', 'cd']
  seeds = [1, 4, 2, 3, 1, 2**63 - 1, 2**63 - 2]
  options = [sampled(seed=s, max_new_tokens=8 + s % 7) for s in seeds]
  first = [r.tokens for r in run(prompts, options)]
  backwards = run(prompts[::-1], options[::-1], seed=9)
  assert [r.tokens for r in backwards[::-1]] == first
  two = run(prompts, options, batch_size=2, rounds_per_chunk=3)
  assert [r.tokens for r in two] == first
  assert first[0] == first[4] and first[0] != first[2]
  assert len(set(first)) == 6


def test_the_seed_of_a_run_and_the_turn_of_a_dialogue_change_the_noise():
  texts = [[r.tokens for r in run(['ab', 'ab'], sampled(), seed=s)]
           for s in (0, 0, 1)]
  assert texts[0] == texts[1]
  assert len({*texts[0], *texts[2]}) == 4
  # One next-token law for all contexts: equal noise would give equal texts.
  flat = {k: jnp.zeros_like(v).at[:, 94:].set(-30.0)
          for k, v in MODEL.params.items()}
  same = dataclasses.replace(MODEL, params=flat)
  turns = [Prompt(id='a', turns=('x', 'y'))]
  small = ChainLM(num_speculative_tokens=3, model=MODEL.lm)
  a, b = run(turns, sampled(), small, same, drafter_params=flat,
             verify='speculative')
  assert a.tokens != b.tokens


MIXED = [
    Sampling(max_new_tokens=20), sampled(seed=3), sampled(top_p=0.5),
    sampled(temperature=0.3, repetition_penalty=1.5),
    sampled(max_new_tokens=1), sampled(allowed_ids=(5, 6, 7)),
    sampled(temperature=2.0, banned_ids=tuple(range(40))),
    sampled(logit_bias={9: 40.0}), sampled(logit_bias={9: -np.inf}),
    Sampling(repetition_penalty=3.0, max_new_tokens=12),
    sampled(temperature=3.0, allowed_ids=(1, 2, END), min_new_tokens=9)]
PROMPTS = [echo(start + '+')[0] for start in 'abcdefghijk']


@pytest.fixture(scope='module', name='mixed')
def _mixed():
  options = [dataclasses.replace(s, log_probs=True) for s in MIXED]
  return run(PROMPTS, options)


def test_log_probs_are_those_of_the_model_and_of_the_law(mixed):
  for r in mixed:
    s, prompt = r.request.sampling, r.request.tokens
    bias = np.zeros(toy_text.VOCAB)
    if s.allowed_ids:
      bias[:] = -np.inf
      bias[list(s.allowed_ids)] = 0
    bias[list(s.banned_ids)] = -np.inf
    for token, value in (s.logit_bias or {}).items():
      bias[token] += value
    logits = toy_text.raw_logits(MODEL, [*prompt, *r.tokens])
    for i, token in enumerate(r.tokens):
      row = logits[len(prompt) + i - 1]
      law = numpy_law.law(
          row, prompt, r.tokens[:i], bias=bias, eos=(END,),
          temperature=s.temperature, top_p=s.top_p,
          repetition_penalty=s.repetition_penalty, min_new=s.min_new_tokens)
      raw = np.log(numpy_law.softmax(row.astype(np.float64)))[token]
      # f32 sums of 257 terms.
      np.testing.assert_allclose(r.log_probs['raw'][i], raw, atol=1e-4)
      np.testing.assert_allclose(
          r.log_probs['processed'][i], np.log(law[token]), atol=1e-4)


def test_every_row_keeps_to_its_own_options(mixed):
  texts = [set(r.tokens) for r in mixed]
  assert list(mixed[0].tokens) == toy_text.greedy(
      MODEL, mixed[0].request.tokens, 20)
  assert mixed[0].rounds < 12  # copied
  assert len(mixed[4].tokens) == 1
  assert texts[5] <= {5, 6, 7} and not texts[6] & set(range(40))
  assert texts[7] == {9} and 9 not in texts[8]
  assert len(mixed[9].tokens) == len(texts[9])  # never says a thing twice
  ends = [i for i, t in enumerate(mixed[10].tokens) if t == END]
  assert ends in ([], [len(mixed[10].tokens) - 1])
  assert not ends or ends[0] >= 9
  for r in mixed:
    s = r.request.sampling
    assert r.finish_reason == ('eos' if END in r.tokens else 'length')
    assert s.min_new_tokens <= len(r.tokens) <= s.max_new_tokens
    assert r.histogram.sum() == r.rounds


@pytest.mark.parametrize('drafter', [
    None, {'method': 'ngram', 'num_speculative_tokens': 5, 'prefer': 'oldest',
           'draft_len_schedule': 'heuristic'}, toy_text.model(1), {
               'num_speculative_tokens': 4, 'draft_len_schedule': 'shared',
               'widths': [0, 2], 'round_costs': [1.05, 1.2]}],
    ids=['plain', 'lookup', 'model', 'one length'])
def test_greedy_and_matched_texts_do_not_depend_on_the_drafter(
    mixed, drafter):
  again = run(PROMPTS, MIXED, drafter, verify='match')
  for one, other in zip(mixed, again):
    assert one.tokens == other.tokens and one.text == other.text


def test_a_model_drafts_and_block_verification_is_chosen():
  drafter = toy_text.model(1)
  results = generate(MODEL, drafter, ['ab'], sampled(max_new_tokens=4))
  assert results.description['verify'] == 'block'
  assert results.description['drafter'] == 'ChainLM(K=5)'
  assert len(results.texts) == len(results) == 1
  assert results[0].drafted.tolist() == [results[0].rounds] * 5


def test_end_tokens_stop_a_row_inside_a_block():
  prompt, answer = echo('ab')
  where = answer.index(answer[6])
  last = TEXT.encode(answer[6])[0]
  table = {**MODEL.params,
           'now': MODEL.params['now'].at[last, END].set(90.0)}
  ends = dataclasses.replace(MODEL, params=table)
  options = [Sampling(), Sampling(ignore_eos=True, max_new_tokens=30),
             Sampling(min_new_tokens=where + 9)]
  plain, through, later = run([prompt] * 3, options, model=ends)
  assert plain.text == answer[:where + 1] and plain.tokens[-1] == END
  assert plain.finish_reason == 'eos' and plain.tokens.count(END) == 1
  assert plain.rounds < len(plain.tokens)  # some of it was accepted
  assert plain.accepted.sum() + plain.rounds >= len(plain.tokens)
  assert len(through.tokens) == 30 and END in through.tokens[:-1]
  assert through.finish_reason == 'length'
  assert END not in later.tokens[:where + 9]


def test_stop_strings_cut_wherever_the_blocks_end():
  prompt, answer = echo('ab')
  options = [Sampling(max_new_tokens=24, stop=(answer[i:i + 3], 'zzz'))
             for i in range(12)]
  pieces = {}
  def on_text(request, piece):
    pieces.setdefault(request.prompt_index, []).append(piece)
  for each in (1, 16):
    pieces.clear()
    results = run([prompt] * 12, options, rounds_per_chunk=each,
                  on_text=on_text)
    for i, r in enumerate(results):
      at = answer.index(answer[i:i + 3])
      assert r.text == answer[:at] == ''.join(pieces.get(i, []))
      assert TEXT.decode(r.tokens) == answer[:at + 3]
      assert r.finish_reason == 'stop'


def test_a_constraint_starts_afresh_with_every_request():
  odd = np.arange(toy_text.VOCAB) % 2 == 1
  table = np.where([odd, ~odd], [[1], [0]], -1)[None].astype(np.int32)
  rows = jnp.zeros((2,), jnp.int32)
  results = generate(
      MODEL, Lookup(3), ['ab', echo('cd')[0], 'ef', 'gh', 'ij'],
      sampled(temperature=0.7), batch_size=2,
      constraint=Automaton(jnp.asarray(table), rows, rows))
  for r in results:
    assert (np.asarray(r.tokens) % 2).tolist() == [1, 0] * 6


def test_each_request_has_its_own_constraint():
  """Also behind refills, where slots change hands."""
  odd = np.arange(toy_text.VOCAB) % 2 == 1
  table = np.stack([np.where(odd, 0, -1), np.where(odd, -1, 0)])[:, None]
  table = jnp.asarray(table.astype(np.int32))

  def constraint(slots):
    which = [int(r.id) % 2 if r else 0 for r in slots]
    rows = jnp.asarray(which, jnp.int32)
    return Automaton(table, rows, jnp.zeros_like(rows))

  results = generate(
      MODEL, Lookup(3), ['ab', 'cd', 'ef', 'gh'], sampled(temperature=0.7),
      batch_size=2, constraint=constraint)
  for i, r in enumerate(results):
    assert set(np.asarray(r.tokens) % 2) == {1 - i % 2}


class Own(rules.Rule):
  """Somebody's rule."""

  name = 'own'


def test_describe_and_choose_rule():
  greedy, some = Sampling(), sampled()
  small = ChainLM(num_speculative_tokens=3, model=MODEL.lm)
  nested = Adaptive(Lookup(7), control.Heuristic())
  assert describe(Null(2)) == 'Null(K=2)'
  assert describe(nested) == 'Adaptive(Lookup(K=7), Heuristic)'
  for drafter, options, want in (
      (small, [greedy], 'greedy'), (small, [greedy, some], 'block'),
      (Lookup(3), [some], 'match'), (Null(0), [some], 'match')):
    assert choose_rule('auto', drafter, options).name == want
  assert choose_rule('block', small, [greedy]).name == 'greedy'
  assert choose_rule('speculative', Lookup(3), [some]).name == 'speculative'
  own = Own()
  assert choose_rule(own, small, [some]) is own
  assert choose_rule(own, small, [greedy]) is own  # may be of another kind
  with pytest.raises(ValueError, match='temperature 0 only'):
    choose_rule('greedy', small, [greedy, some])
  with pytest.raises(ValueError, match="'block' needs .*iid.*makes point"):
    choose_rule('block', Lookup(3), [some])
  with pytest.raises(ValueError, match="'typo'.*block, .*greedy, .*match"):
    choose_rule('typo', small, [some])
