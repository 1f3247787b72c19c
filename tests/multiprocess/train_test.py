"""Two processes train one drafter, and stop when one of them is told to."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).with_name('train_worker.py')
ROOT = WORKER.parents[2]
FLAGS = ('--config', 'configs/drafter_smollm2.py:tiny',
         '--config.mesh=(2, 1)', '--config.eval_every=1000',
         '--config.save_every=1000', '--config.save.form=float32')


def start(out, count: int, *flags: str) -> list[subprocess.Popen]:
  """Starts all processes of a run."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  environment.pop('JAX_NUM_CPU_DEVICES', None)
  return [subprocess.Popen(
      [sys.executable, WORKER, str(i), str(count), str(port), *FLAGS,
       '--out', out, *flags], cwd=ROOT, env=environment,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
          for i in range(count)]


def finish(processes) -> list[int]:
  """Returns exit codes and prints what was said; nothing is left running."""
  try:
    for process in processes:
      print(process.communicate(timeout=300)[0][-3000:])
    return [process.returncode for process in processes]
  finally:
    for process in processes:
      process.kill()


@pytest.mark.multiprocess
def test_a_signal_to_one_process_stops_both(tmp_path):
  """They save one state; the run goes on to what one process trains."""
  parts, whole = tmp_path / 'parts', tmp_path / 'whole'
  processes = start(parts, 2, '--config.steps=300')
  for line in processes[0].stdout:
    if line.startswith('step ') and '/300' in line:
      break
  processes[1].send_signal(signal.SIGTERM)
  assert finish(processes) == [128 + signal.SIGTERM] * 2
  [stopped] = [int(p.name) for p in (parts / 'checkpoints').iterdir()]
  assert 0 < stopped < 300 and not (parts / 'drafter').exists()
  assert finish(start(parts, 2, '--config.steps=300')) == [0, 0]
  assert finish(start(whole, 1, '--config.steps=300')) == [0]
  for folder in (parts, whole):
    kept = sorted(p.name for p in (folder / 'checkpoints').iterdir())
    assert kept[-1] == '00000300'
  one, two = (eval_rows(folder)[-1] for folder in (whole, parts))
  assert one['tau'] == two['tau'] and one['rounds'] == two['rounds']
  assert one['held_out']['loss'] == pytest.approx(
      two['held_out']['loss'], rel=1e-4)


def eval_rows(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [r for r in map(json.loads, lines) if r['kind'] == 'eval']
