"""One process of a distributed `generate`; see `two_process_test.py`.

  python tests/multiprocess/worker.py INDEX COUNT PORT OUT

With COUNT 1 the same run in a single process of eight devices.
"""

from __future__ import annotations

import json
import pathlib
import sys


def main(index: int, count: int, port: int, out: pathlib.Path) -> None:
  """Decodes more requests than slots and writes what came of them."""
  import jax
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8 // count)
  if count > 1:
    jax.distributed.initialize(f'localhost:{port}', count, index)
  import specjax
  from specjax.drafters import Lookup
  from specjax.host import tiny
  from specjax.parallel import make_mesh

  assert jax.device_count() == 8 and jax.process_count() == count
  mesh = make_mesh((8, 1))
  model = tiny.model(mesh=mesh, num_layers=1)
  prompts = [f'say {"ab" * i}' for i in range(11)]
  prompts.append(specjax.Prompt(id='talk', turns=('hi', 'and?')))
  options = [
      specjax.Sampling(max_new_tokens=3 + i, temperature=0.8 * (i % 2),
                       seed=i, stop=('bb', 'q'), log_probs=True)
      for i in range(12)]
  pieces: list[str] = []
  results = specjax.generate(
      model, Lookup(3), prompts, options, batch_size=8, capacity=128,
      rounds_per_chunk=4, on_text=lambda request, piece: pieces.append(piece))
  rows = [{'id': r.request.id, 'tokens': list(r.tokens), 'text': r.text,
           'reason': r.finish_reason, 'rounds': r.rounds,
           'raw': [x.hex() for x in r.log_probs['raw'].tolist()]}
          for r in results]
  summary = results.summary()
  rows.append({'pieces': pieces, 'rounds': summary['num_rounds'],
               'share': summary['useful_row_share']})
  out.write_text(json.dumps(rows))


if __name__ == '__main__':
  main(*map(int, sys.argv[1:4]), pathlib.Path(sys.argv[4]))
