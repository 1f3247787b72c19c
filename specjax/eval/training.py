"""Figures of a training run; each takes rows of its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import PercentFormatter

from specjax.eval.plots import COLOURS, MARKERS, finish, new_figure

Rows = Sequence[Mapping[str, Any]]


def draw(train: Rows, tests: Rows, folder: Path, title: str) -> list[Path]:
  """Draws all figures that there are rows for; returns their paths.

  Args:
    train: rows with `step`, `loss`, and `acceptance` by position.
    tests: rows with `step`, `minutes`, `tau`, `conditional` and `held_out`.
    folder: where PNG files go. title: first line, says of what.
  """
  made = []
  for name, draw_one, rows in (
      ('tau.png', tau, tests), ('loss.png', loss, train),
      ('acceptance.png', acceptance, train), ('gap.png', gap, tests)):
    if rows:
      draw_one(rows, folder / name, title)
      made.append(folder / name)
  return made


def tau(rows: Rows, path: Path, title: str) -> None:
  """Draws tokens a round, measured by the decoder, against minutes."""
  figure, axes = new_figure(6.5)
  axes.plot([r['minutes'] for r in rows], [r['tau'] for r in rows], 'o-',
            color=COLOURS[0])
  axes.set_xlabel('training (minutes, tests left out)')
  axes.set_ylabel('tokens a round, τ')
  finish(figure, axes, f'{title}\nτ on held-out prompts, greedy', path)


def loss(rows: Rows, path: Path, title: str) -> None:
  """Draws the training loss against steps."""
  figure, axes = new_figure(6.5)
  shown = [r for r in rows if 'loss' in r]
  axes.plot([r['step'] for r in shown], [r['loss'] for r in shown],
            color=COLOURS[0])
  axes.set_xlabel('step')
  axes.set_ylabel('loss')
  finish(figure, axes, f'{title}\nTraining loss (its mixture may change on '
          'the way)', path)


def acceptance(rows: Rows, path: Path, title: str) -> None:
  """Draws teacher-forced acceptance by position against steps."""
  shown = [r for r in rows if 'acceptance' in r]
  figure, axes = new_figure(6.5)
  for place in range(len(shown[0]['acceptance']) if shown else 0):
    axes.plot([r['step'] for r in shown],
              [r['acceptance'][place] for r in shown],
              color=COLOURS[place % len(COLOURS)],
              linestyle='-' if place < len(COLOURS) else '--',
              label=f'position {place + 1}')
  axes.yaxis.set_major_formatter(PercentFormatter(1.0))
  axes.set_xlabel('step')
  axes.set_ylabel('Σ min(p, q) (%)')
  finish(figure, axes, f"{title}\nAcceptance by position in training, after "
          "the text's own tokens", path)


def gap(rows: Rows, path: Path, title: str) -> None:
  """Draws the last test: what training promises, what decoding accepts."""
  last = rows[-1]
  figure, axes = new_figure(6.5)
  for number, (label, values) in enumerate((
      ('decoder: accepted, given those before', last['conditional']),
      ("teacher-forced: equal argmax, after the text's own tokens",
       last['held_out']['match']))):
    axes.plot(range(1, len(values) + 1), values, '-',
              marker=MARKERS[number], color=COLOURS[number], label=label)
  axes.set_ylim(0, 1.02)
  axes.yaxis.set_major_formatter(PercentFormatter(1.0))
  axes.set_xticks(range(1, len(last['conditional']) + 1))
  axes.set_xlabel('position in the draft (tokens)')
  axes.set_ylabel('accepted (%)')
  finish(figure, axes, f'{title}\nHeld-out text in training and in '
          f'decoding, step {last["step"]}', path)
