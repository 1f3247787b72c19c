"""Two processes of four devices decode what one process of eight does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).with_name('worker.py')


def start(tmp_path, index: int, count: int, port: int):
  environment = {**os.environ, 'PYTHONPATH': str(WORKER.parents[2])}
  environment.pop('JAX_NUM_CPU_DEVICES', None)
  return subprocess.Popen(
      [sys.executable, WORKER, str(index), str(count), str(port),
       tmp_path / f'{count}-{index}.json'],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      text=True)


def finish(processes) -> None:
  """Waits for all; a process that hangs or fails takes the others along."""
  try:
    for process in processes:
      said, _ = process.communicate(timeout=300)
      assert process.returncode == 0, said[-3000:]
  finally:
    for process in processes:
      process.kill()


@pytest.mark.multiprocess
def test_two_processes_say_what_one_says(tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  finish([start(tmp_path, i, 2, port) for i in range(2)])
  finish([start(tmp_path, 0, 1, port)])
  one, first, second = (
      json.loads((tmp_path / name).read_text())
      for name in ('1-0.json', '2-0.json', '2-1.json'))
  assert first == second
  # The same devices in the same mesh: also the bits of the scores.
  assert one == first
  assert {row['reason'] for row in one[:-1]} >= {'stop', 'length'}
