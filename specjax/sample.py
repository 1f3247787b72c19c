"""Decodes prompts: `python -m specjax.sample --config configs/quickstart.py`.

Streams the text of one prompt, decodes the rest beside it, and writes
`samples.jsonl` and `summary.json` to `--out`. With `config.compare_plain` the
same prompts are then decoded without drafts, and both are printed side by
side. With `config.online.enabled` a trained drafter learns as it goes
(`distill.online`); the texts follow the same law. With `config.images` there
are classes instead of prompts, and `samples.png` and `acceptance.png`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
from typing import Any

from absl import flags
import jax
from rich.console import Console
from rich.table import Table

import specjax
from specjax.data import builtin
from specjax.host import cli, image_sampling, methods
from specjax.host import online as online_lib
from specjax.host import rules as rules_lib
from specjax.host.requests import Result
from specjax.io import output
from specjax.io import prompts as prompts_io

_FLAGS = cli.define_flags('out/sample')
_SPECULATIVE = flags.DEFINE_string(
    'speculative_config', None,
    "vLLM's JSON, for instance '{\"method\": \"ngram\", "
    '"num_speculative_tokens": 7}\'; replaces config.speculative.')


def main() -> int:
  """Runs the program; returns the exit code."""
  config, quiet = _FLAGS.config.value, _FLAGS.quiet.value
  out = output.prepare(_FLAGS.out.value)
  options = cli.sampling(config.sampling)
  drafting = cli.speculative(config.speculative, _SPECULATIVE.value)
  learning = online_lib.settings(config.get('online'))
  pictures = None
  prompts = [] if 'images' in config else read_prompts(config, quiet)
  cli.start(_FLAGS.distributed.value)
  mesh = cli.mesh(config.mesh)
  if 'images' in config:
    target, prompts, pictures = image_sampling.prepare(config, mesh, quiet)
    options = dataclasses.replace(
        options, max_new_tokens=pictures.length, ignore_eos=True)
  else:
    target = cli.load_target(config, mesh, quiet)
  drafter, drafter_params = methods.build(
      drafting or {'method': 'null'}, target,
      cli.load_drafter(target, quiet))
  online = learning and online_lib.build(
      learning, drafter, drafter_params, target)
  rule, rule_params = rules_lib.build(
      config.verify, config.verify_options.to_dict(), target.vocab_size)

  # --- Decode ---------------------------------------------------------
  shared: dict[str, Any] = dict(
      batch_size=min(config.batch_size, len(prompts) * options.n),
      capacity=config.capacity, seed=config.seed, exact=config.exact)
  # All processes of a distributed run decode alike; one of them tells.
  is_first = jax.process_index() == 0
  quiet = quiet or not is_first
  shown = Shown(quiet or not config.stream)
  status = cli.StatusLine(quiet)
  with output.JsonLines(
      out / 'samples.jsonl' if is_first else None,
      outdated=[out / 'summary.json']) as file:
    results = specjax.generate(
        target, drafter, prompts, options, drafter_params=drafter_params,
        verify=rule, verifier_params=rule_params, online=online,
        on_text=shown.text, on_progress=status,
        on_result=lambda r: file.write(row(r)), **shared)
  status.clear()
  shown.end()
  summary = results.summary()
  if online:
    summary['online'] = online.summary()
  summary['config'] = config.to_dict()

  # --- Compare --------------------------------------------------------
  if config.compare_plain:
    if is_first:  # who has seen enough may press Ctrl-C now
      output.write_json(out / 'summary.json', summary)
    cli.note('decoding the same prompts without drafts ...', quiet)
    compare(summary, target, prompts, options, pictures,
            out if is_first else None, on_progress=status, **shared)
    status.clear()
  if is_first:
    output.write_json(out / 'summary.json', summary)
    if pictures is not None:
      pictures.draw(results.results, out)
  if not quiet:
    print_table(summary)
    cli.note(f'wrote {out}/samples.jsonl and {out}/summary.json')
  return 0


def compare(
    summary: dict[str, Any], target: Any, prompts: list[Any], options: Any,
    pictures: Any, out: pathlib.Path | None, **shared: Any,
) -> None:
  """Decodes without drafts, and by a model's own cheaper ways.

  Puts 'plain', 'speedup' and 'rivals' into `summary`; draws what rivals make
  into folders in `out`.
  """
  own, drafter = pictures.plain(target) if pictures else (target, None)
  plain = specjax.generate(own, drafter, prompts, options, **shared)
  summary['plain'] = plain.summary()
  summary['speedup'] = (
      summary['tokens_per_s'] / summary['plain']['tokens_per_s'])
  rivals = pictures.rivals(target) if pictures else {}
  for name, (other, drafter) in rivals.items():
    found = specjax.generate(other, drafter, prompts, options, **shared)
    summary.setdefault('rivals', {})[name] = found.summary()
    if out is not None:
      pictures.draw(found.results, out / re.sub(r'\W+', '_', name))


def read_prompts(config, quiet: bool) -> list[Any]:
  """Returns the prompts of a file, or the built-in ones."""
  if config.prompts is None:
    return list(builtin.QUICKSTART)
  return prompts_io.read(
      config.prompts, keep_going=_FLAGS.keep_going.value,
      on_error=lambda message: cli.note(f'skipped: {message}', quiet))


def row(result: Result) -> dict[str, Any]:
  """Returns a line of `samples.jsonl`."""
  request = result.request
  line = {
      'id': request.id, 'sample': request.stream, 'turn': request.turn,
      'text': result.text, 'finish_reason': result.finish_reason,
      'num_prompt_tokens': len(request.tokens),
      'num_new_tokens': len(result.tokens), 'num_rounds': result.rounds,
      'tokens': list(result.tokens)}
  if result.log_probs is not None:
    line['log_probs'] = {
        name: [float(x) for x in values]
        for name, values in result.log_probs.items()}
  return line


class Shown:
  """Streams the text of the first request on stdout."""

  def __init__(self, off: bool):
    self._off, self._any = off, False
    self._id: tuple[str, int] | None = None

  def text(self, request, piece: str) -> None:
    """Prints a piece if it is the shown request's; a `generate` hook."""
    if self._id is None:
      self._id = (request.id, request.stream)
    if self._off or self._id != (request.id, request.stream):
      return
    if sys.stderr.isatty():  # the status line stands where the text goes on
      sys.stderr.write('\r\x1b[2K')
      sys.stderr.flush()
    if not self._any:
      print(f'--- {request.id} ---')
    print(piece, end='', flush=True)
    self._any = True

  def end(self) -> None:
    """Ends the text."""
    if self._any:
      print('\n---', flush=True)


def print_table(summary: dict[str, Any]) -> None:
  """Prints speculative and plain decoding side by side."""
  table = Table(title=f"{summary['target']} on {summary['device']}")
  for name in ('', 'tokens/s', 'tokens/round', 'rounds', 'new tokens',
               'compile s'):
    # Names of drafters hold no space to break at.
    table.add_column(name, justify='right' if name else 'left',
                     overflow='fold')
  rows = [(f"{summary['drafter']}, {summary['verify']}", summary)]
  if 'plain' in summary:
    rows += [('plain', summary['plain']), *summary.get('rivals', {}).items()]
  for name, one in rows:
    table.add_row(
        name, f"{one['tokens_per_s']:.1f}",
        f"{one['mean_acceptance_length']:.2f}", str(one['num_rounds']),
        str(one['new_tokens']), f"{one['compile_s']:.1f}")
  console = Console()
  console.print(table)
  if 'scoring' in summary:
    console.print(f"drafts are scored by {summary['scoring']}")
  if 'speedup' in summary:
    console.print(f"speed-up {summary['speedup']:.2f}x")
  if 'online' in summary:
    one = summary['online']
    console.print(
        f"online adaptation: {one['updates']} updates in "
        f"{one['seconds']:.1f} s, {one['skipped']} skipped")
    if not one['updates'] + one['skipped']:
      console.print('(an update takes config.online.every requests, and '
                    'rejected drafts within their first config.online.length '
                    'tokens)')
  if summary['gave_up']:
    console.print(f"residuals capped in {summary['gave_up']:.2%} of rounds")
  if summary['lossy']:
    console.print(f"lossy rule: one-step TV {summary['one_step_tv']:.4f}")


if __name__ == '__main__':
  cli.run(main)
