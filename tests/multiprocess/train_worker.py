"""One process of a distributed `train.drafter`; see `train_test.py`.

  python tests/multiprocess/train_worker.py INDEX COUNT PORT FLAGS...
"""

from __future__ import annotations

import sys


def main(index: int, count: int, port: int, arguments: list[str]) -> None:
  """Joins the other processes, then runs the program with its flags."""
  import jax
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 2 // count)
  if count > 1:
    jax.distributed.initialize(f'localhost:{port}', count, index)
  sys.argv = ['train.drafter', *arguments]
  from specjax.host import cli
  from train import drafter
  cli.run(drafter.main)


if __name__ == '__main__':
  main(*map(int, sys.argv[1:4]), sys.argv[4:])
