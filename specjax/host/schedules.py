"""How many tokens a round drafts: schedules of a speculative configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specjax.core import control
from specjax.drafters import Adaptive, ChainLM

_SCHEDULES = ('constant', 'heuristic', 'confidence', 'tracking', 'shared')


def scheduled(drafter: Any, config: Mapping[str, Any]) -> Any:
  """Returns a drafter whose length follows the schedule that is asked for.

  It is `drafter` itself where that is 'constant', or nothing is drafted.

  Args:
    drafter: of as many tokens as a round may draft.
    config: a speculative configuration; its keys are those of
      `methods.build`: 'draft_len_schedule', 'draft_cost', 'round_costs',
      'widths', 'exact_shape'.

  Raises:
    ValueError: an unknown schedule, or values that it cannot have.
  """
  schedule = config.get('draft_len_schedule', 'constant')
  if schedule not in _SCHEDULES:
    raise ValueError(f'draft_len_schedule={schedule!r}: known are '
                     f"{', '.join(_SCHEDULES)}")
  if 'round_costs' in config and schedule != 'shared':
    raise ValueError("'round_costs' goes with draft_len_schedule='shared'")
  if schedule == 'constant' or drafter.topology.num_nodes == 0:
    return drafter
  if schedule == 'confidence' and not isinstance(drafter, ChainLM):
    raise ValueError(
        "draft_len_schedule='confidence' needs a drafter that reports its "
        "probabilities ('draft_model'); use 'heuristic' or 'tracking'")
  exact = config.get('exact_shape', True)
  if not exact and isinstance(drafter, ChainLM):
    drafter = drafter.resyncing()
  num = drafter.topology.num_nodes
  widths = tuple(config.get('widths') or {0, 1, num // 2} - {num})
  if not all(isinstance(w, int) for w in widths):
    raise ValueError(f'widths={list(widths)}: must be integers')
  return Adaptive(drafter, _controller(schedule, config, {*widths, num}),
                  exact_shape=exact, widths=widths)


def _controller(
    schedule: str, config: Mapping[str, Any], widths: set[int]
) -> Any:
  """Returns the controller of a schedule that is not 'constant'."""
  cost = config.get('draft_cost', 0.0)
  if cost < 0:
    raise ValueError(f'draft_cost={cost}: must be >= 0')
  costs = config.get('round_costs', ())
  drafting = sorted(widths - {0})
  if costs and (len(costs) != len(drafting) or not all(
      isinstance(c, (int, float)) and c > 0 for c in costs)):
    raise ValueError(f'round_costs={list(costs)}: must be numbers > 0, one '
                     f'for each of the widths {drafting}')
  if not costs:  # a straight line, at the widths that are compiled
    costs = [control.Shared.verify_cost + cost * w for w in drafting]
  controllers: dict[str, Any] = {
      'heuristic': control.Heuristic(), 'confidence': control.Confidence(),
      'tracking': control.Tracking(draft_cost=cost),
      'shared': control.Shared(
          draft_cost=cost, costs=tuple(zip(drafting, costs, strict=False)))}
  return controllers[schedule]
